"""What people type: flags, scripts, the output tree, and what is refused before anything is written."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from convert_weight import export_generator
from tests import ROOT
from tests.conftest import flags, random_sit, refused, run_cold_start
from train_cc import cold_start
from train_cc.io.fields import replaced
from train_cc.models import SiT


def test_parsed_arguments_do_not_change():
    args = cold_start.stage_parser().parse_args(["--teacher", "t", "--output-dir", "o"])
    with pytest.raises(AttributeError, match="seed"):
        args.seed = 5
    assert (replaced(args, seed=5).seed, args.seed) == (5, 30)


BAD_VALUES = [
    (["--lora-rank", "0"], "--lora-rank is 0"),
    (["--num-steps", "0"], "--num-steps is 0"),
    (["--batch-size", "-3"], "--batch-size is -3"),
    (["--ema-decay", "1"], "--ema-decay is 1;"),
    (["--max-grad-norm", "nan"], "--max-grad-norm is nan"),
    (["--learning-rate-generator", "inf"], "--learning-rate-generator is inf"),
    (["--lora-scale-fake", "0"], "--lora-scale-fake is 0;"),
    (["--seed", str(2**64)], "--seed is 18446744073709551616"),
    (["--vae", "stabilityai/sd-vae-ft-ema"], "--vae none is needed"),
    (["--real-guidance-interval", "0.7", "0.2"], "--real-guidance-interval is 0.7 0.2"),
    (["--num-step", "2"], "--num-step"),
    (["--unknown-flag", "2"], "--unknown-flag"),
    (["--mixed-precision", "fp8"], "fp8"),
    (["--mixed-precision", "fp16"], "fp16 needs a GPU"),
    (["--num-classes", "1000"], "--num-classes is 1000"),
    (["--teacher", "nowhere"], "nowhere"),
    (["--vae", "./nowhere"], "nowhere"),
    (["--resume-ckpt", "nowhere.pt"], "nowhere.pt does not exist"),
]


@pytest.mark.parametrize("more,words", BAD_VALUES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_values_are_refused_before_anything_is_written(teacher, tmp_path, capsys, more, words):
    if "fp16" in more and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert words in refused(cold_start.main, flags(teacher, tmp_path / "run", *more), capsys=capsys)
    assert not (tmp_path / "run").exists()


def test_a_non_empty_output_folder_is_refused_and_left_alone(teacher, tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("mine")
    assert "not empty" in refused(cold_start.main, flags(teacher, tmp_path), capsys=capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_overwrite_deletes_a_run_and_nothing_else(teacher, tmp_path):
    run_cold_start(teacher, tmp_path)
    (tmp_path / "precious.txt").write_text("mine")
    run_cold_start(teacher, tmp_path, "--overwrite", "--max-train-steps", 1)
    assert (tmp_path / "precious.txt").exists()
    assert [path.name for path in (tmp_path / "checkpoints" / "torch_units").iterdir()] == ["step-1.pt"]


def test_a_bad_teacher_leaves_the_earlier_run_alone(teacher, tmp_path, capsys):
    run_cold_start(teacher, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    refused(cold_start.main, flags(tmp_path, tmp_path / "run", "--overwrite"), capsys=capsys)
    assert sorted(tmp_path.rglob("*")) == before


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


def test_export_of_a_checkpoint_equals_the_final_export(teacher, tmp_path, capsys):
    for name, more in (("plain", []), ("lora", ["--use-lora-gen"]), ("ema", ["--ema-decay", 0.5])):
        run = run_cold_start(teacher, tmp_path / name, *more)
        checkpoint = run / "checkpoints" / "torch_units" / "step-3.pt"
        export_generator.main(["--checkpoint", str(checkpoint), "--output-dir", str(tmp_path / f"{name}-export")])
        ours, theirs = (SiT.from_pretrained(f).state_dict() for f in (tmp_path / f"{name}-export", run / "generator"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    arguments = ["--checkpoint", str(tmp_path / "plain/checkpoints/torch_units/step-3.pt"), "--weights", "ema"]
    assert "no EMA" in refused(export_generator.main, [*arguments, "--output-dir", str(tmp_path / "e")], capsys=capsys)


def test_a_lora_generator_is_exported_as_an_adapter_that_peft_reads(teacher, tmp_path, capsys):
    """The average's where there is one. Without LoRA there is none, and nothing is written."""
    run = run_cold_start(teacher, tmp_path / "run", "--use-lora-gen", "--ema-decay", 0.5)
    adapter = tmp_path / "adapter"
    checkpoint = run / "checkpoints/torch_units/step-3.pt"
    export_generator.main(["--checkpoint", str(checkpoint), "--adapter", str(adapter)])
    assert "outputs verified" in capsys.readouterr().out
    assert {path.name for path in adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    weights = load_file(adapter / "adapter_model.safetensors")
    assert len(weights) == 16 and all(value.dtype == torch.float32 for value in weights.values())
    model = PeftModel.from_pretrained(SiT.from_pretrained(teacher), adapter).merge_and_unload()
    merged = SiT.from_pretrained(run / "generator").state_dict()
    moved = SiT.from_pretrained(teacher).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(merged[name], moved[name]) != name.endswith(LORA_WEIGHTS)
    plain = run_cold_start(teacher, tmp_path / "plain", "--max-train-steps", 1)
    words = ["--checkpoint", str(plain / "checkpoints/torch_units/step-1.pt"), "--adapter", str(tmp_path / "none")]
    assert "trained whole" in refused(export_generator.main, words, capsys=capsys)
    assert not (tmp_path / "none").exists()


LORA_WEIGHTS = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


def test_a_teacher_of_another_size_does_not_resume(teacher, tmp_path, capsys):
    run = run_cold_start(teacher, tmp_path / "run")
    random_sit(hidden_size=64).save_pretrained(tmp_path / "wide")
    resume = ["--resume-ckpt", str(run / "checkpoints/torch_units/step-3.pt"), "--max-train-steps", "4"]
    message = refused(cold_start.main, flags(tmp_path / "wide", tmp_path / "new", *resume), capsys=capsys)
    assert "does not fit" in message and not (tmp_path / "new").exists()
    shutil.rmtree(run)
