"""The cost of a run without a GPU: its own two turns on tensors that have shapes and no values.

Networks are made on `meta`, or read if they are there, and get fake tensors of the CPU (torch's `FakeTensor`);
whatever is computed of these is fake, too. Draws, times and labels are real. Live tensors are counted as torch's
allocator on CUDA counts them; the rest is an `allowance`.
"""

import argparse
import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor

from train_cc.distillation import turns
from train_cc.distillation.loop import update
from train_cc.distillation.panel import ESTIMATE_TIME, preview_inputs
from train_cc.distillation.run import Run, trainable
from train_cc.distillation.state import averaged
from train_cc.models.backbone import choose_attention
from train_cc.models.vae import DECODED_AT_ONCE
from train_cc.planning.networks import NetworksToCome
from train_cc.run.meters import Meter, flop_of, tensors_in
from train_cc.run.session import Session, take_environment
from train_cc.run.states import put_moments
from train_cc.samplers import euler_sample, few_step_sample
from train_cc.schedules import annealing
from train_cc.setup.build import build

GIB = 2**30
MOST_CHUNKS = 4  # accumulated batches that are gone through; later ones are as the last of these
SAMPLES = 250  # images at once of `evaluation.generate`
CONTEXT, NCCL, FRAGMENTS = 0.75 * GIB, 1.0 * GIB, 0.05  # of torch and its libraries; of several processes; of the peak
STARTED = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # accelerate's signs
REST = "other (buckets of DDP, statistics and feature spaces of rewards)"
aten = torch.ops.aten


@dataclass
class Cost:
    """Bytes are of one process. ``flop`` and ``sent`` (bytes to others) are of one process in one cycle."""

    resident: dict[str, int] = field(default_factory=dict)  # from turn to turn, by what it is
    peaks: dict[str, int] = field(default_factory=dict)  # of training, resuming, previews and sampling
    flop: int = 0
    sent: int = 0
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # by network: trained, all
    checkpoint: int = 0  # bytes of its parts
    sharded_over: int = 1
    notes: list[str] = field(default_factory=list)

    def peak(self) -> int:
        """The peak of a run, which may be resumed. Sampling is another command."""
        return max(value for name, value in self.peaks.items() if not name.startswith("sampling"))


def allowance(peak: int, processes: int) -> int:
    """Bytes that the simulation does not see, roughly: context and libraries, NCCL, fragmentation."""
    return round(CONTEXT + (NCCL if processes > 1 else 0) + FRAGMENTS * peak)


# What is counted ---------------------------------------------------------------------------------------------------


class Costs(Meter):
    """Bytes of live fake tensors of ``mode``, ``now`` and at their ``peak``; ``flop``; bytes ``sent`` to others.

    What runs inside counts ``times`` for FLOP and bytes sent. A number that is read of a fake tensor is 0, and memory
    that is taken without being filled is fake.
    """

    def __init__(self, mode: FakeTensorMode):
        super().__init__()
        self.now = self.peak = self.flop = self.sent = 0
        self.times = 1
        self._mode = mode
        self._sizes: dict[int, tuple[weakref.ref, int]] = {}  # by the address of a storage: the storage, its bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return torch.zeros((), dtype=args[0].dtype).item()
        if func is aten.empty.memory_format:
            with self._mode:
                out = func(*args, **(kwargs or {}))
            self.watch(out)
            return out
        if func.namespace == "c10d" and any(isinstance(x, FakeTensor) for x in tensors_in(args)):
            self.seen(func, args, {}, None)  # torch 2.9 has no collective of tensors without values
            return func(*(nothing_of(x) for x in args), **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def seen(self, func, args: tuple, kwargs: dict, out: object) -> None:
        self.flop += self.times * flop_of(func, args, kwargs, out)
        if "c10d" in func.namespace:
            self.sent += self.times * bytes_sent(func._overloadpacket.__name__, args, out)
        if func.namespace == "fsdp":  # before its copies FSDP2 frees and takes memory without an operator
            for key, (storage, _) in list(self._sizes.items()):
                if (alive := storage()) is not None:
                    self._resize(key, alive.nbytes())
        self.watch(*(x for x in tensors_in(out) if isinstance(x, FakeTensor) and x.fake_mode is self._mode))
        self.watch(*(x for x in args if isinstance(x, nn.Parameter)))  # of a network in a user's function

    def lap(self) -> int:
        """Return the peak since the last lap."""
        peak, self.peak = self.peak, self.now
        return peak

    def watch(self, *things: nn.Module | torch.optim.Optimizer | Tensor) -> None:
        """Count the tensors of ``things``; of a sharded one its part of here."""
        for thing in things:
            if isinstance(thing, nn.Module):
                self.watch(*thing.parameters(), *thing.buffers())
            elif isinstance(thing, torch.optim.Optimizer):
                self.watch(*tensors_in(dict(thing.state)))
            elif isinstance(thing, Tensor):
                storage = (thing.to_local() if isinstance(thing, DTensor) else thing).untyped_storage()
                key = storage._cdata
                if key not in self._sizes:
                    self._sizes[key] = weakref.ref(storage, lambda _, key=key: self._resize(key, None)), 0
                self._resize(key, storage.nbytes())

    def _resize(self, key: int, size: int | None) -> None:
        """The storage ``key`` has ``size`` bytes, in multiples of 512 as CUDA's allocator has it; None: it is gone."""
        storage, before = self._sizes.pop(key)
        after = -(-(size or 0) // 512) * 512
        if size is not None:
            self._sizes[key] = storage, after
        self.now += after - before
        self.peak = max(self.peak, self.now)


def nothing_of(x: object) -> object:
    """``x``, or an empty tensor for a tensor, also in a list."""
    return [nothing_of(each) for each in x] if isinstance(x, list) else torch.empty(0) if isinstance(x, Tensor) else x


def bytes_sent(collective: str, args: tuple, out: object) -> int:
    """Bytes to other ranks: gathers and scatters by a ring; a reduction over n ranks by its limit for many.

    That is twice its bytes, in truth 2 (n - 1) / n of them.
    """
    if collective in ("_allgather_base_", "_reduce_scatter_base_"):
        return abs(args[0].nbytes - args[1].nbytes)
    if collective in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        return abs(out.nbytes - args[0].nbytes)
    return 2 * sum(x.nbytes for x in tensors_in(args)) if collective.strip("_") in ("allreduce", "all_reduce") else 0


# A run of fake tensors ---------------------------------------------------------------------------------------------


class FakeSession(Session):
    """Rank 0 of ``processes``, of which there is one; its networks are fake."""

    def __init__(self, precision: str, sharded: bool, shard_over: str, processes: int):
        options = {"cpu": True, "mixed_precision": "no" if precision == "no" else "bf16"}
        super().__init__(Accelerator(**options), Accelerator(**options), sharded and processes > 1, shard_over)
        if precision == "fp16":  # which accelerate refuses without a GPU
            for accelerator in (self.generator_accelerator, self.estimator_accelerator):
                accelerator.state._mixed_precision, accelerator.scaler = "fp16", torch.amp.GradScaler("cpu")
        self.processes, self.networks = processes, NetworksToCome(self)

    @property
    def world_size(self) -> int:
        return self.processes

    def place(self, accelerator: Accelerator, network: nn.Module) -> nn.Module:
        return super().place(accelerator, self.networks.faked(network))  # its LoRA is still real


@contextlib.contextmanager
def open_fake_session(args: argparse.Namespace, precision: str, processes: int) -> Iterator[FakeSession]:
    """Yield a session in which torch and accelerate see no other processes, but for FSDP2's fake process group."""
    variables = dict(os.environ)
    _, sharded, notes = take_environment()
    for name in STARTED:
        os.environ.pop(name, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        session = FakeSession(precision, sharded, args.shard_over, processes)
        session.notes = notes
        if session.sharded:
            from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

            dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
        yield session
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.update(variables)


def simulate(args: argparse.Namespace, precision: str, processes: int) -> Cost:
    """One cycle of the run of ``args``, after it was resumed. Raises `InputError` as `build` does."""
    chunks = args.gradient_accumulation_steps if args.tilt else min(args.gradient_accumulation_steps, MOST_CHUNKS)
    # No compilation, which saves some memory; moments in 8 bits are counted below.
    lighter = {"gradient_accumulation_steps": chunks, "compile": False, "optimizer": "adamw"}
    with open_fake_session(args, precision, processes) as session:
        networks = session.networks
        run = build(argparse.Namespace(**vars(args) | lighter), session, networks)
        for network in (run.plain_generator, run.plain_estimator, *run.judges.values()):
            choose_attention(network, torch.device("cuda"), torch.bfloat16)
        cost = Cost(parameters=parameters_of(run), sharded_over=session.mesh_shape[-1] if session.sharded else 1)
        costs = Costs(networks.mode)
        statistics = [[memory.features_of, *tensors_in(vars(memory))] for memory in run.memories.values()]
        for things in (*things_of(run).values(), *statistics):
            costs.watch(*things)
        with costs:
            buckets = buckets_of(run) if processes > 1 and not session.sharded else {}
            resume(run)
            cost.peaks["resuming"] = costs.lap()
            cost.checkpoint = sum(t.numel() * t.element_size() for part in run.parts for t in part.tensors())
            plan_cycle(run, args, costs, cost, buckets)
            cost.resident = {name: local_bytes(networks, *things) for name, things in things_of(run).items()}
            cost.resident[REST] = costs.now - sum(cost.resident.values())
            if args.num_previews:
                plan_previews(run)
                cost.peaks["previews"] = costs.lap()
        name = f"sampling {SAMPLES} images in fp32, {DECODED_AT_ONCE} decoded at once"
        cost.peaks[name] = sample(args, networks, run.decode)
    if args.optimizer == "adamw8bit":
        in_8_bits(cost)
    cost.notes = list(dict.fromkeys(networks.notes + session.notes))
    return cost


def parameters_of(run: Run) -> dict[str, tuple[int, int]]:
    return {
        name: (sum(p.numel() for p in trainable(each.plain).values()), sum(p.numel() for p in each.plain.parameters()))
        for name, each in run.learners.items()
    }


def things_of(run: Run) -> dict[str, list]:
    """Weights and states on the device between two cycles, by their lines of the plan."""
    things: dict[str, list] = {}
    for name, learner in run.learners.items():
        trained = f" {learner.plain.trained}" if hasattr(learner.plain, "trained") else ""
        things |= {f"{name} weights": [learner.plain], f"{name}{trained} moments": [learner.optimizer.optimizer]}
    things |= {"EMA": list(run.ema.values.values()) if run.ema else [], "decoder weights": [run.decode]}
    return things | {f"{name.replace('_', ' ')} weights": [judge] for name, judge in run.judges.items()}


def local_bytes(networks: NetworksToCome, *things: object) -> int:
    costs = Costs(networks.mode)
    costs.watch(*things)
    return costs.now


def buckets_of(run: Run) -> dict[nn.Parameter, Tensor]:
    """The gradients, which DDP holds from turn to turn."""
    return {p: torch.empty_like(p) for each in run.learners.values() for p in trainable(each.plain).values()}


def resume(run: Run) -> None:
    """`train_cc.distillation.state.restore`: moments go to their places, a parameter at a time."""
    for part in run.parts:
        for p in trainable(part.network).values() if part.optimizer is not None else ():
            local = p.detach().to_local() if isinstance(p, DTensor) else p.detach()
            # Of a sharded one a whole one is on the device for a while.
            zeros = (
                local.new_zeros(p.shape) if isinstance(p, DTensor) else torch.zeros((), dtype=p.dtype).expand(p.shape)
            )
            put_moments(part.optimizer, p, {"step": local.new_zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros})
    for memory in run.memories.values():  # it holds samples, and has measured its scale
        memory.observed, memory.norms = True, [[1.0, 1.0]] * 3


def plan_cycle(
    run: Run, args: argparse.Namespace, costs: Costs, cost: Cost, buckets: dict[nn.Parameter, Tensor]
) -> None:
    """One cycle of ``run``, scaled up to that of ``args``: its FLOP, bytes sent, and the peaks of its turns.

    Of the estimator turns, which are alike, only the first is simulated.
    """
    chunks, gone = args.gradient_accumulation_steps, run.optimisation.gradient_accumulation_steps

    def begin_turns(number: int, accelerator: Accelerator) -> None:
        costs.times = number
        for learner in run.learners_of(accelerator).values() if buckets else ():
            for p in trainable(learner.plain).values():
                p.grad = buckets[p]
                cost.sent += 2 * number * p.nbytes

    # A cycle begins by drawing the samples of all its estimator turns. Those that are not drawn here:
    absent = torch.empty((chunks - gone) * args.ratio_update * args.batch_size, *run.sample_shape)
    costs.lap()
    batches = turns.estimator_batches(run, 0)
    begin_turns(args.ratio_update, run.session.estimator_accelerator)
    turns.observe_batches(run, batches[0])
    turns.estimator_turn(run, 0, batches[0])
    update(run, run.session.estimator_accelerator)
    cost.peaks["training, estimator turns"] = costs.lap()
    del batches, absent
    begin_turns(1, run.session.generator_accelerator)
    turns.generator_turn(run, 0)
    update(run, run.session.generator_accelerator)
    if run.ema is not None:
        run.ema.update(trainable(run.plain_generator))
    cost.peaks["training, generator turn"] = costs.lap()
    cost.flop = round(costs.flop * chunks / gone)
    cost.sent += round(costs.sent * chunks / gone)


def decoded(decode: Callable[[Tensor], Tensor], x0: Tensor, at_once: int) -> Tensor:
    """Images of ``x0``, ``at_once`` decoded at a time: the first of them in earnest, and room for the others."""
    first = decode(x0[:at_once].float()).float()
    parts = [first, *(torch.empty_like(first) for _ in range(at_once, len(x0), at_once))]
    return torch.cat(parts)[: len(x0)]


@torch.no_grad()
def plan_previews(run: Run) -> None:
    """Compute `panel.preview`; one step of the teacher's row takes as much memory as all of them."""
    noise, y, draws = preview_inputs(run)
    with averaged(run), run.session.generator_accelerator.autocast():
        x0 = few_step_sample(run.generator, noise, y, run.method.num_steps, run.method.timestep_shift, draws.noise_like)
        images = decoded(run.decode, x0, 4)
    if run.output.teacher_preview_steps:
        decoded(run.decode, euler_sample(run.scores.teacher, noise, y, 1), 4)
    for judge in run.judges.values():
        judge(images)
    t = torch.full((len(y),), ESTIMATE_TIME)
    for v in run.scores.both(x0, t, t, y, annealing(0, run.method.dynamic_steps)):
        decoded(run.decode, v, 4)


@torch.no_grad()
def sample(args: argparse.Namespace, networks: NetworksToCome, decode: Callable[[Tensor], Tensor]) -> int:
    """Return the peak of the generator only with its decoder, as `evaluation.generate` has them."""
    generator, costs = networks.teacher(args.teacher), Costs(networks.mode)
    costs.watch(generator, decode.float() if isinstance(decode, nn.Module) else None)
    with costs:
        noise, y = torch.randn(SAMPLES, *generator.sample_shape), torch.zeros(SAMPLES, dtype=torch.long)
        x0 = few_step_sample(generator, noise, y, min(2, args.num_steps), args.timestep_shift)
        decoded(decode, x0, DECODED_AT_ONCE)
    return costs.peak


def in_8_bits(cost: Cost) -> None:
    """Two bytes a trained parameter in place of eight."""
    for name in [name for name in cost.resident if name.endswith(" moments")]:
        less = 3 * cost.resident[name] // 4
        cost.resident[name] -= less
        for peak in cost.peaks:
            cost.peaks[peak] -= 0 if peak.startswith("sampling") else less
