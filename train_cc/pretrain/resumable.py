"""Training of one small network that can be stopped anywhere and continued to the same bits.

    NAME.tmp/checkpoint.pt   beside the output folder NAME while it trains: network, average, optimizer and the step

The draws of a step are a function of the step, so a checkpoint needs no state of a random generator.
"""

import argparse
import io
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from train_cc.io.errors import InputError
from train_cc.io.products import need_space, product, record, write_atomically
from train_cc.io.read import parsing, read_torch
from train_cc.run.stop import StopSignal

CHECKPOINT = "checkpoint.pt"
Finish = Callable[[Path], str]  # saves a trained network into a folder, and returns the sentence that describes it


def cosine_decay(step: int, steps: int, floor: float = 0.05) -> float:
    """The factor of the learning rate: 1 at the start, ``floor`` at the end."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))


def warmed_cosine(warmup: int) -> Callable[[int, int], float]:
    """`cosine_decay`, with a linear rise over the first ``warmup`` steps."""
    return lambda step, steps: min(1.0, (step + 1) / (warmup + 1)) * cosine_decay(step, steps)


@dataclass
class Training:
    """``update`` computes the loss of a step, 0-d, from the step only. ``factor``: of the learning rate, by step."""

    model: nn.Module
    optimizer: torch.optim.AdamW
    update: Callable[[int], Tensor]
    average: AveragedModel | None = None
    factor: Callable[[int, int], float] = cosine_decay
    max_grad_norm: float | None = None

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """All that a checkpoint holds the state of, by name."""
        average = {} if self.average is None else {"average": self.average}
        return {"model": self.model, "optimizer": self.optimizer} | average


def make_network(stage: str, args: argparse.Namespace, prepare: Callable[[Path], tuple[Training, Finish]]) -> None:
    """Train what ``prepare`` returns, given the folder of parts, and make --output-dir of it. Raises `InputError`."""
    with product(args.output_dir, record(stage, vars(args)), args.overwrite, keep=True) as place:
        if place is None:
            return
        began, file = time.monotonic(), place.parts / CHECKPOINT
        training, finish = prepare(place.parts)
        try:
            step = restore(training, file)
        except InputError as error:
            print(f"warning: {error}; training starts anew", file=sys.stderr)
            training, finish = prepare(place.parts)
            step = 0
        if train(training, file, step, args, stage):
            print(f"{finish(place.new)}, {time.monotonic() - began:.0f} s -> {args.output_dir}")


def train(training: Training, file: Path, begin: int, args: argparse.Namespace, title: str) -> bool:
    """Train from step ``begin`` on, with checkpoints in ``file``. Return False if a signal stopped it.

    Raises `InputError` if loss or weights are no longer finite; then the last checkpoint stays.
    """
    steps, saved = args.max_train_steps, begin
    progress = tqdm(total=steps, initial=begin, desc=title, mininterval=2)
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
                require(math.isfinite(loss.item()), f"the loss is {loss.item()}", step + 1, saved)
            if stop.name or step + 1 in (steps, saved + args.checkpoint_steps):
                save_checkpoint(training, file, step + 1, saved)
                saved = step + 1
            if stop.name and saved < steps:
                print(f"stopped at step {saved} as asked; the same command continues", file=sys.stderr)
                return False
    return True


def require(fine: bool, problem: str, step: int, saved: int) -> None:
    if not fine:
        state = f"the checkpoint of step {saved} is kept, and --overwrite starts anew" if saved else "nothing is kept"
        raise InputError(f"{problem} at step {step}: lower --learning-rate ({state})")


def save_checkpoint(training: Training, file: Path, step: int, saved: int) -> None:
    content = {name: part.state_dict() for name, part in training.parts().items()}
    weights = content["model"]
    bad = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    require(not bad, f"{', '.join(bad[:2])} holds NaN or infinity", step, saved)
    need_space(file.parent, 4 * sum(value.nbytes for value in weights.values()))
    buffer = io.BytesIO()
    torch.save(content | {"step": step}, buffer)
    write_atomically(file, buffer.getbuffer())


def restore(training: Training, file: Path) -> int:
    """Return the step to go on from: the checkpoint's, or 0 without one. Raises `InputError` for a damaged one."""
    if not file.exists():
        return 0
    expected = "a checkpoint of this command"
    with parsing(file, expected):
        content = read_torch(file, expected)
        for name, part in training.parts().items():
            part.load_state_dict(content[name])
        return content["step"]
