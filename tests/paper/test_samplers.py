"""train_cc/samplers.py: the SDE against the law that its steps have, and guidance of some channels.

The other solvers: test_math.py."""

import itertools
import math

import numpy as np
import pytest
import torch

from tests.paper.test_math import gaussian_velocity
from train_cc.draws import Draws
from train_cc.samplers import guide, sde_sample


def law_of_the_sde(mu: float, s: float, num_steps: int) -> tuple[float, float]:
    """Mean and deviation after ``num_steps`` of Euler-Maruyama for N(mu, s^2) by its true score.

    x_t is N((1 - t) mu, (1 - t)^2 s^2 + t^2); the reverse SDE is dx = (v - w/2 score) dt + sqrt(w) dW, w = 2 t;
    the last step adds no noise.
    """
    mean, variance, times = 0.0, 1.0, [*np.linspace(1, 0.04, num_steps), 0.0]
    for t, t_next in itertools.pairwise(times):
        m, var, step = (1 - t) * mu, (1 - t) ** 2 * s**2 + t**2, t - t_next
        slope_v, slope_score = (t - (1 - t) * s**2) / var, -1 / var  # of E[noise - x0 | x_t] and of the score
        slope = slope_v - t * slope_score
        mean -= step * (-mu + slope * (mean - m))
        variance = (1 - step * slope) ** 2 * variance + (2 * t * step if t_next else 0)
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("num_steps", [2, 10, 60])
def test_the_sde_samples_the_law_that_its_steps_have(num_steps):
    draws = Draws(num_steps)
    noise = draws.noise(64, 1, 32, 32)
    x0 = sde_sample(gaussian_velocity(0.7, 0.4), noise, torch.zeros(64), num_steps, draws.noise_like)
    mean, deviation = law_of_the_sde(0.7, 0.4, num_steps)
    error = deviation / 256  # of the mean of 64 x 32 x 32 numbers
    assert x0.mean().item() == pytest.approx(mean, abs=4 * error)
    assert x0.std().item() == pytest.approx(deviation, abs=3 * error)


def test_that_law_converges_to_the_data():
    """More steps, a smaller error, down to that of the last step, which is .04 long whatever their number."""
    laws = [law_of_the_sde(0.7, 1.0, num_steps) for num_steps in (5, 20, 250)]
    errors = [max(abs(mean - 0.7), abs(deviation - 1)) for mean, deviation in laws]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.01


def test_guidance_in_the_sde_follows_its_interval():
    """Calls with null rows are those at t in the interval; the times go from 1 to 0.04."""
    rows, times = [], []

    def model(x, t, y):
        rows.append(len(x)), times.append(t[0].item())
        return gaussian_velocity(0.7, 0.4)(x, t)

    noise, y = torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.long)
    sde_sample(guide(model, 9, 1.8, (0.0, 0.7)), noise, y, 250)
    assert np.allclose(times, np.linspace(1, 0.04, 250), atol=1e-6)
    assert rows == [4 if t <= 0.7 else 2 for t in times] and rows.count(4) == 172


def test_the_first_channels_are_guided():
    x, t, y = torch.randn(3, 4, 2, 2), torch.tensor([0.1, 0.5, 0.9]), torch.arange(3)

    def by_class(x, t, y):
        return x * 0.1 + y.view(-1, 1, 1, 1)

    plain, every = by_class(x, t, y), guide(by_class, 9, 1.5, (0, 0.6))(x, t, y)
    three = guide(by_class, 9, 1.5, (0, 0.6), 3)(x, t, y)
    assert torch.equal(three[:, :3], every[:, :3]) and torch.equal(three[:, 3:], plain[:, 3:])
    assert not torch.equal(three[:, 3:], every[:, 3:])
    assert torch.equal(guide(by_class, 9, 1.5, (0, 0.6), 4)(x, t, y), every)
