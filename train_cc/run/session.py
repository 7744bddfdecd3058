"""The processes of a run: devices, precision, the two accelerators, reductions."""

import contextlib
import os
import signal
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from train_cc.errors import InputError

COMPUTE_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # what autocast computes in


@dataclass
class Session:
    """One accelerator for the generator and one for the estimator: each prepares and steps its own network."""

    generator: Accelerator
    estimator: Accelerator

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


def open_session(mixed_precision: str) -> Session:
    """Raises `InputError` where the precision is not to be had or the launcher started too few processes."""
    precision = resolve_precision(mixed_precision)
    if precision == "fp16" and not torch.cuda.is_available():
        raise InputError("--mixed-precision fp16 needs a GPU; allowed on a CPU: no, bf16")
    # Buffers never change. (torch's successor of this option still synchronises them once.)
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    cpu = not torch.cuda.is_available()
    session = Session(*(Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[ddp]) for _ in range(2)))
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


def synchronised(accelerator: Accelerator, model: torch.nn.Module, chunks: int) -> Iterable[int]:
    """Number the ``chunks`` of an accumulated batch; gradients are reduced over processes in the last one alone.

    Not `accelerator.accumulate`: two accelerators share one gradient state, and one would flip the other's.
    """
    for chunk in range(chunks):
        last = chunk + 1 == chunks
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            yield chunk
