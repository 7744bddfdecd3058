"""The straight path between data and noise (docs/method.md: symbols). t = 1 is noise, t = 0 is data.

Shapes: x0, noise, x_t, v are (B, C, H, W); t is (B,).
"""

from torch import Tensor


def expand(t: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1): a time that broadcasts over ``like``."""
    return t.view(-1, *[1] * (like.ndim - 1))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """v = d x_t / dt = noise - x0."""
    return noise - x0


def x0_from_velocity(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x0_hat = x_t - t v: the clean estimate."""
    return x_t - expand(t, x_t) * v
