"""`--dry-run` against what really happens: parameters, checkpoint size, activations."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evaluation.standins import write_vae
from tests.conftest import TINY, flags, random_sit, refused, run_cold_start
from train_cc import cold_start
from train_cc.models.classifier import ImageClassifier
from train_cc.models.sit import read_sit_config
from train_cc.setup import plan as dry_run
from train_cc.setup.plan import kept_bytes, network_activations, networks_to_come, state_bytes


def planned(capsys, teacher, output, *more):
    cold_start.main(flags(teacher, output, *more, "--dry-run"))
    return capsys.readouterr().out


def test_nothing_is_loaded_or_written(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "SiT", **TINY}))
    text = planned(capsys, tmp_path, tmp_path / "run", "--gradient-accumulation-steps", 3)
    assert "effective batch: 12 = 4 a process x 3 accumulated x 1 process(es)" in text
    assert "from step 0 to 3: 36" in text and "--batch-size 4" in text
    assert not (tmp_path / "run").exists()


def test_one_process_of_many_tells_the_plan(teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (0, 1, 2):
        monkeypatch.setenv("RANK", str(rank))
        text = planned(capsys, teacher, tmp_path / "run")
        assert ("effective batch: 12" in text) if rank == 0 else (text == "")


@pytest.mark.parametrize("more", [[], ["--use-lora-gen"], ["--ema-decay", 0.9]], ids=str)
def test_parameters_and_checkpoint_size_are_the_real_ones(teacher, tmp_path, capsys, monkeypatch, more):
    monkeypatch.setattr(dry_run, "GIB", 1)  # the size in bytes: of a small model
    text = planned(capsys, teacher, tmp_path / "run", *more)
    run = run_cold_start(teacher, tmp_path / "run", *more)
    told = re.search(r"generator ([\d,]+) trained of ([\d,]+); estimator ([\d,]+) trained, ([\d,]+) frozen", text)
    trained, whole, lora, frozen = (int(number.replace(",", "")) for number in told.groups())
    log = (run / "log.txt").read_text()
    assert f"generator: {trained} parameters trained of {whole}" in log
    assert f"estimator: {lora} parameters trained of {lora + frozen}" in log
    each, every = (int(number) for number in re.search(r"(\d+)\.00 GiB each, (\d+)\.00 GiB in all", text).groups())
    held = sum(tensor_bytes(path) for path in (run / "checkpoints").glob("accelerator_*/step-3/*"))
    assert held > 1e5 and 0 <= held - each < 4096  # the position table, and an optimizer's step counters
    assert every == 3 * each


def tensor_bytes(path: Path) -> int:
    """Of all tensors in a file of a checkpoint: at this size the headers weigh as much."""

    def added(content) -> int:
        if isinstance(content, dict):
            return sum(map(added, content.values()))
        return content.nbytes if isinstance(content, torch.Tensor) else 0

    return added(load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True))


def test_extrapolated_activations_are_those_of_the_whole_network(teacher, tmp_path):
    args = cold_start.stage_parser().parse_args(flags(teacher, tmp_path))
    config = {**TINY, "patch_size": 2, "mlp_ratio": 4.0, "depth": 5}
    estimate = network_activations(config, args, "generator", torch.float32)
    model = random_sit(depth=5)
    x, t, y = torch.zeros(4, 1, 8, 8), torch.zeros(4), torch.zeros(4, dtype=torch.long)
    whole = kept_bytes(model, lambda: model(x, t, y), torch.enable_grad())
    assert whole > 0 and estimate == pytest.approx(whole, rel=0.02)


def test_a_missing_config_is_refused(tmp_path, capsys):
    assert "config.json" in refused(cold_start.main, flags(tmp_path, tmp_path / "run", "--dry-run"), capsys=capsys)


def gib(text, name):
    return float(re.search(rf"^  {name}: ([\d.]+) GiB", text, re.MULTILINE)[1])


def test_a_reward_in_pixel_space_and_a_held_out_classifier_are_counted(teacher, reward_folder, tmp_path, capsys):
    more = ["--batch-size", 512, "--num-previews", 0]
    plain = planned(capsys, teacher, tmp_path / "run", *more)
    words = ["--encoder-type", "classifier", "--reward-classifier", reward_folder]
    text = planned(capsys, teacher, tmp_path / "run", *more, *words, "--holdout-classifier", reward_folder)
    assert "reward classifier weights" in text and "holdout classifier weights" in text
    assert gib(text, "activations, generator, reward turn") > gib(plain, "activations, generator turn") + 0.05
    assert "classifier" not in plain.split("memory per process")[1]


@pytest.mark.parametrize("widths", [(8, 8, 8, 8), (32, 32, 32, 32)])
def test_the_decoder_is_the_one_that_is_named(tmp_path, capsys, widths):
    from train_cc.models.vae import VAEDecoder, load_vae
    from train_cc.setup.plan import decoder_to_come

    vae = write_vae(tmp_path / "vae", widths)
    decoder, notes = decoder_to_come(str(vae))
    assert not notes and sum(p.numel() for p in decoder.parameters()) == sum(
        p.numel() for p in VAEDecoder(load_vae(str(vae))).parameters()
    )


def test_accumulation_under_fsdp2_holds_whole_gradients(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    held = []
    for chunks in (1, 4):
        args = cold_start.stage_parser().parse_args(flags(teacher, tmp_path, "--gradient-accumulation-steps", chunks))
        networks = networks_to_come(args, read_sit_config(teacher), torch.float32)
        held.append(sum(state_bytes(args, *networks, 2, torch.float32).values()))
    trained = sum(p.numel() for p in networks[0].parameters() if p.requires_grad)
    assert held[1] - held[0] == 4 * trained


def test_auto_precision_is_planned_as_on_a_gpu(teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = planned(capsys, teacher, tmp_path / "run", "--mixed-precision", "auto")
    assert "precision bf16" in text and "no GPU here" in text
    assert "precision no" in planned(capsys, teacher, tmp_path / "run", "--mixed-precision", "no")


def wrong_inputs(teacher, reward_folder, tmp_path):
    other = tmp_path / "other"
    random_sit(num_classes=7).save_pretrained(other / "sit")
    shutil.copy(teacher / "config.json", other / "sit" / "config.json")
    ImageClassifier("test_resnet", 7, 1, 32).save_pretrained(other / "classifier")
    return {
        "resume": (["--resume-ckpt", other / "step-1.pt"], "step-1.pt does not exist"),
        "reward": (["--encoder-type", "classifier", "--reward-classifier", other], "config.json does not exist"),
        "reward name": (["--encoder-type", "classifier", "--reward-classifier", "no_such"], "no_such"),
        "holdout": (["--holdout-classifier", other / "classifier"], "7 classes, the generator 10"),
        "dinov2": (
            ["--encoder-type", "dinov2", "--dinov2-backbone", other / "b.pth", "--dinov2-head", other / "h.pth"],
            "b.pth does not exist",
        ),
        "vae": (["--vae", other], "has 1 channel, that is pixels"),
        "teacher": (["--teacher", other / "sit"], "embedding_table"),
        "classes": (["--num-classes", 11], "--num-classes is 11"),
    }


def test_inputs_that_a_run_would_refuse_are_refused_in_the_same_words(teacher, reward_folder, tmp_path, capsys):
    for more, words in wrong_inputs(teacher, reward_folder, tmp_path).values():
        told = [
            refused(cold_start.main, flags(teacher, tmp_path / "run", *more, *dry), capsys=capsys)
            for dry in (["--dry-run"], [])
        ]
        assert words in told[0] and told[0] == told[1]
        assert not (tmp_path / "run").exists()
