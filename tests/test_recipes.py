"""The numbers of the launchers, written out from the method's page and the recipes: a slip of a digit is seen."""

import itertools

import pytest

from tests.test_command_line import commands
from train_cc import cold_start, dmdr_refl

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
    "mixed_precision": "no",
    "compile": False,
    "vae": "none",
}
DIGITS_COLD = DIGITS | {
    "max_train_steps": 400,
    "learning_rate_generator": 2e-4,
    "dynamic_steps": 200,
    "encoder_type": "none",
}
DIGITS_DMDR = DIGITS | {
    "max_train_steps": 500,
    "learning_rate_generator": 1e-4,
    "dynamic_steps": 0,
    "encoder_type": "classifier",
    "reward_weight": 0.5,
    "reward_micro_batch": 0,
}
LAUNCHERS = {
    "cold_start_sitxl.sh": (cold_start, SITXL_COLD),
    "dmdr_sitxl_refl.sh": (dmdr_refl, SITXL_DMDR),
    "cold_start_digits.sh": (cold_start, DIGITS_COLD),
    "dmdr_digits_refl.sh": (dmdr_refl, DIGITS_DMDR),
}


def words_of(script: str, starting: str) -> list[list[str]]:
    return [words for name, words in commands(starting) if name == script]


@pytest.mark.parametrize("script", LAUNCHERS)
def test_a_launcher_trains_with_the_numbers_of_its_recipe(script):
    stage, recipe = LAUNCHERS[script]
    ((_, *words),) = words_of(script, "launch")
    args = vars(stage.stage_parser().parse_args(words))
    assert {name: args[name] for name in recipe} == recipe


@pytest.mark.parametrize("stage,recipe", [(cold_start, SITXL_COLD), (dmdr_refl, SITXL_DMDR)], ids=["cold", "dmdr"])
def test_the_defaults_are_the_full_size_recipe(stage, recipe):
    args = vars(stage.stage_parser().parse_args(["--teacher", "t", "--output-dir", "o"]))
    assert {name: args[name] for name in recipe} == recipe


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
    reward, evaluation = found["train_cc.pretrain.classifier"]
    assert reward["--architecture"] == "test_efficientnet" and float(reward["--noise-augmentation"]) == 0.2
    assert evaluation["--architecture"] == "test_resnet" and float(evaluation["--noise-augmentation"]) == 0.1
    for each in (reward, evaluation):
        numbers = [float(each[name]) for name in ("--max-train-steps", "--batch-size", "--learning-rate")]
        assert numbers == [400, 128, 2e-3]


def test_the_full_size_evaluation_samples_fifty_thousand():
    ((_, *words),) = [words for words in words_of("evaluate_sitxl.sh", "launch") if "evaluation.generate" in words[0]]
    assert int(options(words).get("--num-images", 50_000)) == 50_000
