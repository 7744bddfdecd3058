"""The processes of a run: precision, the two accelerators, reductions, what one process does for all, trackers."""

import atexit
import contextlib
import gc
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from train_cc.io.errors import InputError, message_of
from train_cc.io.read import parsing
from train_cc.run.devices import mesh_of, open_processes

T = TypeVar("T")
GPU_PRECISION = "fp16"  # what --mixed-precision auto is on a GPU (docs/benchmarks.md: precision by role)
COMPUTE_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # what autocast computes in


@dataclass(frozen=True)
class Learner:
    """A network in training and the optimizer of its trained weights, as ``accelerator`` prepared both."""

    accelerator: Accelerator
    network: nn.Module  # has ``blocks``
    optimizer: torch.optim.Optimizer

    @property
    def plain(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.network)


@dataclass
class Session:
    """One accelerator for the generator and one for the estimator: each prepares and steps its own network."""

    generator_accelerator: Accelerator
    estimator_accelerator: Accelerator
    sharded: bool = False  # FSDP2 in place of DDP
    shard_over: str = "node"  # or "all": the processes that share one copy of the weights
    notes: list[str] = field(default_factory=list)  # for the log: variables of the environment that are ignored

    @property
    def device(self) -> torch.device:
        return self.generator_accelerator.device

    @property
    def rank(self) -> int:
        return self.generator_accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.generator_accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.generator_accelerator.is_main_process

    @property
    def mesh_shape(self) -> tuple[int, ...]:
        """Processes of sharded networks: (replicas, shards of each), or (shards,).

        A copy a node, so that weights are gathered over its own links and only gradients travel between nodes. With
        one process a node, one copy over all.
        """
        of_node = int(os.environ.get("LOCAL_WORLD_SIZE") or self.world_size)
        if self.shard_over == "all" or of_node == 1 or self.world_size <= of_node or self.world_size % of_node:
            return (self.world_size,)
        return self.world_size // of_node, of_node

    def mean(self, figures: Tensor) -> Tensor:
        """The mean over processes of ``figures``, any shape."""
        return self.generator_accelerator.reduce(figures, reduction="mean")

    def total(self, figures: Tensor) -> Tensor:
        """The sum over processes of ``figures``, any shape."""
        return self.generator_accelerator.reduce(figures, reduction="sum")

    def gather(self, values: Tensor) -> Tensor:
        """``values`` (N,) of all processes one after another, in the order of their ranks."""
        return self.generator_accelerator.gather(values)

    def agree(self, number: int) -> bool:
        """True if all processes have the same ``number``."""
        return len(set(self.generator_accelerator.gather(torch.tensor([number], device=self.device)).tolist())) == 1

    def place(self, accelerator: Accelerator, network: nn.Module) -> nn.Module:
        """``network`` on the device, under autocast, and over the processes: replicated (DDP) or sharded (FSDP2).

        Sharded, every block is a unit of its own and every parameter a DTensor, frozen ones too: who shards is short of
        memory. Units are gathered in the compute dtype and freed after use, the root too: kept, it would hide a
        change of weights between two calls without gradient, such as the previews' EMA. Not accelerate's FSDP plugin:
        on a CPU that falls back to DDP without a word, and what is tested would not be what runs.
        """
        if not self.sharded:
            return accelerator.prepare_model(network)
        network = accelerator.prepare_model(network, evaluation_mode=True)  # device and autocast only
        dtype = COMPUTE_DTYPES[accelerator.mixed_precision]
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = mesh_of(self.device.type, self.mesh_shape, ("replicate", "shard")[-len(self.mesh_shape) :])
        options = {"mp_policy": policy, "reshard_after_forward": True, "mesh": mesh}
        for block in network.blocks:
            fully_shard(block, **options)
        return fully_shard(network, **options)

    def leave_at_exit(self) -> None:
        """The process leaves its group before Python ends: gloo's threads would end it with a message of theirs.

        For a run that succeeded: after an error this could wait for processes that are gone.
        """
        atexit.unregister(leave_group)
        atexit.register(leave_group)


def leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # a group ends its threads when the last thing that holds it goes


def agreed_precision(configured: str, flag: str) -> str:
    """The precision: config "no" and flag "auto" defer to the other. Raises `InputError`."""
    if configured not in COMPUTE_DTYPES:
        raise InputError(f"ACCELERATE_MIXED_PRECISION is {configured}; allowed: {', '.join(COMPUTE_DTYPES)}")
    precision = flag
    if flag == "auto":
        precision = configured if configured != "no" else GPU_PRECISION if torch.cuda.is_available() else "no"
    if configured not in ("no", precision):
        raise InputError(
            f"the accelerate config says mixed_precision {configured}, --mixed-precision {flag} is "
            f"{precision} on this machine; make them agree, or write 'no' into the config to let the flag rule"
        )
    return precision


# Of the variables that accelerate reads, those that change nothing of what is trained.
HARMLESS = {"ACCELERATE_CONFIG", "ACCELERATE_LOG_LEVEL", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY"}
HARMLESS |= {"ACCELERATE_USE_CPU", "ACCELERATE_DISABLE_RICH"}
NEUTRAL = ("", "no", "none", "false", "0", "auto", "default")
SHARDING = "shard by scripts/accelerate/fsdp2.yaml"
INSTEAD = {f"ACCELERATE_USE_{name}": SHARDING for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")}
INSTEAD |= {"ACCELERATE_DYNAMO_BACKEND": "compile by --compile"}


def take_environment() -> tuple[str, bool, list[str]]:
    """Take out of the environment all that accelerate would act on: the command line says how a run is trained.

    -> the configured precision, whether to shard, and a line for each ignored variable. Raises `InputError`.
    """
    names = [name for name in os.environ if name.startswith("ACCELERATE_") and name not in HARMLESS]
    variables = {name: os.environ.pop(name) for name in names}
    precision = variables.pop("ACCELERATE_MIXED_PRECISION", None) or "no"
    sharded = variables.pop("ACCELERATE_USE_FSDP", "").lower() == "true"  # `Session.place` shards, not accelerate
    if variables.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") == "1":
        del variables["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"]
    ignored = {name: value for name, value in variables.items() if value.lower() not in NEUTRAL}
    for name in ignored.keys() & INSTEAD.keys():
        raise InputError(f"{name} is {ignored[name]}, which is not done here: unset it, and {INSTEAD[name]}")
    if sharded and os.environ.get("FSDP_VERSION", "2") != "2":
        raise InputError("the accelerate config asks for FSDP version 1; fsdp_version: 2 is expected")
    notes = [f"{name}={value} of the environment is ignored: only flags count" for name, value in ignored.items()]
    return precision, sharded, notes


def open_session(
    mixed_precision: str, report_to: str = "none", folder: Path | None = None, shard_over: str = "node"
) -> Session:
    """Processes, precision and sharding as the launcher's config says; tracker ``report_to`` writes into ``folder``.

    Raises `InputError` where a GPU cannot be used, the config contradicts ``mixed_precision``, the precision is not to
    be had, or other than NUM_PROCESSES processes were started.
    """
    configured, sharded, notes = take_environment()
    precision = agreed_precision(configured, mixed_precision)
    open_processes(exact=True)
    session = make_session(precision, sharded, report_to, folder)
    session.notes, session.shard_over = notes, shard_over
    return session


def make_session(precision: str, sharded: bool, report_to: str = "none", folder: Path | None = None) -> Session:
    """The processes that were started, in ``precision``, a key of `COMPUTE_DTYPES`. Raises `InputError`."""
    cpu = not torch.cuda.is_available()
    device = PartialState(cpu=cpu).device
    if precision == "fp16" and device.type == "cpu":
        raise InputError("--mixed-precision fp16 needs a GPU; allowed on a CPU: no, bf16")
    # Buffers never change. (torch's successor of this option still synchronises them once.)
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    options = {"cpu": cpu, "mixed_precision": precision, "kwargs_handlers": [ddp]}
    tracked = {} if report_to == "none" else {"log_with": report_to, "project_dir": folder}
    session = Session(Accelerator(**options, **tracked), Accelerator(**options))
    session.sharded = sharded and session.world_size > 1
    return session


def synchronised(learners: Collection[Learner], chunks: int) -> Iterable[int]:
    """Number the ``chunks`` of an accumulated batch; gradients are reduced over processes in the last one only.

    Not `accelerator.accumulate`: two accelerators share one gradient state, and one would flip the other's.
    """
    for chunk in range(chunks):
        last = chunk + 1 == chunks
        with contextlib.ExitStack() as unsynchronised:
            for each in learners:
                if isinstance(each.network, FSDPModule):
                    each.network.set_requires_gradient_sync(last)
                elif not last:
                    unsynchronised.enter_context(each.accelerator.no_sync(each.network))
            yield chunk


def on_main(session: Session, work: Callable[[], T]) -> T:
    """``work()`` on the main process; its result comes back on all. Its error is raised on all: none waits for ever."""
    outcome = [None, "the main process failed; its error says why"]
    try:
        if session.is_main:
            try:
                outcome = [work(), None]
            except Exception as error:
                outcome[1] = message_of(error) or outcome[1]
                raise
    finally:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise InputError(outcome[1])
    return outcome[0]


# --report-to: rows and previews in tensorboard or wandb, by accelerate. The jsonl logs are written always ----------


@contextlib.contextmanager
def tracking(accelerator: Accelerator, arguments: dict) -> Iterator[None]:
    """Open the tracker that ``accelerator`` was made with, if any, and close it whatever happens.

    Not `accelerator.end_training`, which would end the process group as well.
    """
    if accelerator.log_with:
        config = {name: str(value) for name, value in arguments.items()}
        with parsing("--report-to", "a tracker that can be reached"):  # a library's own errors, such as no login
            accelerator.init_trackers("dmdr", config)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def show_picture(accelerator: Accelerator, path: Path, step: int) -> None:
    for tracker in accelerator.trackers:
        images = np.array(Image.open(path).convert("RGB"))[None]  # (1, H, W, 3)
        order = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"previews": images}, step=step, **order)
