"""`--dry-run`: its text against what a run does, and inputs that are still to come or do not fit."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evaluation.standins import write_vae
from tests.conftest import TINY, flags, random_sit, refused, run_cold_start
from train_cc import cold_start, dmdr_refl
from train_cc.models import SIT_SIZES, SiT
from train_cc.models.classifier import ImageClassifier
from train_cc.models.vae import VAEDecoder, load_vae
from train_cc.planning import plan as plan_module
from train_cc.run.meters import tensors_in


def planned(capsys, teacher, output, *more, stage=cold_start) -> str:
    stage.main(flags(teacher, output, *more, "--dry-run"))
    return capsys.readouterr().out


def gib(text, name) -> float:
    return float(re.search(rf"^  {name}: ([\d.]+) GiB", text, re.MULTILINE)[1])


def test_a_config_is_enough_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    """One process on each machine prints the plan; hours are those of the peak that is named."""
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "SiT", **TINY}))
    monkeypatch.setenv("WORLD_SIZE", "3")
    more = ["--num-previews", 0, "--gradient-accumulation-steps", 3, "--max-train-steps", 1000, "--peak-tflops"]
    text = planned(capsys, tmp_path, tmp_path / "run", *more, "1e-6")
    assert "effective batch: 36 = 4 a process x 3 accumulated x 3 process(es)" in text
    assert "from step 0 to 1000: 36,000" in text and "--batch-size 4" in text
    assert "not in it: the CUDA context, workspaces of libraries" in text and "fragmentation)" in text
    twice = planned(capsys, tmp_path, tmp_path / "run", *more, "2e-6")
    hours, half = (float(re.search(r"an update, ([\d.]+) hours", each)[1]) for each in (text, twice))
    assert hours > 10 and hours == pytest.approx(2 * half, rel=0.01)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert planned(capsys, tmp_path, tmp_path / "run", *more, "1e-6") == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [["--ema-decay", 0.9], ["--use-lora-gen"]], ids=str)
def test_parameters_and_checkpoint_size_are_the_real_ones(teacher, tmp_path, capsys, monkeypatch, more):
    monkeypatch.setattr(plan_module, "GIB", 1)  # the size in bytes: of a small model
    text = planned(capsys, teacher, tmp_path / "run", *more)
    run = run_cold_start(teacher, tmp_path / "run", *more)
    counts = re.search(r"generator ([\d,]+) trained of ([\d,]+); estimator ([\d,]+) trained, ([\d,]+) frozen", text)
    trained, whole, lora, frozen = (int(number.replace(",", "")) for number in counts.groups())
    log = (run / "log.txt").read_text()
    assert f"generator: {trained} parameters trained of {whole}" in log
    assert f"estimator: {lora} parameters trained of {lora + frozen}" in log
    each, every = (int(number) for number in re.search(r"(\d+)\.00 GiB each, (\d+)\.00 GiB in all", text).groups())
    written = sum(tensor_bytes(path) for path in (run / "checkpoints").glob("accelerator_*/step-3/*"))
    assert written > 1e5 and 0 <= written - each < 4096  # the position table, and an optimizer's step counters
    assert every == 3 * each


def tensor_bytes(path: Path) -> int:
    """Bytes of all tensors in a file of a checkpoint: at this size the headers weigh as much."""
    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return sum(x.nbytes for x in tensors_in(content))


def test_a_reward_in_pixel_space_and_a_held_out_classifier_are_counted(teacher, reward_folder, tmp_path, capsys):
    more = ["--batch-size", 512, "--num-previews", 0]
    plain = planned(capsys, teacher, tmp_path / "run", *more)
    words = ["--encoder-type", "classifier", "--reward-classifier", reward_folder]
    text = planned(capsys, teacher, tmp_path / "run", *more, *words, "--holdout-classifier", reward_folder)
    assert "reward classifier weights" in text and "holdout weights" in text
    assert gib(text, "peak, training, generator turn") > gib(plain, "peak, training, generator turn") + 0.05
    assert gib(text, "peak, training, estimator turns") < gib(plain, "peak, training, estimator turns") + 0.01
    assert "classifier" not in plain.split("memory of a GPU")[1]


def test_the_decoder_is_the_one_that_is_named_and_in_fp32_if_fp16_overflows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan_module, "GIB", 1)  # sizes in bytes: of a small decoder
    random_sit(in_channels=4).save_pretrained(tmp_path / "sit")
    vae = write_vae(tmp_path / "vae", (32, 32, 32, 32))
    more = ["--vae", vae, "--mixed-precision", "fp16", "--num-previews", 0]
    half = planned(capsys, tmp_path / "sit", tmp_path / "run", *more)
    parameters = list(VAEDecoder(load_vae(str(vae))).parameters())
    own = 2 * sum(p.numel() for p in parameters)
    assert own <= gib(half, "decoder weights") < own + 512 * len(parameters) and "the VAE" not in half
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"force_upcast": True}))
    whole = planned(capsys, tmp_path / "sit", tmp_path / "run", *more)
    assert gib(whole, "decoder weights") == pytest.approx(2 * gib(half, "decoder weights"), rel=0.1)
    assert "force_upcast" in whole and "force_upcast" not in half


# What is still to come ------------------------------------------------------------------------------------------------


def test_a_teacher_to_come_is_planned_by_the_size_in_its_name(tmp_path, capsys):
    """A name of the size table, or a folder named as sit_convert.py names the one that it makes."""
    more = ["--vae", "stabilityai/sd-vae-ft-ema", "--num-previews", 0]
    text = planned(capsys, "-", tmp_path / "run", "--teacher", "SiT-S/8", *more)
    trained = sum(p.numel() for p in SiT(**SIT_SIZES["SiT-S/8"]).parameters())
    assert f"generator {trained:,} trained of {trained:,}" in text and "SiT-S/8 is the name of a size" in text
    assert "SiT-S/8" in refused(cold_start.main, flags("SiT-S/8", tmp_path / "run"), capsys=capsys)
    folder = tmp_path / "sit_weights" / "SiT-S-8"
    text = planned(capsys, folder, tmp_path / "run", *more)
    assert "SiT-S-8 does not exist yet" in text and "a run needs a model folder" in text
    folder.mkdir(parents=True)
    words = flags(folder, tmp_path / "run", "--dry-run", *more)
    assert "config.json" in refused(cold_start.main, words, capsys=capsys)


def test_a_checkpoint_that_a_run_has_yet_to_write_is_planned_from(teacher, reward_folder, tmp_path, capsys):
    """Its path is where a run writes it, and its name the one that it writes; any other missing file is refused."""
    place = tmp_path / "cold" / "checkpoints" / "torch_units"
    more = ["--encoder-type", "classifier", "--reward-classifier", reward_folder, "--max-train-steps", 9]
    text = planned(capsys, teacher, tmp_path / "run", *more, "--resume-ckpt", place / "step-7.pt", stage=dmdr_refl)
    assert f"{place / 'step-7.pt'} does not exist yet: planned as from step 7" in text
    assert "from step 7 to 9: 8\n" in text
    place.mkdir(parents=True)
    (place / "step-8.pt").write_bytes(b"")
    for path in (place / "step-07.pt", place / "step-8.pt", tmp_path / "step-7.pt"):
        words = flags(teacher, tmp_path / "run", "--dry-run", *more, "--resume-ckpt", path)
        assert str(path) in refused(dmdr_refl.main, words, capsys=capsys)


REWARDS = """
def plain(images, labels):
    return images.mean(dim=(1, 2, 3))


def by_values(images, labels):
    import math
    return math.log(images.max().item()) * images.mean(dim=(1, 2, 3))
"""


@pytest.mark.parametrize(("name", "known"), [("plain", True), ("by_values", False)])
def test_a_function_that_needs_values_is_noted(teacher, tmp_path, capsys, name, known):
    (tmp_path / "r.py").write_text(REWARDS)
    more = ["--num-previews", 0, "--reward", "python", 1, f"{tmp_path / 'r.py'}:{name}"]
    assert ("is not known" in planned(capsys, teacher, tmp_path / "run", *more)) != known


def test_auto_precision_is_the_configs_or_that_of_a_gpu(teacher, tmp_path, capsys, monkeypatch):
    more = ["--num-previews", 0, "--mixed-precision"]
    text = planned(capsys, teacher, tmp_path / "run", *more, "auto")
    assert "precision fp16" in text and "no GPU here" in text
    assert "precision no" in planned(capsys, teacher, tmp_path / "run", *more, "no")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "precision bf16" in planned(capsys, teacher, tmp_path / "run", *more, "auto")
    words = flags(teacher, tmp_path / "run", "--dry-run", *more, "fp16")
    assert "config says mixed_precision bf16" in refused(cold_start.main, words, capsys=capsys)


# What a run would refuse ----------------------------------------------------------------------------------------------

REFUSED = {  # flags after a folder OTHER, words
    "checkpoint": (["--resume-ckpt", "OTHER/step-1.pt"], "step-1.pt does not exist"),
    "classes of a reward": (
        ["--encoder-type", "classifier", "--reward-classifier", "OTHER/classifier"],
        "the reward classifier has 7 classes, the generator 10",
    ),
    "holdout name": (["--holdout-classifier", "no_such"], "no_such"),
    "dinov2": (
        ["--encoder-type", "dinov2", "--dinov2-backbone", "OTHER/b.pth", "--dinov2-head", "OTHER/h.pth"],
        "b.pth does not exist",
    ),
    "vae": (["--vae", "OTHER"], "has 1 channel, that is pixels"),
    "teacher": (["--teacher", "OTHER/sit"], "embedding_table"),
    "classes": (["--num-classes", 11], "--num-classes is 11"),
}


@pytest.fixture(scope="module")
def other(teacher, tmp_path_factory) -> Path:
    """A folder with a SiT whose config is another's, and a classifier of seven classes."""
    folder = tmp_path_factory.mktemp("other")
    random_sit(num_classes=7).save_pretrained(folder / "sit")
    shutil.copy(teacher / "config.json", folder / "sit" / "config.json")
    ImageClassifier("test_resnet", num_classes=7, in_channels=1, image_size=32).save_pretrained(folder / "classifier")
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_refuses_what_a_run_refuses_in_the_same_words(teacher, other, tmp_path, capsys, name):
    more, words = REFUSED[name]
    more = flags(teacher, tmp_path / "run", *(str(word).replace("OTHER", str(other)) for word in more))
    messages = [refused(cold_start.main, [*more, *dry], capsys=capsys) for dry in (["--dry-run"], [])]
    assert words in messages[0] and messages[0] == messages[1]
    assert not (tmp_path / "run").exists()
