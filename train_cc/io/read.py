"""Where reading ends and using begins: a file from outside is parsed and checked here, and not again.

No pickle runs code: torch files are read with ``weights_only=True``, .npz with ``allow_pickle=False``.
"""

import contextlib
import hashlib
import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from train_cc.io.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

JSON_BYTES = 64 << 20  # no JSON file of ours or of a library comes near


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def parsing(path: Path | str, expected: str) -> Iterator[None]:
    """Around a library's parser alone: whatever it raises says that ``path`` is not what it should be."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path} is damaged or something else; {expected} is expected ({first_line(error)})"
        ) from error


def require_file(path: Path, expected: str) -> Path:
    try:
        there = path.is_file()
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)[:300]!r} is no path ({first_line(error)}); {expected} is expected") from error
    if not there:
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {kind}; {expected} is expected")
    return path


def require_folder(path: Path, expected: str, *names: str) -> Path:
    """``path`` is a folder that holds files ``names``."""
    try:
        there = path.is_dir()
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)[:300]!r} is no path ({first_line(error)}); {expected} is expected") from error
    if not there:
        kind = "is a file" if path.is_file() else "does not exist"
        raise InputError(f"{path} {kind}; {expected} is expected")
    for name in names:
        if not (path / name).is_file():
            raise InputError(f"{path / name} does not exist; {expected} is expected")
    return path


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
    """Name -> shape from the header alone."""
    from safetensors import safe_open

    require_file(path, expected)
    with parsing(path, expected), safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_torch(path: Path, expected: str, allowed: Sequence[type] = ()) -> object:
    """A .pt file's content, without running code from it; of classes, plain values and ``allowed`` alone.

    torch trusts the sizes that the pickle names and skips the archive's checksums: both are checked here, or a damaged
    file could read past its own end.
    """
    import torch

    require_file(path, expected)
    with parsing(path, expected):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
            if bad is not None:
                raise InputError(f"{path} is damaged: its part {bad} fails its checksum; {expected} is expected")
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)


def read_npz(path: Path, expected: str) -> dict[str, "np.ndarray"]:
    """All arrays of an .npz of plain arrays."""
    import numpy as np

    require_file(path, expected)
    with parsing(path, expected):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise InputError(f"{path}: {entry.filename} is encrypted or compressed in an unknown way")
                with archive.open(entry) as file:
                    _check_array_header(path, entry, file)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}


def _check_array_header(path: Path, entry: zipfile.ZipInfo, file) -> None:
    """The header's shape and dtype make as many bytes as the archive holds: a lie would reserve memory for itself."""
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise InputError(f"{path}: {entry.filename} holds Python objects; plain arrays are expected")
    size = math.prod(shape) * dtype.itemsize + file.tell()
    if size != entry.file_size:
        raise InputError(f"{path}: {entry.filename} names {size:,} bytes and holds {entry.file_size:,}")


# Contents ---------------------------------------------------------------------------------------------------------


class Number(NamedTuple):
    """What a number in a config may be; ``kind``: int or float (which takes whole numbers too)."""

    kind: type
    low: float
    high: float

    def problem(self, value: object) -> str | None:
        kinds = (int, float) if self.kind is float else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return f"a {'whole ' if self.kind is int else ''}number"
        return None if self.low <= value <= self.high else f"{self.low:g} to {self.high:g}"


def check_numbers(config: Mapping, allowed: Mapping[str, Number], source: Path | str) -> None:
    """Every key of ``allowed`` that is in ``config`` holds such a number. Raises `InputError`."""
    for name, number in allowed.items():
        if name in config and (told := number.problem(config[name])):
            raise InputError(f"{source}: {name} is {str(config[name])[:80]}; allowed: {told}")


def require_keys(config: Mapping, needed: Sequence[str], optional: Sequence[str], source: Path | str) -> None:
    """``config`` has all of ``needed``, and besides them at most ``optional`` and private keys (``_name``)."""
    missing = [name for name in needed if name not in config]
    unknown = [str(name) for name in config if name not in needed and name not in optional and str(name)[:1] != "_"]
    if missing or unknown:
        raise InputError(f"{source} does not fit: missing {missing[:8]}, unknown {unknown[:8]}")


def fit(
    own: Mapping[str, Sequence[int]],
    state: Mapping[str, "Tensor"],
    source: Path | str,
    hint: str = "",
) -> None:
    """``state`` has exactly the names and shapes of ``own``. Raises `InputError`."""
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(map(str, state.keys() - own.keys()))
    reshaped = [
        f"{name} {tuple(state[name].shape)}, expected {tuple(own[name])}"
        for name in sorted(own.keys() & state.keys())
        if tuple(state[name].shape) != tuple(own[name])
    ]
    if missing or unexpected or reshaped:
        told = {"missing": missing, "unexpected": unexpected, "other shapes": reshaped}
        words = "; ".join(f"{kind}: {', '.join(names[:6])}" for kind, names in told.items() if names)
        raise InputError(f"{source} does not fit{f' ({hint})' if hint else ''}: {words}")


def require_finite(state: Mapping[str, "Tensor"], source: Path | str) -> None:
    """No tensor of ``state`` holds NaN or infinity. Raises `InputError` that names the first that does."""
    import torch

    for name, tensor in state.items():
        if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
            raise InputError(f"{source}: {name} is {tensor.dtype}, {tensor.layout}; plain real numbers are expected")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{source}: {name} holds NaN or infinity; such weights are not used")
