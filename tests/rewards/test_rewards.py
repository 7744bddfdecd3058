"""The family of rewards: from a user's file, of distributions, several at once, and without a gradient."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from evaluation import evaluate, generate
from tests.conftest import build_run, flags, logged, refused, run_cold_start, spread_lora_b
from tests.conftest import words as argv
from tests.run.test_resume import assert_same_run, units
from train_cc import cold_start
from train_cc.distillation import turns
from train_cc.draws import Draws
from train_cc.flow import interpolate
from train_cc.io.read import sha256
from train_cc.models.generator import GenerationConfig
from train_cc.objectives import dmd_direction, dmd_loss, velocity_matching_losses
from train_cc.rewards.build import PythonReward
from train_cc.rewards.spec import RewardSpec, named_apart
from train_cc.rewards.terms import Reward, effective_samples, rewards_at_x0, tilt_weights
from train_cc.schedules import beta_times

SHARP = """
def sharpness(images, labels):
    across = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    return across + down
"""
INK = """
IMAGES = "uint8"


def ink(images, labels):
    assert images.dtype.name == "uint8" and images.shape[-1] == 1 and labels.shape == (len(images),)
    return [float((image > 127).sum()) / 64 for image in images]
"""


@pytest.fixture
def sharp(tmp_path) -> str:
    (tmp_path / "sharp.py").write_text(SHARP)
    return f"{tmp_path / 'sharp.py'}:sharpness"


@pytest.fixture
def ink(tmp_path) -> str:
    (tmp_path / "ink.py").write_text(INK)
    return f"{tmp_path / 'ink.py'}:ink"


# A reward of ten lines from a file outside the package


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


@pytest.mark.parametrize(
    "more,words",
    [
        (["--reward", "novel", 1], "the kind is 'novel'"),
        (["--reward", "frechet", -1, "x.npz"], "the number is -1"),
        (["--reward", "frechet", "nan", "x.npz"], "finite"),
        (["--reward", "frechet", 1], "expected are frechet NUMBER SOURCE"),
        (["--reward", "dinov2", 1, "x"], "expected are dinov2 NUMBER"),
        (["--reward", "python", 1, "file.py"], "FILE.py:FUNCTION"),
        (["--reward", "python", 1, "nowhere.py:f"], "is not there"),
        (["--reward", "frechet", 1, "nowhere.npz"], "nowhere.npz does not exist"),
        (["--tilt", 0, "python", "x.py:f"], "the number is 0"),
        (["--tilt", 1, "frechet", "x.npz"], "the kind is 'frechet'"),
        (["--reward", "python", 1, "x.py:f", "--tilt", 1, "python", "x.py:f"], "given twice"),
    ],
)
def test_what_cannot_be_a_reward_is_refused(teacher, tmp_path, capsys, more, words):
    assert words in refused(cold_start.main, flags(teacher, tmp_path / "run", *more), capsys=capsys)
    assert not (tmp_path / "run").exists()


def test_names_and_what_none_sets_aside():
    specs = [RewardSpec("classifier", 1, "a"), RewardSpec("classifier", 1, "b"), RewardSpec("python", 1, "f.py:sharp")]
    assert named_apart(specs) == ["classifier", "classifier_2", "sharp"]
    functions = [RewardSpec("python", 1, f"f.py:{name}") for name in ("sharp_2", "sharp", "sharp", "sharp_2_b")]
    assert named_apart(functions) == ["sharp_2", "sharp", "sharp_3", "sharp_2_b"]
    parser = cold_start.stage_parser()
    base = ["--teacher", "t", "--output-dir", "o", "--reward", "frechet", "1", "x.npz"]
    assert parser.parse_args([*base, "--encoder-type", "none"]).reward == []
    assert len(parser.parse_args([*base, "--encoder-type", "none", "--reward", "dinov2", "1"]).reward) == 1


def test_several_rewards_share_one_decode_and_add_up():
    decoded, x0, y = [], torch.randn(5, 1, 4, 4), torch.zeros(5, dtype=torch.long)

    def decode(x):
        decoded.append(len(x))
        return x.tanh()

    rewards = [
        Reward("mean", 1.0, lambda images, y: (images.mean(dim=(1, 2, 3)), {})),
        Reward("square", 1.0, lambda images, y: (images.square().sum(dim=(1, 2, 3)), {})),
    ]
    first, second = rewards_at_x0(rewards, decode, x0, y, micro_batch=2)
    assert decoded == [2, 2, 1]
    free = x0.clone().requires_grad_()
    for found, loss in ((first, free.tanh().mean(dim=(1, 2, 3))), (second, free.tanh().square().sum(dim=(1, 2, 3)))):
        (expected,) = torch.autograd.grad(loss.mean(), free)
        assert expected.norm() > 0
        torch.testing.assert_close(found.gradient, expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.losses, loss.detach(), rtol=1e-5, atol=1e-6)


# Of a distribution


def frechet(real, *more):
    return ["--reward", "frechet", 1, real, "--frechet-window", 200, *more]


def test_the_frechet_reward_trains_and_its_distance_is_logged(teacher, tmp_path, real):
    run = run_cold_start(teacher, tmp_path / "run", *frechet(real), "--max-train-steps", 5, "--batch-size", 16)
    rows = logged(run)
    assert all(row["frechet"] > 0 for row in rows)
    assert [row["scale_frechet"] > 0 for row in rows] == [False, False, False, True, True]
    assert [row["grad_norm_reward_frechet_x0"] > 0 for row in rows] == [False, False, False, True, True]
    log = (run / "log.txt").read_text()
    assert "WARNING: --frechet-window 200 is short" in log


def test_features_are_never_taken_under_autocast(teacher, tmp_path, real, monkeypatch):
    """Neither those that fill the window before the first update, nor later ones: they are fp32's."""
    plain, seen = turns.observe_batches, []

    def watched(*given):
        seen.append(torch.is_autocast_enabled("cpu"))
        return plain(*given)

    monkeypatch.setattr(turns, "observe_batches", watched)
    AcceleratorState._reset_state(True)
    try:
        run_cold_start(teacher, tmp_path / "run", *frechet(real), "--mixed-precision", "bf16", "--max-train-steps", 1)
    finally:
        AcceleratorState._reset_state(True)
    assert len(seen) > 10 and not any(seen)


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


# Without a gradient


def test_tilt_weights():
    r = torch.tensor([0.0, 1.0, 2.0, 50.0])
    w = tilt_weights(r, 0.5, clip=1e9)
    assert w.mean().item() == pytest.approx(1)
    assert (w[0] / w[1]).item() == pytest.approx(math.exp(0.5)) and (w[1] / w[2]).item() == pytest.approx(math.exp(0.5))
    assert tilt_weights(torch.cat([torch.zeros(1), torch.full((99,), 50.0)]), 1.0).max() == 10
    assert effective_samples(torch.ones(8)) == 8 and effective_samples(torch.tensor([1.0, 0, 0])) == 1


def test_the_fixed_point_of_a_tilt_has_the_tilted_weights():
    """Two modes, the teacher at 1/2 each, r = 1 in the right one: tilted, that has e^beta / (1 + e^beta).

    At a generator of these weights the minimiser of the tilted velocity matching loss, here by bins of x_t, is the
    teacher's velocity, so that matching rests; at the teacher's own weights it is not.
    """
    beta, spread, time, count = 1.0, 0.3, torch.tensor([0.7]), 400_000
    rng = torch.Generator().manual_seed(0)

    def teacher_velocity(x_t: torch.Tensor) -> torch.Tensor:
        """E (noise - x0 | x_t) of the mixture: by mode, x0 = m + k (x_t - (1 - t) m)."""
        t = time.item()
        variance = ((1 - t) * spread) ** 2 + t**2
        means = torch.tensor([-1.0, 1.0])
        mode = torch.softmax(-((x_t[:, None] - (1 - t) * means) ** 2) / (2 * variance), dim=1)
        x0 = (mode * (means + (1 - t) * spread**2 / variance * (x_t[:, None] - (1 - t) * means))).sum(dim=1)
        return (x_t - x0) / t  # noise - x0 with noise = (x_t - (1 - t) x0) / t

    gaps = []
    for share in (math.e / (1 + math.e), 0.5):
        right = torch.rand(count, generator=rng) < share
        x0 = right * 2.0 - 1 + spread * torch.randn(count, generator=rng)
        noise = torch.randn(count, generator=rng)
        x_t, w = (1 - time) * x0 + time * noise, tilt_weights(right.float(), beta)
        assert (w * right).sum() / w.sum() == pytest.approx(0.5, abs=0.01) or share == 0.5
        places = torch.linspace(-1.5, 1.5, 31)
        bins = torch.bucketize(x_t, places)
        total = torch.zeros(32).index_add_(0, bins, w)
        fake = torch.zeros(32).index_add_(0, bins, w * (noise - x0)) / total
        real = torch.zeros(32).index_add_(0, bins, w * teacher_velocity(x_t)) / total
        gaps.append((fake - real)[1:-1].abs().max().item())
    assert gaps[0] < 0.05 < 0.2 < gaps[1]


def test_a_black_box_tilts_the_estimator(teacher, tmp_path, ink):
    run = run_cold_start(teacher, tmp_path / "run", "--tilt", 2, "python", ink, "--num-steps", 2)
    plain = run_cold_start(teacher, tmp_path / "plain", "--num-steps", 2)
    row = logged(run, "gui")[0]
    assert 0 < row["tilt_reward_ink"] < 1 and row["tilt_largest_weight_ink"] > 1
    assert 1 <= row["tilt_effective_samples_ink"] <= 4
    assert row["loss_fake"] == logged(plain, "gui")[0]["loss_fake"]  # unweighted, so that runs can be compared
    assert row["grad_norm_estimator"] != logged(plain, "gui")[0]["grad_norm_estimator"]


def test_a_tilt_weighs_each_samples_loss(teacher, tmp_path, ink):
    """The estimator's gradient is that of the mean of w_i l_i, over both accumulated batches."""
    run = build_run(teacher, tmp_path / "run", "--tilt", 2, "python", ink, "--gradient-accumulation-steps", 2)
    spread_lora_b(run.estimator)
    batches = turns.estimator_batches(run, 0)[0]
    weights, _ = turns.tilt_batches(run, batches)
    rewards = torch.cat([((run.decode(x0) * 255).round() > 127).float().mean(dim=(1, 2, 3)) for _, _, x0 in batches])
    expected = torch.exp(-2 * (rewards - rewards.mean()))
    torch.testing.assert_close(torch.cat(weights), expected / expected.mean(), rtol=1e-5, atol=1e-6)
    assert len(weights) == 2 and torch.cat(weights).std() > 0
    losses = []

    def kept(*args, _real=turns.velocity_matching_losses):
        losses.append(_real(*args))
        return losses[-1]

    turns.velocity_matching_losses, real = kept, turns.velocity_matching_losses
    try:
        turns.estimator_turn(run, 0, turns.estimator_batches(run, 0)[0])
    finally:
        turns.velocity_matching_losses = real
    found = {name: p.grad.clone() for name, p in run.estimator.named_parameters() if p.grad is not None}
    assert found and all(gradient.norm() > 0 for gradient in found.values())
    run.estimator.zero_grad()
    for draws, (own, (_, y, x0)) in enumerate(zip(weights, batches, strict=True)):
        fresh = turns.chunk_draws(run, turns.ESTIMATOR_TURN, 0, draws)
        fresh.integers(run.num_classes, len(y)), fresh.noise(len(y), *run.sample_shape), fresh.integers(1, len(y))
        x_t, noise, _, t = turns.renoise(run, fresh, x0, 1.0)
        v = run.estimator(x_t, t, y, lora_scale=run.method.lora_scale_fake)
        ((real(v, x0, noise) * own).mean() / 2).backward()
    for name, p in run.estimator.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-7)


def test_rewards_of_all_kinds_train_together(teacher, tmp_path, real, sharp, ink, reward_folder):
    words = ["--encoder-type", "classifier", "--reward-classifier", reward_folder, "--reward", "python", 0.1, sharp]
    words += [
        *frechet(real),
        "--tilt",
        1,
        "python",
        ink,
        "--reward-micro-batch",
        2,
        "--holdout-classifier",
        reward_folder,
    ]
    run = run_cold_start(teacher, tmp_path / "run", *words)
    row = logged(run)[1]
    for name in ("classifier", "sharpness", "frechet"):
        assert {f"loss_reward_{name}", f"grad_norm_reward_{name}_x0", f"grad_cosine_reward_{name}_x0"} <= row.keys()
    assert "preview_accuracy_reward_classifier" in row and "preview_accuracy_holdout" in row
    assert units(run, 3).exists()


def two_modes(share: torch.Tensor, spread: float = 0.2):
    """The velocity of (1 - share) N(-1, spread^2) + share N(1, spread^2), in closed form."""

    def velocity(x, t):
        t = t.float().view(-1, 1, 1, 1)
        keep, variance = 1 - t, ((1 - t) * spread) ** 2 + t**2
        of_mode = [(-1.0, torch.log(1 - share)), (1.0, torch.log(share))]
        which = torch.stack([log - (x - keep * mode) ** 2 / (2 * variance) for mode, log in of_mode]).softmax(dim=0)
        shrink = keep * spread**2 / variance
        x0 = sum(part * (mode + shrink * (x - keep * mode)) for part, (mode, _) in zip(which, of_mode, strict=True))
        return (x - x0) / t

    return velocity


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_tilts_fixed_point_is_the_tilted_teacher(beta):
    """Two modes, reward 1 at the right one: its share becomes that of p_teacher exp(beta r) / Z, within 5 %.

    The fake score learns its share by the weighted loss; the generator, a threshold on its noise, by matching.
    """
    teacher, steps = torch.tensor(0.3), 300
    threshold, logit = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    optimizers = [torch.optim.Adam([threshold], lr=0.05), torch.optim.Adam([logit], lr=0.1)]
    decays = [torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, steps) for optimizer in optimizers]

    def sample(draws):
        z = draws.noise(1024, 1, 1, 2)
        return torch.tanh(30 * (z[..., :1] - threshold)) + 0.2 * z[..., 1:]

    for step in range(steps):
        for turn in range(2):
            draws = Draws(3, step, turn)
            x0 = sample(draws).detach()
            t, noise = beta_times(draws.uniform(len(x0)), 1, 1), draws.noise_like(x0)
            weights = tilt_weights((x0.flatten() > 0).float(), beta)
            optimizers[1].zero_grad()
            v = two_modes(logit.sigmoid())(interpolate(x0, noise, t), t)
            (velocity_matching_losses(v, x0, noise) * weights).mean().backward()
            optimizers[1].step()
        draws = Draws(3, step, 2)
        x0 = sample(draws)
        t, noise = beta_times(draws.uniform(len(x0)), 1, 1), draws.noise_like(x0)
        x_t = interpolate(x0.detach(), noise, t)
        v_real, v_fake = two_modes(teacher)(x_t, t), two_modes(logit.detach().sigmoid())(x_t, t)
        optimizers[0].zero_grad()
        dmd_loss(x0, dmd_direction(v_real, v_fake, x0, noise)).backward()
        optimizers[0].step()
        for decay in decays:
            decay.step()
    share = 1 - torch.special.ndtr(threshold.detach()).item()
    assert share == pytest.approx(0.3 * math.exp(beta) / (0.3 * math.exp(beta) + 0.7), rel=0.05)


# What rewarded a generator is written down, for those who judge it


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
