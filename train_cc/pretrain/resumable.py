"""Training of one small network that can be stopped anywhere and continued to the same bits.

    output_dir/checkpoint.pt   while it trains: the tensors of network, average and optimizer by name, and the step
    output_dir/args.json       the record; "finished" names the network's files once they lie beside it

The draws of a step are a function of the step, so a checkpoint needs no state of a random generator.
"""

import argparse
import contextlib
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from train_cc.io.errors import InputError
from train_cc.io.read import read_torch
from train_cc.io.weights import GENERATION_CONFIG, WEIGHTS_NAME, fit, require_finite
from train_cc.io.write import RECORD, check_output_dir, flush, locked, need_space, record, record_of, write_record
from train_cc.run.stop import StopSignal

CHECKPOINT = "checkpoint.pt"
WEIGHTS = ("model.safetensors", WEIGHTS_NAME)
WRITTEN = (CHECKPOINT, CHECKPOINT + ".tmp", "config.json", GENERATION_CONFIG, *WEIGHTS)
# First key of the draws, after the seed, as in the stages: no two networks share random numbers.
TEACHER, CLASSIFIER, VAE, DECODER = 21, 22, 23, 24
# Arguments that change nothing of what is trained.
ASIDE = {"output_dir", "overwrite", "checkpoint_steps", "data_dir"}


def cosine_decay(step: int, steps: int, floor: float = 0.05) -> float:
    """The factor of the learning rate: 1 at the start, ``floor`` at the end."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))


def warmed_cosine(warmup: int) -> Callable[[int, int], float]:
    """`cosine_decay`, with a linear rise over the first ``warmup`` steps."""
    return lambda step, steps: min(1.0, (step + 1) / (warmup + 1)) * cosine_decay(step, steps)


@dataclass
class Training:
    """``update`` computes the loss of a step, 0-d, from the step alone. ``factor``: of the learning rate, by step."""

    model: nn.Module
    optimizer: torch.optim.AdamW
    update: Callable[[int], Tensor]
    average: AveragedModel | None = None
    factor: Callable[[int, int], float] = field(default_factory=lambda: warmed_cosine(0))
    max_grad_norm: float | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All state that changes, by name. AdamW's moments are made here, as its first step would make them."""
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.average is not None:
            found |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            moments = self.optimizer.state[parameter]
            if not moments:
                fused = self.optimizer.defaults["fused"]  # its kernel reads the step where the parameter is
                moments["step"] = torch.zeros((), device=parameter.device if fused else None)
                moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            found |= {f"optimizer.{name}.{key}": value.detach() for key, value in moments.items()}
        return found


# The output folder -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def output_folder(stage: str, args: argparse.Namespace) -> Iterator[bool]:
    """The output folder, locked. -> whether there is something to train.

    Raises `InputError` for a folder that is not ours, or that holds what other arguments made.
    """
    check_output_dir(args.output_dir, overwrite=True)
    with locked(args.output_dir):
        check_output_dir(args.output_dir, overwrite=True)
        yield _something_is_left(stage, args)


def _something_is_left(stage: str, args: argparse.Namespace) -> bool:
    folder, found = args.output_dir, record_of(args.output_dir)
    if found and found["stage"] != stage:
        raise InputError(f"the output folder {folder} holds what {found['stage']} wrote; choose another --output-dir")
    if not found or args.overwrite:
        return True
    files = found.get("finished")
    finished = isinstance(files, list) and all((folder / str(name)).is_file() for name in files)
    begun = "finished" if finished else "begun" if (folder / CHECKPOINT).exists() else ""
    asked, before = _what_counts(record(stage, vars(args))["arguments"]), _what_counts(found["arguments"])
    differing = [name for name in sorted(asked | before) if asked.get(name) != before.get(name)]
    if begun and differing:
        told = ", ".join(
            f"--{name.replace('_', '-')} {before.get(name)} (asked for: {asked.get(name)})" for name in differing
        )
        raise InputError(
            f"{folder} holds a {stage} that was {begun} with {told}; "
            "choose another --output-dir, or replace it with --overwrite"
        )
    if begun == "finished":
        (folder / CHECKPOINT).unlink(missing_ok=True)  # killed just before its end
        print(f"{folder} holds this {stage} already: nothing is left to train")
    return begun != "finished"


def _what_counts(arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if name not in ASIDE}


# Training ---------------------------------------------------------------------------------------------------------


def run_training(training: Training, stage: str, args: argparse.Namespace, save: Callable[[Path], None]) -> bool:
    """Train from the folder's checkpoint or anew, and ``save`` the network into a folder. -> whether it is finished.

    Raises `InputError` where loss or weights are no longer finite; then what was saved before stays.
    """
    begin, content = _restore(training, args), record(stage, vars(args))
    if begin == 0 and (args.output_dir / RECORD).exists():
        write_record(args.output_dir, content)  # a folder of ours stays ours, whenever this is killed
        for name in WRITTEN:  # what is left of an earlier network must not be taken for this one
            (args.output_dir / name).unlink(missing_ok=True)
    if not _train(training, stage, args, begin, content):
        return False
    temporary = args.output_dir / "finished.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save(temporary)
    names = sorted(file.name for file in temporary.iterdir())
    for name in names:
        (temporary / name).chmod(0o644)
        flush(temporary / name)
        os.replace(temporary / name, args.output_dir / name)
    temporary.rmdir()
    write_record(args.output_dir, content | {"finished": names})
    (args.output_dir / CHECKPOINT).unlink()
    return True


def _train(training: Training, stage: str, args: argparse.Namespace, begin: int, content: dict) -> bool:
    steps, saved = args.max_train_steps, begin
    progress = tqdm(total=steps, initial=begin, desc=stage, mininterval=2)
    with StopSignal() as stop, progress:
        for step in range(begin, steps):
            for group in training.optimizer.param_groups:
                group["lr"] = args.learning_rate * training.factor(step, steps)
            training.optimizer.zero_grad(set_to_none=True)
            loss = training.update(step)
            loss.backward()
            if training.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(training.model.parameters(), training.max_grad_norm)
            training.optimizer.step()
            if training.average is not None:
                training.average.update_parameters(training.model)
            progress.update()
            if step % 50 == 0:
                progress.set_postfix(loss=f"{loss.item():.4f}")
                _require(math.isfinite(loss.item()), f"the loss is {loss.item()}", step + 1, saved)
            if stop.name or step + 1 in (steps, saved + args.checkpoint_steps):
                _save(training, args, step + 1, saved, content)
                saved = step + 1
            if stop.name and saved < steps:
                print(f"stopped at step {saved} as asked; the same command continues", file=sys.stderr)
                return False
    return True


def _require(fine: bool, told: str, step: int, saved: int) -> None:
    if not fine:
        kept = f"the checkpoint of step {saved} is kept, and --overwrite starts anew" if saved else "nothing is kept"
        raise InputError(f"{told} at step {step}: lower --learning-rate ({kept})")


def _save(training: Training, args: argparse.Namespace, step: int, saved: int, content: dict) -> None:
    tensors = {name: value.cpu() for name, value in training.tensors().items()}
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    _require(not bad, f"{', '.join(bad[:2])} holds NaN or infinity", step, saved)
    need_space(args.output_dir, sum(value.nbytes for value in tensors.values()))
    if not saved:  # until here the folder is empty; the record says whose it is
        write_record(args.output_dir, content)
    temporary = args.output_dir / (CHECKPOINT + ".tmp")
    torch.save({"step": step, "tensors": tensors}, temporary)
    flush(temporary)
    os.replace(temporary, args.output_dir / CHECKPOINT)


def _restore(training: Training, args: argparse.Namespace) -> int:
    """-> the step to go on from: the checkpoint's, or 0 where there is none, or a damaged one, which is told."""
    file = args.output_dir / CHECKPOINT
    if args.overwrite or not file.exists():
        return 0
    try:
        return _read(training, file, args.max_train_steps)
    except InputError as error:
        print(f"warning: {error}; training starts anew", file=sys.stderr)
        return 0


@torch.no_grad()
def _read(training: Training, file: Path, steps: int) -> int:
    expected = "a checkpoint of this command"
    content, own = read_torch(file, expected), training.tensors()
    whole = isinstance(content, dict) and content.keys() == {"step", "tensors"} and isinstance(content["tensors"], dict)
    if not whole or type(content["step"]) is not int or not 0 < content["step"] <= steps:
        raise InputError(f"{file} is something else; {expected} is expected")
    state = content["tensors"]
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{file} holds other than tensors; {expected} is expected")
    fit({name: value.shape for name, value in own.items()}, state, file)
    require_finite(state, file)
    for name, value in own.items():
        if state[name].dtype != value.dtype:
            raise InputError(f"{file}: {name} is {state[name].dtype}; {value.dtype} is expected")
    for name, value in own.items():
        value.copy_(state[name])
    return content["step"]
