"""Tilted fake score: a reward without a gradient (docs/method.md: tilted fake score). Experimental.

The estimator's loss weighs sample i by w_i = exp(-beta (r_i - mean r)) / mean, clipped. The fake score then is that of
p_generator w, and matching's fixed point p_generator w = p_teacher is p_generator = p_teacher exp(beta r) / Z.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CLIP = 10.0


@dataclass
class Tilt:
    """``rewards``: images (B, C, H, W) in [0, 1], labels (B,) -> (B,), larger is better; no gradient is asked of it.

    ``users``: a user's function, whose NaN is no overflow of ours.
    """

    name: str
    beta: float
    rewards: Callable[[Tensor, Tensor], Tensor]
    users: bool = False


def tilt_weights(rewards: Tensor, beta: float, clip: float = CLIP) -> Tensor:
    """w = exp(-beta (r - mean r)), normalised to mean 1, at most ``clip``. (B,) -> (B,), of the global batch."""
    return (torch.softmax(-beta * rewards.double(), dim=0) * len(rewards)).clamp(max=clip).float()


def effective_samples(weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2: how many equally weighted samples would be as good. (B,) -> 0-d."""
    return weights.sum().square() / weights.square().sum()
