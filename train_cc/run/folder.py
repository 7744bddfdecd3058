"""A run's folder: the names that a run writes there. Only these are ever replaced or deleted; all else stays."""

import contextlib
import os
import re
from pathlib import Path

from train_cc.io.errors import InputError
from train_cc.io.products import LEFTOVER, RECORD, UNFINISHED, check_parent, flush, record_of
from train_cc.io.read import read_json
from train_cc.io.weights import GENERATION_CONFIG, WEIGHTS_NAME

STAGES = ("cold_start", "dmdr_refl")
BEST = "best.json"  # of evaluation.checkpoints, in RUN_checkpoints: the best step, and its verdict in words
CHECKPOINT_STEP = r"step-(0|[1-9][0-9]{0,9})"  # as it is written: ASCII digits, no leading zeros
# Name (a regular expression of the whole of it) -> None for a file, or the same of a folder. In the order of deletion:
# first what makes a checkpoint count. The record is not here: it is replaced, and while it stands the folder is ours.
TORN = {r"\.tmp\w{6}": None}  # safetensors' own name for a file that it has not finished
FILE_OF_A_STEP = r"[a-z][a-z0-9_]*\.(safetensors|pt)"  # a part of a run
OF_A_STEP = TORN | {FILE_OF_A_STEP: None}
CHECKPOINTS = {
    "torch_units": {CHECKPOINT_STEP + r"\.pt(\.tmp|\.damaged)?": None},
    r"accelerator_[12]": {CHECKPOINT_STEP + r"(\.tmp)?": OF_A_STEP},
}
GENERATOR_FILES = TORN | {
    r"config\.json": None,
    r"diffusion_pytorch_model\.safetensors": None,
    rf"network\.py({UNFINISHED})?": None,
    rf"generation_config\.json({UNFINISHED})?": None,
}
WHOLE = (*OF_A_STEP, *GENERATOR_FILES)
EXPORT = "export.tmp"  # within an older generator/: what replaces its files, one by one
EVENTS = {r"events\.out\.tfevents\..*": None, r"hparams\.yml": None}
TREE = {
    "checkpoints": CHECKPOINTS,
    "generator": GENERATOR_FILES | {re.escape(EXPORT): GENERATOR_FILES},
    r"generator\.tmp": GENERATOR_FILES,
    "loss_logs": {rf"loss_(gen|gui)_log\.jsonl({UNFINISHED})?": None},
    "samples": {
        CHECKPOINT_STEP: {rf"grid\.png({UNFINISHED})?": None},
        r"teacher-[0-9]+-steps-seed-[0-9]+\.npy": None,  # of earlier versions
    },
    "dmdr": EVENTS | {r"[0-9]+\.[0-9]+": EVENTS},  # tensorboard's
    r"log\.txt": None,
}
FOLDERS = ("checkpoints", "generator", "loss_logs", "samples", "dmdr")


def is_run(folder: Path) -> bool:
    """True if the record of ``folder`` is a training run's."""
    return record_of(folder).get("stage") in STAGES


def is_unused(folder: Path) -> bool:
    """True if ``folder`` has at most a killed start's lock and empty folders, or links to them, for a run to fill."""
    if not folder.exists():
        return True
    others = [path for path in folder.iterdir() if not LEFTOVER.fullmatch(path.name)]
    return all(path.name in FOLDERS and path.is_dir() and not any(path.iterdir()) for path in others)


def delete_ours(folder: Path, tree: dict) -> None:
    """Delete what ``tree`` names in ``folder``, and the folder if nothing else is in it. A link to a folder stays."""
    if not folder.is_dir():
        return
    for pattern, inside in tree.items():
        for path in sorted(folder.iterdir()):
            if not re.fullmatch(pattern, path.name):
                continue
            if inside is None and (path.is_symlink() or path.is_file()):
                path.unlink()
            elif inside is not None:
                delete_ours(path, inside)
    if not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def clear_output_dir(folder: Path) -> None:
    """Delete an earlier run in ``folder``. Its record stays, to be replaced."""
    for pattern, inside in TREE.items():
        for path in sorted(folder.iterdir()):
            if re.fullmatch(pattern, path.name):
                path.unlink() if inside is None else delete_ours(path, inside)


def move_files(temporary: Path, target: Path, last: str = "") -> None:
    """Rename folder ``temporary`` to ``target``; where that exists, its files into it, ``last`` at the end.

    So foreign files stay where they are, in either folder, and a link stays a link.
    """
    ours = [path for path in temporary.iterdir() if re.fullmatch("|".join(WHOLE), path.name)]
    if not target.is_dir() and len(ours) == len(list(temporary.iterdir())):
        os.replace(temporary, target)
        return
    target.mkdir(exist_ok=True)
    for path in sorted(ours, key=lambda path: (path.name == last, path.name)):
        os.replace(path, target / path.name)
    flush(target)
    with contextlib.suppress(OSError):  # foreign files are in it
        temporary.rmdir()


def exported_step(folder: Path) -> int | None:
    """The step of the generator that a run exported to ``folder``/generator; None: there is no whole one that says."""
    target = folder / "generator"
    whole = (target / WEIGHTS_NAME).is_file() and (target / "config.json").is_file()
    if not whole or (target / EXPORT).exists() or not (target / GENERATION_CONFIG).is_file():
        return None
    try:
        return read_json(target / GENERATION_CONFIG, "a generator's sampling").get("step")
    except InputError:
        return None


def check_writable(folder: Path) -> None:
    """A run can write all it will into ``folder``. Raises `InputError`; nothing is changed."""
    of_checkpoints = (f"checkpoints/{name}" for name in ("accelerator_1", "accelerator_2", "torch_units"))
    for each in (folder, *(folder / name for name in (*FOLDERS, *of_checkpoints))):
        check_parent(each / "step-1000000000.tmp")
        if each.exists() and not each.is_dir():
            raise InputError(f"{each} is a file; a run needs a folder there: choose another --output-dir")
    for name in (RECORD, "log.txt", "loss_logs/loss_gen_log.jsonl", "loss_logs/loss_gui_log.jsonl"):
        path = folder / name
        check_parent(path)
        if path.is_dir():
            raise InputError(f"{path} is a folder; a run needs a file there: choose another --output-dir")
        if path.exists():
            path.open("ab").close()  # read-only and immutable files show here
