"""The numbers of the launchers, written out from the method's page and the recipes: a slip of a digit is seen."""

import dataclasses
import itertools
import re
import shutil
from functools import partial
from pathlib import Path

import pytest

from evaluation.rows import read_table
from tests import test_command_line
from tests.test_command_line import ROOT, commands
from train_cc import cold_start, dmdr_refl
from train_cc.io.errors import InputError
from train_cc.settings import Method, Optimisation, Output

# docs/method.md and the paper: SiT-XL/2, ImageNet 256
SITXL = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay_generator": 0.01,
    "weight_decay_estimator": 0.0,
    "max_grad_norm": 1.0,
    "gradient_accumulation_steps": 1,
    "lora_rank": 32,
    "lora_init_spread": 1.0,
    "lora_scale_fake": 2.0,
    "lora_scale_real": 0.75,
    "use_lora_gen": False,
    "ratio_update": 5,
    "renoise_alpha": 4.0,
    "renoise_beta": 1.5,
    "num_steps": 1,
    "timestep_shift": 1.0,
    "real_guidance_scale": 1.0,
    "real_guidance_interval": [0.0, 1.0],
    "ema_decay": 0.0,
    "num_previews": 16,
    "teacher_preview_steps": 50,
    "seed": 30,
    "compile": "auto",
}
SITXL_COLD = SITXL | {
    "max_train_steps": 20_000,
    "batch_size": 64,
    "learning_rate_generator": 2e-5,
    "learning_rate_estimator": 2e-5,
    "dynamic_steps": 10_000,
    "checkpoint_steps": 5_000,
    "sample_steps": 1_000,
    "encoder_type": "none",
}
SITXL_DMDR = SITXL | {
    "max_train_steps": 22_000,
    "batch_size": 24,
    "learning_rate_generator": 1e-5,
    "learning_rate_estimator": 1e-5,
    "dynamic_steps": 0,
    "checkpoint_steps": 500,
    "sample_steps": 50,
    "encoder_type": "dinov2",
    "reward_weight": 0.05,
    "reward_micro_batch": 8,
}
# README: digits
DIGITS = SITXL | {
    "lora_init_spread": 0.072,  # peft's own, 1 / sqrt(3 x 64)
    "weight_decay_estimator": 0.01,
    "batch_size": 64,
    "learning_rate_estimator": 1e-3,
    "ema_decay": 0.98,
    "num_previews": 20,
    "teacher_preview_steps": 32,
    "mixed_precision": "no",
    "compile": False,
    "vae": "none",
}
DIGITS_COLD = DIGITS | {
    "max_train_steps": 400,
    "learning_rate_generator": 2e-4,
    "dynamic_steps": 200,
    "checkpoint_steps": 100,
    "sample_steps": 50,
    "encoder_type": "none",
}
DIGITS_DMDR = DIGITS | {
    "max_train_steps": 500,
    "learning_rate_generator": 1e-4,
    "dynamic_steps": 0,
    "checkpoint_steps": 50,
    "sample_steps": 25,
    "encoder_type": "classifier",
    "reward_weight": 0.5,
    "frechet_window": 6400,  # a hundred batches
    "reward_micro_batch": 0,
}
# docs/latents.md: Fashion-MNIST in latents
FASHION = {"teacher_preview_steps": 20, "vae": "x/vae"}
FASHION_COLD = DIGITS_COLD | FASHION | {"max_train_steps": 300, "dynamic_steps": 150}
FASHION_DMDR = DIGITS_DMDR | FASHION | {"max_train_steps": 400, "reward_weight": 0.05, "reward_micro_batch": 32}
LAUNCHERS = {
    "cold_start_sitxl.sh": (cold_start, SITXL_COLD),
    "dmdr_sitxl_refl.sh": (dmdr_refl, SITXL_DMDR),
    "cold_start_digits.sh": (cold_start, DIGITS_COLD),
    "dmdr_digits_refl.sh": (dmdr_refl, DIGITS_DMDR),
    "cold_start_fashion.sh": (cold_start, FASHION_COLD),
    "dmdr_fashion_refl.sh": (dmdr_refl, FASHION_DMDR),
}


def words_of(script: str, starting: str) -> list[list[str]]:
    return [words for name, words in commands(starting) if name == script]


@pytest.mark.parametrize("script", LAUNCHERS)
def test_a_launcher_trains_with_the_numbers_of_its_recipe(script):
    stage, recipe = LAUNCHERS[script]
    ((_, *words),) = words_of(script, "launch")
    args = vars(stage.stage_parser().parse_args(words))
    assert {name: args[name] for name in recipe} == recipe
    if stage is dmdr_refl:  # from where the cold start of the same recipe ends
        cold = LAUNCHERS[script.replace("dmdr", "cold_start").replace("_refl", "")][1]
        assert Path(args["resume_ckpt"]).name == f"step-{cold['max_train_steps']}.pt"


@pytest.mark.parametrize("stage,recipe", [(cold_start, SITXL_COLD), (dmdr_refl, SITXL_DMDR)], ids=["cold", "dmdr"])
def test_the_defaults_are_the_full_size_recipe(stage, recipe):
    args = vars(stage.stage_parser().parse_args(["--teacher", "t", "--output-dir", "o"]))
    assert {name: args[name] for name in recipe} == recipe


def test_settings_without_a_command_line_are_the_full_size_recipe():
    settings = vars(Method()) | vars(Optimisation()) | vars(Output(output_dir=Path("o")))
    settings["real_guidance_interval"] = list(settings["real_guidance_interval"])
    named = {name: value for name, value in SITXL_COLD.items() if name in settings}
    assert len(named) > 20 and settings | named == settings
    for each, name in [(Method(), "num_steps"), (Optimisation(), "seed"), (Output(output_dir=Path("o")), "overwrite")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(each, name, 2)
    assert Output(output_dir=Path("o")).checkpoints == Path("o/checkpoints")
    assert Optimisation(batch_size=3, gradient_accumulation_steps=5).effective_batch(7) == 105


def options(words: list[str]) -> dict[str, str]:
    return {flag: value for flag, value in itertools.pairwise(words) if flag.startswith("--")}


def test_digits_teacher_and_classifiers():
    found = {words[0]: [] for words in words_of("pretrain_digits.sh", "python -m")}
    for words in words_of("pretrain_digits.sh", "python -m"):
        found[words[0]].append(options(words[1:]))
    (teacher,) = found["train_cc.pretrain.teacher"]
    expected = {"--hidden-size": 64, "--depth": 4, "--num-heads": 2, "--patch-size": 2, "--max-train-steps": 2000}
    expected |= {"--batch-size": 128, "--learning-rate": 2e-3, "--label-dropout": 0.1, "--ema-decay": 0.999}
    assert {name: float(teacher[name]) for name in expected} == expected
    assert float(teacher["--checkpoint-steps"]) == 250
    reward, evaluation = found["train_cc.pretrain.classifier"]
    assert reward["--architecture"] == "test_efficientnet" and float(reward["--noise-augmentation"]) == 0.2
    assert evaluation["--architecture"] == "test_resnet" and float(evaluation["--noise-augmentation"]) == 0.1
    expected = {"--max-train-steps": 400, "--batch-size": 128, "--learning-rate": 2e-3, "--image-size": 32}
    expected |= {"--checkpoint-steps": 100}
    for each in (reward, evaluation):
        assert {name: float(each[name]) for name in expected} == expected
    assert evaluation["--seed"] == "30"  # whatever SEED is: all rows have one judge


def test_fashion_networks():
    found = {}
    for words in words_of("pretrain_fashion.sh", "python -m"):
        found.setdefault(words[0].rpartition(".")[2], []).append(options(words[1:]))
    first, decoder = found["vae"]
    channels = next(words for words in words_of("pretrain_fashion.sh", "python -m") if "--channels" in words)
    assert channels[channels.index("--channels") + 1 :][:3] == ["16", "32", "64"]
    expected = [
        (first, {"--layers": 1, "--groups": 8, "--kl-weight": 5e-5, "--max-train-steps": 3000, "--ema-decay": 0.995}),
        (first, {"--batch-size": 16, "--checkpoint-steps": 500, "--learning-rate": 2e-3}),
        (decoder, {"--feature-weight": 0.1, "--max-train-steps": 2000, "--ema-decay": 0.997}),
        (decoder, {"--batch-size": 16, "--checkpoint-steps": 500, "--learning-rate": 1e-3}),
    ]
    (teacher,) = found["teacher"]
    sizes = {"--hidden-size": 128, "--depth": 6, "--num-heads": 4, "--patch-size": 2, "--batch-size": 128}
    how = {"--max-train-steps": 7000, "--learning-rate": 2e-3, "--warmup-steps": 100, "--label-dropout": 0.1}
    expected += [(teacher, sizes), (teacher, how | {"--ema-decay": 0.999, "--checkpoint-steps": 250})]
    names = ["test_efficientnet", "test_resnet", "test_vit"]
    assert [each["--architecture"] for each in found["classifier"]] == names
    numbers = [(1500, 64, 2e-3, 0.2), (3000, 128, 2e-3, 0.1), (3000, 128, 1e-3, 0.1)]
    flags = ("--max-train-steps", "--batch-size", "--learning-rate", "--noise-augmentation")
    for each, values in zip(found["classifier"], numbers, strict=True):
        expected.append((each, dict(zip(flags, values, strict=True)) | {"--checkpoint-steps": 250, "--image-size": 32}))
    for given, numbers_of in expected:
        assert {name: float(given[name]) for name in numbers_of} == numbers_of
    assert [each["--seed"] for each in found["classifier"]] == ["x", "30", "30"]  # all rows have the same judges
    reals = [each["--num-images"] for each in found["data"] if "--num-images" in each]
    assert reals == ["10000", "10000"]


def test_every_seed_is_thirty():
    texts = [path.read_text() for path in sorted((test_command_line.ROOT / "scripts").glob("*.sh"))]
    assert {seed for text in texts for seed in re.findall(r"SEED:-(\w+)", text)} == {"30"}


def of_module(script: str, starting: str, module: str) -> dict[str, str]:
    (found,) = [options(words) for words in words_of(script, starting) if module in words]
    return found


def test_the_full_size_evaluation_samples_fifty_thousand():
    found = of_module("evaluate_sitxl.sh", "launch", "evaluation.generate")
    assert (found["--num-images"], found["--batch-size"]) == ("50000", "64")


def test_a_fashion_row_is_of_10000_images():
    assert of_module("evaluate_fashion.sh", "python -m", "evaluation.generate")["--num-images"] == "10000"


def test_a_digits_row_is_of_1800_images():
    assert of_module("evaluate_digits.sh", "python -m", "evaluation.generate")["--num-images"] == "1800"


FRONTIERS = {
    "digits": (DIGITS_COLD, DIGITS_DMDR, "32", "10000"),
    "fashion": (FASHION_COLD, FASHION_DMDR, "20", "10000"),
    "sitxl": (SITXL_COLD, SITXL_DMDR, "250", "50000"),
}


@pytest.mark.parametrize("recipe", FRONTIERS)
def test_the_frontier_trains_as_long_as_the_launchers(recipe, tmp_path, monkeypatch):
    cold, dmdr, steps, images = FRONTIERS[recipe]
    for name in ("DIGITS", "FASHION", "REFERENCE", "VAE", "TIMM_ENCODER"):
        monkeypatch.setenv(name, str(tmp_path))
    (tmp_path / "statistics.npz").touch()
    monkeypatch.chdir(ROOT)
    table = read_table(ROOT / "scripts" / "frontier" / f"{recipe}.toml")
    assert table.base_steps == cold["max_train_steps"]
    assert table.extra_steps == dmdr["max_train_steps"] - cold["max_train_steps"]
    assert options(table.generate)["--num-images"] == images
    teachers = [options(row.flags) for row in table.rows if row.stage == "teacher"]
    assert {(each["--sampler"], each["--num-steps"]) for each in teachers} == {("euler", steps)}


def test_the_second_judge_of_digits():
    found = of_module("frontier_digits.sh", "python -m", "train_cc.pretrain.classifier")
    expected = {"--image-size": 32, "--noise-augmentation": 0.1, "--learning-rate": 1e-3}
    assert {name: float(found[name]) for name in expected} == expected and found["--architecture"] == "test_vit"


CHECKS = {
    "pretrain_digits.sh": [test_digits_teacher_and_classifiers, test_every_seed_is_thirty],
    "evaluate_sitxl.sh": [test_the_full_size_evaluation_samples_fifty_thousand],
    "pretrain_fashion.sh": [test_fashion_networks, test_every_seed_is_thirty],
    "evaluate_fashion.sh": [test_a_fashion_row_is_of_10000_images],
    "evaluate_digits.sh": [test_a_digits_row_is_of_1800_images],
    "frontier_digits.sh": [test_the_second_judge_of_digits],
}
# A flag's number, a variable's default, the step of a checkpoint's name
NUMBER = re.compile(r"(?:(?<= )|(?<=:-)|(?<=/step-))\d[\d.]*(?:e-?\d+)?(?=[ }\n]|\.pt)")


def noticed(script: str) -> bool:
    """Whether a test above fails on the scripts as they are now."""
    of_launcher = partial(test_a_launcher_trains_with_the_numbers_of_its_recipe, script)
    for check in [of_launcher] if script in LAUNCHERS else CHECKS[script]:
        try:
            check()
        except (AssertionError, InputError):
            return True
    return False


@pytest.mark.parametrize("script", [*LAUNCHERS, *CHECKS])
def test_every_number_of_a_script_is_held(script, tmp_path, monkeypatch):
    """Each number times ten (10 for 0) makes a test above fail, but for cores and minutes, which change no result."""
    text = (ROOT / "scripts" / script).read_text()
    code = re.sub(r"(?m)(^|(?<= ))#.*", lambda comment: "x" * len(comment[0]), text)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    monkeypatch.setattr(test_command_line, "ROOT", tmp_path)
    assert not noticed(script)
    unnoticed, numbers = [], list(NUMBER.finditer(code))
    for number in numbers:
        wrong = f"{float(number[0]) * 10:.10g}" if float(number[0]) else "10"
        (tmp_path / "scripts" / script).write_text(text[: number.start()] + wrong + text[number.end() :])
        line = text[: number.end()].splitlines()[-1].strip()
        if not noticed(script) and not line.startswith(("OMP_NUM_THREADS=", "--jobs ", "part ", "exit 2")):
            unnoticed.append(line)
    assert numbers and not unnoticed
