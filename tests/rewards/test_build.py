"""Rewards of every kind in a run: a user's file, a distribution, DINOv2 in latents; what rewarded is recorded."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from evaluation import evaluate, generate
from evaluation.standins import write_dinov2, write_vae
from tests.conftest import build_run, flags, logged, random_sit, refused, run_cold_start
from tests.conftest import words as argv
from tests.run.test_resume import assert_same_run, units
from train_cc import cold_start, dmdr_refl
from train_cc.distillation import turns
from train_cc.distillation.loop import cycle
from train_cc.io.read import sha256
from train_cc.models.generator import GenerationConfig
from train_cc.rewards.build import PythonReward


def test_a_users_file_may_hold_a_dataclass(tmp_path):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass A:\n    a: int\n"
    for name, value in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "reward.py"
        file.write_text(f"{text}\ndef brightness(images, labels):\n    return {value} * images.mean((1, 2, 3))\n")
    rewards = [PythonReward(f"{tmp_path / name / 'reward.py'}:brightness", "cpu") for name in ("one", "two")]
    images = torch.ones(2, 1, 4, 4)
    assert [reward.rewards(images, torch.zeros(2)).tolist() for reward in rewards] == [[1.0, 1.0], [2.0, 2.0]]


def test_a_reward_from_a_users_file_trains(teacher, tmp_path, sharp):
    run = run_cold_start(teacher, tmp_path / "run", "--reward", "python", 0.5, sharp, "--max-train-steps", 2)
    plain = run_cold_start(teacher, tmp_path / "plain", "--max-train-steps", 2)
    row = logged(run)[0]
    assert row["loss_reward_sharpness"] < 0 and row["grad_norm_reward_sharpness_x0"] > 0
    assert "grad_cosine_reward_sharpness_x0" in row and "loss_reward_sharpness" not in logged(plain)[0]
    assert logged(run)[1]["loss_dmd"] != logged(plain)[1]["loss_dmd"]
    assert "reward_sharpness" in json.loads((run / "args.json").read_text())["sha256"]


@pytest.mark.parametrize(
    "source,words",
    [
        ("def other(images, labels): ...", "has no function f"),
        ("import nothing_like_this", "cannot be imported"),
        ("def f(images, labels): raise KeyError('mine')", "raised KeyError"),
        ("def f(images, labels): return images.mean()", "shape ()"),
        ("def f(images, labels): return 'good'", "a str"),
        ("def f(images, labels): return images.mean(dim=(1, 2, 3)) * float('nan')", "not finite"),
        ("def f(images, labels): return images.detach().mean(dim=(1, 2, 3))", "--tilt"),
        (
            "def setup(device): raise OSError('no model')\ndef f(images, labels): return images.mean((1, 2, 3))",
            "no model",
        ),
    ],
)
def test_a_users_file_that_cannot_be_used_is_refused(teacher, tmp_path, capsys, source, words):
    (tmp_path / "mine.py").write_text(source)
    arguments = flags(teacher, tmp_path / "run", "--reward", "python", 1, f"{tmp_path / 'mine.py'}:f")
    assert words in refused(cold_start.main, arguments, capsys=capsys)
    assert not (tmp_path / "run").exists()


def frechet(real, *more, kind="frechet"):
    return ["--reward", kind, 1, real, "--frechet-window", 200, *more]


@pytest.mark.parametrize("kind", ["frechet", "kl"])
def test_a_reward_of_the_distribution_trains_and_its_distance_is_logged(teacher, tmp_path, real, kind):
    more = "--max-train-steps", 5, "--batch-size", 16
    run = run_cold_start(teacher, tmp_path / "run", *frechet(real, kind=kind), *more)
    rows = logged(run)
    assert all(row[kind] > 0 for row in rows)
    assert [row[f"scale_{kind}"] > 0 for row in rows] == [False, False, False, True, True]
    assert [row[f"grad_norm_reward_{kind}_x0"] > 0 for row in rows] == [False, False, False, True, True]
    log = (run / "log.txt").read_text()
    assert "WARNING: --frechet-window 200 is short" in log


def test_features_are_never_taken_under_autocast(teacher, tmp_path, real):
    AcceleratorState._reset_state(True)
    try:
        run = build_run(teacher, tmp_path / "run", *frechet(real), "--mixed-precision", "bf16")
        (memory,), autocast = run.memories.values(), []
        memory.features_of.register_forward_pre_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))
        turns.fill_memories(run)
        filled = len(autocast)
        cycle(run, 0)
    finally:
        AcceleratorState._reset_state(True)
    assert 10 < filled < len(autocast) and not any(autocast)


def test_the_frechet_reward_resumes_to_the_bit(teacher, tmp_path, real):
    more = [*frechet(real, "--frechet-observe", 1), "--gradient-accumulation-steps", 2]
    straight = run_cold_start(teacher, tmp_path / "a", *more, "--max-train-steps", 5)
    stopped = run_cold_start(teacher, tmp_path / "b", *more, "--max-train-steps", 2)
    run_cold_start(teacher, stopped, *more, "--max-train-steps", 5, "--auto-resume")
    assert_same_run(straight, stopped, 5)
    assert (straight / "checkpoints/accelerator_1/step-5/rewards.safetensors").exists()


def test_statistics_of_another_space_are_refused(teacher, tmp_path, real, capsys):
    with np.load(real) as file:
        content = dict(file)
    space = json.loads(str(content["space"]))
    for wrong, words in (
        (space | {"sha256": "0" * 64}, "another space"),
        (space | {"name": "novel"}, "no feature space"),
    ):
        np.savez(tmp_path / "wrong.npz", **content | {"space": np.array(json.dumps(wrong))})
        message = refused(
            cold_start.main, flags(teacher, tmp_path / "run", *frechet(tmp_path / "wrong.npz")), capsys=capsys
        )
        assert words in message and not (tmp_path / "run").exists()


def test_a_black_box_tilts_the_estimator(teacher, tmp_path, ink):
    run = run_cold_start(teacher, tmp_path / "run", "--tilt", 2, "python", ink, "--num-steps", 2)
    plain = run_cold_start(teacher, tmp_path / "plain", "--num-steps", 2)
    row = logged(run, "gui")[0]
    assert 0 < row["tilt_reward_ink"] < 1 and row["tilt_largest_weight_ink"] > 1
    assert 1 <= row["tilt_effective_samples_ink"] <= 4
    assert row["loss_fake"] == logged(plain, "gui")[0]["loss_fake"]  # unweighted, so that runs can be compared
    assert row["grad_norm_estimator"] != logged(plain, "gui")[0]["grad_norm_estimator"]


def test_both_stages_in_latent_space_with_dinov2(tmp_path):
    """The full-size path in small: VAE folder and official DINOv2 files, through both stages, hashes written down."""
    random_sit(in_channels=4).save_pretrained(tmp_path / "sit")
    vae = write_vae(tmp_path / "vae")
    backbone, head = write_dinov2(tmp_path / "dinov2", width=64, depth=4, classes=10)
    cold = run_cold_start(tmp_path / "sit", tmp_path / "cold", "--vae", vae)
    words = ["--vae", vae, "--encoder-type", "dinov2", "--dinov2-backbone", backbone, "--dinov2-head", head]
    words += ["--resume-ckpt", cold / "checkpoints/torch_units/step-3.pt", "--max-train-steps", 5]
    words += ["--reward-micro-batch", 2, "--reward-checkpointing"]
    dmdr_refl.main(flags(tmp_path / "sit", tmp_path / "dmdr", *words))
    assert logged(tmp_path / "dmdr")[-1]["grad_norm_reward_dinov2_x0"] > 0
    hashes = json.loads((tmp_path / "dmdr" / "args.json").read_text())["sha256"]
    assert hashes.keys() == {"teacher", "vae", "dinov2_backbone", "dinov2_head"}
    assert all(len(digest) == 64 for digest in hashes.values())


def test_rewards_of_all_kinds_train_together(teacher, tmp_path, real, sharp, ink, reward_folder):
    more = ["--encoder-type", "classifier", "--reward-classifier", reward_folder, "--reward", "python", 0.1, sharp]
    more += [*frechet(real), "--tilt", 1, "python", ink, "--reward-micro-batch", 2]
    row = logged(run_cold_start(teacher, tmp_path / "run", *more, "--holdout-classifier", reward_folder))[1]
    for name in ("classifier", "sharpness", "frechet"):
        assert {f"loss_reward_{name}", f"grad_norm_reward_{name}_x0", f"grad_cosine_reward_{name}_x0"} <= row.keys()
    assert {"preview_accuracy_reward_classifier", "preview_accuracy_holdout"} <= row.keys()


def test_figures_in_the_space_of_a_reward_are_warned_of(teacher, tmp_path, reward_folder, real, capsys):
    """Over two stages, through the export and the samples: a later stage without the reward does not wash it off."""
    rewarded = run_cold_start(teacher, tmp_path / "a", *frechet(real), "--max-train-steps", 1)
    later = ["--resume-ckpt", units(rewarded, 1), "--max-train-steps", 2]
    after = run_cold_start(teacher, tmp_path / "b", *later)
    plain = run_cold_start(teacher, tmp_path / "c", "--max-train-steps", 1)
    digest = sha256(reward_folder / "model.safetensors")
    made = {}
    for name, source in (
        ("folder", after / "generator"),
        ("checkpoint", units(after, 2)),
        ("plain", plain / "generator"),
    ):
        made[name] = tmp_path / f"{name}.npz"
        generate.main(argv("--generator", source, "--output", made[name], "--num-images", 10))
    images = np.load(made["plain"])["arr_0"]
    np.savez(tmp_path / "reference.npz", arr_0=images[::-1] // 2)
    for name, path in made.items():
        capsys.readouterr()
        evaluate.main(argv(path, tmp_path / "reference.npz", "--classifier", reward_folder))
        assert ("This space rewarded" in capsys.readouterr().err) == (name != "plain"), name
    recorded = json.loads((after / "generator" / "generation_config.json").read_text())
    assert recorded["rewards_sha256"] == [digest]
    # A generator can be a teacher, if that is meant, and a folder that is converted.
    student = run_cold_start(rewarded / "generator", tmp_path / "d", "--max-train-steps", 1, "--teacher-is-distilled")
    assert GenerationConfig.read(student / "generator").rewards_sha256 == [digest]
