"""The peak that `--dry-run` tells against what a real process on a CPU allocates beyond its libraries.

This file is also the program that is measured: `python -m tests.planning.test_dry_run_memory SIZE BATCH`, one thread.
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.conftest import RandomNetworks
from train_cc import cold_start

# Each tensor of a page and more in pages of its own, given back when it is freed: else freed memory counts as held.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_MMAP_MAX_": "10000000", "MALLOC_ARENA_MAX": "1"}


def arguments(size: str, batch: int):
    words = ["--teacher", size, "--output-dir", "-", "--vae", "stabilityai/sd-vae-ft-ema", "--mixed-precision", "no"]
    words += ["--batch-size", str(batch), "--num-previews", "0", "--ratio-update", "1"]
    return cold_start.stage_parser().parse_args(words)


def resident(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure(size: str, batch: int) -> int:
    """-> the peak of a second cycle, less what the process held after cycles of a small run."""
    from train_cc.distillation.loop import cycle
    from train_cc.models.sit import SIT_SIZES
    from train_cc.run.session import open_session
    from train_cc.setup.build import build

    def two_cycles(config: dict, batch: int) -> None:
        session = open_session("no")
        run = build(arguments(size, batch), session, RandomNetworks(session, config))
        cycle(run, 0)
        tidy()
        cycle(run, 1)

    two_cycles(SIT_SIZES["SiT-S/8"] | {"depth": 2, "hidden_size": 96}, 1)
    before = tidy()
    two_cycles(SIT_SIZES[size], batch)
    return resident("VmHWM") - before


def tidy() -> int:
    """Forget the peak so far. -> bytes that are resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


@pytest.mark.slow
@pytest.mark.parametrize("size,batch", [("SiT-B/2", 8), ("SiT-XL/2", 1)])
def test_the_simulated_peak_is_that_of_a_real_run(size, batch):
    from train_cc.planning.memory import GIB, simulate

    environment = os.environ | MALLOC | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.planning.test_dry_run_memory", size, str(batch)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    cost = simulate(arguments(size, batch), "no", 1)
    simulated = max(value for name, value in cost.peaks.items() if name.startswith("training"))
    print(f"\n{size}, batch {batch}: simulated {simulated / GIB:.2f} GiB, measured {measured / GIB:.2f} GiB")
    assert simulated == pytest.approx(measured, rel=0.05)


if __name__ == "__main__":
    print(measure(sys.argv[1], int(sys.argv[2])))
