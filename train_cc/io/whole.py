"""A folder that is made whole or not at all, in a working folder beside it, which a kill leaves to the next command."""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from train_cc.io.errors import InputError
from train_cc.io.write import (
    LEFTOVER,
    RECORD,
    check_output_dir,
    check_parent,
    flush,
    is_ours,
    locked,
    record_of,
    write_record,
    writing,
)


def work_folder(target: Path) -> Path:
    """Where `whole_folder` makes ``target``: beside it, on its disk, even where ``target`` is a link.

    Raises `InputError` for the current folder and those that hold it, up to "/": they cannot be replaced whole.
    """
    target = target.resolve()
    if Path.cwd().is_relative_to(target):
        raise InputError(f"{target} holds the current folder, and would be replaced whole: name a folder in it")
    return target.with_name(target.name + ".tmp")


def was_interrupted(content: dict, *targets: Path) -> bool:
    """Whether the command of record ``content`` was killed between finishing ``targets`` and cleaning up.

    Then it may replace what it finished itself, and nothing else.
    """
    begun = any(made_by(content, work_folder(target)) for target in targets)
    return begun and all(made_by(content, target) for target in targets if target.exists())


def made_by(content: dict, folder: Path) -> bool:
    """Whether the command of record ``content`` wrote ``folder``, from the same inputs as far as the record knows."""
    found = record_of(folder)
    return all(found.get(name) == content.get(name) for name in ("stage", "arguments", "inputs"))


def is_there(content: dict, *targets: Path) -> bool:
    """Whether the command of record ``content`` has finished ``targets``. What a kill left beside them is removed."""
    if not all(made_by(content, target) for target in targets):
        return False
    for work in map(work_folder, targets):
        if work.is_dir() and is_work(work):
            with locked(work):
                clear_work(work)
    return True


def is_work(work: Path) -> bool:
    """Whether folder ``work`` is what `whole_folder` fills, as far as a killed command came."""
    return is_ours(work) or all(LEFTOVER.fullmatch(path.name) for path in work.iterdir())


def clear_work(work: Path) -> None:
    """Delete it, the record last: a kill in between leaves a folder that is known as ours."""
    for folder in (work / "new", work / "old", work):
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(target: Path, content: dict, names: Collection[str], overwrite: bool) -> Iterator[Path]:
    """``target`` is made whole or not at all. Yields a folder to fill; it becomes ``target``, ``content`` its record.

    Filled in ``target``.tmp, which a killed command leaves to the next one. What is replaced must be ours and hold
    nothing but ``names``. Call `check_whole_folder` first, before the work. Raises `InputError`.
    """
    target, work = target.resolve(), work_folder(target)
    with locked(work):
        write_record(work, content)
        fresh, before = work / "new", work / "old"
        if before.exists() and not target.exists():  # killed between the two renames below
            before.rename(target)
        try:
            check_whole_folder(target, names, overwrite)
            for leftover in (fresh, before):
                shutil.rmtree(leftover, ignore_errors=True)
            fresh.mkdir()
            with writing(target):
                yield fresh
                write_record(fresh, content)
                for path in fresh.rglob("*"):
                    flush(path)
            if target.exists():
                target.rename(before)
            fresh.rename(target)
            flush(target.parent)
        finally:
            if before.exists() and not target.exists():
                before.rename(target)
            clear_work(work)


def check_whole_folder(target: Path, names: Collection[str], overwrite: bool, flag: str = "--output-dir") -> None:
    """`whole_folder` can make ``target``. Raises `InputError`."""
    check_output_dir(target, overwrite, flag)
    target, work = target.resolve(), work_folder(target)
    if target.is_dir():
        others = sorted({path.name for path in target.iterdir()} - {*names, RECORD})
        if strangers := [name for name in others if not LEFTOVER.fullmatch(name)]:
            raise InputError(f"{target} also holds {', '.join(strangers[:6])}: move it, or choose another {flag}")
    check_parent(work / RECORD)
    if work.is_dir() and not is_work(work):
        raise InputError(
            f"{work} is needed, and no command of this project wrote it: move it, or choose another {flag}"
        )
    if os.path.lexists(work) and (work.is_symlink() or not work.is_dir()):
        raise InputError(f"{work} is needed, and is no folder: move it, or choose another {flag}")
