"""SiT-XL/2 at full size, from files in the official layouts to images, on a CPU: the launchers as a user types them.

`python -m pytest -m slow -s tests/slow/test_full_size.py` takes 6 minutes and 20 GB, and prints time and peak memory.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.standins import write_dinov2, write_vae
from tests import ROOT
from tests.releases import repa_state
from train_cc.models import SiT


def run(told: list, name: str, command: list, **variables: object) -> str:
    """Run to the end, remember seconds and the largest peak memory of its processes."""
    environment = os.environ | {key: str(value) for key, value in variables.items()}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["VIRTUAL_ENV"] = str(Path(sys.executable).parents[1])
    measured = ["/usr/bin/env", "python", "-c", MEASURE, *map(str, command)]
    began = time.monotonic()
    done = subprocess.run(measured, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
    peak = int(done.stdout.rsplit("peak ", 1)[1]) / 2**20
    told.append(f"| {name} | {time.monotonic() - began:.0f} s | {peak:.1f} GiB |")
    print(told[-1], flush=True)
    return done.stdout + done.stderr


MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.slow
def test_the_whole_path_at_full_size(tmp_path):
    told = ["", "| step | time | peak memory |", "|---|---|---|"]
    torch.save(repa_state(spread=0.02), tmp_path / "last.pt")
    vae = write_vae(tmp_path / "vae", channels=(128, 256, 512, 512), groups=32)
    backbone, head = write_dinov2(tmp_path / "dinov2", width=1024, depth=24)

    convert = [
        "python",
        "convert_weight/sit_convert.py",
        "--input",
        tmp_path / "last.pt",
        "--save-dir",
        tmp_path / "sit",
    ]
    assert "SiT-XL/2" in run(told, "convert", convert)
    (tmp_path / "last.pt").unlink()
    variables = {"TEACHER": tmp_path / "sit" / "SiT-XL-2", "VAE": vae}
    small = ["--batch-size", "1", "--mixed-precision", "bf16", "--num-previews", "1", "--teacher-preview-steps", "0"]
    small += ["--keep-checkpoints", "1", "--checkpoint-steps", "1"]

    cold = ["bash", "scripts/cold_start_sitxl.sh", *small]
    variables["OUTPUT_DIR"] = tmp_path / "cold"
    run(told, "cold start, 1 update, checkpoint, export", [*cold, "--max-train-steps", "1"], **variables)
    output = run(told, "cold start, resumed, 1 more update", [*cold, "--max-train-steps", "2"], **variables)
    assert "continues from" in output

    units = tmp_path / "cold" / "checkpoints" / "torch_units" / "step-2.pt"
    dmdr = ["bash", "scripts/dmdr_sitxl_refl.sh", *small, "--max-train-steps", "3", "--reward-checkpointing"]
    variables |= {"OUTPUT_DIR": tmp_path / "dmdr", "RESUME_CKPT": units}
    variables |= {"DINOV2_BACKBONE": backbone, "DINOV2_HEAD": head}
    output = run(told, "DMDR, 1 update through VAE and DINOv2-L", dmdr, **variables)
    assert "starts from" in output and "loss_reward_dinov2" in output

    units = tmp_path / "dmdr" / "checkpoints" / "torch_units" / "step-3.pt"
    export = ["python", "convert_weight/export_generator.py", "--checkpoint", units, "--output-dir", tmp_path / "out"]
    run(told, "export", export)
    generate = ["python", "-m", "evaluation.generate", "--generator", tmp_path / "out", "--output", tmp_path / "s.npz"]
    generate += ["--num-images", "8", "--batch-size", "4", "--vae", vae, "--dtype", "bf16"]
    run(told, "generate 8 images", generate)
    with np.load(tmp_path / "s.npz") as samples:
        assert samples["arr_0"].shape == (8, 256, 256, 3) and samples["arr_0"].std() > 1
    final, first = (SiT.from_pretrained(folder) for folder in (tmp_path / "out", tmp_path / "sit" / "SiT-XL-2"))
    moved = (final.final_layer.linear.weight - first.final_layer.linear.weight).abs().max()
    assert 0 < moved < 1e-3
    print("\n".join(told))
