"""The way out: what commands write is checked before the work, locked, made whole, and replaced only if it may be.

    with product(folder, record("sit_convert", vars(args)), args.overwrite) as place:
        if place is None:
            return  # the same command made it before
        network.save_pretrained(place.new)

``place.new`` becomes the product at the end. What survives a kill (checkpoints, shards) is kept in ``place.parts``,
the working folder beside the product:

    NAME.tmp/   .lock  args.json (the record)  new  old (what is replaced)  and the parts

A folder is replaced or deleted only if its own record names the command that wrote it; a file that exists is replaced
if --overwrite was given.
"""

import contextlib
import errno
import functools
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from train_cc.io.errors import InputError, disk_message

LIBRARIES = ("torch", "torchvision", "accelerate", "timm", "peft", "diffusers", "safetensors", "numpy", "scipy")
MARK = "made by DMDR"  # of every record
RECORD = "args.json"  # of a folder: which command wrote it, with which arguments
LOCK = ".lock"
UNFINISHED = r"\.[0-9a-f]{16}\.tmp"  # ends the name of a file that is being written: nobody else's ends so
# What a killed command can leave in a folder before the folder has a record.
LEFTOVER = re.compile(rf"\.lock|({re.escape(RECORD)})?{UNFINISHED}")
# Arguments in which two commands of one product may differ.
ASIDE = {"overwrite", "output", "output_dir", "data_dir", "checkpoint_steps", "trust_teacher_code"}


# Records ----------------------------------------------------------------------------------------------------------


def library_versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES}


def commit() -> str | None:
    """The commit of this code, with "-dirty" after changes; None where it is no git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        process = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip() or None


def record(stage: str, arguments: dict, **more: object) -> dict:
    """A folder's record: the command, its arguments, versions."""
    plain = {
        name: value if isinstance(value, int | float | list | None) else str(value) for name, value in arguments.items()
    }
    return {"made_by": MARK, "stage": stage, "arguments": plain, "versions": library_versions()} | more


def record_of(folder: Path) -> dict:
    """A folder's record, or {} without one of ours."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    ours = isinstance(content, dict) and isinstance(content.get("arguments"), dict) and "stage" in content
    return content if ours and ("versions" in content or content.get("made_by") == MARK) else {}


def write_record(folder: Path, content: dict) -> None:
    write_atomically(folder / RECORD, json.dumps(content, indent=2, default=str) + "\n")


def differences(record: Mapping, content: Mapping) -> list[str]:
    """The words for what record ``record`` has otherwise than ``content``; versions do not count."""
    words = []
    for part, value in json.loads(json.dumps(content, default=str)).items():
        if part in ("made_by", "versions"):
            continue
        if not isinstance(value, dict):
            words += [f"{part} {record.get(part)} (asked for: {value})"] if record.get(part) != value else []
            continue
        old = record[part] if isinstance(record.get(part), dict) else {}
        names = sorted(name for name in (old | value).keys() - ASIDE if old.get(name) != value.get(name))
        for name in names:
            flag = f"--{name.replace('_', '-')} {old.get(name)} (asked for: {value.get(name)})"
            words.append(flag if part == "arguments" else f"another {name}")
    return words


# Before the work -------------------------------------------------------------------------------------------------


def check_parent(path: Path) -> None:
    """Something can be created at ``path``: its parents exist or can be made. Raises `InputError`."""
    parent = next(each for each in path.absolute().parents if os.path.lexists(each))
    for link in (path, parent):
        if link.is_symlink() and not link.exists():
            raise InputError(f"{link} is a link that leads nowhere; mend it, or choose another output")
    if not parent.is_dir():
        raise InputError(f"{path} cannot be written: {parent} is a file; a folder is expected")
    longest = [(path.absolute(), "PC_PATH_MAX"), *((name, "PC_NAME_MAX") for name in path.absolute().parts)]
    if any(len(os.fsencode(name)) + 21 > os.pathconf(parent, limit) for name, limit in longest):  # 21: UNFINISHED
        raise InputError(f"{str(path)[:300]} cannot be written: {os.strerror(errno.ENAMETOOLONG)}")
    try:
        with contextlib.suppress(AttributeError, OSError):
            os.close(os.open(parent, os.O_TMPFILE | os.O_WRONLY))  # it has no name: a kill leaves nothing
            return
        probe = parent / f".{secrets.token_hex(8)}.tmp"
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise InputError(f"{parent} takes no new file: {os.strerror(error.errno)}; choose another output") from error


def check_output_file(path: Path, overwrite: bool, flag: str = "--output") -> None:
    """``path`` can be written, and is not there, or a file to replace. Raises `InputError`."""
    check_parent(path)
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise InputError(f"{flag} {path} is {kind}; a file is expected")
    if path.exists() and not overwrite:
        raise InputError(f"{flag} {path} exists; choose another, or replace it with --overwrite")


def apart(paths: Iterable[tuple[str, Path | None]]) -> None:
    """No two outputs are one file. Raises `InputError`."""
    places: dict[str, str] = {}
    for flag, path in paths:
        if path is not None and places.setdefault(real := os.path.realpath(path), flag) != flag:
            raise InputError(f"{places[real]} and {flag} are both {path}; choose two")


def check_output_dir(folder: Path, overwrite: bool = False, flag: str = "--output-dir") -> None:
    """``folder`` can be written, and is empty, or is a folder of ours to replace. Raises `InputError`."""
    check_parent(folder / RECORD)
    if folder.exists() and not is_empty(folder):
        if not record_of(folder):
            problem = "is not empty, and no command of this project wrote it"
            raise InputError(f"the output folder {folder} {problem}: choose another {flag}")
        if not overwrite:
            raise InputError(
                f"the output folder {folder} is not empty; choose another {flag}, continue from its checkpoint "
                "with --auto-resume (training runs), or replace what it holds with --overwrite"
            )


def is_empty(folder: Path) -> bool:
    """True if ``folder`` holds at most what a command leaves that was killed before it wrote its record."""
    return all(LEFTOVER.fullmatch(path.name) for path in folder.iterdir())


def need_space(folder: Path, size: int) -> None:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{folder} has {free / 1e9:.2f} GB free, {size / 1e9:.2f} GB are needed; nothing was written")


@contextlib.contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[None]:
    """``folder`` is written by this process only. Made where missing, and removed again if nothing came of it."""
    parents = [parent for parent in (folder, *folder.parents) if not parent.exists()]
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
        for parent in parents:
            with contextlib.suppress(OSError):  # something is in it
                parent.rmdir()
        if lock is not None:
            lock.release()


def plain_mode(path: Path) -> None:
    """The mode that a plain ``open`` would have given: some libraries write files that only their owner reads."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


# Files ---------------------------------------------------------------------------------------------------------------


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


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """``path`` holds ``content``, text as UTF-8, or what it held before."""
    for each in list(path.parent.iterdir()):
        if re.fullmatch(re.escape(path.name) + UNFINISHED, each.name):  # a kill has left it
            each.unlink(missing_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with writing(path):
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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


# Products ---------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """``new``: the folder to fill, or the file to write. ``parts``: the folder of what the next start can use."""

    new: Path
    parts: Path


def place_of(target: Path) -> Place:
    """The working folder of ``target``: beside it, on its disk, even if ``target`` is a link. Raises `InputError`."""
    target = Path(os.path.realpath(target))
    if Path.cwd().is_relative_to(target):
        raise InputError(f"{target} holds the current folder, and would be replaced whole: name a folder in it")
    parts = target.with_name(target.name + ".tmp")
    return Place(parts / "new", parts)


def finished(target: Path, content: Mapping, read: Callable[[Path], Mapping] = record_of) -> bool:
    """True if the command of record ``content`` made ``target`` and all of it is there. Only decided here."""
    record = read(target) if target.is_file() or target.is_dir() else {}  # a pipe would be waited for
    if not isinstance(record, Mapping) or not record or differences(record, content):
        return False
    return target.is_file() or is_whole(target, record)


def is_whole(folder: Path, record: Mapping) -> bool:
    """True if every name is in ``folder`` that its record ``record`` lists as finished."""
    names = names_in(record)
    return bool(names) and all((folder / name).exists() for name in names)


def names_in(record: Mapping) -> list[str]:
    """The names in a finished folder, by its record; none of a folder that is filled in place, such as a run's."""
    return [str(name) for name in record["finished"]] if isinstance(record.get("finished"), list) else []


def check_product(
    target: Path,
    content: Mapping,
    overwrite: bool = False,
    flag: str = "--output-dir",
    file: bool = False,
    read: Callable[[Path], Mapping] = record_of,
) -> bool:
    """True if the same command made ``target``. Raises `InputError` if `product` cannot make it; before the work."""
    parts = place_of(target).parts
    if not overwrite and finished(target, content, read):
        return True
    if file:
        check_output_file(target, overwrite, flag)
    else:
        check_output_dir(target, True, flag)
        if target.exists() and not is_empty(target):
            check_replaced(target, content, overwrite, flag)
    check_parent(parts / RECORD)
    if os.path.lexists(parts) and not is_work(parts):
        kind = "no command of this project wrote it" if parts.is_dir() else "is no folder"
        raise InputError(f"{parts} is needed, and {kind}: move it, or choose another {flag}")
    return False


def check_replaced(folder: Path, content: Mapping, overwrite: bool, flag: str) -> None:
    """The kind of command of record ``content`` wrote all of ``folder``, and ``overwrite``. Raises `InputError`."""
    record = record_of(folder)
    if record["stage"] != content["stage"]:
        raise InputError(f"the output folder {folder} holds what {record['stage']} wrote; choose another {flag}")
    if not overwrite:
        words = ", ".join(differences(record, content)) or "these settings, and is not whole"
        raise InputError(
            f"the output folder {folder} is not empty: it was made with {words}; choose another {flag}, or replace it "
            "with --overwrite"
        )
    names = {path.name for path in folder.iterdir() if not LEFTOVER.fullmatch(path.name)}
    if others := sorted(names - {RECORD, *(names_in(record) or names)}):
        raise InputError(f"{folder} also holds {', '.join(others[:6])}: move it, or choose another {flag}")


@contextlib.contextmanager
def product(
    target: Path,
    content: Mapping,
    overwrite: bool = False,
    flag: str = "--output-dir",
    file: bool = False,
    read: Callable[[Path], Mapping] = record_of,
    keep: bool = False,
) -> Iterator[Place | None]:
    """Make ``target``, a folder or a ``file``, whole or not at all: yields the `Place` to fill, locked.

    None: the same command, of record ``content``, made it before. ``flag`` named it. ``keep``: an end without a
    product, by a kill or an error, leaves ``parts`` to the next command of the same record. ``read``: returns the
    record of a finished file. Raises `InputError`.
    """
    check = functools.partial(check_product, target, content, overwrite, flag, file, read)
    there, place, target = check(), place_of(target), Path(os.path.realpath(target))
    before = place.parts / "old"
    with contextlib.ExitStack() as lock:
        if not there or is_work(place.parts):
            lock.enter_context(locked(place.parts))
            if before.exists() and not target.exists():  # killed between the two renames of `put_in_place`
                before.rename(target)
            if there := there or check():
                clear(place.parts)
        if there:
            print(f"there already, by the same command: {target}; --overwrite makes it anew", flush=True)
            yield None
            return
        begin(place, content, overwrite or not keep or file, flag)
        if not file:
            place.new.mkdir()
        try:
            with writing(target):
                yield place
                if place.new.is_file() or any(place.new.glob("*")):
                    put_in_place(place, target, content, before)
                    keep = False
        finally:
            if before.exists() and not target.exists():
                before.rename(target)
            if not keep or not has_parts(place):
                clear(place.parts)


def begin(place: Place, content: Mapping, anew: bool, flag: str) -> None:
    """Empty the working folder, but for the parts of the same command. Raises `InputError` for another's."""
    begun = record_of(place.parts)
    words = differences(begun, content)
    if words and has_parts(place) and not anew:
        problem = f"{place.parts} holds what was begun with {', '.join(words)}"
        raise InputError(f"{problem}; choose another {flag}, or replace it with --overwrite")
    same = not words and begun["arguments"].get("overwrite") == content["arguments"].get("overwrite")
    for path in place.parts.iterdir():
        if path.name not in (RECORD, LOCK) and (not same or path.name in ("new", "old")):
            remove(path)
    write_record(place.parts, dict(content))


def put_in_place(place: Place, target: Path, content: Mapping, before: Path) -> None:
    """``place.new`` becomes ``target``, a folder with its record; an older folder becomes ``before``."""
    if place.new.is_dir():
        write_record(place.new, {**content, "finished": sorted(path.name for path in place.new.iterdir())})
    for path in (place.new, *place.new.rglob("*")):
        if path.is_file():
            plain_mode(path)
        flush(path)
    if target.is_dir():
        target.rename(before)
    place.new.rename(target)
    flush(target.parent)


def is_work(parts: Path) -> bool:
    """True for a working folder, as far as a killed command came."""
    return parts.is_dir() and not parts.is_symlink() and bool(record_of(parts) or is_empty(parts))


def has_parts(place: Place) -> bool:
    names = (path.name for path in place.parts.iterdir())
    return not all(name in (RECORD, "new", "old") or LEFTOVER.fullmatch(name) for name in names)


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def clear(parts: Path) -> None:
    """Delete a working folder, its record last: a kill in between leaves a folder of ours."""
    for path in sorted(parts.glob("*"), key=lambda path: path.name == RECORD):
        if path.name != LOCK:
            remove(path)
    remove(parts)
