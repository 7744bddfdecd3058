"""Rank 0 of any number of processes that are not there, each with a fake GPU.

Everything that asks torch.distributed or accelerate sees them.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from torch import Tensor
from torch.distributed import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from tests.lab.fake_gpu import NAME

real_accelerator = Accelerator.__init__
real_state = PartialState.__init__
real_ddp = DistributedDataParallel.__init__


def _accelerator(self: Accelerator, *args: object, cpu: bool = False, **options: object) -> None:
    """`Accelerator` on the fake device. It allows fp16 on devices of a list alone: there it is set up afterwards."""
    half = options.get("mixed_precision") == "fp16"
    if half:
        options["mixed_precision"] = "bf16"
        if AcceleratorState._shared_state:
            AcceleratorState._shared_state["_mixed_precision"] = "bf16"
    real_accelerator(self, *args, **options)
    if half:
        AcceleratorState._shared_state["_mixed_precision"] = "fp16"
        self.scaler = torch.amp.GradScaler(NAME)


def _state(self: PartialState, cpu: bool = False, **options: object) -> None:
    """`PartialState` on the fake device, also where the environment was cleared for a run."""
    with mock.patch.dict(os.environ, {"ACCELERATE_TORCH_DEVICE": f"{NAME}:0"}):
        real_state(self, **options)


def _ddp(self: DistributedDataParallel, *args: object, **options: object) -> None:
    """Its own reduction waits for a result, which a fake process group does not give."""
    real_ddp(self, *args, **options)
    self.register_comm_hook(None, _reduce)


def _reduce(state: object, bucket: GradBucket) -> Future[Tensor]:
    dist.all_reduce(bucket.buffer())
    future = Future()
    future.set_result(bucket.buffer())
    return future


@contextlib.contextmanager
def fake_processes(count: int = 1) -> Iterator[None]:
    """Inside of `fake_gpu`: new `Accelerator`s are on the fake device, in rank 0 of ``count`` processes.

    Collectives return at once, with what rank 0 gave. DDP, FSDP2 and meshes work on them. No process group may be open;
    accelerate's state is cleared before and after.
    """
    environment = {}
    patches = [
        mock.patch.object(Accelerator, "__init__", functools.wraps(real_accelerator)(_accelerator)),
        mock.patch.object(PartialState, "__init__", functools.wraps(real_state)(_state)),
    ]
    if count > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

        environment = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": str(count)}
        ddp = "torch.nn.parallel.distributed"
        patches += [
            mock.patch.object(PartialState, "_prepare_backend", lambda *args: ("fake", DistributedType.MULTI_GPU)),
            mock.patch.object(DistributedDataParallel, "__init__", functools.wraps(real_ddp)(_ddp)),
            # It orders the buckets anew by indices that went through the device, where there are no values.
            mock.patch.object(dist.Reducer, "_rebuild_buckets", lambda self: False),
            # Rank 0 gives; objects would go through a storage on the device.
            mock.patch.object(dist, "broadcast_object_list", lambda objects, *args, **options: None),
            mock.patch(f"{ddp}._verify_param_shape_across_processes", lambda *args: None),
            mock.patch(f"{ddp}._sync_module_states", lambda *args, **options: None),
        ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        for each in patches:
            stack.enter_context(each)
        stack.callback(_forget_accelerate)
        _forget_accelerate()
        if count > 1:
            dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
            stack.callback(dist.destroy_process_group)
        yield


def _forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
