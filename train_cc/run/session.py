"""The processes of a run: devices, precision, the two accelerators, reductions."""

import contextlib
import os
import signal
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from train_cc.io.errors import InputError

COMPUTE_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # what autocast computes in


@dataclass
class Session:
    """One accelerator for the generator and one for the estimator: each prepares and steps its own network."""

    generator: Accelerator
    estimator: Accelerator
    sharded: bool = False  # FSDP2 in place of DDP

    @property
    def device(self) -> torch.device:
        return self.generator.device

    @property
    def rank(self) -> int:
        return self.generator.process_index

    @property
    def world_size(self) -> int:
        return self.generator.num_processes

    @property
    def is_main(self) -> bool:
        return self.generator.is_main_process

    def mean(self, figures: Tensor) -> Tensor:
        """The mean over processes of ``figures``, any shape."""
        return self.generator.reduce(figures, reduction="mean")

    def agree(self, number: int) -> bool:
        """Whether all processes hold the same ``number``."""
        return len(set(self.generator.gather(torch.tensor([number], device=self.device)).tolist())) == 1

    def place(self, accelerator: Accelerator, network: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
        """``network`` on the device, under autocast, and over the processes: replicated (DDP) or sharded (FSDP2).

        Sharded, every block is a unit of its own and every parameter a DTensor, frozen ones too: who shards is short of
        memory. Units are gathered in the compute dtype and freed after use, the root too: kept, it would hide a
        change of weights between two calls without gradient, such as the previews' EMA. Not accelerate's FSDP plugin:
        on a CPU that falls back to DDP without a word, and what is tested would not be what runs.
        """
        if not self.sharded:
            return accelerator.prepare_model(network)
        network = accelerator.prepare_model(network, evaluation_mode=True)  # device and autocast alone
        dtype = COMPUTE_DTYPES[accelerator.mixed_precision]
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        options = {"mp_policy": policy, "reshard_after_forward": True}
        options["mesh"] = init_device_mesh(self.device.type, (self.world_size,))
        for block in blocks:
            fully_shard(block, **options)
        return fully_shard(network, **options)

    def barrier(self) -> None:
        self.generator.wait_for_everyone()


class StopSignal:
    """SIGTERM and SIGINT ask the run to stop after the current update; a second one stops it at once."""

    def __init__(self):
        self.name = ""

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *error: object) -> None:
        self._restore()


def resolve_precision(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def sharding_asked() -> bool:
    """Whether the accelerate config is one for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def open_session(mixed_precision: str, report_to: str = "none", folder: Path | None = None) -> Session:
    """Processes, precision and sharding as the launcher's config says; tracker ``report_to`` writes into ``folder``.

    Raises `InputError` where the config contradicts ``mixed_precision``, the precision is not to be had, or other than
    NUM_PROCESSES processes were started.
    """
    configured = os.environ.pop("ACCELERATE_MIXED_PRECISION", None) or "no"
    precision = configured if mixed_precision == "auto" and configured != "no" else resolve_precision(mixed_precision)
    if configured not in ("no", precision):
        raise InputError(
            f"the accelerate config says mixed_precision {configured}, --mixed-precision {mixed_precision} is "
            f"{precision} on this machine; make them agree, or write 'no' into the config to let the flag rule"
        )
    sharded = sharding_asked()
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # `Session.place` shards, not accelerate
    if sharded and os.environ.get("FSDP_VERSION", "2") != "2":
        raise InputError("the accelerate config asks for FSDP version 1; fsdp_version: 2 is expected")
    if precision == "fp16" and not torch.cuda.is_available():
        raise InputError("--mixed-precision fp16 needs a GPU; allowed on a CPU: no, bf16")
    # Buffers never change. (torch's successor of this option still synchronises them once.)
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    cpu = not torch.cuda.is_available()
    options = {"cpu": cpu, "mixed_precision": precision, "kwargs_handlers": [ddp]}
    tracked = {} if report_to == "none" else {"log_with": report_to, "project_dir": folder}
    session = Session(Accelerator(**options, **tracked), Accelerator(**options))
    session.sharded = sharded and session.world_size > 1
    wanted = int(os.environ.get("NUM_PROCESSES") or session.world_size)
    if wanted != session.world_size:
        raise InputError(f"NUM_PROCESSES is {wanted}, but {session.world_size} process(es) were started")
    return session


def require_compiler() -> None:
    """Raises `InputError` where `torch.compile` finds no compiler for this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # whatever the missing piece raises
        missing = "Triton" if device == "cuda" else "a C++ compiler such as g++"
        told = str(error).strip().splitlines()
        raise InputError(
            f"--compile found no working compiler on this machine: {missing} is needed. Install it, or leave "
            f"--compile away ({type(error).__name__}: {told[0] if told else ''})"
        ) from error


def synchronised(accelerator: Accelerator, model: nn.Module, chunks: int) -> Iterable[int]:
    """Number the ``chunks`` of an accumulated batch; gradients are reduced over processes in the last one alone.

    Not `accelerator.accumulate`: two accelerators share one gradient state, and one would flip the other's.
    """
    for chunk in range(chunks):
        last = chunk + 1 == chunks
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
            yield chunk
        else:
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                yield chunk
