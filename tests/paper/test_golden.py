"""Two updates with everything on, against METHOD.md restated in plain torch: each turn's inputs, and all weights.

The restatement uses the product's SiT forward and its stateless draws, and nothing else of it: flow, schedules, LoRA,
guidance, direction, reward, clipping, AdamW and average are written again, in float64.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from scipy.special import betaincinv
from torch.func import functional_call
from torch.nn import functional as F

from tests.conftest import TINY, assert_close_and_not_zero, build_run, logged, spread_lora_b, trained
from train_cc.distillation import loop
from train_cc.draws import Draws
from train_cc.models import SiT
from train_cc.models.classifier import ImageClassifier

# Every value differs from its neighbour's and from the default: none can stand for another.
P = SimpleNamespace(
    seed=11,
    first=2,  # global_step of the first update: c is neither 0 nor 1
    updates=2,
    batch=8,
    chunks=2,
    ratio=2,
    steps=2,
    shift=3.0,
    dynamic=5,
    alpha=4.0,
    beta=1.5,
    fake=2.0,
    real=0.75,
    guidance=1.7,
    interval=(0.35, 0.7),
    reward=12.0,
    rate=(1e-3, 3e-3),  # generator, estimator
    decay=(0.3, 0.2),
    betas=(0.8, 0.95),
    epsilon=1e-3,  # far below the gradients a rounding of almost zero would be a step of full size
    clip=0.03,
    ema=0.2,  # between the first two decays of the warm-up, 2 / 11 and 3 / 12
)
CLASSES = TINY["num_classes"]
ESTIMATOR, GENERATOR = 1, 2  # which turn draws


def golden_flags(reward_folder) -> list:
    return [
        *("--seed", P.seed, "--max-train-steps", P.first + P.updates, "--checkpoint-steps", 100, "--num-previews", 0),
        *("--batch-size", P.batch, "--gradient-accumulation-steps", P.chunks, "--ratio-update", P.ratio),
        *("--num-steps", P.steps, "--timestep-shift", P.shift, "--dynamic-steps", P.dynamic),
        *("--renoise-alpha", P.alpha, "--renoise-beta", P.beta),
        *("--lora-scale-fake", P.fake, "--lora-scale-real", P.real),
        *("--real-guidance-scale", P.guidance, "--real-guidance-interval", *P.interval),
        *("--encoder-type", "classifier", "--reward-classifier", reward_folder, "--reward-weight", P.reward),
        *("--learning-rate-generator", P.rate[0], "--learning-rate-estimator", P.rate[1]),
        *("--weight-decay-generator", P.decay[0], "--weight-decay-estimator", P.decay[1]),
        *("--adam-beta1", P.betas[0], "--adam-beta2", P.betas[1], "--adam-epsilon", P.epsilon),
        *("--max-grad-norm", P.clip, "--ema-decay", P.ema),
    ]


# What the product does: all that these tests know of its insides


def product(teacher, output, reward_folder) -> SimpleNamespace:
    """Two updates of the real loop. -> the weights before and after, and every call of the estimator."""
    run = build_run(teacher, output, *golden_flags(reward_folder))
    spread_lora_b(run.estimator)
    run.step = P.first
    before = (trained(run.generator), trained(run.estimator))
    calls, forward = [], run.estimator.forward

    def recorded(x, t, y, lora_scale):
        scales = torch.as_tensor(lora_scale).expand(len(x)).clone()
        calls.append(SimpleNamespace(x=x.detach(), t=t, y=y, scale=scales, learns=torch.is_grad_enabled()))
        return forward(x, t, y, lora_scale=lora_scale)

    run.estimator.forward = recorded
    loop.train(run)
    rows = [logged(run.output.output_dir, name) for name in ("gen", "gui")]
    optimizers = [run.generator_optimizer.param_groups, run.estimator_optimizer.param_groups]
    after = (trained(run.generator), trained(run.estimator))
    return SimpleNamespace(before=before, after=after, ema=run.ema.values, calls=calls, groups=optimizers, rows=rows)


# The method, restated


def c_of(k: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(k / P.dynamic, 1)))


def times_of(uniform: torch.Tensor, k: int) -> torch.Tensor:
    """t ~ Beta(1 + (a - 1) c, 1 + (b - 1) c), rounded to the fp32 that the networks are given."""
    a, b = 1 + (P.alpha - 1) * c_of(k), 1 + (P.beta - 1) * c_of(k)
    return torch.from_numpy(betaincinv(a, b, uniform.numpy())).float().double()


def at(t: torch.Tensor) -> torch.Tensor:
    return t[:, None, None, None]


class Adam:
    """AdamW with decoupled decay, after clipping to a norm of ``P.clip``."""

    def __init__(self, parameters: dict, rate: float, decay: float):
        self.rate, self.decay, self.count, self.norms = rate, decay, 0, []
        self.m = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.v = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def step(self, parameters: dict, gradients: dict) -> dict:
        self.norms.append(math.sqrt(sum(g.square().sum().item() for g in gradients.values())))
        factor = min(1.0, P.clip / (self.norms[-1] + 1e-6))
        self.count += 1
        (one, two), new = P.betas, {}
        for name, p in parameters.items():
            g = gradients[name] * factor
            self.m[name] = one * self.m[name] + (1 - one) * g
            self.v[name] = two * self.v[name] + (1 - two) * g.square()
            m, v = self.m[name] / (1 - one**self.count), self.v[name] / (1 - two**self.count)
            new[name] = p * (1 - self.rate * self.decay) - self.rate * m / (v.sqrt() + P.epsilon)
        return new


class Restated:
    def __init__(self, teacher, reward_folder, generator: dict, lora: dict):
        self.network = SiT.from_pretrained(teacher).double().requires_grad_(False)
        self.teacher = dict(self.network.named_parameters())
        self.generator = {name: p.double() for name, p in generator.items()}
        self.lora = {name: p.double() for name, p in lora.items()}
        self.classifier = copy.deepcopy(ImageClassifier.from_pretrained(reward_folder).network).double()
        self.optimizers = (
            Adam(self.generator, P.rate[0], P.decay[0]),
            Adam(self.lora, P.rate[1], P.decay[1]),
        )
        self.ema, self.ema_updates = dict(self.generator), 0
        self.times, self.guided, self.norms_at_x0, self.losses = [], [], [], ([], [])  # losses: a chunk
        self.figures = []

    def velocity(self, weights: dict, x, t, y):
        return functional_call(self.network, weights, (x, t, y))

    def score(self, lora: dict, scale: float, x, t, y):
        """The teacher with W + scale B A in place of each W that LoRA adapts."""
        weights = dict(self.teacher)
        for name, a in lora.items():
            if "lora_A" in name:
                base = name.removeprefix("network.").replace(".lora_A.default", "")
                weights[base] = weights[base] + scale * lora[name.replace("lora_A", "lora_B")] @ a
        return self.velocity(weights, x, t, y)

    def sample(self, weights: dict, draws: Draws, y):
        """x0 at a uniformly drawn step i of two: noise at t = 1, or x0_hat of step 0 re-noised to t_1."""
        shape = (P.batch, 1, 8, 8)
        noise, i = draws.noise(*shape).double(), draws.integers(P.steps, P.batch)
        t_1 = torch.tensor(P.shift * 0.5 / (1 + (P.shift - 1) * 0.5)).double()
        ones, t = torch.ones(P.batch).double(), torch.where(i == 0, 1.0, t_1)
        with torch.no_grad():
            x0_hat = noise - self.velocity(weights, noise, ones, y)
            renoised = (1 - t_1) * x0_hat + t_1 * draws.noise(*shape).double()
        x_t = torch.where(at(i) == 0, noise, renoised)
        return x_t - at(t) * self.velocity(weights, x_t, t, y)

    def renoised(self, draws: Draws, x0, k: int):
        t = times_of(draws.uniform(P.batch), k)
        noise = draws.noise(*x0.shape).double()
        self.times.append(t)
        return (1 - at(t)) * x0 + at(t) * noise, noise, t

    def estimator_turn(self, k: int, turn: int):
        lora = {name: p.clone().requires_grad_() for name, p in self.lora.items()}
        for chunk in range(P.chunks):
            draws = Draws(P.seed, ESTIMATOR, k * P.ratio + turn, chunk)
            y = draws.integers(CLASSES, P.batch)
            with torch.no_grad():
                x0 = self.sample(self.generator, draws, y)
            x_t, noise, t = self.renoised(draws, x0, k)
            error = self.score(lora, P.fake, x_t, t, y) - (noise - x0)
            loss = error.square().mean()
            (loss / P.chunks).backward()
            self.losses[1].append(loss.item())
        gradients = {name: p.grad for name, p in lora.items()}
        self.lora = self.optimizers[1].step(self.lora, gradients)

    def generator_turn(self, k: int):
        weights = {name: p.clone().requires_grad_() for name, p in self.generator.items()}
        for chunk in range(P.chunks):
            draws = Draws(P.seed, GENERATOR, k, chunk)
            y = draws.integers(CLASSES, P.batch)
            x0 = self.sample(weights, draws, y)
            x_t, noise, t = self.renoised(draws, x0.detach(), k)
            with torch.no_grad():
                direction = self.direction(x_t, noise, t, y, x0, k)
            loss = 0.5 * (x0 - (x0 - direction).detach()).square().mean()
            images = ((x0 + 1) / 2).clamp(0, 1)
            images = F.interpolate(images, (32, 32), mode="bicubic", antialias=True)
            loss_reward = P.reward * F.cross_entropy(self.classifier((images - 0.5) / 0.5), y)
            parts = [torch.autograd.grad(each, x0, retain_graph=True)[0].norm().item() for each in (loss, loss_reward)]
            self.norms_at_x0.append(parts)
            ((loss + loss_reward) / P.chunks).backward()
            self.losses[0].append((loss.item(), loss_reward.item() / P.reward))
        gradients = {name: p.grad for name, p in weights.items()}
        self.generator = self.optimizers[0].step(self.generator, gradients)
        self.ema_updates += 1
        decay = min(P.ema, (1 + self.ema_updates) / (10 + self.ema_updates))
        self.ema = {name: decay * old + (1 - decay) * self.generator[name] for name, old in self.ema.items()}

    def direction(self, x_t, noise, t, y, x0, k: int):
        real = P.real * c_of(k)
        v_fake, v_real = self.score(self.lora, P.fake, x_t, t, y), self.score(self.lora, real, x_t, t, y)
        v_null = self.score(self.lora, real, x_t, t, torch.full_like(y, CLASSES))
        inside = (t >= P.interval[0]) & (t <= P.interval[1])
        self.guided.append(inside)
        v_real = torch.where(at(inside), v_null + P.guidance * (v_real - v_null), v_real)
        normaliser = (v_real - (noise - x0)).abs().mean(dim=(1, 2, 3), keepdim=True)
        self.figures.append(((v_real - v_fake).abs().mean().item(), normaliser.mean().item(), t.mean().item()))
        return (v_real - v_fake) / normaliser


@pytest.fixture(scope="module")
def golden(teacher, reward_folder, tmp_path_factory):
    """-> (what the product did, what the method says)"""
    done = product(teacher, tmp_path_factory.mktemp("golden") / "run", reward_folder)
    told = Restated(teacher, reward_folder, *done.before)
    for k in range(P.first, P.first + P.updates):
        for turn in range(P.ratio):
            told.estimator_turn(k, turn)
        told.generator_turn(k)
    return done, told


def test_the_case_has_everything_in_it(golden):
    """What is compared is not zero, and every switch of the method is met on both its sides."""
    _, told = golden
    assert all(0.05 < c_of(k) < 0.95 for k in range(P.first, P.first + P.updates))
    assert all(norm > 1.5 * P.clip for optimizer in told.optimizers for norm in optimizer.norms)
    assert all(0.1 < of_reward / of_matching < 10 for of_matching, of_reward in told.norms_at_x0)
    t, inside = torch.cat(told.times[2 * P.chunks :: 6]), torch.cat(told.guided)
    assert inside.any() and (t < P.interval[0]).any() and (t > P.interval[1]).any()
    assert 2 / 11 < P.ema < 3 / 12


def turns_of(done) -> list[tuple[str, int, SimpleNamespace]]:
    """The estimator's calls in their order: (turn, k, call)."""
    order = [
        (turn, k)
        for k in range(P.first, P.first + P.updates)
        for turn in [ESTIMATOR] * P.ratio * P.chunks + [GENERATOR] * P.chunks
    ]
    return [(turn, k, call) for (turn, k), call in zip(order, done.calls, strict=True)]


def test_every_turn_has_its_times_labels_and_scales(golden):
    done, told = golden
    guided = iter(told.guided)
    for (turn, k, call), t in zip(turns_of(done), told.times, strict=True):
        assert call.learns == (turn == ESTIMATOR)
        assert torch.equal(call.t[: P.batch].double(), t), f"t at k = {k}"
        if turn == ESTIMATOR:
            assert len(call.x) == P.batch and (call.scale == P.fake).all() and (call.y < CLASSES).all()
            continue
        inside = next(guided)
        rows = [P.batch, P.batch, int(inside.sum())]
        assert len(call.x) == sum(rows)
        fake, real, null = (
            SimpleNamespace(x=x, t=t, y=y, scale=scale)
            for x, t, y, scale in zip(*(getattr(call, n).split(rows) for n in ("x", "t", "y", "scale")), strict=True)
        )
        assert torch.equal(fake.x, real.x) and torch.equal(fake.t, real.t) and torch.equal(fake.y, real.y)
        assert torch.equal(null.x, fake.x[inside]) and torch.equal(null.t, fake.t[inside])
        assert (null.y == CLASSES).all() and (fake.y < CLASSES).all()
        assert (fake.scale == P.fake).all()
        torch.testing.assert_close(torch.cat([real.scale, null.scale]), torch.full((sum(rows[1:]),), P.real * c_of(k)))


def test_every_class_is_drawn_and_no_draw_comes_twice(golden):
    done, _ = golden
    firsts = [SimpleNamespace(x=c.x[: P.batch], t=c.t[: P.batch], y=c.y[: P.batch]) for c in done.calls]
    for turn in (ESTIMATOR, GENERATOR):
        labels = torch.cat([first.y for (kind, *_), first in zip(turns_of(done), firsts, strict=True) if kind == turn])
        assert set(labels.tolist()) == set(range(CLASSES))
    for i, one in enumerate(firsts):
        for other in firsts[:i]:
            assert not torch.equal(one.y, other.y) and not torch.isin(one.t, other.t).any()
            correlation = torch.corrcoef(torch.stack([one.x.flatten(), other.x.flatten()]))[0, 1]
            assert abs(correlation) < 0.9


def test_each_network_has_its_own_rate_and_decay(golden):
    done, _ = golden
    for groups, rate, decay in zip(done.groups, P.rate, P.decay, strict=True):
        (group,) = groups
        assert (group["lr"], group["weight_decay"], group["eps"]) == (rate, decay, P.epsilon)
        assert tuple(group["betas"]) == P.betas


def test_the_logged_losses_and_norms_are_those_of_the_method(golden):
    """Norms are from before the clipping, which hides the size of a gradient from the weights."""
    done, told = golden
    for rows, optimizer, role in zip(done.rows, told.optimizers, ("generator", "estimator"), strict=True):
        assert [row[f"grad_norm_{role}"] for row in rows] == pytest.approx(optimizer.norms, rel=1e-4)
    fake = torch.tensor(told.losses[1]).view(-1, P.chunks).mean(dim=1)
    dmd, reward = torch.tensor(told.losses[0]).view(-1, P.chunks, 2).mean(dim=1).T
    assert [row["loss_fake"] for row in done.rows[1]] == pytest.approx(fake.tolist(), rel=1e-4)
    assert [row["loss_dmd"] for row in done.rows[0]] == pytest.approx(dmd.tolist(), rel=1e-4)
    figures = torch.tensor(told.figures).view(-1, P.chunks, 3).mean(dim=1).tolist()
    for row, expected in zip(done.rows[0], figures, strict=True):
        assert [row[name] for name in ("score_gap", "normaliser", "t_mean")] == pytest.approx(expected, rel=1e-4)
    assert [row["loss_reward_classifier"] for row in done.rows[0]] == pytest.approx(reward.tolist(), rel=1e-4)


@pytest.mark.parametrize("which", ["generator", "lora", "ema"])
def test_the_weights_are_those_of_the_method(golden, which):
    """The change of every tensor, to 3e-4 of itself: fp32 against float64 after two updates."""
    done, told = golden
    start = {"generator": done.before[0], "lora": done.before[1], "ema": done.before[0]}[which]
    actual = {"generator": done.after[0], "lora": done.after[1], "ema": done.ema}[which]
    expected = {"generator": told.generator, "lora": told.lora, "ema": told.ema}[which]
    assert actual.keys() == expected.keys() == start.keys() and len(start) >= 4
    for name, before in start.items():
        moved = expected[name] - before.double()
        assert_close_and_not_zero(actual[name].double() - before.double(), moved, 3e-4, name)
