"""Closed forms: the path, the schedules, the losses, the solvers, and the whole method on a Gaussian."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from train_cc.draws import Draws, JoinedDraws, rng_of
from train_cc.flow import interpolate, velocity, x0_from_velocity
from train_cc.objectives import (
    dmd_direction,
    dmd_loss,
    dmd_normaliser,
    velocity_matching_loss,
    velocity_matching_losses,
)
from train_cc.samplers import euler_sample, few_step_input, few_step_sample, guide, guided_rows, heun_sample
from train_cc.schedules import annealing, beta_times, dynamic_guidance_scale, renoise_density, timestep_grid


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gaussian_velocity(mu, s):
    """The exact v(x, t) = E[noise - x0 | x_t = x] for data N(mu, s^2), every pixel alone."""

    def v(x, t, y=None):
        t = t.view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * s**2 + t**2
        centred = (x - (1 - t) * mu) / variance
        return t * centred - (mu + (1 - t) * s**2 * centred)

    return v


# The path


def test_x0_comes_back_from_x_t_and_velocity():
    x0, noise, t = random(5, 2, 4, 4), random(5, 2, 4, 4, seed=1), torch.linspace(0, 1, 5)
    x_t = interpolate(x0, noise, t)
    torch.testing.assert_close(x0_from_velocity(x_t, velocity(x0, noise), t), x0)


def test_path_ends():
    x0, noise = random(2, 1, 4, 4), random(2, 1, 4, 4, seed=1)
    assert torch.equal(interpolate(x0, noise, torch.zeros(2)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(2)), noise)


# Schedules


def test_annealing_ends():
    assert annealing(0, 100) == 1.0
    assert annealing(50, 100) == pytest.approx(0.5)
    assert annealing(100, 100) == annealing(1000, 100) == 0.0
    assert annealing(0, 0) == 0.0


def test_annealing_is_a_half_cosine():
    assert annealing(25, 100) == pytest.approx(0.8535534)  # 0.5 (1 + cos(pi / 4))
    assert annealing(75, 100) == pytest.approx(0.1464466)


def test_the_real_scores_lora_fades_with_the_dynamic_phase():
    assert dynamic_guidance_scale(0.75, 1.0) == 0.75
    assert dynamic_guidance_scale(0.75, 0.4) == pytest.approx(0.3)
    assert dynamic_guidance_scale(0.75, 0.0) == 0.0


def test_renoise_density_ends():
    assert renoise_density(4, 1.5, 1.0) == (4, 1.5)
    assert renoise_density(4, 1.5, 0.0) == (1, 1)
    assert renoise_density(4, 1.5, 0.5) == (2.5, 1.25)


@pytest.mark.parametrize("a,b", [(4.0, 1.5), (1.0, 1.0), (2.5, 1.25)])
def test_beta_times_have_their_distribution(a, b):
    t = beta_times(Draws(0, 1).uniform(20_000), a, b)
    assert stats.kstest(t.numpy(), stats.beta(a, b).cdf).pvalue > 0.01


def test_timestep_grid():
    assert timestep_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = timestep_grid(4, shift=3.0)
    assert shifted[0] == 1.0 and shifted[-1] == 0.0
    assert shifted[2] == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


# Draws


def test_draws_are_a_function_of_their_key():
    assert torch.equal(Draws(1, 2, 3).noise(4), Draws(1, 2, 3).noise(4))
    keys = [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 2)]
    drawn = [Draws(*key).noise(1000) for key in keys]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.15


@pytest.mark.parametrize(
    "key,words",
    [
        ((5,), [1, 1, 5]),
        ((0,), [1, 1, 0]),
        ((5, 0), [2, 1, 5, 1, 0]),
        ((2**32 - 1,), [1, 1, 2**32 - 1]),
        ((2**32 + 5, 7), [2, 2, 5, 1, 1, 7]),
        ((3 * 2**64 + 2,), [1, 3, 2, 0, 3]),
    ],
)
def test_a_key_goes_in_behind_its_lengths(key, words):
    """Number of integers, then each with its number of words of 32 bits, lowest first: no key is another's padding."""
    low, high = np.random.SeedSequence(words).generate_state(2, np.uint32)
    assert rng_of(*key).initial_seed() == int(low) + int(high) * 2**32


def test_noise_and_numbers_have_streams_of_their_own():
    draws = Draws(5, 6)
    assert torch.equal(draws.noise(8), torch.randn(8, generator=rng_of(5, 6, 1)))
    numbers = rng_of(5, 6, 0)
    assert torch.equal(draws.integers(10, 8), torch.randint(10, (8,), generator=numbers))
    assert torch.equal(draws.uniform(8), torch.rand(8, generator=numbers, dtype=torch.float64))


def test_draws_of_one_kind_do_not_move_the_others():
    first, second = Draws(5), Draws(5)
    first.integers(10, 100)
    assert torch.equal(first.noise(8), second.noise(8))


def test_joined_draws_are_those_of_each_one_after_another():
    keys = [(5, 1), (5, 2), (5, 3)]
    for draw in (
        lambda draws, n: draws.noise(2 * n, 3),
        lambda draws, n: draws.noise_like(torch.empty(2 * n, 1, 4)),
        lambda draws, n: draws.integers(1000, 2 * n),
        lambda draws, n: draws.uniform(2 * n),
    ):
        joined = draw(JoinedDraws([Draws(*key) for key in keys]), len(keys))
        assert torch.equal(joined, torch.cat([draw(Draws(*key), 1) for key in keys]))


# Losses


def test_dmd_direction_is_the_published_quotient():
    x0, noise, v_real, v_fake = (random(3, 2, 4, 4, seed=i) for i in range(4))
    t = torch.tensor([0.1, 0.5, 0.9])
    x_t = interpolate(x0, noise, t)
    p_real, p_fake = (x0 - x0_from_velocity(x_t, v, t) for v in (v_real, v_fake))
    published = (p_real - p_fake) / p_real.abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(dmd_direction(v_real, v_fake, x0, noise), published, rtol=1e-4, atol=1e-5)


def test_dmd_gradient_identity():
    x0 = random(3, 2, 4, 4).requires_grad_()
    direction = random(3, 2, 4, 4, seed=1)
    dmd_loss(x0, direction).backward()
    torch.testing.assert_close(x0.grad, direction / x0.numel())


def test_direction_is_fp32_and_has_no_gradient():
    x0, noise, v_real, v_fake = (random(2, 1, 4, 4, seed=i).bfloat16().requires_grad_() for i in range(4))
    direction = dmd_direction(v_real, v_fake, x0, noise)
    assert direction.dtype == torch.float32 and not direction.requires_grad


def test_direction_is_normalised_per_sample():
    x0, noise, v_real, v_fake = (random(3, 1, 4, 4, seed=i) for i in range(4))
    together = dmd_direction(v_real, v_fake, x0, noise)
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(together[one], dmd_direction(v_real[one], v_fake[one], x0[one], noise[one]))
    assert dmd_normaliser(v_real, x0, noise).shape == (3, 1, 1, 1)


def test_velocity_matching_is_a_mean_a_sample():
    x0, noise, v = (random(2, 3, 4, 4, seed=i) for i in range(3))
    losses = velocity_matching_losses(v, x0, noise)
    expected = [((v[i] - (noise[i] - x0[i])) ** 2).mean().item() for i in range(2)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5) and expected[0] != pytest.approx(expected[1], rel=1e-2)
    assert velocity_matching_loss(v, x0, noise).item() == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_velocity_matching_is_zero_at_the_velocity():
    x0, noise = random(2, 1, 4, 4), random(2, 1, 4, 4, seed=1)
    assert velocity_matching_loss(velocity(x0, noise), x0, noise) == 0
    assert velocity_matching_loss(velocity(x0, noise) + 2, x0, noise) == pytest.approx(4, rel=1e-5)


# The Gaussian oracle


def test_euler_recovers_the_gaussian():
    mu, s = 0.7, 0.4
    x0 = euler_sample(gaussian_velocity(mu, s), random(64, 1, 16, 16), torch.zeros(64), num_steps=200)
    assert x0.mean().item() == pytest.approx(mu, abs=0.01)
    assert x0.std().item() == pytest.approx(s, abs=0.01)


def test_heun_is_of_second_order():
    """Halving the step quarters Heun's error and halves Euler's. The exact flow maps noise z to mu + s z."""
    mu, s = 0.7, 0.4
    noise, y = random(8, 1, 8, 8).double(), torch.zeros(8)
    errors = {
        solver: [(solver(gaussian_velocity(mu, s), noise, y, n) - (mu + s * noise)).abs().max() for n in (20, 40)]
        for solver in (euler_sample, heun_sample)
    }
    assert errors[euler_sample][0] / errors[euler_sample][1] == pytest.approx(2, rel=0.2)
    assert errors[heun_sample][0] / errors[heun_sample][1] == pytest.approx(4, rel=0.2)
    assert errors[heun_sample][1] < 0.1 * errors[euler_sample][1]


def test_few_step_sampler_with_the_exact_velocity():
    """Each step maps a spread b to slope(t) sqrt((1 - t)^2 b^2 + t^2), slope(t) x + ... being E[x0 | x_t = x]."""
    mu, s = 0.7, 0.4
    for num_steps in (1, 2, 4, 16):
        b = 0.0
        for t in timestep_grid(num_steps)[:-1]:
            slope = (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2)
            b = slope * math.sqrt((1 - t) ** 2 * b**2 + t**2)
        draws = Draws(num_steps)
        noise, y = random(64, 1, 16, 16), torch.zeros(64)
        x0 = few_step_sample(gaussian_velocity(mu, s), noise, y, num_steps, 1.0, draws.noise_like)
        assert x0.mean().item() == pytest.approx(mu, abs=0.01)
        assert x0.std().item() == pytest.approx(b, abs=0.005)


def test_dmd_converges_on_the_gaussian():
    """x0 = a + b noise, trained by this direction and loss against analytic velocities, becomes N(mu, s^2)."""
    mu, s = 0.7, 0.4
    a, b = torch.zeros((), requires_grad=True), torch.ones((), requires_grad=True)
    optimizer = torch.optim.Adam([a, b], lr=0.02, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, 400)
    for step in range(400):
        draws = Draws(7, step)
        x0 = a + b * draws.noise(64, 1, 8, 8)
        t = beta_times(draws.uniform(64), 1, 1)
        noise = draws.noise_like(x0)
        x_t = interpolate(x0.detach(), noise, t)
        v_fake = gaussian_velocity(a.detach(), b.detach())(x_t, t)
        v_real = gaussian_velocity(mu, s)(x_t, t)
        optimizer.zero_grad()
        dmd_loss(x0, dmd_direction(v_real, v_fake, x0, noise)).backward()
        optimizer.step()
        schedule.step()
    assert a.item() == pytest.approx(mu, abs=0.01)
    assert abs(b.item()) == pytest.approx(s, abs=0.01)


# Solvers


class Counted:
    def __init__(self, model):
        self.model, self.rows, self.inputs = model, [], []

    def __call__(self, x, t, y):
        self.rows.append(len(x))
        self.inputs.append((x, t, y))
        return self.model(x, t, y)


def by_class(x, t, y):
    """A velocity that depends on the class: class 9 stands for the null class."""
    return x * 0.1 + y.view(-1, 1, 1, 1).float()


def test_guidance_off_costs_one_row_a_sample():
    x, t, y = random(4, 1, 2, 2), torch.linspace(0, 1, 4), torch.arange(4)
    for scale in (1.0, 0.5, 0.0, -1.0):
        model = Counted(by_class)
        assert guide(model, 9, scale) is model
        torch.testing.assert_close(guide(model, 9, scale)(x, t, y), by_class(x, t, y))
        assert model.rows == [4]


def test_guided_rows_are_those_of_the_closed_interval():
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert guided_rows(t, 1.5, (0.25, 0.75)).tolist() == [1, 2, 3]
    assert guided_rows(t, 1.5, (0, 1)).tolist() == [0, 1, 2, 3, 4]
    for scale in (1.0, 0.5, 0.0):
        assert guided_rows(t, scale, (0, 1)).tolist() == []


def test_guidance_costs_two_rows_inside_the_interval_alone():
    x, t, y = random(4, 1, 2, 2), torch.tensor([0.0, 0.3, 0.7, 1.0]), torch.arange(4)
    model = Counted(by_class)
    v = guide(model, 9, 1.5, (0.2, 0.7))(x, t, y)
    assert model.rows == [6]
    null = by_class(x, t, torch.full_like(y, 9))
    expected = by_class(x, t, y)
    expected[1:3] = (null + 1.5 * (expected - null))[1:3]
    torch.testing.assert_close(v, expected)
    assert (model.inputs[0][2] == torch.tensor([0, 1, 2, 3, 9, 9])).all()


def test_guidance_everywhere_and_nowhere():
    x, t, y = random(3, 1, 2, 2), torch.tensor([0.1, 0.5, 0.9]), torch.arange(3)
    model = Counted(by_class)
    guide(model, 9, 2.0)(x, t, y)
    v = guide(model, 9, 2.0, (0.95, 1.0))(x, t, y)
    assert model.rows == [6, 3]
    torch.testing.assert_close(v, by_class(x, t, y))


def test_model_calls_of_the_samplers():
    noise, y = random(2, 1, 2, 2), torch.zeros(2, dtype=torch.long)
    for num_steps in (1, 2, 4):
        model = Counted(by_class)
        few_step_sample(model, noise, y, num_steps)
        assert model.rows == [2] * num_steps
    model = Counted(by_class)
    euler_sample(model, noise, y, 5)
    assert model.rows == [2] * 5


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_multi_step_training_input_is_what_inference_feeds(shift):
    """A sample trained at step i sees the x_t and the t that the sampler feeds the network at step i."""
    noise, y, num_steps = random(6, 1, 4, 4), torch.arange(6), 3
    model = Counted(by_class)
    few_step_sample(model, noise, y, num_steps, shift, Draws(3).noise_like)
    for index in (torch.zeros(6), torch.full((6,), 2), torch.tensor([0, 1, 2, 0, 1, 2])):
        x_t, t = few_step_input(by_class, noise, y, index.long(), num_steps, shift, Draws(3).noise_like)
        for row, step in enumerate(index.long().tolist()):
            x_inference, t_inference, _ = model.inputs[step]
            torch.testing.assert_close(x_t[row], x_inference[row])
            assert t[row].item() == pytest.approx(t_inference[row].item())


class Noises:
    """Counts what is drawn, and hands out the same at every call's number."""

    def __init__(self):
        self.drawn = 0

    def __call__(self, like):
        self.drawn += 1
        return random(*like.shape, seed=100 + self.drawn)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_sampler_draws_noise_between_its_steps_alone(num_steps):
    noise, y, fresh = random(2, 1, 2, 2), torch.zeros(2, dtype=torch.long), Noises()
    few_step_sample(by_class, noise, y, num_steps, 1.0, fresh)
    assert fresh.drawn == num_steps - 1


def test_two_steps_by_hand_without_a_shift():
    """x0_hat = x_t - t v at t = 1 and 1/2: the default grid."""
    noise, y, fresh = random(2, 1, 2, 2), torch.tensor([1, 2]), random(2, 1, 2, 2, seed=101)
    x0 = noise - by_class(noise, None, y)
    x_t = 0.5 * x0 + 0.5 * fresh
    expected = x_t - 0.5 * by_class(x_t, None, y)
    torch.testing.assert_close(few_step_sample(by_class, noise, y, 2, fresh_noise=Noises()), expected)
    x_input, t = few_step_input(by_class, noise, y, torch.tensor([0, 1]), 2, fresh_noise=Noises())
    torch.testing.assert_close(x_input, torch.stack([noise[0], x_t[1]]))
    assert t.tolist() == [1.0, 0.5]


def test_training_input_has_no_gradient_and_costs_no_call_more():
    weight = torch.ones((), requires_grad=True)
    model = Counted(lambda x, t, y: weight * by_class(x, t, y))
    fresh = Noises()
    noise, y = random(3, 1, 2, 2), torch.arange(3)
    x_t, _ = few_step_input(model, noise, y, torch.tensor([0, 1, 2]), 3, 1.0, fresh)
    assert not x_t.requires_grad
    assert model.rows == [2, 1] and fresh.drawn == 2


def test_one_step_training_input_is_noise_and_calls_nothing():
    noise = random(3, 1, 4, 4)
    x_t, t = few_step_input(None, noise, torch.zeros(3), torch.zeros(3, dtype=torch.long), 1)
    assert torch.equal(x_t, noise) and (t == 1).all()


def test_one_step_sample_is_noise_minus_velocity():
    noise, y = random(3, 1, 4, 4), torch.arange(3)
    torch.testing.assert_close(few_step_sample(by_class, noise, y), noise - by_class(noise, torch.ones(3), y))
    assert math.isclose(timestep_grid(1)[0], 1.0)
