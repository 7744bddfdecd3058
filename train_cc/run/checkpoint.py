"""Checkpoints that either are whole or do not exist.

    checkpoints/accelerator_1/step-N/   generator.safetensors  optimizer.pt  (ema.safetensors)
    checkpoints/accelerator_2/step-N/   estimator_lora.safetensors  optimizer.pt
    checkpoints/torch_units/step-N.pt   counters, arguments, format version, size and SHA-256 of each file; last

Tensors are saved unsharded under their plain names, so that any number of processes continues what any other wrote.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from train_cc.io.errors import InputError
from train_cc.io.fields import check, setting
from train_cc.io.products import flush, plain_mode
from train_cc.io.read import read_json, read_safetensors, read_torch, require_file, sha256, value_text
from train_cc.run.folder import BEST, CHECKPOINT_STEP, FILE_OF_A_STEP, OF_A_STEP, delete_ours, move_files
from train_cc.settings import Method, Models, Optimisation

UNITS_FILE = "a checkpoints/torch_units/step-N.pt"
OF_PLAIN_VALUES = f"{UNITS_FILE} of plain values (code in it is not run)"
UNITS_BYTES = 64 << 20  # a torch_units file holds no tensors of a network
DAMAGED = ".damaged"  # ends the name of a damaged torch_units file
FORMAT_VERSION = 3  # 1: sizes of the files without their SHA-256; 2: without the networks that rewarded
FILE_NAME = re.compile("accelerator_[12]/" + FILE_OF_A_STEP)  # no name leads out of the folder


class NewerFormat(InputError):
    """Written by newer code than this: not damaged, and nothing to go around."""


@dataclass(frozen=True)
class Units:
    """The fields of every torch_units file. Others are of single parts of a run."""

    step: int = setting()
    samples_seen: int = setting(low=0, high=2**62)
    model_config: dict = setting()
    teacher_sha256: str = setting()
    arguments: dict = setting()  # of the command line
    scalers: list = setting()  # of the two accelerators
    files: dict = setting()  # name -> size and SHA-256; in format 1 the size


def check_units(content: object, path: Path) -> dict:
    """``content`` of a torch_units file, with every file as {"size", "sha256"} (None: not known, format 1).

    The arguments are checked by the settings' own fields. Raises `InputError` that names the field.
    """
    source = f"the checkpoint {path} is not a checkpoint of this project, or is damaged"
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise InputError(f"{source}: it has no format version; {UNITS_FILE} is expected")
    if version > FORMAT_VERSION:
        raise NewerFormat(
            f"{path} has format version {version}, this code reads up to {FORMAT_VERSION}; update the code"
        )
    units = content | check(Units, content, source, others=True)
    for kind in (Models, Method, Optimisation):
        check(kind, units["arguments"], f"{source}: in its arguments", others=True)
    if version == 1:
        units["files"] = {name: {"size": size, "sha256": None} for name, size in units["files"].items()}
    for name, entry in units["files"].items():
        if not FILE_NAME.fullmatch(str(name)) or not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
            allowed = "files of accelerator_1 and accelerator_2, each with size and sha256"
            raise InputError(f"{source}: files has {value_text(name)}: {value_text(entry)}; allowed: {allowed}")
    return units


@dataclass
class Checkpoint:
    """A complete checkpoint on disk; ``units`` is the content of its torch_units file."""

    path: Path
    units: dict

    @property
    def step(self) -> int:
        return self.units["step"]

    @property
    def hashed(self) -> bool:
        return self.units["format_version"] > 1

    def file(self, name: str) -> Path:
        """The path of a file such as "accelerator_1/optimizer.pt"."""
        accelerator, file = name.split("/")
        return self.path.parent.parent / accelerator / f"step-{self.step}" / file

    def read(self, name: str) -> Any:
        """The content of one file, such as "accelerator_1/optimizer.pt", or of a field. Raises `InputError`."""
        if "/" not in name:
            return self.units[name]
        path = self.file(name)
        if path.suffix == ".safetensors":
            return read_safetensors(path, "a file of a checkpoint")
        return read_torch(path, "a file of a checkpoint")

    def has(self, name: str) -> bool:
        """True for a file of the checkpoint, or a field of its torch_units file."""
        return name in self.units["files"] or ("/" not in name and name in self.units)

    def complete(self) -> bool:
        """True if this process sees all files, with their sizes."""
        files = ((self.file(name), entry["size"]) for name, entry in self.units["files"].items())
        return all(path.is_file() and path.stat().st_size == size for path, size in files)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a torch_units file and make sure that all it names is there, whole, by size and SHA-256.

    Raises `InputError`. No parser sees a file before its hash is known to be right (format 1 has sizes only).
    """
    require_file(path, UNITS_FILE)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    if path.stat().st_size > UNITS_BYTES:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes; {UNITS_FILE} is expected")
    checkpoint = Checkpoint(path, check_units(read_torch(path, OF_PLAIN_VALUES), path))
    if step_of(path) not in (None, checkpoint.step):
        raise InputError(f"the checkpoint {path} is damaged or was renamed: it says step {checkpoint.step}")
    for name, entry in checkpoint.units["files"].items():
        file = checkpoint.file(name)
        size = file.stat().st_size if file.is_file() else None
        if size != entry["size"]:
            state = "is missing" if size is None else f"has {size} bytes"
            raise InputError(f"the checkpoint {path} is incomplete: {file} {state}, {entry['size']} bytes were written")
        if entry["sha256"] is not None and sha256(file) != entry["sha256"]:
            raise InputError(f"the checkpoint {path} is damaged: the SHA-256 of {file} is not the one that was written")
    return checkpoint


def units_path(root: Path, step: int) -> Path:
    """The torch_units file of ``step`` under ``root``, a checkpoints folder."""
    return root / "torch_units" / f"step-{step}.pt"


def step_of(path: Path, ending: str = ".pt") -> int | None:
    """N of a file or folder named step-N and ``ending``, as `units_path` writes it; None for any other name."""
    match = re.fullmatch(CHECKPOINT_STEP + re.escape(ending), path.name)
    return int(match[1]) if match else None


def steps_in(folder: Path, ending: str) -> list[int]:
    """The steps N of the files step-N and ``ending`` in ``folder``, ascending."""
    steps = (step_of(path, ending) for path in folder.glob("step-*"))
    return sorted(step for step in steps if step is not None)


def complete_steps(root: Path) -> list[int]:
    """The steps of ``root`` (a checkpoints folder) that have a torch_units file, ascending."""
    return steps_in(root / "torch_units", ".pt")


def newest_words(root: Path) -> str:
    """Words of an error for the checkpoints that there are."""
    steps = complete_steps(root)
    return f"the checkpoint of step {steps[-1]} is kept" if steps else "there is no checkpoint yet"


def newest_intact(root: Path) -> tuple[Checkpoint | None, dict[int, str]]:
    """Return the newest whole checkpoint of ``root``, and by newer step its damage.

    Raises `InputError` where there are checkpoints and none is whole, or newer code than this wrote one.
    """
    damaged: dict[int, str] = {}
    for step in reversed(complete_steps(root)):
        try:
            return open_checkpoint(units_path(root, step)), damaged
        except NewerFormat:
            raise
        except InputError as error:
            damaged[step] = str(error)
    if damaged:
        problems = "; ".join(damaged.values())
        raise InputError(f"{root} holds no whole checkpoint: {problems}. Nothing was changed; --overwrite starts anew")
    return None, {}


def write_checkpoint(root: Path, step: int, parts: dict[str, dict], units: dict) -> Path:
    """Write ``parts`` ("accelerator_1/optimizer.pt" -> content) and then the torch_units file. -> its path.

    Every folder and file is written under a temporary name, flushed to the disk and renamed.
    """
    root.mkdir(parents=True, exist_ok=True)
    units_path(root, step).unlink(missing_ok=True)  # an older checkpoint of this step ends before its files change
    units_path(root, step).with_name(f"step-{step}.pt{DAMAGED}").unlink(missing_ok=True)
    written = {}
    for accelerator in sorted({name.split("/")[0] for name in parts}):
        folder = root / accelerator / f"step-{step}"
        temporary = folder.with_name(folder.name + ".tmp")
        for leftover in (temporary, folder):  # of a killed run: without its torch_units file it is no checkpoint
            delete_ours(leftover, OF_A_STEP)
        temporary.mkdir(parents=True, exist_ok=True)
        for name, content in parts.items():
            if name.startswith(accelerator + "/"):
                path = temporary / name.split("/")[1]
                (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
                plain_mode(path)
                flush(path)
                written[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        move_files(temporary, folder)
        flush(folder.parent)
    target = units_path(root, step)
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    torch.save(units | {"format_version": FORMAT_VERSION, "step": step, "files": written}, temporary)
    flush(temporary)
    os.replace(temporary, target)
    flush(target.parent)
    return target


def nbytes(content: dict) -> int:
    """Bytes of all tensors in a nested dict."""
    values = [nbytes(value) if isinstance(value, dict) else getattr(value, "nbytes", 0) for value in content.values()]
    return sum(values)


def rotate_checkpoints(root: Path, keep: int, protected: Path | None) -> None:
    """Delete all but the ``keep`` newest complete checkpoints (0: none is deleted).

    Never ``protected``, nor the one that evaluation.checkpoints found best.
    """
    run = root.parent.absolute()
    try:
        best = read_json(run.with_name(f"{run.name}_checkpoints") / BEST, "the best step")["step"]
    except (InputError, KeyError):
        best = None
    for step in complete_steps(root)[:-keep] if keep else []:
        same = protected is not None and os.path.realpath(units_path(root, step)) == os.path.realpath(protected)
        if step != best and not same:
            delete_checkpoint(root, step)


def delete_checkpoint(root: Path, step: int) -> None:
    units_path(root, step).unlink()  # first: what is left is not taken for a checkpoint
    for folder in root.glob(f"accelerator_[12]/step-{step}"):
        delete_ours(folder, OF_A_STEP)


def mark_damaged(root: Path, step: int) -> None:
    """A damaged checkpoint keeps its files, but counts no more: neither as a start nor in the rotation."""
    path = units_path(root, step)
    os.replace(path, path.with_name(path.name + DAMAGED))


def delete_leftovers(root: Path) -> None:
    """Delete what a kill left in ``root``: temporary files, and files of steps without a torch_units file."""
    units = root / "torch_units"
    for step in steps_in(units, ".pt.tmp"):
        (units / f"step-{step}.pt.tmp").unlink()
    steps = {*complete_steps(root), *steps_in(units, ".pt" + DAMAGED)}
    for folder in list(root.glob("accelerator_[12]/step-*")):
        step = step_of(folder, "")
        if step_of(folder, ".tmp") is not None or (step is not None and step not in steps):
            delete_ours(folder, OF_A_STEP)
