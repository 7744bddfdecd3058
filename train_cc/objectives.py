"""The losses of the method. Pure tensors; whatever the autocast, the algebra here is fp32.

Shapes: x0, noise and every v are (B, C, H, W).
"""

import torch
from torch import Tensor

from train_cc.flow import velocity


def velocity_matching_losses(v: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """mean (v - (noise - x0))^2 over C, H, W, per sample. (B,), fp32."""
    return (v.float() - velocity(x0.float(), noise.float())).square().mean(dim=(1, 2, 3))


def velocity_matching_loss(v: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """mean (v - (noise - x0))^2: trains the estimator's fake score on generated x0, and a teacher on data. Scalar."""
    return velocity_matching_losses(v, x0, noise).mean()


def dmd_normaliser(v_real: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """mean |v_real - (noise - x0)| over C, H, W, per sample: (B, 1, 1, 1), fp32."""
    return (v_real.float() - velocity(x0.float(), noise.float())).abs().mean(dim=(1, 2, 3), keepdim=True)


@torch.no_grad()
def dmd_direction(v_real: Tensor, v_fake: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """direction = (v_real - v_fake) / mean |v_real - (noise - x0)|, per sample. (B, C, H, W), fp32, no gradient.

    DMD2 (arXiv 2405.14867) writes (p_real - p_fake) / mean |p_real| with p = x0 - x0_hat = t (v - (noise - x0)).
    The t cancels; in this form no small-t difference is left to half precision's rounding.
    """
    return (v_real.float() - v_fake.float()) / dmd_normaliser(v_real, x0, noise)


def dmd_loss(x0: Tensor, direction: Tensor) -> Tensor:
    """0.5 mean (x0 - stop_gradient(x0 - direction))^2: its gradient at x0 is direction / numel. Scalar."""
    x0 = x0.float()
    target = (x0 - direction).detach()
    return 0.5 * (x0 - target).square().mean()
