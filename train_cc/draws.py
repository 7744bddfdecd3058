"""Random draws without state: every number is a function of a key such as (seed, turn, step, chunk)."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


def rng_of(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator seeded by mixing all integers of ``key``: equal keys give equal draws, others are independent.

    `SeedSequence` pads with zeros and cuts into words of 32 bits, so that (5,) would be (5, 0) and 2^32 + 5 would be
    (5, 1): each integer goes in behind its length in words, and all behind their number.
    """
    words = [len(key)]
    for integer in key:
        count = max(1, -(-integer.bit_length() // 32))
        words += [count, *(integer >> 32 * i & 0xFFFFFFFF for i in range(count))]
    low, high = np.random.SeedSequence(words).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(low) | int(high) << 32)


class Draws:
    """The draws of one device batch. Noise comes on ``device``; labels, times and indices on the CPU.

    Times on the CPU let the guidance interval be known without asking the device. A resumed run needs no saved
    generator state, and previews cannot disturb training.
    """

    def __init__(self, *key: int, device: torch.device | str = "cpu"):
        self._key, self._place = key, torch.device(device)

    @cached_property  # to seed a generator takes as long as an image's noise
    def _cpu(self) -> torch.Generator:
        return rng_of(*self._key, 0)

    @cached_property
    def _device(self) -> torch.Generator:
        return rng_of(*self._key, 1, device=self._place)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._device, device=self._device.device)

    def noise_like(self, x: Tensor) -> Tensor:
        return self.noise(*x.shape)

    def integers(self, high: int, size: int) -> Tensor:
        """(size,) int64, uniform over 0 .. high - 1: labels, step indices."""
        return torch.randint(high, (size,), generator=self._cpu)

    def uniform(self, size: int) -> Tensor:
        return torch.rand(size, generator=self._cpu, dtype=torch.float64)


class JoinedDraws(Draws):
    """The draws of several device batches of one size as those of one: each row keeps its own draws."""

    def __init__(self, draws: Sequence[Draws]):
        self._all = draws

    def _share(self, size: int) -> int:
        return size // len(self._all)

    def noise(self, *shape: int) -> Tensor:
        return torch.cat([draws.noise(self._share(shape[0]), *shape[1:]) for draws in self._all])

    def integers(self, high: int, size: int) -> Tensor:
        return torch.cat([draws.integers(high, self._share(size)) for draws in self._all])

    def uniform(self, size: int) -> Tensor:
        return torch.cat([draws.uniform(self._share(size)) for draws in self._all])
