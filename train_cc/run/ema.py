"""The average of weights: its decay grows with the number of its updates (docs/method.md: EMA of the generator)."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


def decay_at(n: int, decay: float) -> float:
    """min(decay, (1 + n) / (10 + n)) at the average's n-th update: a long decay must not keep its start for ever."""
    return min(decay, (1 + n) / (10 + n))


def warmed_up_average(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor | int], None]:
    """Return ``average(averaged, current, n)``, the n-th update of ``averaged`` in place, for `AveragedModel`."""

    def average(averaged: list[Tensor], current: list[Tensor], n: Tensor | int) -> None:
        get_ema_multi_avg_fn(decay_at(int(n), decay))(averaged, current, n)

    return average


@dataclass
class Average:
    """The average of named weights. ``updates`` is n, part of a checkpoint."""

    decay: float
    values: dict[str, Tensor]
    updates: int = 0

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], decay: float) -> "Average":
        """An average that begins at ``weights``."""
        return cls(decay, {name: value.detach().clone() for name, value in weights.items()})

    def update(self, weights: Mapping[str, Tensor]) -> None:
        self.updates += 1
        current = [weights[name].detach() for name in self.values]
        warmed_up_average(self.decay)(list(self.values.values()), current, self.updates)

    @torch.no_grad()
    def _swap(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            held = weight.clone()
            weight.copy_(self.values[name])
            self.values[name].copy_(held)

    @contextlib.contextmanager
    def in_place_of(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The average stands in ``weights`` inside; the raw ones come back afterwards, bit for bit."""
        self._swap(weights)
        try:
            yield
        finally:
            self._swap(weights)
