"""What a piece of training costs: FLOP by torch's formulas, memory of live storages, bytes sent to other ranks.

Each is a context that watches the operators inside, on a device that is there or on a fake one, where nothing is
computed (`train_cc.run.fake_gpu`).
"""

import functools
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
DEVICE_OF = torch.ops.prim.device.default
is_wrapper = functools.cache(is_traceable_wrapper_subclass_type)


def is_wrapped(types: Iterable[type]) -> bool:
    """Whether an operator is on tensors that hold others (DTensor): what runs on those is watched, this is not."""
    return any(map(is_wrapper, types))


def device_type(x: Tensor) -> str:
    return x.fake_device.type if isinstance(x, FakeTensor) else x.device.type


def tensors_in(*things: object) -> list[Tensor]:
    """Of nested lists, tuples and dicts. (torch's `tree_leaves` takes ten times as long.)"""
    found = []
    for thing in things:
        if isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, list | tuple):
            found += tensors_in(*thing)
        elif isinstance(thing, dict):
            found += tensors_in(*thing.values())
    return found


class Meter(TorchDispatchMode):
    """Hands every operator that ran inside to `seen`, with its result; and to the meters in ``also``.

    One context with others in ``also`` takes a third of the time of three contexts.
    """

    def __init__(self):
        super().__init__()
        self.also: list[Meter] = []

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
        for other in self.also:
            other.seen(func, args, kwargs, out)
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


# Memory ----------------------------------------------------------------------------------------------------------


class LiveMemory(Meter):
    """Bytes of the storages on ``device`` that are alive: ``now`` and, since `reset`, ``peak``.

    As torch's allocator on CUDA counts them, in multiples of 512 bytes. What a kernel allocates for itself, the
    context, NCCL and fragmentation are not in it. What was made before it was entered is to be given to `watch`.
    """

    def __init__(self, device: str):
        super().__init__()
        self.now = self.peak = 0
        self._device = device
        self._held: dict[int, tuple[weakref.ref, int]] = {}  # by the address of the storage: the storage, its bytes

    def reset(self) -> None:
        self.peak = self.now

    def watch(self, *things: nn.Module | torch.optim.Optimizer | Tensor) -> None:
        """Count the tensors of ``things``, also those that were made before this context was entered."""
        for thing in things:
            if isinstance(thing, nn.Module):
                tensors = [*thing.parameters(), *thing.buffers()]
                self.watch(*tensors, *(p.grad for p in tensors if p.grad is not None))
            elif isinstance(thing, torch.optim.Optimizer):
                self.watch(*tensors_in(dict(thing.state)))
            else:
                local = thing._local_tensor if hasattr(thing, "_local_tensor") else thing
                self._see(local)

    def _see(self, x: Tensor) -> None:
        if device_type(x) != self._device:
            return
        storage = x.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        held = self._held.get(key)
        if held is None:
            held = (weakref.ref(storage, lambda _: self._gone(key)), 0)
        if held[1] != size:
            self.now += size - held[1]
            self._held[key] = (held[0], size)
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._held.pop(key)[1]

    def seen(self, func, args: tuple, kwargs: dict, out: object) -> None:
        for x in tensors_in(out):
            self._see(x)

    def __enter__(self):
        resize = self._resize = torch.UntypedStorage.resize_

        def resized(storage, size):
            """Sharding frees and takes memory by it; no operator tells."""
            result, held = resize(storage, size), self._held.get(storage._cdata)
            if held is not None:
                self._held[storage._cdata] = (held[0], rounded := -(-size // 512) * 512)
                self.now += rounded - held[1]
                self.peak = max(self.peak, self.now)
            return result

        torch.UntypedStorage.resize_ = resized
        return super().__enter__()

    def __exit__(self, *error: object):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*error)


# Communication ---------------------------------------------------------------------------------------------------


class Traffic(Meter):
    """Bytes that this rank sends to others in collectives, in ``sent``: gathers and scatters by a ring.

    A reduction over n ranks counts as its limit for many: twice its bytes, in truth 2 (n - 1) / n of them.
    """

    def __init__(self):
        super().__init__()
        self.sent = 0

    def seen(self, func, args: tuple, kwargs: dict, out: object) -> None:
        name = func._overloadpacket.__name__
        if func.namespace == "c10d" and name in ("_allgather_base_", "_reduce_scatter_base_"):
            self.sent += abs(args[0].nbytes - args[1].nbytes)
        elif func.namespace == "_c10d_functional" and name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            self.sent += abs(out.nbytes - args[0].nbytes)
        elif name in ("allreduce_", "all_reduce", "all_reduce_"):
            self.sent += 2 * sum(x.nbytes for x in tensors_in(args))
        elif name == "broadcast_":
            self.sent += sum(x.nbytes for x in tensors_in(args))
