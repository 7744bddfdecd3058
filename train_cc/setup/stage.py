"""One stage from a validated command line to its end: the command that starts a run also resumes it."""

import argparse
import contextlib
import hashlib
import sys

from train_cc.distillation.loop import train
from train_cc.distillation.run import Run, trainable
from train_cc.distillation.state import restore
from train_cc.io.errors import InputError
from train_cc.io.fields import replaced
from train_cc.io.products import locked
from train_cc.io.remote import model_folder, pinned
from train_cc.io.saying import saying
from train_cc.io.weights import WEIGHTS_NAME
from train_cc.run.checkpoint import Checkpoint
from train_cc.run.folder import clear_output_dir
from train_cc.run.logbook import log_to, logger
from train_cc.run.session import on_main, open_session
from train_cc.setup.build import build
from train_cc.setup.start import Start, check_own, find_start, go_back, write_run_record

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
        "%s on %d x %s%s, precision %s; effective batch %d = %d a process x %d accumulated x %d process(es)",
        name,
        session.world_size,
        session.device.type,
        f", sharded (FSDP2) over {session.mesh_shape[-1]}" if session.sharded else "",
        session.generator_accelerator.mixed_precision,
        batch,
        args.batch_size,
        args.gradient_accumulation_steps,
        session.world_size,
    )
    for name, digest in run.hashes.items():
        logger.info("%s %s: SHA-256 %s", name, getattr(args, name, ""), digest)
    if checkpoint is None:
        return
    before = checkpoint.units.get("effective_batch", batch)
    if before != batch:
        logger.warning("WARNING: the effective batch was %d in %s, and is %d here", before, checkpoint.path, batch)
    if not checkpoint.hashed:
        logger.warning("WARNING: %s is of an older format, without hashes: sizes alone were checked", checkpoint.path)
    logger.info(
        "%s from %s at step %d: weights, optimizer moments and the step carry over; %s; "
        "the learning rates are this command's: generator %g, estimator %g",
        "continues" if start.continues else "starts",
        checkpoint.path,
        run.step,
        "; ".join(carried_over(run, checkpoint)) or "there is no EMA",
        args.learning_rate_generator,
        args.learning_rate_estimator,
    )


def carried_over(run: Run, checkpoint: Checkpoint) -> list[str]:
    """Sentences for the log: which of the parts that not every run has carry over, begin or end here."""
    files = {part.file: part for part in run.parts if "/" in part.file}
    sentences = [
        f"the {part.name} carries over"
        if checkpoint.has(file)
        else f"the checkpoint has no {part.name}: it starts here"
        for file, part in files.items()
        if part.anew is not None
    ]
    return sentences + [f"{file} ends here" for file in checkpoint.units["files"] if file not in files]
