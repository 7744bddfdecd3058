"""Solvers. A model is any callable (x, t, y) -> v with x, v (B, C, H, W), t (B,), y (B,) int64."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from train_cc.flow import interpolate, x0_from_velocity
from train_cc.schedules import timestep_grid

VelocityModel = Callable[[Tensor, Tensor, Tensor], Tensor]
SDE_LAST = 0.04  # the last step of the SDE, in SiT's and REPA's samplers whatever the number of steps


def guided_rows(t: Tensor, scale: float, interval: tuple[float, float]) -> Tensor:
    """The rows that guidance acts on and that cost a second one, for the null class; none at any scale <= 1.

    With t given on the CPU they are found without asking the device.
    """
    low, high = interval
    return ((t >= low) & (t <= high) & (scale > 1)).nonzero().flatten()


def with_null_rows(x: Tensor, t: Tensor, y: Tensor, rows: Tensor, null_class: int) -> tuple[Tensor, Tensor, Tensor]:
    """The batch, and below it once more its ``rows`` with the null class: one network call for both."""
    return torch.cat([x, x[rows]]), torch.cat([t, t[rows]]), torch.cat([y, torch.full_like(rows, null_class)])


def apply_guidance(v: Tensor, v_null: Tensor, rows: Tensor, scale: float) -> Tensor:
    """v_null + w (v - v_null) at ``rows``, v elsewhere; ``v_null`` holds these rows only."""
    return v.index_copy(0, rows, v_null + scale * (v[rows] - v_null))


def guide(
    model: VelocityModel,
    null_class: int,
    scale: float,
    interval: tuple[float, float] = (0, 1),
    channels: int | None = None,
) -> VelocityModel:
    """Classifier-free guidance: v = v_null + w (v_cond - v_null) where t lies in ``interval``, v_cond elsewhere.

    Any scale <= 1 means off and returns the model itself. Otherwise every call passes the conditional batch and the
    null rows of the samples inside the interval through the network at once: a sample outside costs one row, not two.
    ``channels``: only the first ones are guided, as the samplers of DiT and SiT guide three of four; None: all.
    """
    if scale <= 1:
        return model

    def guided(x: Tensor, t: Tensor, y: Tensor, t_cpu: Tensor | None = None) -> Tensor:
        rows = guided_rows(t if t_cpu is None else t_cpu, scale, interval).to(x.device, non_blocking=True)
        v, v_null = model(*with_null_rows(x, t, y, rows, null_class)).split([len(x), len(rows)])
        w = apply_guidance(v, v_null, rows, scale)
        return w if channels is None else torch.cat([w[:, :channels], v[:, channels:]], 1)

    guided.takes_times_on_cpu = True  # without them the host waits for those on the device
    return guided


def velocity_at(model: VelocityModel, x: Tensor, time: float, y: Tensor) -> Tensor:
    """v of the whole batch at one time, which is known without asking the device."""
    t = x.new_full((len(x),), time)
    on_cpu = [torch.full((len(x),), time, dtype=x.dtype)] if hasattr(model, "takes_times_on_cpu") else []
    return model(x, t, y, *on_cpu)


def few_step_sample(
    model: VelocityModel,
    noise: Tensor,
    y: Tensor,
    num_steps: int = 1,
    shift: float = 1.0,
    fresh_noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """The generator's sampler: x0_hat = x_t - t v, then re-noise x0_hat to the next time. -> x0 (B, C, H, W).

    One step: x0 = noise - v(noise, 1, y). ``fresh_noise`` maps x0_hat to the noise of the next step.
    """
    times = timestep_grid(num_steps, shift)
    x_t = noise
    for step in range(num_steps):
        t = noise.new_full((len(noise),), times[step])
        x0 = x0_from_velocity(x_t, velocity_at(model, x_t, times[step], y), t)
        if step + 1 < num_steps:
            x_t = interpolate(x0, fresh_noise(x0), torch.full_like(t, times[step + 1]))
    return x0


@torch.no_grad()
def few_step_input(
    model: VelocityModel,
    noise: Tensor,
    y: Tensor,
    index: Tensor,
    num_steps: int,
    shift: float = 1.0,
    fresh_noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> tuple[Tensor, Tensor]:
    """Backward simulation: what `few_step_sample` feeds the network at step ``index`` ((B,) int64, CPU). -> (x_t, t).

    The published code re-noises the x0_hat of step i itself; here the input at t_i is the re-noised x0_hat of step
    i - 1, exactly as at inference. For one step both are pure noise.
    """
    if num_steps == 1:
        return noise, noise.new_ones(len(noise))
    times = timestep_grid(num_steps, shift)
    x_t = noise
    for step in range(num_steps - 1):
        rows = (index > step).nonzero().flatten().to(noise.device, non_blocking=True)
        renoise = fresh_noise(noise)  # drawn for every row, so that a row's noise does not depend on the others' index
        # One row at the least: where weights are sharded, all processes must make the same calls.
        called = rows if len(rows) else torch.zeros_like(index[:1], device=noise.device)
        t = noise.new_full((len(called),), times[step])
        x0 = x0_from_velocity(x_t[called], model(x_t[called], t, y[called]), t)
        x_next = interpolate(x0, renoise[called], noise.new_full((len(called),), times[step + 1]))
        x_t = x_t.index_copy(0, rows, x_next[: len(rows)])
    return x_t, torch.tensor(times, dtype=noise.dtype)[index].to(noise.device, non_blocking=True)


def euler_sample(model: VelocityModel, noise: Tensor, y: Tensor, num_steps: int) -> Tensor:
    """Euler's method for dx = v dt from t = 1 to 0 in equal steps: the multi-step teacher. -> x0 (B, C, H, W)."""
    times = timestep_grid(num_steps)
    x_t = noise
    for t, t_next in itertools.pairwise(times):
        v = velocity_at(model, x_t, t, y)
        x_t = x_t + (t_next - t) * v
    return x_t


def heun_sample(model: VelocityModel, noise: Tensor, y: Tensor, num_steps: int) -> Tensor:
    """Heun's method, of second order: each step averages the velocities at both its ends. Two calls a step."""
    x_t = noise
    for t, t_next in itertools.pairwise(timestep_grid(num_steps)):
        v = velocity_at(model, x_t, t, y)
        ahead = velocity_at(model, x_t + (t_next - t) * v, t_next, y)
        x_t = x_t + (t_next - t) * 0.5 * (v + ahead)
    return x_t


def sde_sample(
    model: VelocityModel,
    noise: Tensor,
    y: Tensor,
    num_steps: int,
    fresh_noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Euler-Maruyama for dx = (v - w/2 s) dt + sqrt(w) dW from t = 1 to 0, with w(t) = 2 t. -> x0 (B, C, H, W).

    The reverse SDE of SiT (arXiv 2401.08740), as REPA's published figures are made (arXiv 2410.06940, `samplers.py`).
    The score on the straight path is s = -(x_t + (1 - t) v) / t, so that the drift is x_t + (2 - t) v. ``num_steps``
    times go from 1 to `SDE_LAST` in equal steps; the last step, to 0, adds no noise. At least two steps.
    """
    times = [1 - i * (1 - SDE_LAST) / (num_steps - 1) for i in range(num_steps)]
    x_t = noise
    for t, t_next in itertools.pairwise([*times, 0.0]):
        x_t = x_t + (t_next - t) * (x_t + (2 - t) * velocity_at(model, x_t, t, y))
        if t_next > 0:
            x_t = x_t + math.sqrt(2 * t * (t - t_next)) * fresh_noise(x_t)
    return x_t
