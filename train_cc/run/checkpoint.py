"""Checkpoints that either are whole or do not exist.

    checkpoints/accelerator_1/step-N/   generator.safetensors  optimizer.pt  (ema.safetensors)
    checkpoints/accelerator_2/step-N/   estimator_lora.safetensors  optimizer.pt
    checkpoints/torch_units/step-N.pt   counters, arguments, format version, the size of every file; written last

Tensors are saved unsharded under their plain names, so that a checkpoint does not know how many processes wrote it.
"""

import errno
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from train_cc.diagnostics import gathered
from train_cc.io.errors import InputError

FORMAT_VERSION = 1
# What every torch_units file holds.
UNITS = {"step", "files", "samples_seen", "model_config", "teacher_sha256", "arguments", "scalers"}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class Checkpoint:
    """A complete checkpoint on disk; ``units`` is the content of its torch_units file."""

    path: Path
    units: dict

    @property
    def step(self) -> int:
        return self.units["step"]

    def file(self, name: str) -> Path:
        """Where "accelerator_1/optimizer.pt" and the like lie."""
        accelerator, file = name.split("/")
        return self.path.parent.parent / accelerator / f"step-{self.step}" / file

    def read(self, name: str) -> dict:
        """The content of one file, such as "accelerator_1/optimizer.pt"."""
        path = self.file(name)
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error

    def has(self, name: str) -> bool:
        return name in self.units["files"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a torch_units file and make sure that all it names is there, whole. Raises `InputError`."""
    expected = "a checkpoints/torch_units/step-N.pt is expected"
    if not path.is_file():
        raise InputError(f"the checkpoint {path} does not exist; {expected}")
    try:
        units = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"the checkpoint {path} is damaged or a pickle of more than plain values; it was not run. {expected}"
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise InputError(f"the checkpoint {path} is truncated or no checkpoint ({error}); {expected}") from error
    if not isinstance(units, dict) or "format_version" not in units:
        raise InputError(f"{path} is not a checkpoint of this project; {expected}")
    if units["format_version"] > FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {units['format_version']}, "
            f"this code reads up to {FORMAT_VERSION}; update the code"
        )
    if UNITS - units.keys():
        raise InputError(
            f"{path} is not a checkpoint of this project, it lacks {sorted(UNITS - units.keys())}; {expected}"
        )
    checkpoint = Checkpoint(path, units)
    for name, size in units["files"].items():
        file = checkpoint.file(name)
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            told = "is missing" if found is None else f"has {found} bytes"
            raise InputError(f"the checkpoint {path} is incomplete: {file} {told}, {size} bytes were written")
    return checkpoint


def units_path(root: Path, step: int) -> Path:
    """The torch_units file of ``step`` under ``root``, a checkpoints folder."""
    return root / "torch_units" / f"step-{step}.pt"


def complete_steps(root: Path) -> list[int]:
    """The steps of ``root`` (a checkpoints folder) that have a torch_units file, ascending."""
    found = (re.fullmatch(r"step-(\d+)\.pt", path.name) for path in (root / "torch_units").glob("step-*.pt"))
    return sorted(int(match[1]) for match in found if match)


def newest_checkpoint(root: Path) -> Path | None:
    steps = complete_steps(root)
    return units_path(root, steps[-1]) if steps else None


def write_checkpoint(root: Path, step: int, parts: dict[str, dict], units: dict) -> Path:
    """Write ``parts`` ("accelerator_1/optimizer.pt" -> content) and then the torch_units file. -> its path.

    Every folder and file is written under a temporary name, flushed to the disk and renamed. Raises `InputError` where
    the disk is too small, before anything is written.
    """
    root.mkdir(parents=True, exist_ok=True)
    needed, free = sum(_bytes(content) for content in parts.values()), shutil.disk_usage(root).free
    if free < needed:
        raise InputError(
            f"{root} has {free / 1e9:.2f} GB free, the checkpoint of step {step} needs {needed / 1e9:.2f} GB; "
            "stopped, the last checkpoint is kept (--keep-checkpoints N deletes older ones)"
        )
    units_path(root, step).unlink(missing_ok=True)  # an older checkpoint of this step ends before its files change
    sizes = {}
    for accelerator in sorted({name.split("/")[0] for name in parts}):
        folder = root / accelerator / f"step-{step}"
        temporary = folder.with_name(folder.name + ".tmp")
        for leftover in (temporary, folder):  # of a killed run: without its torch_units file it is no checkpoint
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, content in parts.items():
            if name.startswith(accelerator + "/"):
                path = temporary / name.split("/")[1]
                (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
                _flush(path)
                sizes[name] = path.stat().st_size
        temporary.rename(folder)
        _flush(folder.parent)
    target = units_path(root, step)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    torch.save(units | {"format_version": FORMAT_VERSION, "step": step, "files": sizes}, temporary)
    _flush(temporary)
    os.replace(temporary, target)
    _flush(target.parent)
    return target


def _bytes(content: dict) -> int:
    """Of all tensors in a nested dict."""
    values = [_bytes(value) if isinstance(value, dict) else getattr(value, "nbytes", 0) for value in content.values()]
    return sum(values)


def rotate_checkpoints(root: Path, keep: int, protected: Path | None) -> None:
    """Delete all but the ``keep`` newest complete checkpoints (0: none is deleted), and never ``protected``."""
    for step in complete_steps(root)[:-keep] if keep else []:
        if protected is None or units_path(root, step).resolve() != protected.resolve():
            delete_checkpoint(root, step)


def delete_checkpoint(root: Path, step: int) -> None:
    units_path(root, step).unlink()  # first: what is left is not taken for a checkpoint
    for folder in root.glob(f"accelerator_*/step-{step}"):
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    """Make a file or folder durable. A full disk may show only here: then the error stops the checkpoint."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no fsync
            raise
    finally:
        os.close(descriptor)


# States of networks and optimizers, whole and on the CPU, whatever wraps or shards them. Collective: every rank calls.


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and buffers by plain name; on ranks other than 0 empty."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return {name: value.contiguous() for name, value in get_model_state_dict(model, options=options).items()}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Moments by parameter name. Hyperparameters are left out: on resume those of the command line apply."""
    return get_optimizer_state_dict(model, optimizer, options=FULL).get("state", {})  # empty on ranks other than 0


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Put ``state`` back, sharded as ``model`` is; hyperparameters stay what the optimizer was built with."""
    name_of = {p: name for name, p in model.named_parameters()}
    groups = [dict(group, params=[name_of[p] for p in group["params"]]) for group in optimizer.param_groups]
    content = {"state": state, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, content, options=StateDictOptions(full_state_dict=True))


def restore_trained(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy ``state`` into the trainable parameters and buffers of ``model``; names and shapes must fit exactly."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [
        f"{name} {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if missing or unexpected or reshaped:
        raise InputError(
            f"{source} does not fit this run's model (another size, class count, LoRA rank or --use-lora-gen?): "
            f"missing {missing[:4]}, unexpected {unexpected[:4]}, other shapes {sorted(reshaped)[:4]}"
        )
    for name, tensor in own.items():
        copy_whole(tensor, state[name])


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is, a sharded one gathered; on the CPU."""
    return gathered(tensor).cpu()


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copy ``value``, whole and the same on every process, into ``target``, which may be sharded."""
    if isinstance(target, DTensor):
        value = value.to(target.device, target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)
