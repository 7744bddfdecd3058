"""Where reading ends and using begins: a file from outside is parsed and checked here, and not again.

No pickle runs code: torch files are read with ``weights_only=True``, .npz with ``allow_pickle=False``.
"""

import contextlib
import hashlib
import json
import math
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from train_cc.io.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

JSON_BYTES = 64 << 20  # no JSON file of ours or of a library comes near


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def parsing(path: Path | str, expected: str, told: str = "is damaged or something else") -> Iterator[None]:
    """Around a library's parser alone: whatever it raises says that ``path`` is not what it should be."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} {told}; {expected} is expected ({first_line(error)})") from error


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
    with parsing(path, expected, "is truncated, damaged, or a pickle that holds code, which was not run"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
                if packed:  # torch writes none, and what it unpacks to has no bound
                    raise InputError(f"{path}: its part {packed[0]} is compressed; {expected} is expected")
                bad = archive.testzip()
            if bad is not None:
                raise InputError(f"{path} is damaged: its part {bad} fails its checksum; {expected} is expected")
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on a pickle's protocol: what it cannot read, it refuses
            return torch.load(path, map_location="cpu", weights_only=True)


def npz_headers(path: Path, expected: str) -> dict[str, tuple[tuple[int, ...], "np.dtype"]]:
    """Name -> shape and dtype of every array of an .npz, from the headers alone."""
    require_file(path, expected)
    found = {}
    with parsing(path, expected), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(f"{path}: {entry.filename} is encrypted or compressed in an unknown way")
            if entry.filename in found:
                raise InputError(f"{path}: {entry.filename} is there twice; {expected} is expected")
            with archive.open(entry) as file:
                found[entry.filename] = _array_header(f"{path}: {entry.filename}", entry.file_size, file)
    return {name.removesuffix(".npy"): header for name, header in found.items()}


def read_npz(path: Path, expected: str) -> dict[str, "np.ndarray"]:
    """All arrays of an .npz of plain arrays; the archive's checksums are verified."""
    import numpy as np

    npz_headers(path, expected)
    with parsing(path, expected), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def read_npy(path: Path, expected: str) -> "np.ndarray":
    """The plain array of an .npy file."""
    import numpy as np

    require_file(path, expected)
    with parsing(path, expected), path.open("rb") as file:
        _array_header(str(path), path.stat().st_size, file)
        file.seek(0)
        return np.load(file, allow_pickle=False)


def _array_header(told: str, held: int, file) -> tuple[tuple[int, ...], "np.dtype"]:
    """Shape and dtype, which make the ``held`` bytes that there are: a lie would reserve memory for itself."""
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise InputError(f"{told} holds Python objects; plain arrays are expected")
    size = math.prod(shape) * dtype.itemsize + file.tell()
    if size != held:
        raise InputError(f"{told} names {size:,} bytes and holds {held:,}")
    return shape, dtype


# Contents ---------------------------------------------------------------------------------------------------------


def shown(value: object) -> str:
    """``value`` for a message, cut short. Numbers of thousands of digits and what cannot be shown are named."""
    try:
        return repr(value)[:80]
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"


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
            raise InputError(f"{source}: {name} is {shown(config[name])}; allowed: {told}")


def require_keys(config: Mapping, needed: Sequence[str], optional: Sequence[str], source: Path | str) -> None:
    """``config`` has all of ``needed``, and besides them at most ``optional`` and private keys (``_name``)."""
    missing = [name for name in needed if name not in config]
    unknown = [str(name) for name in config if name not in needed and name not in optional and str(name)[:1] != "_"]
    if missing or unknown:
        raise InputError(f"{source} does not fit: missing {missing[:8]}, unknown {unknown[:8]}")


def fit_shapes(
    own: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], source: Path | str, hint: str = ""
) -> None:
    """``found`` has exactly the names and shapes of ``own``. Raises `InputError`."""
    missing, unexpected = sorted(own.keys() - found.keys()), sorted(map(str, found.keys() - own.keys()))
    reshaped = [
        f"{name} {tuple(found[name])}, expected {tuple(own[name])}"
        for name in sorted(own.keys() & found.keys())
        if tuple(found[name]) != tuple(own[name])
    ]
    if missing or unexpected or reshaped:
        told = {"missing": missing, "unexpected": unexpected, "other shapes": reshaped}
        words = "; ".join(
            f"{kind}: {', '.join(name[:120] for name in names[:6])}" for kind, names in told.items() if names
        )
        raise InputError(f"{source} does not fit{f' ({hint})' if hint else ''}: {words}")


def fit(
    own: Mapping[str, Sequence[int]],
    state: Mapping[str, "Tensor"],
    source: Path | str,
    hint: str = "",
) -> None:
    """``state`` has exactly the names and shapes of ``own``. Raises `InputError`."""
    fit_shapes(own, {name: value.shape for name, value in state.items()}, source, hint)


def require_finite(state: Mapping[str, "Tensor"], source: Path | str) -> None:
    """No tensor of ``state`` holds NaN or infinity. Raises `InputError` that names the first that does."""
    import torch

    for name, tensor in state.items():
        if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
            raise InputError(f"{source}: {name} is {tensor.dtype}, {tensor.layout}; plain real numbers are expected")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{source}: {name} holds NaN or infinity; weights that are not finite are not used")


def require_tensors(content: object, source: Path | str, expected: str) -> dict[str, "Tensor"]:
    """``content`` is a dict of named plain tensors that hold all that they name. -> it. Raises `InputError`."""
    import torch

    if not isinstance(content, Mapping) or not content:
        kind = "nothing" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise InputError(f"{source} holds {kind}; {expected} is expected")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            told = f"it holds {str(name)[:80]!r}, a {type(value).__name__}"
            raise InputError(f"{source} is no bare state dict of tensors: {told}; {expected} is expected")
        plain = value.layout == torch.strided and not (value.is_nested or value.is_quantized or value.is_complex())
        if not plain or value.device.type != "cpu":
            told = "nested" if value.is_nested else f"{value.dtype}, {value.layout}, on {value.device.type}"
            raise InputError(f"{source}: {name} is {told}; plain real numbers are expected")
        if value.nbytes > value.untyped_storage().nbytes():
            raise InputError(f"{source}: {name} names {value.nbytes:,} bytes and holds fewer")
    return dict(content)


def block_count(names: Iterable[str], source: Path | str) -> int:
    """N of the ``blocks.0.`` to ``blocks.(N - 1).`` in ``names``. Raises `InputError` where one is missing."""
    found = {match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))}
    if far := sorted(number for number in found if len(number) > 4):
        raise InputError(f"{source} has a block {far[0][:40]}; 0 to 9999 are possible")
    numbers = {int(number) for number in found}
    if numbers != set(range(len(numbers))):
        gaps = sorted(set(range(max(numbers))) - numbers)
        raise InputError(f"{source}: blocks {gaps[:8]} are missing of 0 to {max(numbers)}")
    return len(numbers)


def load_weights(
    module: "nn.Module", state: Mapping[str, "Tensor"], source: Path | str, hint: str = "", partly: bool = False
) -> None:
    """``state`` into ``module``, which may be on the meta device: names, shapes and kinds fit exactly, values finite.

    Values become copies in the dtype of what they replace: of a mapped file, one view left would keep all of it in
    memory. ``partly``: what ``state`` does not name stays as it is. Raises `InputError`.
    """
    require_tensors(state, source, "a state dict")
    own = module.state_dict()
    if partly:
        own = {name: value for name, value in own.items() if name in state}
    fit({name: value.shape for name, value in own.items()}, state, source, hint)
    loaded = {}
    for name, value in state.items():
        if value.is_floating_point() != own[name].is_floating_point():
            raise InputError(f"{source}: {name} is {value.dtype}, {own[name].dtype} is expected")
        loaded[name] = value.to(own[name].dtype, copy=True).contiguous()
    require_finite(loaded, source)
    module.load_state_dict(loaded, assign=True, strict=not partly)
