"""Whether converted weights are read rightly: a flow model denoises what it samples itself, and only if read so."""

import math

import torch

from train_cc.draws import Draws
from train_cc.flow import interpolate
from train_cc.io.errors import InputError
from train_cc.models.sit import SiT
from train_cc.objectives import velocity_matching_loss
from train_cc.samplers import euler_sample

HYPOTHESES = {
    "as converted": (1, False),
    "wrong sign": (-1, False),
    "wrong time direction": (1, True),
    "wrong sign and time direction": (-1, True),
}


@torch.no_grad()
def check_denoising(model: SiT, count: int = 4, num_steps: int = 6) -> dict[str, float]:
    """How well the model, read in each of four ways, denoises what it samples itself when read so. No data is needed.

    -> for each way mean (v - (noise - x0))^2 / mean (noise - x0)^2 over three times. A flow model read rightly stays
    well below 1; read with a wrong sign or time direction it does not denoise its own samples.
    """
    draws = Draws(0)
    noise = draws.noise(count, *model.sample_shape)
    y = draws.integers(model.null_class, count)
    errors = {}
    for name, (sign, reverse) in HYPOTHESES.items():

        def velocity(x, t, y, sign=sign, reverse=reverse):
            return sign * model(x, 1 - t if reverse else t, y)

        x0 = euler_sample(velocity, noise, y, num_steps).clamp(-10, 10)
        error = 0.0
        for time in (0.3, 0.5, 0.7):
            fresh, t = draws.noise_like(x0), torch.full((count,), time)
            v = velocity(interpolate(x0, fresh, t), t, y)
            error += (velocity_matching_loss(v, x0, fresh) / (fresh - x0).square().mean()).item() / 3
        errors[name] = error
    return errors


def require_denoising(model: SiT) -> None:
    errors = check_denoising(model)
    for name, error in errors.items():
        print(f"check: read {name}, relative denoising error {error:.3f}")
    best, found = min(errors, key=errors.get), errors["as converted"]
    if not all(map(math.isfinite, errors.values())):
        raise InputError("the converted model's outputs are not finite: its weights are no trained SiT's")
    if best != "as converted" or not found <= 0.95:
        raise InputError("the converted model denoises better when read otherwise: its sign or time direction is wrong")
