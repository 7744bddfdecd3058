"""Time grids, time densities and the annealing of the two dynamic schedules (DMDR, arXiv 2511.13649)."""

import math

import torch
from scipy.special import betaincinv
from torch import Tensor


def timestep_grid(num_steps: int, shift: float = 1.0) -> list[float]:
    """The K + 1 times of a K-step sampler, from 1 to exactly 0: linspace(1, 0), then t <- s t / (1 + (s - 1) t)."""
    times = [1 - i / num_steps for i in range(num_steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in times]


def annealing(step: int, dynamic_steps: int) -> float:
    """c(k) = 0.5 (1 + cos(pi min(k / D, 1))): from 1 at k = 0 to 0 at k = D. c = 0 when D = 0.

    The published code keeps Beta(4, 1.5) when D = 0; here c = 0 means that the dynamic phase is over.
    """
    if step >= dynamic_steps:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * step / dynamic_steps))


def dynamic_guidance_scale(lora_scale_real: float, c: float) -> float:
    """DynaDG: the LoRA scale of the real branch, annealed to 0, where the real score is the teacher's own."""
    return lora_scale_real * c


def renoise_density(alpha: float, beta: float, c: float) -> tuple[float, float]:
    """DynaRS: the two parameters of t ~ Beta(1 + (alpha - 1) c, 1 + (beta - 1) c); uniform at c = 0."""
    return 1 + (alpha - 1) * c, 1 + (beta - 1) * c


def beta_times(uniform: Tensor, alpha: float, beta: float) -> Tensor:
    """Times t ~ Beta(alpha, beta) by inverting its distribution function at ``uniform`` draws. (B,) -> (B,), CPU.

    `torch.distributions.Beta` takes no generator; the inverse needs one uniform number a sample.
    """
    return torch.from_numpy(betaincinv(alpha, beta, uniform.double().numpy())).float()


def logit_normal_times(normal: Tensor) -> Tensor:
    """Times sigmoid(N(0, 1)), the density that the small teachers are trained with. (B,) -> (B,)."""
    return normal.sigmoid()
