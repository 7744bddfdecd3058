"""What commands write: checked before the work, locked, replaced whole, and only where it is ours."""

import contextlib
import errno
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout

from train_cc.io.errors import InputError, disk_message

LIBRARIES = ("torch", "torchvision", "accelerate", "timm", "peft", "diffusers", "safetensors", "numpy", "scipy")
# Stands in every file and record that a command writes: what does not have it is somebody else's, and is not replaced.
MARK = "made by DMDR"
RECORD = "args.json"  # of a folder: which command wrote it, with which arguments
ENDS = 1 << 16  # bytes at both ends of a file in which the mark is looked for
UNFINISHED = r"\.[0-9a-f]{16}\.tmp"  # ends the name of a file that is being written: nobody else's ends so
# What a killed command can leave in a folder before the folder has a record.
LEFTOVER = re.compile(rf"\.lock|({re.escape(RECORD)})?{UNFINISHED}")


def library_versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES}


def commit() -> str | None:
    """The commit of this code, with "-dirty" after changes; None where it is no git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


# Whose is it? -----------------------------------------------------------------------------------------------------


def mark_of(kind: str = "") -> str:
    """The mark of files of one ``kind``, such as "samples": one kind does not replace another."""
    return f"{MARK}: {kind}" if kind else MARK


def is_ours(path: Path, kind: str = "") -> bool:
    """Whether a command of this project wrote the file or folder ``path``: its mark or its record says so."""
    if path.is_dir():
        return bool(record_of(path))
    if not path.is_file():  # a device, or a pipe, which would be waited for
        return False
    try:
        with path.open("rb") as file:
            head = file.read(ENDS)
            file.seek(max(0, os.fstat(file.fileno()).st_size - ENDS))
            return mark_of(kind).encode() in head + file.read(ENDS)
    except OSError:
        return False


def record_of(folder: Path) -> dict:
    """A folder's record, or {} where there is none that a command of ours wrote."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    ours = isinstance(content, dict) and isinstance(content.get("arguments"), dict) and "stage" in content
    return content if ours and ("versions" in content or content.get("made_by") == MARK) else {}


def record(stage: str, arguments: dict, **more: object) -> dict:
    """What a folder's record holds: the command, its arguments, versions."""
    shown = {
        name: value if isinstance(value, int | float | list | None) else str(value) for name, value in arguments.items()
    }
    return {"made_by": MARK, "stage": stage, "arguments": shown, "versions": library_versions()} | more


# Before the work --------------------------------------------------------------------------------------------------


def check_parent(path: Path) -> None:
    """Something can be created at ``path``: its parents exist or can be made. Raises `InputError`."""
    try:
        os.lstat(path.with_name(path.name + ".0123456789abcdef.tmp"))  # names too long show here
    except FileNotFoundError:
        pass
    except NotADirectoryError as error:
        file = next(parent for parent in path.parents if parent.exists())
        raise InputError(f"{path} cannot be written: {file} is a file; a folder is expected") from error
    except OSError as error:
        raise InputError(f"{str(path)[:300]} cannot be written: {os.strerror(error.errno)}") from error
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} is a link that leads nowhere; mend it, or choose another output")
    parent = path.parent
    while not parent.exists():
        if parent.is_symlink():
            raise InputError(f"{parent} is a link that leads nowhere; mend it, or choose another output")
        parent = parent.parent
    for part in path.relative_to(parent).parts:  # names that are too long show above only where the parent is there
        if len(os.fsencode(part)) + len(".0123456789abcdef.tmp") > os.pathconf(parent, "PC_NAME_MAX"):
            raise InputError(f"{str(path)[:300]} cannot be written: {os.strerror(errno.ENAMETOOLONG)}")
    try:
        touch(parent)
    except OSError as error:
        raise InputError(f"{parent} takes no new file: {os.strerror(error.errno)}; choose another output") from error


def touch(folder: Path) -> None:
    """Make a file in ``folder`` and remove it. It has no name where the system can: a kill leaves nothing of it."""
    with contextlib.suppress(AttributeError, OSError):
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
        return
    probe = folder / f".{secrets.token_hex(8)}.tmp"
    probe.touch(exist_ok=False)
    probe.unlink()


def check_output_file(path: Path, overwrite: bool = True, flag: str = "--output", kind: str = "") -> None:
    """``path`` can be written, and is not there, or is ours (of ``kind``) to replace. Raises `InputError`."""
    check_parent(path)
    if path.is_dir():
        raise InputError(f"{flag} {path} is a folder; a file is expected")
    if path.exists():
        if not is_ours(path, kind):
            told = f"is not a file of this project{f' that holds {kind}' if kind else ''}"
            raise InputError(f"{flag} {path} exists and {told}: move it, or choose another")
        if not overwrite:
            raise InputError(f"{flag} {path} exists; choose another, or replace it with --overwrite")


def check_output_dir(folder: Path, overwrite: bool = False, flag: str = "--output-dir") -> None:
    """``folder`` can be written, and is empty, or is a folder of ours to replace. Raises `InputError`."""
    check_parent(folder / RECORD)
    if folder.exists() and not all(LEFTOVER.fullmatch(path.name) for path in folder.iterdir()):
        if not is_ours(folder):
            raise InputError(
                f"the output folder {folder} is not empty, and no command of this project wrote it: "
                f"choose another {flag}"
            )
        if not overwrite:
            raise InputError(
                f"the output folder {folder} is not empty; choose another {flag}, continue from its checkpoint "
                "with --auto-resume (training runs), or replace what it holds with --overwrite"
            )


def need_space(folder: Path, size: int) -> None:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{folder} has {free / 1e9:.2f} GB free, {size / 1e9:.2f} GB are needed; nothing was written")


@contextlib.contextmanager
def locked(folder: Path, name: str = ".lock") -> Iterator[None]:
    """``folder`` is written by this process alone. Made where missing, and removed again if nothing came of it."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in folder.iterdir()}
    lock = FileLock(folder / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another process writes to {folder}; stop it, or choose another output") from None
    except (NotImplementedError, OSError):  # a file system without locks
        lock = None
    try:
        yield
    finally:
        if folder.is_dir() and name not in before and {path.name for path in folder.iterdir()} - {name} == before:
            (folder / name).unlink(missing_ok=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
        if lock is not None:
            lock.release()


def plain_mode(path: Path) -> None:
    """The mode that a plain ``open`` would have given: some libraries write files that only their owner reads."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


# Whole or not at all ----------------------------------------------------------------------------------------------


def copy_mode(like: Path, path: Path) -> None:
    """``path`` may be read by whom ``like`` may be: safetensors makes its files for their owner alone."""
    path.chmod(like.stat().st_mode & 0o777)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes ``path``: a full disk or a limit, for which libraries name no file, is an `InputError`."""
    try:
        yield
    except Exception as error:
        reason = disk_message(error)
        if isinstance(error, InputError) or reason is None or getattr(error, "filename", None) is not None:
            raise
        raise InputError(f"{path} is not written: {reason}") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """``path`` holds ``content``, text as UTF-8, or what it held before."""
    for each in list(path.parent.iterdir()):
        if re.fullmatch(re.escape(path.name) + UNFINISHED, each.name):  # a kill has left it
            each.unlink(missing_ok=True)
    temporary = unfinished(path)
    try:
        with writing(path):
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def unfinished(path: Path) -> Path:
    """Where ``path`` is written before it is whole."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


def write_record(folder: Path, content: dict) -> None:
    write_atomically(folder / RECORD, json.dumps(content, indent=2, default=str) + "\n")


def flush(path: Path) -> None:
    """Make a file or folder durable. A full disk may show only here: then the error stops what writes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no fsync
            raise
    finally:
        os.close(descriptor)
