"""Readers of files from outside: a file is parsed and checked here, and not again.

No pickle runs code: torch files are read with ``weights_only=True``, .npz with ``allow_pickle=False``.
"""

import contextlib
import hashlib
import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train_cc.io.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

POINTER = b"version https://git-lfs"  # of what a clone holds where Git LFS is not installed
MAX_LABEL = 99_999  # a label beyond is no label
JSON_BYTES = 64 << 20  # no JSON file of ours or of a library comes near


def first_line(error: BaseException) -> str:
    """The kind of ``error`` and the first line of its text, without the colours of a terminal."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {printable(lines[0][:200])}" if lines else type(error).__name__


@contextlib.contextmanager
def parsing(path: Path | str, expected: str, problem: str = "is damaged or something else") -> Iterator[None]:
    """Around a library's parser only: whatever it raises says that ``path`` is not what it should be."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if Path(path).is_file():
            with Path(path).open("rb") as file:
                if file.read(len(POINTER)) == POINTER:
                    problem = "is a pointer of Git LFS, not the file itself, which `git lfs pull` fetches"
        raise InputError(f"{path} {problem}; {expected} is expected ({first_line(error)})") from error


def require_file(path: Path, expected: str) -> Path:
    _require(path, Path.is_file, expected)
    return path


def require_folder(path: Path, expected: str, *names: str) -> Path:
    """``path`` is a folder that holds files ``names``."""
    _require(path, Path.is_dir, expected)
    for name in names:
        if not (path / name).is_file():
            raise InputError(f"{path / name} does not exist; {expected} is expected")
    return path


def _require(path: Path, is_kind: Callable[[Path], bool], expected: str) -> None:
    try:
        there = is_kind(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)[:300]!r} is not a path ({first_line(error)}); {expected} is expected") from error
    if not there:
        kind = "is a folder" if path.is_dir() else "is a file" if path.is_file() else "does not exist"
        raise InputError(f"{path} {kind}; {expected} is expected")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


# Formats ---------------------------------------------------------------------------------------------------------


def read_json(path: Path, expected: str) -> dict:
    """A JSON object. Raises `InputError` for anything else."""
    require_file(path, expected)
    if path.stat().st_size > JSON_BYTES:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes; {expected} is expected")
    with parsing(path, expected):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; {expected} is expected")
    return content


def read_safetensors(path: Path, expected: str) -> dict[str, "Tensor"]:
    """All tensors of a safetensors file, on the CPU, as views of the mapped file."""
    from safetensors.torch import load_file

    require_file(path, expected)
    with parsing(path, expected):
        return load_file(path)


def safetensors_shapes(path: Path, expected: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape from the header only."""
    from safetensors import safe_open

    require_file(path, expected)
    with parsing(path, expected), safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_torch(path: Path, expected: str, allowed: Sequence[type] = ()) -> object:
    """A .pt file's content, without running code from it; of classes, plain values and ``allowed`` only.

    Tensors are views of the mapped file: a part that is not looked at takes no memory, and processes share the rest.
    torch skips the archive's checksums: they are checked here.
    """
    import torch

    require_file(path, expected)
    with parsing(path, expected, "is truncated, damaged, or a pickle that holds code, which was not run"):
        zipped = zipfile.is_zipfile(path)  # an older file is one pickle, and cannot be mapped
        if zipped:
            with zipfile.ZipFile(path) as archive:
                packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
                if packed:  # torch writes none, and what it unpacks to has no bound
                    raise InputError(f"{path}: its part {packed[0]} is compressed; {expected} is expected")
                bad = archive.testzip()
            if bad is not None:
                raise InputError(f"{path} is damaged: its part {bad} fails its checksum; {expected} is expected")
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on a pickle's protocol: what it cannot read, it refuses
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
            except pickle.UnpicklingError as error:  # torch advises to run the file's code
                reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
                if match := re.search(r"GLOBAL ([\w.]+)", reason):
                    raise InputError(
                        f"{path} holds {match[1]}, a class or function that is not allowed there and was not run; "
                        f"{expected} is expected. Where you trust it, save it again with plain numbers, text, tensors"
                    ) from error
                raise pickle.UnpicklingError(reason) from error


def npz_headers(path: Path, expected: str) -> dict[str, tuple[tuple[int, ...], "np.dtype"]]:
    """Name -> shape and dtype of every array of an .npz, from the headers only."""
    from numpy.lib import format as npy

    require_file(path, expected)
    headers = {}
    with parsing(path, expected), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # LZMA reserves what it claims
                raise InputError(f"{path}: {entry.filename} is compressed in an unknown way; {expected} is expected")
            with archive.open(entry) as file:
                read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
                shape, _, dtype = read(file)
                size = math.prod(shape) * dtype.itemsize + file.tell()
            if dtype.hasobject:
                raise InputError(f"{path}: {entry.filename} holds Python objects; plain arrays are expected")
            if size != entry.file_size:  # a false header would reserve memory
                raise InputError(f"{path}: {entry.filename} is no array of its {entry.file_size:,} bytes")
            headers[entry.filename.removesuffix(".npy")] = shape, dtype
    return headers


def read_npz(path: Path, expected: str) -> dict[str, "np.ndarray"]:
    """All arrays of an .npz of plain arrays; the archive's checksums are verified."""
    import numpy as np

    npz_headers(path, expected)
    with parsing(path, expected), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def images_shape(headers: Mapping[str, tuple], path: Path, expected: str) -> tuple[int, ...]:
    """(N, H, W, C) of arr_0; ``headers``: name -> shape and dtype of each array. Raises `InputError`."""
    if "arr_0" not in headers:
        names = f" but {', '.join(headers)[:200]}" if headers else ""
        raise InputError(f"{path} has no arr_0{names}; {expected} is expected")
    shape, dtype = headers["arr_0"]
    if dtype != "uint8" or len(shape) != 4 or shape[3] not in (1, 3):
        hint = ""
        if dtype.kind == "f":
            hint = "; of values x in [0, 1] these are (255 * x).round().astype(numpy.uint8)"
        elif len(shape) == 4 and shape[1] in (1, 3):
            hint = "; of (N, C, H, W) these are arr_0.transpose(0, 2, 3, 1)"
        raise InputError(f"{path} has arr_0 {dtype} {shape}; {expected} is expected{hint}")
    return shape


def require_scale(images: "np.ndarray", path: Path) -> None:
    """Raises `InputError` if no value is above 1, as of images in [0, 1] that were cast without a scale."""
    if images.max() <= 1:
        raise InputError(f"{path} holds no value above 1; images in [0, 255] are expected, not in [0, 1]")


# Values of a config ---------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """``text`` on one line, in what any terminal, page and font can show: a file's name can hold any byte."""
    return "".join(c if c.isprintable() else "?" for c in text)


def value_text(value: object) -> str:
    """``value`` for a message, cut short. Numbers of thousands of digits and what cannot be shown are named."""
    try:
        return repr(value)[:80]
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"


def kind_of(config: Mapping, expected: str) -> str:
    """The class that a config.json names, as diffusers, timm or transformers do; ``expected`` if it names none."""
    keys = ("_class_name", "architecture", "model_type")
    return next((str(config[key])[:80] for key in keys if key in config), expected)


def require_plain(content: object, path: Path) -> None:
    """``content`` can be written as JSON again: finite numbers, not nested without end. Raises `InputError`."""
    with parsing(path, "JSON of finite numbers, not deeply nested"):
        json.dumps([[[[[[content]]]]]], indent=2, allow_nan=False)
