"""The plan of a command (`--dry-run`): arguments, images, checkpoints, memory, FLOP, hours.

Inputs are checked as a run checks them, the teacher's weights by their header only. The rest is computed
(`train_cc.planning.memory`).
"""

import argparse
import os

import torch

from train_cc.io.errors import InputError, saying
from train_cc.io.fields import flag_of
from train_cc.io.processes import MOST, count_of
from train_cc.planning.memory import GIB, Cost, allowance, simulate
from train_cc.run.checkpoint import newest_intact, open_checkpoint, step_of
from train_cc.run.session import GPU_PRECISION, agreed_precision

UTILISATION = 0.4  # of a GPU's peak, that hours are told for


def print_plan(stage: str, args: argparse.Namespace, notes: list[str]) -> None:
    """Print the plan, on one process of each machine: a cluster may set RANK for a pod of which one process plans."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with saying("planning"):
            text = plan(stage, args, count_of(os.environ, "WORLD_SIZE", 1, MOST, 1))
        print("\n".join([text, *notes]))


def begins_at(stage: str, args: argparse.Namespace) -> tuple[int, list[str]]:
    """The step that the run starts from, and notes. A checkpoint may be one that a cold start has yet to write.

    Raises `InputError` for a checkpoint that is missing or not whole.
    """
    checkpoint, path = None, args.resume_ckpt
    if args.auto_resume and not args.overwrite:
        checkpoint = newest_intact(args.output_dir / "checkpoints")[0]
    if checkpoint is None and path is not None:
        step = step_of(path) if path.parent.name == "torch_units" else None
        if step is not None and not os.path.lexists(path):
            return step, [f"{path} does not exist yet: planned as from step {step}; a run needs it"]
        checkpoint = open_checkpoint(path)
    if checkpoint is None and stage == "dmdr_refl":
        raise InputError("--resume-ckpt is missing: this stage starts from a cold start's torch_units/step-N.pt")
    return checkpoint.step if checkpoint is not None else 0, []


def planned_precision(args: argparse.Namespace) -> tuple[str, list[str]]:
    """Return the precision to plan for, and notes on it."""
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    if (configured, args.mixed_precision) == ("no", "auto") and not torch.cuda.is_available():
        note = f"no GPU here: --mixed-precision auto is planned as {GPU_PRECISION}, as on a GPU (here it would be fp32)"
        return GPU_PRECISION, [note]
    return agreed_precision(configured, args.mixed_precision), []


def plan(stage: str, args: argparse.Namespace, processes: int) -> str:
    """The text that `--dry-run` prints. Raises `InputError` for inputs that a run would refuse.

    A teacher may be a name such as SiT-XL/2, or a folder that has its config.json only.
    """
    precision, notes = planned_precision(args)
    begin, more = begins_at(stage, args)
    cost = simulate(args, precision, processes)
    updates = max(0, args.max_train_steps - begin)
    batch = args.batch_size * args.gradient_accumulation_steps * processes
    return "\n".join(
        [
            f"{stage}, dry run: nothing is trained or written",
            "",
            "arguments:",
            *[f"  {flag_of(name)} {value}" for name, value in vars(args).items() if name != "dry_run"],
            "",
            *[f"note: {note}" for note in notes + more + cost.notes],
            f"effective batch: {batch} = {args.batch_size} a process x {args.gradient_accumulation_steps} accumulated "
            f"x {processes} process(es), precision {precision}",
            f"images that the generator is trained on, from step {begin} to {args.max_train_steps}: "
            f"{batch * updates:,}",
            *parameter_lines(args, cost, updates),
            "",
            *memory_lines(cost, processes),
            "",
            *time_lines(args, cost, processes, updates),
        ]
    )


def parameter_lines(args: argparse.Namespace, cost: Cost, updates: int) -> list[str]:
    (trained, whole), (lora, estimator) = cost.parameters["generator"], cost.parameters["estimator"]
    count = -(-updates // args.checkpoint_steps)
    count = min(count, args.keep_checkpoints) if args.keep_checkpoints else count
    return [
        f"parameters: generator {trained:,} trained of {whole:,}; estimator {lora:,} trained, "
        f"{estimator - lora:,} frozen",
        f"checkpoints kept: {count} (every {args.checkpoint_steps} updates), {cost.checkpoint / GIB:.2f} GiB each, "
        f"{count * cost.checkpoint / GIB:.2f} GiB in all",
    ]


def memory_lines(cost: Cost, processes: int) -> list[str]:
    peak = cost.peak()
    more = allowance(peak, processes)
    how = f", sharded (FSDP2) over {cost.sharded_over}" if cost.sharded_over > 1 else ""
    of_several = "NCCL, " if processes > 1 else ""
    return [
        f"memory of a GPU{how}, from a simulated cycle:",
        *[f"  {name}: {value / GIB:.2f} GiB" for name, value in cost.resident.items() if value > 0],
        *[f"  peak, {name}: {value / GIB:.2f} GiB" for name, value in cost.peaks.items()],
        f"  peak of the run: {peak / GIB:.2f} GiB; with an allowance for torch's context, {of_several}fragmentation: "
        f"about {(peak + more) / GIB:.1f} GiB",
        "  (the peak is that of live tensors, not compiled; not in it: the CUDA context, workspaces of libraries and "
        "compilers, buffers of NCCL, the allocator's fragmentation)",
    ]


def time_lines(args: argparse.Namespace, cost: Cost, processes: int, updates: int) -> list[str]:
    seconds = cost.flop / (UTILISATION * args.peak_tflops * 1e12)
    traffic = f", {cost.sent / GIB:.2f} GiB sent to other processes" if processes > 1 else ""
    return [
        f"an update: {cost.flop / 1e12:.2f} TFLOP a process{traffic}",
        f"{updates} updates: {cost.flop * updates * processes / 1e18:.2f} EFLOP in all processes; at "
        f"{UTILISATION:.0%} of {args.peak_tflops:g} TFLOP/s (--peak-tflops) {seconds:.2f} s an update, "
        f"{seconds * updates / 3600:.1f} hours, communication and pictures apart",
    ]
