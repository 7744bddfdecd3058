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
from train_cc.run.diagnostics import compare_gradients, finite, first_overflow
from train_cc.run.logbook import OVERFLOW

# Half precision would lose small gradients on the way back through decoder and classifier. A power of two is exact.
GRADIENT_SCALE = 1024.0
GROWTH_INTERVAL = 2000  # turns without an overflow after which a lowered scale is doubled, as torch's GradScaler has it


class Term(NamedTuple):
    """One term of a turn's loss: the generator's are known by their gradient at x0, the estimator's by their loss."""

    loss: Tensor  # 0-d, the mean over the batch
    gradient: Tensor | None  # of the weighted loss at x0, (B, C, H, W), fp32
    figures: dict[str, Tensor]  # for the log


@dataclass
class Reward:
    """``losses``: images (B, C, H, W) in [0, 1], labels (B,) -> losses (B,) and figures, each (B,).

    ``memory``: of a reward of the distribution, which sets its own weight. ``users``: a user's function, whose NaN is
    no overflow of ours. ``backoff``: factor of `GRADIENT_SCALE`, halved by each overflow of the reward's gradient.
    """

    name: str
    weight: float
    losses: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
    memory: Frechet | None = None
    users: bool = False
    backoff: float = 1.0
    good_turns: int = 0  # since the last overflow, or the last growth; counted while ``backoff`` is below 1

    @property
    def gradient_overflow(self) -> str:
        """Name of the log's column."""
        return f"{OVERFLOW}gradient_reward_{self.name}"

    def adapt_scale(self, overflowed: bool) -> None:
        """Lower the gradient's scale after a turn in which it overflowed; raise it again after many good ones."""
        if overflowed:
            self.backoff, self.good_turns = self.backoff / 2, 0
        elif self.backoff < 1:
            self.good_turns += 1
            if self.good_turns == GROWTH_INTERVAL:
                self.backoff, self.good_turns = self.backoff * 2, 0


class AtX0(NamedTuple):
    """What one reward gives at x0, before its weight."""

    losses: Tensor  # (B,)
    gradient: Tensor  # of their mean, (B, C, H, W)
    figures: dict[str, Tensor]  # each (B,)
    decoded: Tensor  # (B,), True for a finite image


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
        decoded = images.detach().flatten(1).isfinite().all(dim=1)
        for number, reward in enumerate(rewards):
            last = number + 1 == len(rewards)
            with torch.enable_grad():
                losses, figures = reward.losses(images, labels)
            scale = GRADIENT_SCALE * reward.backoff
            scaled = losses.float().sum() * (scale / len(x0))
            (gradient,) = torch.autograd.grad(scaled, part, retain_graph=not last)
            parts[number].append(AtX0(losses.detach().float(), gradient.float() / scale, figures, decoded))
    return [
        AtX0(
            torch.cat([part.losses for part in of_reward]),
            torch.cat([part.gradient for part in of_reward]),
            {name: torch.cat([part.figures[name] for part in of_reward]) for name in of_reward[0].figures},
            torch.cat([part.decoded for part in of_reward]),
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
    half: bool = False,
) -> list[Term]:
    """Each reward's term, its weight in the gradient, and how it stands to ``of_matching``, matching's gradient.

    ``half``: decoder and rewards compute in fp16. A term that overflows there is dropped, and counted in its figures.
    """
    terms = []
    for reward, found in zip(rewards, rewards_at_x0(rewards, decode, x0, y, micro_batch), strict=True):
        name, figures = reward.name, {f"loss_reward_{reward.name}": found.losses.mean()}
        figures |= {f"{figure}_reward_{name}": values.mean() for figure, values in found.figures.items()}
        weight = reward.weight
        if reward.memory is not None:
            weight = reward.memory.weight_of(found.gradient, of_matching)
            figures |= reward.memory.figures(name)
        gradient = weight * found.gradient
        figures |= compare_gradients(name, of_matching, gradient)
        if half:
            overflows = overflows_of(reward, found, x0)
            figures |= overflows
            gradient = torch.where(sum(overflows.values()) > 0, 0.0, gradient)
        terms.append(Term(found.losses.mean(), gradient, figures))
    return terms


def overflows_of(reward: Reward, found: AtX0, x0: Tensor) -> dict[str, Tensor]:
    """Figures: where in fp16 the term of ``reward`` overflowed first, if it did."""
    losses = finite(found.losses)
    stages = {"generator": finite(x0), "decoder": found.decoded.all()}
    if not reward.users:
        stages[f"reward_{reward.name}"] = losses
    # Losses that are no overflow and not finite, a user's NaN, must stop the run.
    stages[reward.gradient_overflow.removeprefix(OVERFLOW)] = finite(found.gradient) | ~losses
    return first_overflow(**stages)
