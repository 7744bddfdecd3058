"""What commands write: checked before the work, locked, replaced whole, and only where it is ours."""

import contextlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout

from train_cc.io.errors import InputError

LIBRARIES = ("torch", "torchvision", "accelerate", "timm", "peft", "diffusers", "safetensors", "numpy", "scipy")
# Stands in every file and record that a command writes: what does not have it is somebody else's, and is not replaced.
MARK = "made by DMDR"
RECORD = "args.json"  # of a folder: which command wrote it, with which arguments
ENDS = 1 << 16  # bytes at both ends of a file in which the mark is looked for


def library_versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES}


# Whose is it? -----------------------------------------------------------------------------------------------------


def is_ours(path: Path) -> bool:
    """Whether a command of this project wrote the file or folder ``path``: its mark or its record says so."""
    if path.is_dir():
        return bool(record_of(path))
    try:
        with path.open("rb") as file:
            head = file.read(ENDS)
            file.seek(max(0, os.fstat(file.fileno()).st_size - ENDS))
            return MARK.encode() in head + file.read(ENDS)
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
    except OSError as error:
        raise InputError(f"{str(path)[:300]} cannot be written: {os.strerror(error.errno)}") from error
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} is a link that leads nowhere; mend it, or choose another output")
    parent = path.parent
    while not parent.exists():
        if parent.is_symlink():
            raise InputError(f"{parent} is a link that leads nowhere; mend it, or choose another output")
        parent = parent.parent
    probe = parent / f".{secrets.token_hex(8)}.tmp"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise InputError(f"{parent} takes no new file: {os.strerror(error.errno)}; choose another output") from error


def check_output_file(path: Path, overwrite: bool = True, flag: str = "--output") -> None:
    """``path`` can be written, and is not there, or is ours to replace. Raises `InputError`."""
    check_parent(path)
    if path.is_dir():
        raise InputError(f"{flag} {path} is a folder; a file is expected")
    if path.exists():
        if not is_ours(path):
            raise InputError(f"{flag} {path} exists and is not a file of this project: move it, or choose another")
        if not overwrite:
            raise InputError(f"{flag} {path} exists; choose another, or replace it with --overwrite")


def check_output_dir(folder: Path, overwrite: bool = False, flag: str = "--output-dir") -> None:
    """``folder`` can be written, and is empty, or is a folder of ours to replace. Raises `InputError`."""
    check_parent(folder / RECORD)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the output folder {folder} is a file")
    if folder.exists() and any(path.name != ".lock" for path in folder.iterdir()):
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
        if made and {path.name for path in folder.iterdir()} <= {name}:
            (folder / name).unlink(missing_ok=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
        if lock is not None:
            lock.release()


# Whole or not at all ----------------------------------------------------------------------------------------------


def write_atomically(path: Path, content: str | bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    flush(temporary)
    os.replace(temporary, path)


def write_record(folder: Path, content: dict) -> None:
    write_atomically(folder / RECORD, json.dumps(content, indent=2, default=str) + "\n")


def flush(path: Path) -> None:
    """Make a file or folder durable. A full disk may show only here: then the error stops what writes."""
    import errno

    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no fsync
            raise
    finally:
        os.close(descriptor)
