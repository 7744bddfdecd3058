"""Rewards as terms at x0: decoded once, in micro-batches, each with a gradient of its own (docs/method.md).

A reward is a function of images: ``losses(images, y) -> (B,)``, smaller is better, differentiable. Its term at x0 is
the mean over the batch and its gradient, taken at a detached x0, so that no term holds another's activations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from train_cc.rewards.frechet import Frechet
from train_cc.run.diagnostics import compare_gradients

# Half precision would lose small gradients on the way back through decoder and classifier. A power of two is exact.
GRADIENT_SCALE = 1024.0


class Term(NamedTuple):
    """One term of the generator's loss at x0."""

    loss: Tensor  # 0-d, the mean over the batch
    gradient: Tensor  # of the weighted loss at x0, (B, C, H, W), fp32
    figures: dict[str, Tensor]  # for the log


@dataclass
class Reward:
    """``losses``: images (B, C, H, W) in [0, 1], labels (B,) -> losses (B,) and figures, each (B,).

    ``memory``: of a reward of the distribution, which sets its own weight.
    """

    name: str
    weight: float
    losses: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
    memory: Frechet | None = None


class AtX0(NamedTuple):
    """What one reward gives at x0, before its weight."""

    losses: Tensor  # (B,)
    gradient: Tensor  # of their mean, (B, C, H, W)
    figures: dict[str, Tensor]  # each (B,)


def rewards_at_x0(
    rewards: Sequence[Reward], decode: Callable[[Tensor], Tensor], x0: Tensor, y: Tensor, micro_batch: int
) -> list[AtX0]:
    """Every reward at x0 (B, C, H, W), ``micro_batch`` samples at a time (0: all at once).

    A micro-batch is decoded once for all rewards. Decoder and rewards hold the activations of a micro-batch alone, and
    none when the generator's own backward runs.
    """
    if not rewards:
        return []
    size = micro_batch or len(x0)
    parts: list[list[AtX0]] = [[] for _ in rewards]
    for part, labels in zip(x0.detach().split(size), y.split(size), strict=True):
        part = part.clone().requires_grad_()
        with torch.enable_grad():
            images = decode(part)
        for number, reward in enumerate(rewards):
            last = number + 1 == len(rewards)
            with torch.enable_grad():
                losses, figures = reward.losses(images, labels)
            scaled = losses.float().sum() * (GRADIENT_SCALE / len(x0))
            (gradient,) = torch.autograd.grad(scaled, part, retain_graph=not last)
            parts[number].append(AtX0(losses.detach().float(), gradient.float() / GRADIENT_SCALE, figures))
    return [
        AtX0(
            torch.cat([part.losses for part in of_reward]),
            torch.cat([part.gradient for part in of_reward]),
            {name: torch.cat([part.figures[name] for part in of_reward]) for name in of_reward[0].figures},
        )
        for of_reward in parts
    ]


def reward_terms(
    rewards: Sequence[Reward],
    decode: Callable[[Tensor], Tensor],
    x0: Tensor,
    y: Tensor,
    micro_batch: int,
    of_matching: Tensor,
) -> list[Term]:
    """Each reward's term, its weight in the gradient, and how it stands to ``of_matching``, matching's gradient."""
    terms = []
    for reward, found in zip(rewards, rewards_at_x0(rewards, decode, x0, y, micro_batch), strict=True):
        name, figures = reward.name, {f"loss_reward_{reward.name}": found.losses.mean()}
        figures |= {f"{figure}_reward_{name}": values.mean() for figure, values in found.figures.items()}
        weight = reward.weight
        if reward.memory is not None:
            weight = reward.memory.weight_of(found.gradient, of_matching)
            figures |= reward.memory.figures(name)
        gradient = weight * found.gradient
        terms.append(Term(found.losses.mean(), gradient, figures | compare_gradients(name, of_matching, gradient)))
    return terms
