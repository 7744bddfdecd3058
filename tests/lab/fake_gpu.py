"""A GPU without hardware: a device type whose tensors are fake, so that any machine shows what CUDA would do.

    with fake_gpu() as gpu:
        model.to(gpu.device)
        ...
    gpu.waits, gpu.lost

Tensors on the CPU are real, those on ``gpu.device`` have only shape and dtype. As on CUDA, operators refuse tensors of
both (a 0-d CPU tensor may join). Each wait of the host is recorded with its place in the project's code. Non-blocking
copies run late, at the host's next wait: a source that was freed by then is recorded as lost, unless it is so small
that CUDA takes it at the call. A value that is read is 0; `unique` and an index by a mask have their largest shape,
other results whose shape depends on values are refused. The backward pass runs on the calling thread.
"""

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tests.lab.fake_device import NAME, Generator, active, install, on_gpu, require_generator_on_device, synchronize
from train_cc.planning.networks import apply
from train_cc.run.meters import DEVICE_OF, is_wrapped, tensors_in

PROJECT = Path(__file__).resolve().parents[2]
# Bytes of pageable memory that are copied to the device's queue at the call (CUDA C++ Programming Guide, "Asynchronous
# Concurrent Execution"). More is staged by the driver, at the call or later ("API synchronization behavior").
TAKEN_AT_ONCE = 64 * 2**10
OWN_FILES = ("fake_gpu", "fake_device", "fake_processes", "meters")
aten = torch.ops.aten


class Event(NamedTuple):
    """A wait or a copy: what happened, and the file and function of the project's code."""

    kind: str
    place: str


class FakeGpu(TorchDispatchMode):
    """Sends each operator to the CPU or to torch's `FakeTensorMode`, and records waits and lost copies."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.device = torch.device(NAME, 0)
        self.waits: list[Event] = []  # the host waits until the device has done all that it was given
        self.lost: list[Event] = []  # copies whose source was freed before the device had read it
        self._late: list[weakref.ref] = []  # storages that the device has yet to read
        self._fake = fake

    def clear(self) -> None:
        for events in (self.waits, self.lost, self._late):
            events.clear()

    def wait(self, kind: str) -> None:
        self.waits.append(Event(kind, place_in_project()))
        self._late.clear()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as `Meter`

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is DEVICE_OF and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if is_wrapped(types):  # DTensor and the like: their own operators come back here
            return NotImplemented
        tensors = tensors_in(args, kwargs)
        target = kwargs.get("device")
        if not any(map(on_gpu, tensors)) and not (target is not None and torch.device(target).type == NAME):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        generator = kwargs.get("generator")
        require_generator_on_device(generator)
        if func in (aten._to_copy.default, aten.copy_.default):
            return self._copy(func, args, kwargs)
        if func in READS and on_gpu(args[0]):
            self.wait(f"read by {func}")
            return READS[func](*args, **kwargs)
        if func in REPORTING and on_gpu(args[0]):
            self.wait(f"asked by {func}")
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            indices = [i for i in args[1] if i is not None]
            if any(not on_gpu(i) for i in indices):
                self.wait("index from the CPU")
            # x[mask] = number fills, and needs no count of the places.
            filled = func is not aten.index.Tensor and args[2].numel() == 1
            if not filled and any(i.dtype in MASKS for i in indices):
                self.wait("index by a mask")
            args = (args[0], [each for i in args[1] for each in every_place(i)], *args[2:])
        if func._schema.is_mutable and isinstance(args[0], Tensor) and not on_gpu(args[0]):
            raise RuntimeError(f"{func} would write a result of {NAME} into a tensor on the CPU: copy it there")
        if generator is not None or not all(isinstance(x, FakeTensor) for x in tensors):
            args, kwargs = tree_map(self._faked, (args, kwargs))
        return func(*args, **kwargs)

    def _faked(self, x: object) -> object:
        if isinstance(x, Tensor) and not isinstance(x, FakeTensor):
            return self._fake.from_tensor(x.detach(), static_shapes=True)
        return None if isinstance(x, torch.Generator) else x

    def _copy(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        """`_to_copy` or `copy_`, between devices or within one. What comes to the CPU is real, and zero."""
        if func is aten.copy_.default:
            source, target = args[1], args[0].device
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking")
        else:
            source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
            non_blocking = kwargs.get("non_blocking")
        if source.device.type != target.type:
            kind = f"{source.device.type} to {target.type}, {tuple(source.shape)} {str(source.dtype)[6:]}"
            if non_blocking:
                if target.type == NAME and source.nbytes > TAKEN_AT_ONCE:
                    event = Event(kind, place_in_project())
                    self._late.append(weakref.ref(source.untyped_storage(), lambda _: self.lost.append(event)))
            else:
                self.wait(f"blocking copy, {kind}")
        if target.type == NAME:
            return func(*tree_map(self._faked, args), **kwargs)
        with unset_fake_temporarily():
            if func is aten.copy_.default:
                return args[0].zero_()
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)


def place_in_project() -> str:
    """File and function of the innermost frame in the project's code, libraries and this room's own files left out."""
    frame = sys._getframe(1)
    while frame is not None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        ours = PROJECT in path.parents and "site-packages" not in path.parts and path.stem not in OWN_FILES
        if ours and "<" not in name:  # not a comprehension
            return f"{path.relative_to(PROJECT)} {name}"
        frame = frame.f_back
    return "outside of the project"


# Operators whose result depends on values: on a GPU the host reads them --------------------------------------------


READS = {
    aten._local_scalar_dense.default: lambda x: 0.0 if x.dtype.is_floating_point else x.dtype != torch.bool and 0,
    aten.equal.default: lambda x, other: True,
    aten._unique2.default: lambda x, *options: (torch.empty_like(x).flatten(), None, None),
    aten._linalg_check_errors.default: lambda *args, **kwargs: None,
}
REPORTING = {aten._linalg_eigh.default, aten._linalg_svd.default}  # whether they succeeded
MASKS = (torch.bool, torch.uint8)


def every_place(index: Tensor | None) -> list[Tensor | None]:
    """A mask as indices into each of its dimensions, of all its places; another index as it is."""
    if index is None or index.dtype not in MASKS:
        return [index]
    return [torch.empty(index.numel(), dtype=torch.long, device=index.device)] * index.ndim


def _tolist(x: Tensor) -> list:
    """Of a fake tensor: one read of the device, not one for each number."""
    if not on_gpu(x):
        return REAL_TOLIST(x)
    active[-1].wait("read by tolist")
    with unset_fake_temporarily():
        return torch.zeros(x.shape, dtype=x.dtype).tolist()


REAL_TOLIST = FakeTensor.tolist


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """The device, as long as the context lasts."""
    install()
    with contextlib.ExitStack() as stack:
        for owner, name, own in (
            (torch, "Generator", Generator),
            (torch.accelerator, "synchronize", synchronize),
            (FakeTensor, "tolist", _tolist),
            (nn.Module, "_apply", apply),
            # Several tensors by one kernel, as on CUDA, where their type is no other than a tensor's.
            (_foreach_utils, "_foreach_supported_types", [Tensor, FakeTensor]),
        ):
            stack.enter_context(mock.patch.object(owner, name, own))
        # Otherwise torch would look for threads of the device, which are counted at a process's first backward pass.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # new tensors come from the CPU, as for a device that is there
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        gpu = FakeGpu(FakeTensorMode(allow_non_fake_inputs=True))
        active.append(gpu)
        stack.callback(active.remove, gpu)
        stack.enter_context(gpu._fake)
        stack.enter_context(gpu)
        yield gpu
