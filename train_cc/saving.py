"""Saving, resuming and exporting a run: which tensors go where, and where a run starts from."""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from train_cc.io.errors import InputError
from train_cc.io.write import check_output_dir
from train_cc.models.estimator import ScoreEstimator
from train_cc.models.generator import assemble_generator, generator_lora_rank
from train_cc.parts import Run, averaged_weights, effective_batch, trainable
from train_cc.run import checkpoint as checkpoints
from train_cc.run.logbook import RUN_CONTENT, logger


def save(run: Run, args: argparse.Namespace) -> Path:
    """Write a complete checkpoint of this step. -> its torch_units file."""
    generator, estimator = run.plain_generator, run.plain_estimator
    parts = {
        "accelerator_1/generator.safetensors": checkpoints.trained_state(generator),
        "accelerator_1/optimizer.pt": checkpoints.optimizer_state(generator, run.generator_optimizer.optimizer),
        "accelerator_2/estimator_lora.safetensors": lora_state(estimator),
        "accelerator_2/optimizer.pt": checkpoints.optimizer_state(estimator, run.estimator_optimizer.optimizer),
    }
    if run.ema is not None:
        parts["accelerator_1/ema.safetensors"] = {name: checkpoints.whole(value) for name, value in run.ema.items()}
    units = {
        "samples_seen": run.samples_seen,
        "effective_batch": effective_batch(args, run.session.world_size),
        "model_config": run.model_config,
        "teacher_sha256": run.hashes["teacher"],
        "arguments": json.loads(json.dumps(vars(args), default=str)),
        "scalers": [a.scaler and a.scaler.state_dict() for a in (run.session.generator, run.session.estimator)],
    }
    root = args.output_dir / "checkpoints"
    if run.session.is_main:
        checkpoints.write_checkpoint(root, run.step, parts, units)
        checkpoints.rotate_checkpoints(root, args.keep_checkpoints, args.resume_ckpt)
        logger.info("checkpoint %s", checkpoints.units_path(root, run.step))
    run.session.barrier()
    return checkpoints.units_path(root, run.step)


def lora_state(estimator: ScoreEstimator) -> dict[str, Tensor]:
    return {name: value for name, value in checkpoints.trained_state(estimator).items() if "lora_" in name}


def restore(run: Run, checkpoint: checkpoints.Checkpoint) -> None:
    """Weights, moments, EMA, scaler and step. The draws need no state, and the learning rate is the command line's."""
    generator, estimator, source = run.plain_generator, run.plain_estimator, str(checkpoint.path)
    theirs = checkpoint.units
    if theirs["model_config"] != run.model_config:
        raise InputError(f"{source} does not fit this run's model: {theirs['model_config']}, not {run.model_config}")
    if theirs["teacher_sha256"] != run.hashes["teacher"]:
        raise InputError(f"{source} was trained from other teacher weights: {theirs['arguments']['teacher']}")
    frozen_buffers = dict(estimator.named_buffers())
    checkpoints.restore_trained(generator, checkpoint.read("accelerator_1/generator.safetensors"), source)
    lora = checkpoint.read("accelerator_2/estimator_lora.safetensors")
    checkpoints.restore_trained(estimator, lora | frozen_buffers, source)
    for model, optimizer, name in (
        (generator, run.generator_optimizer.optimizer, "accelerator_1/optimizer.pt"),
        (estimator, run.estimator_optimizer.optimizer, "accelerator_2/optimizer.pt"),
    ):
        checkpoints.restore_optimizer(model, optimizer, checkpoint.read(name))
    if run.ema is not None:
        name = "accelerator_1/ema.safetensors"
        if checkpoint.has(name):
            state = checkpoint.read(name)
            for key, value in run.ema.items():
                checkpoints.copy_whole(value, state[key])
        else:
            with torch.no_grad():
                for key, value in trainable(generator).items():
                    run.ema[key].copy_(value)
    for accelerator, state in zip(
        (run.session.generator, run.session.estimator), checkpoint.units["scalers"], strict=True
    ):
        if accelerator.scaler is not None and state:
            accelerator.scaler.load_state_dict(state)
    run.step, run.samples_seen = checkpoint.step, checkpoint.units["samples_seen"]


def export(run: Run, args: argparse.Namespace) -> None:
    """generator/: the plain SiT, with EMA weights where there is an EMA, LoRA merged."""
    with averaged_weights(run):
        # On a CPU the state shares the parameters' memory: it is used up before the raw weights come back.
        state = checkpoints.trained_state(run.plain_generator)
        if run.session.is_main:
            rank = generator_lora_rank(args.use_lora_gen, args.lora_rank)
            generator = assemble_generator(run.model_config, state, args.teacher, rank)
    if run.session.is_main:
        target = args.output_dir / "generator"
        temporary = target.with_name("generator.tmp")
        generator.save_pretrained(temporary)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        logger.info("generator after %d updates: %s", run.step, target)
    run.session.barrier()


def died_early(folder: Path) -> bool:
    """Whether a run was killed here before its first checkpoint: nothing to resume, and the same command starts again.

    A folder with anything in it that such a run does not leave is none: an exported generator, a stranger's file, a
    checkpoint (or the log of one that is gone).
    """
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    if "args.json" not in names:  # it is written first
        return names <= {"args.json.tmp", ".lock"}
    if not names <= {"args.json.tmp", *RUN_CONTENT} - {"generator"}:
        return False
    parts = {path.name for path in (folder / "checkpoints").glob("*")}
    if not parts <= {"accelerator_1", "accelerator_2", "torch_units"}:
        return False
    logged = (folder / "log.txt").read_text() if "log.txt" in names else ""
    return not re.search(r"^\S+ \S+ checkpoint ", logged, re.MULTILINE)


def find_checkpoint(args: argparse.Namespace) -> tuple[Path | None, bool]:
    """-> what the run starts from, and whether it continues its own output folder.

    Raises `InputError` for an output folder that holds something which this run would neither continue nor replace.
    """
    own = args.output_dir / "checkpoints"
    newest = checkpoints.newest_checkpoint(own) if args.auto_resume else None
    if newest is not None:
        return newest, True
    if args.resume_ckpt is not None and own.resolve() in args.resume_ckpt.resolve().parents:
        return args.resume_ckpt, True
    if not (args.auto_resume and died_early(args.output_dir)):
        check_output_dir(args.output_dir, args.overwrite)
    return args.resume_ckpt, False


def drop_later_checkpoints(args: argparse.Namespace, step: int) -> None:
    """Going back to ``step`` in a folder ends what came after it there: the log's rows, and the checkpoints too."""
    root = args.output_dir / "checkpoints"
    for later in checkpoints.complete_steps(root):
        if later > step:
            checkpoints.delete_checkpoint(root, later)
            logger.info("deleted the checkpoint of step %d: the run went back to step %d", later, step)
