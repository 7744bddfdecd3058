"""Rewards as terms at x0: decoded once, in micro-batches, each with a gradient of its own (docs/method.md).

A reward is a function of images: ``losses(images, y) -> (B,)``, smaller is better, differentiable. Its term at x0 is
the mean over the batch and its gradient, taken at a detached x0, so that no term holds another's activations. A tilt
is a reward without a gradient: it weighs the estimator's samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train_cc.rewards.frechet import Frechet
from train_cc.run.diagnostics import finite, first_overflow
from train_cc.run.logbook import OVERFLOW

# Half precision would lose small gradients on the way back through decoder and classifier. A power of two is exact.
GRADIENT_SCALE = 1024.0
GROWTH_INTERVAL = 2000  # turns without an overflow after which a lowered scale is doubled, as torch's GradScaler has it
LARGEST_WEIGHT = 10.0  # of a tilted sample


class Term(NamedTuple):
    """One term of a turn's loss: the generator's are known by their gradient at x0, the estimator's by their loss."""

    loss: Tensor  # 0-d, the mean over the batch
    gradient: Tensor | None  # of the weighted loss at x0, (B, C, H, W), fp32
    figures: dict[str, Tensor]  # for the log
    name: str = ""  # in the log's columns
    overflow: Tensor | None = None  # 0-d, True: the gradient overflowed in fp16 and is dropped

    @property
    def pull(self) -> Tensor:
        """The gradient at x0, or zeros after an overflow."""
        return self.gradient if self.overflow is None else torch.where(self.overflow, 0.0, self.gradient)


@dataclass(kw_only=True)
class Scorer:
    """The network or function behind a reward or tilt. ``check`` of a user's function raises `InputError`."""

    judge: nn.Module | None = None  # a classifier: it scores the previews too
    files: dict[str, list[Path]] = field(default_factory=dict)  # that were read, by flag or name, a judge's first
    notes: list[str] = field(default_factory=list)  # for the log
    check: Callable[[Tensor, Tensor], None] | None = None  # of images and labels, before the first update

    @property
    def users(self) -> bool:
        """True for a user's function, whose NaN is no overflow of ours."""
        return self.check is not None


@dataclass
class Reward(Scorer):
    """``losses``: images (B, C, H, W) in [0, 1], labels (B,) -> losses (B,) and figures, each (B,).

    ``memory``: of a reward of the distribution, which sets its own weight. ``backoff``: factor of `GRADIENT_SCALE`,
    halved by each overflow of the reward's gradient.
    """

    name: str
    weight: float
    losses: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
    memory: Frechet | None = None
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


def classifier_losses(classifier: nn.Module, images: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy, ReFL's loss, and 1 if the class was right: images (B, C, H, W) in [0, 1], y (B,) -> (B,) each."""
    logits = classifier(images).float()
    with torch.no_grad():
        hits = (logits.argmax(dim=1) == y).float()
    return F.cross_entropy(logits, y, reduction="none"), {"accuracy": hits}


class AtX0(NamedTuple):
    """Losses and gradient of one reward at x0, before its weight."""

    losses: Tensor  # (B,)
    gradient: Tensor  # of their mean, (B, C, H, W)
    figures: dict[str, Tensor]  # each (B,)
    decoded: Tensor  # (B,), True for a finite image


def rewards_at_x0(
    rewards: Sequence[Reward], decode: Callable[[Tensor], Tensor], x0: Tensor, y: Tensor, micro_batch: int
) -> list[AtX0]:
    """Every reward at x0 (B, C, H, W), ``micro_batch`` samples at a time (0: all at once).

    A micro-batch is decoded once for all rewards. Decoder and rewards hold the activations of a micro-batch only, and
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
    """Each reward's term, its weight in the gradient; a memory measures it against ``of_matching``, matching's.

    ``half``: decoder and rewards compute in fp16. A term that overflows there is dropped, and counted in its figures.
    """
    terms = []
    for reward, own in zip(rewards, rewards_at_x0(rewards, decode, x0, y, micro_batch), strict=True):
        name, weight, overflow = f"reward_{reward.name}", reward.weight, None
        figures = {f"loss_{name}": own.losses.mean()}
        figures |= {f"{figure}_{name}": values.mean() for figure, values in own.figures.items()}
        if reward.memory is not None:
            weight = reward.memory.weight_of(own.gradient, of_matching)
            figures |= reward.memory.figures(reward.name)
        if half:
            overflows = overflows_of(reward, own, x0)
            figures, overflow = figures | overflows, sum(overflows.values()) > 0
        terms.append(Term(own.losses.mean(), weight * own.gradient, figures, name, overflow))
    return terms


def overflows_of(reward: Reward, own: AtX0, x0: Tensor) -> dict[str, Tensor]:
    """Figures: the stage in which the term of ``reward`` overflowed first in fp16, if it did."""
    losses = finite(own.losses)
    stages = {"generator": finite(x0), "decoder": own.decoded.all()}
    if not reward.users:
        stages[f"reward_{reward.name}"] = losses
    # Losses that are no overflow and not finite, a user's NaN, must stop the run.
    stages[reward.gradient_overflow.removeprefix(OVERFLOW)] = finite(own.gradient) | ~losses
    return first_overflow(**stages)


# Tilted fake score: a reward without a gradient. Experimental ------------------------------------------------------
# The estimator's loss weighs sample i by w_i = exp(-beta (r_i - mean r)) / mean, clipped. The fake score then is that
# of p_generator w, and matching's fixed point p_generator w = p_teacher is p_generator = p_teacher exp(beta r) / Z.


@dataclass
class Tilt(Scorer):
    """``rewards``: images (B, C, H, W) in [0, 1], labels (B,) -> (B,), larger is better; no gradient is asked of it."""

    name: str
    beta: float
    rewards: Callable[[Tensor, Tensor], Tensor]


def tilt_weights(rewards: Tensor, beta: float, clip: float = LARGEST_WEIGHT) -> Tensor:
    """w = exp(-beta (r - mean r)), normalised to mean 1, at most ``clip``. (B,) -> (B,), of the global batch."""
    return (torch.softmax(-beta * rewards.double(), dim=0) * len(rewards)).clamp(max=clip).float()


def effective_samples(weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2: how many equally weighted samples would be as good. (B,) -> 0-d."""
    return weights.sum().square() / weights.square().sum()
