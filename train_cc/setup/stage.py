"""One stage from a validated command line to its end: the command that starts a run also resumes it.

The start is found under the lock: a checkpoint of the run's own folder, one of another, or nothing.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from train_cc.distillation.loop import train
from train_cc.distillation.run import Run, trainable
from train_cc.distillation.state import restore
from train_cc.io.errors import InputError, saying
from train_cc.io.fields import flag_of, marked, replaced
from train_cc.io.products import (
    RECORD,
    check_output_dir,
    check_parent,
    commit,
    locked,
    need_space,
    record,
    record_of,
    write_record,
)
from train_cc.io.read import value_text
from train_cc.io.remote import model_folder, pinned
from train_cc.io.weights import WEIGHTS_NAME
from train_cc.run.checkpoint import (
    Checkpoint,
    complete_steps,
    delete_checkpoint,
    delete_leftovers,
    mark_damaged,
    newest_intact,
    open_checkpoint,
    rotate_checkpoints,
    units_path,
)
from train_cc.run.folder import check_writable, clear_output_dir, exported_step, is_run, is_unused
from train_cc.run.logbook import log_to, logger
from train_cc.run.session import on_main, open_session
from train_cc.setup.arguments import GROUPS
from train_cc.setup.build import build


@dataclass
class Start:
    """``continues``: in its own folder. ``damaged``: newer checkpoints there, by step, and what is wrong with them."""

    checkpoint: Checkpoint | None
    continues: bool
    damaged: dict[int, str] = field(default_factory=dict)
    finished: str = ""  # not empty: nothing is left to do, in words


def check_own(args: argparse.Namespace) -> None:
    """The output folder is empty, or a run of ours to continue or replace. Raises `InputError`; writes nothing."""
    folder = args.output_dir
    check_parent(folder / RECORD)
    check_parent(units_path(folder / "checkpoints", 1))  # a link to storage that is not there is no empty run
    if is_unused(folder) or is_run(folder) or complete_steps(folder / "checkpoints"):
        return
    raise InputError(
        f"the output folder {folder} is not empty, and no training run wrote it: choose another --output-dir"
    )


def find_start(stage: str, args: argparse.Namespace, space: int) -> Start:
    """The start of the run; call it with the lock held. Changes nothing.

    Raises `InputError` for an output folder that holds something which this run would neither continue nor replace,
    a checkpoint that is not whole, or a disk with less than ``space`` bytes.
    """
    check_own(args)
    start = newest_start(args)
    checkpoint = start.checkpoint
    if checkpoint is None and stage == "dmdr_refl":
        raise InputError("--resume-ckpt is missing: this stage starts from a cold start's torch_units/step-N.pt")
    if checkpoint is not None:
        if finished := what_is_left(args, start):
            return replace(start, finished=finished)
        for name, default in marked("lasting", *GROUPS.values()).items():
            flag, own, theirs = flag_of(name), getattr(args, name), checkpoint.units["arguments"].get(name, default)
            if own != theirs:
                raise InputError(f"{flag} is {own}, but {checkpoint.path} was made with {flag} {theirs}: give that one")
    check_writable(args.output_dir)
    need_space(args.output_dir, space)
    return start


def newest_start(args: argparse.Namespace) -> Start:
    own, source = args.output_dir / "checkpoints", args.resume_ckpt
    resumes = args.auto_resume and not args.overwrite
    if resumes:
        checkpoint, damaged = newest_intact(own)
        if checkpoint is not None:
            return Start(checkpoint, continues=True, damaged=damaged)
    if source is not None and Path(os.path.realpath(own)) in Path(os.path.realpath(source)).parents:
        return Start(open_checkpoint(source), continues=True)
    if not (resumes and died_early(args.output_dir)) and not is_unused(args.output_dir):
        if args.overwrite and not is_run(args.output_dir):
            raise InputError(f"{args.output_dir} has no {RECORD} of a training run: --overwrite deletes nothing there")
        check_output_dir(args.output_dir, args.overwrite)
    return Start(open_checkpoint(source) if source is not None else None, continues=False)


def died_early(folder: Path) -> bool:
    """True if a run was killed here before its first checkpoint: the same command starts again.

    False if the log or an exported generator shows that there were checkpoints: they were moved.
    """
    if not is_run(folder) or complete_steps(folder / "checkpoints") or (folder / "generator/config.json").exists():
        return False
    log = folder / "log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return not re.search(r"^\S+ \S+ checkpoint ", text, re.MULTILINE)


def what_is_left(args: argparse.Namespace, start: Start) -> str:
    """Words for a run that is finished; "" where there is something to do. Raises `InputError` for going backwards."""
    step, steps, folder = start.checkpoint.step, args.max_train_steps, args.output_dir
    if step < steps:
        return ""
    if not start.continues:
        raise InputError(
            f"--max-train-steps is {steps}, counted over both stages, and {start.checkpoint.path} is at step {step} "
            "already: nothing would be trained"
        )
    if exported_step(folder) == step:
        flags = other_flags(args, folder, start.checkpoint)
        words = f" It was asked for with other flags, which change nothing now: {flags}." if flags else ""
        return (
            f"step {step} of --max-train-steps {steps}: nothing is left to train, and nothing was written. "
            f"{folder} is as it was.{words}"
        )
    if step > steps:
        raise InputError(f"--max-train-steps is {steps}, but {folder} is at step {step} already; nothing was changed")
    return ""


def other_flags(args: argparse.Namespace, folder: Path, checkpoint: Checkpoint) -> str:
    """Flags of this command that differ from the record of ``folder``, in words."""
    recorded = record_of(folder).get("arguments") or checkpoint.units["arguments"]
    arguments = json.loads(json.dumps(vars(args), default=str))
    return "; ".join(
        f"{flag_of(name)} is {value_text(arguments[name])}, recorded {value_text(recorded[name])}"
        for name in sorted(arguments.keys() & recorded.keys() - set(marked("start", *GROUPS.values())))
        if arguments[name] != recorded[name]
    )


def go_back(args: argparse.Namespace, start: Start) -> None:
    """Continuing ends what came later in the folder: damaged checkpoints are renamed, the rest is deleted."""
    root, step = args.output_dir / "checkpoints", start.checkpoint.step
    for later, damage in start.damaged.items():
        logger.warning("WARNING: %s. It is renamed, and the run continues from step %d", damage, step)
        mark_damaged(root, later)
    for later in complete_steps(root):
        if later > step:
            delete_checkpoint(root, later)
            logger.info("deleted the checkpoint of step %d: the run went back to step %d", later, step)
    delete_leftovers(root)
    rotate_checkpoints(root, args.keep_checkpoints, args.resume_ckpt)  # a kill can come between a checkpoint and that


def write_run_record(stage: str, args: argparse.Namespace, start: Start, hashes: dict[str, str]) -> None:
    """args.json. A run that continues with other arguments keeps the earlier commands, each with where it started."""
    step = start.checkpoint.step if start.checkpoint is not None else 0
    path, earlier = args.output_dir / RECORD, []
    if start.continues:
        before = record_of(args.output_dir)
        if not before and path.exists():
            os.replace(path, path.with_name(RECORD + ".damaged"))
        earlier = before.get("earlier") if isinstance(before.get("earlier"), list) else []
        if before and (before["stage"] != stage or other_flags(args, args.output_dir, start.checkpoint)):
            names = ("stage", "command", "arguments", "from_step")
            earlier = [*earlier, {name: before[name] for name in names if name in before}]
        elif before:
            step = before.get("from_step", step)
    content = {"command": sys.argv, "commit": commit(), "from_step": step, "sha256": hashes, "earlier": earlier}
    content["job"] = os.environ.get("SLURM_JOB_ID")
    write_record(args.output_dir, record(stage, vars(args), **content))


# The stage -----------------------------------------------------------------------------------------------------------


ENDS = 1 << 20  # bytes of a file's beginning and end that every process compares


def run_stage(name: str, args: argparse.Namespace, notes: list[str]) -> None:
    """One stage from a validated command line: nothing is written before every input has been read."""
    session = open_session(args.mixed_precision, args.report_to, args.output_dir, args.shard_over)
    with contextlib.ExitStack() as lock:

        def search() -> Start:
            check_own(args)  # before the lock, which is a file in the folder; and again behind it
            lock.enter_context(locked(args.output_dir))
            return find_start(name, args, room_for(args))

        teacher = on_main(session, lambda: pinned(args.teacher))  # a record names one state of the files
        args = replaced(args, teacher=teacher)
        start = on_main(session, search)
        if start.finished:
            if session.is_main:
                print(start.finished, file=sys.stderr)
            session.leave_at_exit()
            return
        if not session.agree(0 if start.checkpoint is None else fingerprint(start.checkpoint)):
            raise InputError(
                f"{start.checkpoint.path} and its files are not the same for all processes: is --output-dir on storage "
                "that all nodes share?"
            )
        with saying("reading the networks"):
            run = build(args, session)
            if start.checkpoint is not None:
                restore(run, start.checkpoint)
        on_main(session, lambda: open_folder(name, args, run, start, [*notes, *session.notes]))
        train(run)
    session.leave_at_exit()


def fingerprint(checkpoint: Checkpoint) -> int:
    """A hash of the checkpoint as this process sees it: its torch_units file, and the ends of each file it names.

    The main process checks every byte; files of two runs or steps have the same size, and differ at their ends.
    """
    if not checkpoint.path.is_file() or not checkpoint.complete():
        return -1
    digest = hashlib.sha256()
    for path in (checkpoint.path, *map(checkpoint.file, sorted(checkpoint.units["files"]))):
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(0, path.stat().st_size - ENDS))
            digest.update(file.read())
    return int.from_bytes(digest.digest()[:7], "big")


def room_for(args: argparse.Namespace) -> int:
    """Bytes that the export needs, and where the whole generator is trained one checkpoint of it; 0: not known yet."""
    weights = model_folder(args.teacher) / WEIGHTS_NAME
    size = weights.stat().st_size if weights.is_file() else 0
    return size if args.use_lora_gen else size * (4 + bool(args.ema_decay))


def open_folder(name: str, args: argparse.Namespace, run: Run, start: Start, notes: list[str]) -> None:
    """The first writing of a run, by the main process: its folder, arguments and log."""
    if not start.continues:
        clear_output_dir(args.output_dir)
    write_run_record(name, args, start, run.hashes)
    log_to(args.output_dir)
    describe(run, args, name, start)
    for note in notes:
        logger.info(note)
    if start.continues:
        go_back(args, start)
    if run.step >= args.max_train_steps:
        logger.info("step %d of --max-train-steps %d: only the export is left", run.step, args.max_train_steps)


def describe(run: Run, args: argparse.Namespace, name: str, start: Start) -> None:
    session, checkpoint = run.session, start.checkpoint
    batch = run.optimisation.effective_batch(session.world_size)
    for role, learner in run.learners.items():
        trained = sum(p.numel() for p in trainable(learner.plain).values())
        whole = sum(p.numel() for p in learner.plain.parameters())
        logger.info("%s: %d parameters trained of %d", role, trained, whole)
    logger.info(
        f"{name} on {session.world_size} x {session.device.type}"
        f"{f', sharded (FSDP2) over {session.mesh_shape[-1]}' if session.sharded else ''}, precision "
        f"{session.generator_accelerator.mixed_precision}; effective batch {batch} = {args.batch_size} a process x "
        f"{args.gradient_accumulation_steps} accumulated x {session.world_size} process(es)"
    )
    for name, digest in run.hashes.items():
        logger.info("%s %s: SHA-256 %s", name, getattr(args, name, ""), digest)
    if checkpoint is None:
        return
    before = checkpoint.units.get("effective_batch", batch)
    if before != batch:
        logger.warning("WARNING: the effective batch was %d in %s, and is %d here", before, checkpoint.path, batch)
    if not checkpoint.hashed:
        logger.warning("WARNING: %s is of an older format, without hashes: only sizes were checked", checkpoint.path)
    # Which of the parts that not every run has carry over, begin or end here.
    files = {part.file: part for part in run.parts if "/" in part.file}
    words = [
        f"the {part.name} carries over"
        if checkpoint.has(file)
        else f"the checkpoint has no {part.name}: it starts here"
        for file, part in files.items()
        if part.anew is not None
    ]
    words += [f"{file} ends here" for file in checkpoint.units["files"] if file not in files]
    logger.info(
        f"{'continues' if start.continues else 'starts'} from {checkpoint.path} at step {run.step}: weights, optimizer "
        f"moments and the step carry over; {'; '.join(words) or 'there is no EMA'}; the learning rates are this "
        f"command's: generator {args.learning_rate_generator:g}, estimator {args.learning_rate_estimator:g}"
    )
