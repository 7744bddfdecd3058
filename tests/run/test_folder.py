"""The folder of a run: its whole tree, and what --overwrite deletes of it."""

import json
import subprocess
import sys

from tests import ROOT
from tests.conftest import flags, run_cold_start


def test_three_steps_through_accelerate_launch_write_the_whole_tree(teacher, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    config = ["--config_file", "scripts/accelerate/one_cpu.yaml"]
    run = tmp_path / "run"
    command = [*launch, *config, "--module", "train_cc.cold_start", *flags(teacher, run, "--ema-decay", 0.9)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    expected = ["args.json", "log.txt", "generator/config.json", "generator/diffusion_pytorch_model.safetensors"]
    expected += ["loss_logs/loss_gen_log.jsonl", "loss_logs/loss_gui_log.jsonl", "samples/step-2/grid.png"]
    for step in (1, 2, 3):
        expected += [f"checkpoints/torch_units/step-{step}.pt"]
        expected += [f"checkpoints/accelerator_1/step-{step}/{n}" for n in ("generator.safetensors", "optimizer.pt")]
        expected += [f"checkpoints/accelerator_1/step-{step}/ema.safetensors"]
        expected += [
            f"checkpoints/accelerator_2/step-{step}/{n}" for n in ("estimator_lora.safetensors", "optimizer.pt")
        ]
    missing = [name for name in expected if not (run / name).is_file()]
    assert not missing
    assert not list(run.rglob("*.tmp"))
    record = json.loads((run / "args.json").read_text())
    assert record["arguments"]["ema_decay"] == 0.9 and "torch" in record["versions"]


def test_overwrite_deletes_a_run_and_nothing_else(teacher, tmp_path):
    run_cold_start(teacher, tmp_path)
    (tmp_path / "precious.txt").write_text("mine")
    run_cold_start(teacher, tmp_path, "--overwrite", "--max-train-steps", 1)
    assert (tmp_path / "precious.txt").exists()
    assert [path.name for path in (tmp_path / "checkpoints" / "torch_units").iterdir()] == ["step-1.pt"]
