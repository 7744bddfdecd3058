"""train_cc/run/states.py: moments that come back, and the average."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests import ROOT
from tests.conftest import run_cold_start
from tests.run.test_resume import units
from train_cc.io.errors import InputError
from train_cc.run import states


def moments_of(model) -> dict:
    return {
        name: {"step": torch.tensor(2.0), "exp_avg": torch.full_like(p, 3), "exp_avg_sq": torch.ones_like(p)}
        for name, p in model.state_dict().items()
    }


@pytest.mark.parametrize("state", [None, {}, {1: 2}, "all and another"])
def test_moments_of_other_parameters_are_refused(state):
    model = torch.nn.Linear(4, 4)
    state = moments_of(model) | {"other": {}} if isinstance(state, str) else state
    with pytest.raises(InputError, match="optimizer"):
        states.restore_optimizer(model, torch.optim.AdamW(model.parameters(), fused=True), state, "optimizer.pt")


RESIDENT = """
import ctypes, gc, re, sys
from pathlib import Path
import torch
from train_cc.io.read import read_torch
from train_cc.run import states

def status(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(8)])
optimizer, before_it = (torch.optim.AdamW(model.parameters(), fused=True) for _ in range(2))
# Once before: what the libraries load at their first use is not counted.
states.restore_optimizer(model, before_it, read_torch(Path(sys.argv[1]), "moments"), "optimizer.pt")
del before_it
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
states.restore_optimizer(model, optimizer, read_torch(Path(sys.argv[1]), "moments"), "optimizer.pt")
print(status("VmHWM") - before)
assert all(torch.equal(state["exp_avg"], torch.full_like(p, 3)) for p, state in optimizer.state.items())
"""


def test_resuming_holds_the_moments_and_the_mapped_file_and_no_more(tmp_path):
    """Both are of one size: two of it, less than half of a third."""
    file = tmp_path / "optimizer.pt"
    torch.save(moments_of(torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(8)])), file)
    done = subprocess.run([sys.executable, "-c", RESIDENT, str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert file.stat().st_size < int(done.stdout) < 2.4 * file.stat().st_size


def test_the_average_warms_up_and_counts(teacher, tmp_path):
    """docs/method.md: ema <- d ema + (1 - d) w with d = min(decay, (1 + n) / (10 + n)) at the n-th update."""
    assert [states.decay_at(n, 0.9999) for n in (1, 2, 90)] == [2 / 11, 3 / 12, 91 / 100]
    assert states.decay_at(10**6, 0.9) == 0.9
    more = ("--num-previews", 0, "--ratio-update", 1, "--ema-decay", 0.9999)
    run = run_cold_start(teacher, tmp_path / "run", *more)
    average = load_file(teacher / "diffusion_pytorch_model.safetensors")
    for n in (1, 2, 3):
        folder = run / "checkpoints" / "accelerator_1" / f"step-{n}"
        weights, ema = load_file(folder / "generator.safetensors"), load_file(folder / "ema.safetensors")
        d = (1 + n) / (10 + n)
        for name in ema:
            average[name] = d * average[name] + (1 - d) * weights[name]
            torch.testing.assert_close(ema[name], average[name], rtol=1e-5, atol=1e-7)
        assert max((ema[name] - weights[name]).abs().max() for name in ema) > 1e-5
        assert torch.load(units(run, n), weights_only=True)["ema_updates"] == n
