"""What a cycle would take on a card that need not be there: its kernels on a fake GPU, each by FLOP, bytes or launch.

An estimate, in seconds, on any machine. Without `--teacher` no weights are read or made: the networks are shapes.
"""

import argparse
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch

from evaluation.phases import phases_watched
from train_cc.distillation import loop
from train_cc.distillation.run import Run
from train_cc.run.fake_gpu import fake_gpu
from train_cc.run.fake_processes import fake_processes
from train_cc.run.meters import LiveMemory
from train_cc.run.roofline import COMPUTE_EFFICIENCY, LAUNCH, MEMORY_EFFICIENCY, Card, Cost, Roofline
from train_cc.run.session import GPU_PRECISION, open_session
from train_cc.setup.build import build
from train_cc.setup.to_come import NetworksToCome

GIB = 2**30
SHAPES = Path("-")  # as a teacher's folder: a network of the size alone


def watch(memory: LiveMemory, run: Run) -> None:
    """What a run holds from turn to turn."""
    judges = [model for model in (run.decode, *run.judges.values()) if isinstance(model, torch.nn.Module)]
    memory.watch(run.generator, run.estimator, *judges, run.generator_optimizer, run.estimator_optimizer)
    if run.ema is not None:
        memory.watch(*run.ema.values.values())


def estimate(args: argparse.Namespace, size: str, card: Card) -> tuple[Roofline, int]:
    """A cycle of the run of ``args``, after one that makes the optimizers' moments. -> its costs, its peak memory.

    Not compiled. Raises `InputError`.
    """
    own = {"compile": False, "teacher": Path(size) if args.teacher == SHAPES else args.teacher}
    if args.mixed_precision == "auto":  # as on a GPU
        own["mixed_precision"] = GPU_PRECISION
    args = argparse.Namespace(**vars(args) | own)
    with fake_gpu() as gpu, fake_processes(1):
        run = build(args, open_session(args.mixed_precision), NetworksToCome(gpu.device))
        loop.cycle(run, 0)
        memory, costs = LiveMemory(gpu.device.type), Roofline(card, gpu.device.type)
        with memory:
            watch(memory, run)
            with costs, phases_watched(run, costs.phase):
                loop.cycle(run, 1)
    return costs, memory.peak


def figures_of(costs: Roofline, peak: int) -> dict:
    """Names are those of a measured benchmark, so that `--compare` reads both."""
    total = costs.total()
    figures = {
        "seconds_per_cycle": total.seconds,
        "tflop_per_cycle": total.flop / 1e12,
        "gigabytes_per_cycle": total.bytes / 1e9,
        "kernels_per_cycle": total.kernels,
        "peak_memory_gib": peak / GIB,
    }
    for i, name in enumerate(("phase", "kind", "kernel")):
        sums: dict[str, Cost] = defaultdict(Cost)
        for key, cost in costs.rows.items():
            sums[key[i]] += cost
        rows = sorted(sums.items(), key=lambda item: -item[1].seconds)
        figures[f"by_{name}"] = {each: asdict(cost) for each, cost in rows}
    return figures | {"seconds_by_phase": {name: row["seconds"] for name, row in figures["by_phase"].items()}}


def table(figures: dict, kernels: int = 15) -> str:
    """``figures`` for people, with the ``kernels`` that take longest."""
    lines = [f"{'':50}{'ms':>9}{'TFLOP':>10}{'GB':>9}{'kernels':>9}"]

    def add(name: str, seconds: float, tflop: float, gigabytes: float, count: int) -> None:
        lines.append(f"{name:50}{1e3 * seconds:9.1f}{tflop:10.2f}{gigabytes:9.1f}{count:9d}")

    add("cycle", *(figures[f"{name}_per_cycle"] for name in ("seconds", "tflop", "gigabytes", "kernels")))
    for title in ("by_phase", "by_kind", "by_kernel"):
        lines.append(title.replace("_", " "))
        for name, row in list(figures[title].items())[: kernels if title == "by_kernel" else None]:
            add(f"  {name}", row["seconds"], row["flop"] / 1e12, row["bytes"] / 1e9, row["kernels"])
    lines.append(f"peak memory {figures['peak_memory_gib']:.2f} GiB")
    return "\n".join(lines)


def assumptions(card: Card) -> str:
    return f"""An estimate by roofline: nothing was measured. A kernel takes the longest of
  FLOP / ({COMPUTE_EFFICIENCY} x {card.half / 1e12:.0f} TFLOP/s; in fp32 {card.single / 1e12:.0f}),
  bytes / ({MEMORY_EFFICIENCY} x {card.bandwidth / 1e12:.2f} TB/s), its inputs and outputs once each, and
  {LAUNCH * 1e6:.0f} us; one kernel after another, without waiting for the host.
Memory: live tensors, without what kernels, the context, NCCL and fragmentation take."""
