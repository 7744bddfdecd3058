"""The cost of a run, measured: its own turns on a fake GPU, in rank 0 of fake processes (`train_cc.run.fake_gpu`).

Nothing is computed, and no weights are needed. What lives on the device is counted as torch's allocator on CUDA counts
it. What does not show there, and is stated apart: `allowance`.
"""

import argparse
import gc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from train_cc.distillation import loop, panel
from train_cc.distillation.parts import Part
from train_cc.distillation.run import Run, trainable
from train_cc.models.estimator import ScoreEstimator
from train_cc.models.sit import SiT
from train_cc.models.vae import DECODED_AT_ONCE
from train_cc.run import states
from train_cc.run.fake_gpu import NAME, fake_gpu
from train_cc.run.fake_processes import fake_processes
from train_cc.run.meters import FlopCounter, LiveMemory, Traffic
from train_cc.run.session import make_session, take_environment
from train_cc.samplers import few_step_sample
from train_cc.setup import build as building
from train_cc.setup.to_come import NetworksToCome

GIB = 2**30
MOST_CHUNKS = 4  # accumulated batches that are gone through; later ones are as the last of these
SAMPLED = 250  # images at once of `evaluation.generate`
CONTEXT, NCCL, FRAGMENTS = 0.75 * GIB, 1.0 * GIB, 0.05  # of torch and its libraries; of several processes; of the peak


@dataclass
class Cost:
    """Bytes are of one process. ``flop`` and ``sent`` (bytes to others) are of one process in one cycle."""

    held: dict[str, int] = field(default_factory=dict)  # from turn to turn, by what it is
    peaks: dict[str, int] = field(default_factory=dict)  # of training, resuming, previews and sampling
    flop: int = 0
    sent: int = 0
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # by network: trained, all
    checkpoint: int = 0  # bytes of its parts
    sharded_over: int = 1
    notes: list[str] = field(default_factory=list)

    def peak(self) -> int:
        """Of a run, which may be resumed. Sampling is another command."""
        return max(value for name, value in self.peaks.items() if not name.startswith("sampling"))


def allowance(peak: int, processes: int) -> int:
    """Bytes that the simulation does not see, roughly: context and libraries, NCCL, fragmentation."""
    return round(CONTEXT + (NCCL if processes > 1 else 0) + FRAGMENTS * peak)


def simulate(args: argparse.Namespace, precision: str, processes: int) -> Cost:
    """One cycle of the run of ``args``, after it was resumed. Raises `InputError` as `build` does."""
    chunks = args.gradient_accumulation_steps if args.tilt else min(args.gradient_accumulation_steps, MOST_CHUNKS)
    # No compilation, which saves some memory; moments in 8 bits are counted below.
    lighter = {"gradient_accumulation_steps": chunks, "compile": False, "optimizer": "adamw"}
    with fake_gpu() as gpu, fake_processes(processes):
        _, sharded, _ = take_environment()
        networks = NetworksToCome(gpu.device)
        with LiveMemory(NAME) as memory:
            session = make_session(precision, sharded)
            session.shard_over = args.shard_over
            with (  # weights that are not there bear fp16
                mock.patch.object(ScoreEstimator, "overflowing_block", lambda *_: None),
                mock.patch.object(building, "require_range"),
            ):
                run = building.build(argparse.Namespace(**vars(args) | lighter), session, networks)
            cost = Cost(parameters=parameters_of(run), sharded_over=session.mesh_shape[-1] if session.sharded else 1)
            memory.reset()
            resume(run)
            cost.peaks["resuming"] = memory.peak
            cost.checkpoint = sum(t.numel() * t.element_size() for part in run.parts for t in part.tensors())
            first_steps(run)
            cycle(run, args, memory, cost)
            cost.held = held_by(run, memory.now)
            if args.num_previews:
                cost.peaks["previews"] = preview(run, memory)
        decode, config = run.decode, run.model_config
        del run
        gc.collect()
        name = f"sampling {SAMPLED} images in fp32, {DECODED_AT_ONCE} decoded at once"
        cost.peaks[name] = sample(config, decode, args, gpu.device)
    if args.optimizer == "adamw8bit":
        in_8_bits(cost)
    cost.notes = networks.notes + session.notes
    return cost


def parameters_of(run: Run) -> dict[str, tuple[int, int]]:
    found = {}
    for name, model in (("generator", run.plain_generator), ("estimator", run.plain_estimator)):
        trained = sum(p.numel() for p in trainable(model).values())
        found[name] = trained, sum(p.numel() for p in model.parameters())
    return found


# What a run does ---------------------------------------------------------------------------------------------------


def nothing(p: Tensor) -> Tensor:
    """Zeros of the shape of ``p``, on the CPU, that take no memory there."""
    return torch.zeros((), dtype=p.dtype).expand(p.shape)


def with_moments(run: Run) -> list[Part]:
    return [part for part in run.parts if part.optimizer is not None]


def resume(run: Run) -> None:
    """`train_cc.distillation.state.restore`, from a checkpoint that takes no memory. Moments are there afterwards."""
    for part in with_moments(run):
        for p in trainable(part.network).values():
            states.copy_whole(p, nothing(p))
            moments = {"step": torch.zeros(()), "exp_avg": nothing(p), "exp_avg_sq": nothing(p)}
            states.put_moments(part.optimizer, p, moments)
    for memory in run.memories.values():  # it holds samples, and has measured its scale
        memory.observed, memory.norms = True, [[1.0, 1.0]] * 3


def first_steps(run: Run) -> None:
    """A step of each optimizer, not counted: in the first, DTensor tries it on whole tensors that have no memory.

    On a real device they take none; here they would be taken for the run's.
    """
    for part in with_moments(run):
        for p in part.optimizer.state:
            p.grad = torch.zeros_like(p)
        part.optimizer.step()
        part.optimizer.zero_grad()


def cycle(run: Run, args: argparse.Namespace, memory: LiveMemory, cost: Cost) -> None:
    """One cycle of ``run``, scaled up to that of ``args``: its FLOP, bytes sent, and the peaks of its turns."""
    chunks, gone = args.gradient_accumulation_steps, run.optimisation.gradient_accumulation_steps
    # A cycle begins by drawing the samples of all its estimator turns. Those that are not drawn here:
    absent = (chunks - gone) * args.ratio_update * args.batch_size
    samples = [
        torch.empty(absent, *run.sample_shape, device=run.session.device),
        torch.empty(absent, dtype=torch.long, device=run.session.device),
    ]
    counter, traffic = FlopCounter(), Traffic()
    spent = {}  # FLOP and bytes sent from the cycle's beginning, by what was just done
    estimator_batches, generator_turn = loop.estimator_batches, loop.generator_turn

    def first_part(run: Run, step: int) -> list:
        """Of the estimator turns, which are alike, the first alone goes on."""
        batches = estimator_batches(run, step)
        samples.append(batches)
        spent["samples"] = (counter.total, traffic.sent)
        return batches[:1]

    def last_part(run: Run, step: int) -> dict[str, Tensor]:
        spent["estimator turn"] = (counter.total, traffic.sent)
        cost.peaks["training, estimator turns"] = memory.peak
        memory.reset()
        return generator_turn(run, step)

    memory.reset()
    memory.also = [counter, traffic]
    with (
        mock.patch.object(loop, "estimator_batches", first_part),
        mock.patch.object(loop, "generator_turn", last_part),
    ):
        loop.cycle(run, 0)
    memory.also = []
    cost.peaks["training, generator turn"] = memory.peak
    spent["generator turn"] = (counter.total, traffic.sent)
    more = args.ratio_update - 1  # estimator turns
    cost.flop, cost.sent = (
        round((whole + more * (turn - drawn)) * chunks / gone)
        for drawn, turn, whole in zip(*spent.values(), strict=True)
    )


def decoded(decode: Callable[[Tensor], Tensor], x0: Tensor, at_once: int) -> Tensor:
    """Images of ``x0``, ``at_once`` decoded at a time: the first of them in earnest, and room for the others."""
    first = decode(x0[:at_once].float()).float()
    parts = [first, *(torch.empty_like(first) for _ in range(at_once, len(x0), at_once))]
    return torch.cat(parts)[: len(x0)]


def preview(run: Run, memory: LiveMemory) -> int:
    """-> the peak. The teacher's row takes its memory at every step: one is enough."""
    decode_all = mock.patch.object(panel, "decode_all", lambda run, x0: decoded(run.decode, x0, 4))
    with tempfile.TemporaryDirectory() as folder, decode_all:
        steps = min(1, run.output.teacher_preview_steps)
        run.output = replace(run.output, output_dir=Path(folder), teacher_preview_steps=steps)
        memory.reset()
        loop.show(run, 0)
    return memory.peak


@torch.no_grad()
def sample(config: dict, decode: Callable[[Tensor], Tensor], args: argparse.Namespace, device: torch.device) -> int:
    """-> the peak of the generator alone with its decoder, as `evaluation.generate` has them."""
    with LiveMemory(NAME) as memory, device:
        generator = SiT(**config).eval()
        if isinstance(decode, nn.Module):
            memory.watch(decode.float())
        noise = torch.randn(SAMPLED, *generator.sample_shape)
        y = torch.zeros(SAMPLED, dtype=torch.long)
        x0 = few_step_sample(generator, noise, y, min(2, args.num_steps), args.timestep_shift, torch.randn_like)
        decoded(decode, x0, DECODED_AT_ONCE)
        return memory.peak


# What it holds -----------------------------------------------------------------------------------------------------


def local_bytes(*things: nn.Module | torch.optim.Optimizer | dict[str, Tensor]) -> int:
    """Of the tensors of ``things``, each storage once, as the allocator rounds them; a sharded one's part of here."""
    memory = LiveMemory(NAME)
    for thing in things:
        memory.watch(*thing.values()) if isinstance(thing, dict) else memory.watch(thing)
    return memory.now


def held_by(run: Run, now: int) -> dict[str, int]:
    """Bytes that are on the device between two cycles, ``now`` in all, by what they are."""
    held = {
        "generator weights": local_bytes(run.plain_generator),
        "generator moments": local_bytes(run.generator_optimizer.optimizer),
        "EMA": local_bytes(run.ema.values) if run.ema else 0,
        "estimator weights": local_bytes(run.plain_estimator),
        "estimator LoRA moments": local_bytes(run.estimator_optimizer.optimizer),
        "decoder weights": local_bytes(run.decode) if isinstance(run.decode, nn.Module) else 0,
    }
    held |= {f"{name.replace('_', ' ')} weights": local_bytes(judge) for name, judge in run.judges.items()}
    rest = now - sum(held.values())
    return held | {"other (buckets of DDP, statistics and feature spaces of rewards)": rest}


def in_8_bits(cost: Cost) -> None:
    """Two bytes a trained parameter in place of eight."""
    for name in ("generator moments", "estimator LoRA moments"):
        less = 3 * cost.held[name] // 4
        cost.held[name] -= less
        for peak in cost.peaks:
            cost.peaks[peak] -= 0 if peak.startswith("sampling") else less
