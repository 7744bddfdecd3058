"""The time of a piece of training on a card that need not be there: each kernel by its FLOP, its bytes, its launch."""

import functools
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from tests.lab.cuda_rules import device_type
from train_cc.run.meters import Meter, flop_of, tensors_in

HALF = (torch.float16, torch.bfloat16)
COMPUTE_EFFICIENCY = 0.72  # of the peak that large products reach
MEMORY_EFFICIENCY = 0.85  # of the bandwidth that element-wise kernels reach
LAUNCH = 4e-6  # seconds that the smallest kernel takes


class Card(NamedTuple):
    """What a data sheet says, dense: FLOP/s in half precision and in fp32 (TF32 off), bytes/s."""

    half: float
    single: float
    bandwidth: float


CARDS = {
    "h100": Card(989e12, 67e12, 3.35e12),
    "a100": Card(312e12, 19.5e12, 2.0e12),
}


class Cost(NamedTuple):
    """Cost of the kernels of one row."""

    seconds: float = 0.0
    flop: int = 0
    bytes: int = 0
    kernels: int = 0

    def plus(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


class Roofline(Meter):
    """An estimate of the time of each kernel on ``card``: max(FLOP / peak, bytes / bandwidth, launch).

    Peak and bandwidth times what kernels reach of them. Bytes: each input and output once, what is changed in place
    twice; a dimension that is expanded costs nothing. ``rows``: (kind, operator) -> `Cost`.
    """

    def __init__(self, card: Card, device: str):
        super().__init__()
        self.card, self.rows = card, defaultdict(Cost)
        self._device = device

    def total(self, kind: str | None = None) -> Cost:
        """The sum over the rows of ``kind``; None: over all."""
        costs = (cost for (own, _), cost in self.rows.items() if kind in (None, own))
        return functools.reduce(Cost.plus, costs, Cost())

    def seen(self, func, args: tuple, kwargs: dict, out: object) -> None:
        if launches_no_kernel(func):
            return
        tensors = {id(x): x for x in tensors_in(args, kwargs, out)}.values()
        if not any(device_type(x) == self._device for x in tensors):
            return
        flop = flop_of(func, args, kwargs, out)
        moved = sum(map(bytes_of, tensors)) + sum(map(bytes_of, changed_in_place(func, args, kwargs)))
        half = any(x.dtype in HALF for x in tensors)
        peak = COMPUTE_EFFICIENCY * (self.card.half if half else self.card.single)
        seconds = max(flop / peak, moved / (MEMORY_EFFICIENCY * self.card.bandwidth), LAUNCH)
        name = func._overloadpacket.__name__
        row = kind_of(name, flop), name
        self.rows[row] = self.rows[row].plus(Cost(seconds, flop, moved, 1))


def kind_of(name: str, flop: int) -> str:
    if "attention" in name:
        return "attention"
    if "convolution" in name:
        return "convolution"
    return "matrix product" if flop else "other"


NO_KERNEL = {  # beside views: memory is taken, or a tensor's description changed
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "set_", "resize_",
    "lift_fresh", "is_same_size", "_has_same_storage_numel",
}  # fmt: skip
WRITES_ONLY = {
    "copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "_foreach_copy_",
    "_foreach_zero_",
}  # fmt: skip


@functools.cache
def launches_no_kernel(func) -> bool:
    name = func._overloadpacket.__name__
    return func.is_view or func.namespace not in ("aten", "fsdp") or name in NO_KERNEL or name.startswith("sym_")


def changed_in_place(func, args: tuple, kwargs: dict) -> list[Tensor]:
    """Tensors that ``func`` reads and writes."""
    if not func._schema.is_mutable or func._overloadpacket.__name__ in WRITES_ONLY:
        return []
    changed = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads":
            changed += tensors_in(args[i] if i < len(args) else kwargs.get(argument.name))
    return changed


def bytes_of(x: Tensor) -> int:
    """Memory that a kernel touches to read or write all of ``x``."""
    count = x.numel()
    for extent, stride in zip(x.shape, x.stride(), strict=True):
        if stride == 0 and extent > 1:
            count //= extent
    return count * x.element_size()
