"""The kind of a network, measured without data: it denoises its own samples only if it is read as it was trained.

A velocity and a DiT's eps have the same names and shapes, and so have the two directions of time. A reading maps each
noise level to the network's time and its target; `measure` samples by this reading and tests it.
"""

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from train_cc.draws import Draws
from train_cc.io.errors import InputError
from train_cc.models.networks.sit import SiT

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t, time, y) -> output


class At(NamedTuple):
    """At one noise level: x_t = alpha x0 + sigma noise, the network's time, and target = of_x0 x0 + of_noise noise."""

    alpha: float
    sigma: float
    time: float
    of_x0: float
    of_noise: float


Reading = Callable[[float], At]  # of the level u = sigma / (alpha + sigma), 0: data, 1: noise


def straight(of_x0: float, of_noise: float, reverse: bool) -> Reading:
    """x_t = (1 - u) x0 + u noise, at time u or 1 - u."""
    return lambda u: At(1 - u, u, 1 - u if reverse else u, of_x0, of_noise)


READINGS = {
    "as converted": straight(-1, 1, False),
    "with the other sign": straight(1, -1, False),
    "with reversed time": straight(-1, 1, True),
    "with the other sign and reversed time": straight(1, -1, True),  # the other --time-direction
}
RIGHT, OTHER_TIME = "as converted", "with the other sign and reversed time"


def _linear_time(angle: float) -> float:
    """The time, 0 to 999, at which DDPM's linear schedule (beta from 1e-4 to 0.02) has alpha = cos(angle)."""
    clean = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().log1p().cumsum(0).div(2).exp()
    return float((clean > math.cos(angle)).sum().clamp(max=999))


def _cosine_time(angle: float) -> float:
    return 999 * max(0.0, _arc(angle) * 1.008 - 0.008)


def _arc(angle: float) -> float:
    return angle / (math.pi / 2)


def _reversed_arc(angle: float) -> float:
    return 1 - _arc(angle)


def circular(predicts: str, time_of: Callable[[float], float], scale: float = 1) -> Reading:
    """alpha = cos(angle), sigma = sin(angle); the target: ``scale`` times eps, x0, or v = alpha noise - sigma x0."""

    def at(u: float) -> At:
        angle = math.atan2(u, 1 - u)
        alpha, sigma = math.cos(angle), math.sin(angle)
        of_x0, of_noise = {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "v": (-sigma, alpha)}[predicts]
        return At(alpha, sigma, time_of(angle), scale * of_x0, scale * of_noise)

    return at


OTHERS = {
    f"a DiT that predicts {predicts} on a DDPM path, at integer times": [
        circular(predicts, time_of) for time_of in (_linear_time, _cosine_time)
    ]
    for predicts in ("eps", "v", "x0")
} | {
    "a network that predicts eps, at times in [0, 1]": [
        *(straight(0, 1, reverse) for reverse in (False, True)),
        *(circular("eps", time_of) for time_of in (_arc, _reversed_arc)),
    ],
    # The velocity is the time derivative of x_t.
    "a flow model on a cosine path": [circular("v", _arc, math.pi / 2), circular("v", _reversed_arc, -math.pi / 2)],
}


class Measured(NamedTuple):
    """``slope``: of the output against the target's noise, at the noise end. A right reading has 1 (0 if it has none).

    ``error``: mean square against the target on own samples, over that of the best multiple of x_t: below 1 if right.
    ``shares``: of x0 in the output at a low, a middle and a high level, all of them 1 if right. If an eps is read as a
    velocity, they fall: by a factor of 4 from each to the next, if it is exact.
    ``spread``: of samples of one class over that of all; random weights sample a constant, nearly.
    """

    slope: float
    rest: float
    error: float = math.inf
    shares: tuple[float, ...] = (0.0, 0.0, 0.0)
    spread: float = 0.0

    def is_flow(self) -> bool:
        low, middle, _ = self.shares
        most = 1.35 if self.is_noise() else 2  # of data whose mean is zero, or of an eps
        right = 1 / most < low < most and 1 / most < middle < most and low < 1.5 * middle
        return abs(self.slope - 1) < 0.3 and self.error < 0.9 and right

    def is_noise(self) -> bool:
        return abs(self.slope - 1) < 0.15 and self.rest < 0.1


@torch.no_grad()
def measure(network: Network, reading: Reading, noise: Tensor, y: Tensor, num_steps: int = 6) -> Measured:
    """Sample from ``noise`` by ``reading`` in DDIM steps, noise the samples again, and compare output with target.

    ``y`` holds each label twice. If the slope at the noise end is wrong, nothing is sampled: one call instead of ten.
    """

    def output(x: Tensor, at: At) -> Tensor:
        return network(x, torch.full((len(x),), float(at.time)), y).float()

    def dot(a: Tensor, b: Tensor) -> float:
        return (a * b).mean().item()

    end = reading(1.0)
    has_noise = abs(end.of_noise) > 0.5
    out = output(noise, end) / (end.of_noise if has_noise else 1)
    slope = dot(out, noise) / dot(noise, noise)
    rest = dot(out - slope * noise, out - slope * noise)
    if not abs(slope - has_noise) < 0.5:
        return Measured(slope, rest)

    x = noise
    levels = [1 - i / num_steps for i in range(num_steps)]
    for level, below in zip([0.98, *levels[1:]], [*levels[1:], 0.0], strict=True):  # at 1 an eps says nothing of x0
        at, to = reading(level), reading(below)
        out = output(x, at)
        determinant = at.alpha * at.of_noise - at.sigma * at.of_x0
        x0 = ((at.of_noise * x - at.sigma * out) / determinant).clamp(-10, 10)
        x = to.alpha * x0 + to.sigma * ((at.alpha * out - at.of_x0 * x) / determinant).clamp(-10, 10)
    x0, draws = x, Draws(1)
    error, shares = 0.0, []
    for level in (0.2, 0.5, 0.8):
        at, fresh = reading(level), draws.noise_like(x0)
        x_t = at.alpha * x0 + at.sigma * fresh
        out, target = output(x_t, at), at.of_x0 * x0 + at.of_noise * fresh
        best = dot(target, target) - dot(target, x_t) ** 2 / dot(x_t, x_t)  # left by the best multiple of x_t
        error += dot(out - target, out - target) / max(best, 1e-12) / 3
        # A conditional mean has exactly its target's product with x_t.
        shares.append(dot(out - at.of_noise * fresh, x_t) / (dot(at.of_x0 * x0, x_t) or math.inf))
    first, second = x0[0::2], x0[1::2]
    spread = dot(first - second, first - second) / 2 / max(dot(x0, x0), 1e-12)
    return Measured(slope, rest, error, tuple(shares), spread)


def own_noise(model) -> tuple[Tensor, Tensor]:
    """At least four inputs of pure noise, more of a small network, and labels, each of them twice."""
    count = 2 * max(2, min(64, 2**12 // math.prod(model.sample_shape)))
    draws = Draws(0)
    return draws.noise(count, *model.sample_shape), draws.integers(model.null_class, count // 2).repeat_interleave(2)


def check_denoising(model, num_steps: int = 6) -> dict[str, Measured]:
    """The four readings of a flow model, each measured on its own samples: about 20 calls. No data is needed."""
    noise, y = own_noise(model)
    return {name: measure(model, reading, noise, y, num_steps) for name, reading in READINGS.items()}


def other_kind(network: Network, noise: Tensor, y: Tensor) -> str | None:
    """The kind of a network that is no flow model on the straight path, or None if no reading fits."""
    errors: dict[str, float] = {}
    for name, readings in OTHERS.items():
        for reading in readings:
            measured = measure(network, reading, noise, y)
            if "eps" in name and measured.is_noise():  # whatever its schedule
                return name
            if measured.error < 0.7 and measured.spread > 0.12:
                errors[name] = min(measured.error, errors.get(name, math.inf))
    return min(errors, key=errors.get) if errors else None


def require_noise_prediction(model) -> None:
    """Raise `InputError` if ``model``, a DiT, predicts something else at DDPM's steps.

    Read as a velocity any network would pass: v holds -x / (1 - t) whatever it predicts.
    """
    kind = other_kind(lambda x, t, y: SiT.forward(model, x, t, y), *own_noise(model))  # at DDPM's steps
    if kind is None or "eps" not in kind or "DDPM" not in kind:
        raise InputError(f"this is no DiT that predicts eps: {kind or 'no reading denoises'}; --network SiT?")


def require_denoising(model, direction: str = "data-at-0", strict: bool = True) -> None:
    """Raise `InputError` if ``model`` is no flow model read rightly; ``direction``: of its file, before conversion.

    A network of which no reading fits is refused too; without ``strict`` a warning says so.
    """
    readings = check_denoising(model)
    for name, measured in readings.items():
        shares = " ".join(f"{share:.2f}" for share in measured.shares)
        words = f", denoising error {measured.error:.3f}, shares of x0 {shares}" if measured.error < math.inf else ""
        print(f"check: read {name}: slope {measured.slope:.2f}{words}")
    if not all(math.isfinite(measured.slope) for measured in readings.values()):
        raise InputError("the converted model's outputs are not finite: its weights are no trained SiT's")
    best = min(readings, key=lambda name: readings[name].error)
    if best in (RIGHT, OTHER_TIME) and readings[best].is_flow():
        if best == RIGHT:
            return
        other = "data-at-0" if direction == "data-at-1" else "data-at-1"
        raise InputError(f"this is a flow model only if read {best}: give --time-direction {other}")
    # Conversion reversed the time of a file with data at 1; its kind shows in the network as it was.
    network = (lambda x, t, y: -model(x, 1 - t, y)) if direction == "data-at-1" else model
    if kind := other_kind(network, *own_noise(model)):
        raise InputError(f"this is {kind}; expected: a flow model, of noise - data on the straight path")
    if fits := {name: measured.error for name, measured in readings.items() if measured.is_flow()}:
        raise InputError(f"this is a flow model only if read {min(fits, key=fits.get)}, which no known file is")
    words = "the check cannot tell what this network predicts: no reading denoises"
    words += " (random or damaged weights, or a generator of few steps, which is no flow any more?)"
    if strict:
        raise InputError(words)
    print(f"warning: {words}", file=sys.stderr)
