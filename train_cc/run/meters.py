"""Contexts that see every operator that runs inside: the FLOP of a piece of training by torch's formulas.

On tensors with values, or on fake ones (`train_cc.planning`).
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
DEVICE_OF = torch.ops.prim.device.default
is_wrapper = functools.cache(is_traceable_wrapper_subclass_type)


def is_wrapped(types: Iterable[type]) -> bool:
    """True for an operator on tensors that hold others (DTensor): what runs on those is seen, this is not."""
    return any(map(is_wrapper, types))


def tensors_in(*things: object) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts. (torch's `tree_leaves` takes ten times as long.)"""
    tensors = []
    for thing in things:
        if isinstance(thing, Tensor):
            tensors.append(thing)
        elif isinstance(thing, list | tuple):
            tensors += tensors_in(*thing)
        elif isinstance(thing, dict):
            tensors += tensors_in(*thing.values())
    return tensors


class Meter(TorchDispatchMode):
    """Hands every operator that ran inside to `seen`, with its result."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled under it, and the guard costs a third of the time

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is DEVICE_OF and isinstance(args[0], FakeTensor):  # C++ asks for it at every turn
            return args[0].fake_device
        if is_wrapped(types):
            return NotImplemented
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.seen(func, args, kwargs, out)
        return out

    def seen(self, func, args: tuple, kwargs: dict, out: object) -> None:
        raise NotImplementedError


# FLOP ------------------------------------------------------------------------------------------------------------

CPU_ATTENTION = {  # not in torch's registry
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop_count,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_: sdpa_backward_flop_count(
        grad, q, k, v
    ),
}


def flop_of(func, args: tuple, kwargs: dict, out: object) -> int:
    """FLOP of one operator; 0 for what is not a product, an attention or a convolution."""
    packet = func._overloadpacket
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    if packet in CPU_ATTENTION:
        return CPU_ATTENTION[packet](*(each.shape for each in args if isinstance(each, Tensor)))
    return 0


class FlopCounter(Meter):
    """The FLOP of every operator that runs inside, in ``total``. (torch's own mode fails on autograd.grad.)"""

    def __init__(self):
        super().__init__()
        self.total = 0

    def seen(self, func, args: tuple, kwargs: dict, out: object) -> None:
        self.total += flop_of(func, args, kwargs, out)
