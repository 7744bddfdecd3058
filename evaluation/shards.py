"""Samples in the making: finished shards beside the output, locked, continued after a stop, merged, and removed again.

    OUTPUT.shards/  provenance.json  .lock  00000000.npz  00001000.npz  ...

A shard carries the provenance of what made it, and counts only if it is whole and that provenance is the one asked for.
"""

import contextlib
import itertools
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from evaluation.files import provenance_of
from train_cc.io.errors import InputError
from train_cc.io.products import (
    UNFINISHED,
    check_output_dir,
    flush,
    locked,
    record_of,
    write_atomically,
    write_record,
    writing,
)
from train_cc.io.read import npz_headers, parsing, printable, read_npz
from train_cc.run.pictures import png_bytes

LOCK, NOTE, WHOLE = ".lock", "provenance.json", "whole.tmp"
SHARD = re.compile(r"([0-9]{8}|[1-9][0-9]{8,})\.npz")
PICTURE = re.compile(r"([0-9]{6}|[1-9][0-9]{6,})\.png")
# What a run that was killed can leave before its first shard.
LEFT = re.compile(rf"\.lock|({re.escape(NOTE)})?{UNFINISHED}")
OURS = re.compile(rf"{SHARD.pattern}(\.tmp)?|whole\.tmp|provenance\.json|{LEFT.pattern}")


def shards_of(output: Path) -> Path:
    return output.with_name(output.name + ".shards")


def shard_path(folder: Path, start: int) -> Path:
    return folder / f"{start:08d}.npz"


def check_shards_folder(folder: Path) -> None:
    """``folder`` is not there, empty, or of an earlier run of ours. Raises `InputError`."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is in the way: shards are kept there while images are made; move it")
    names = [path.name for path in folder.iterdir() if not LEFT.fullmatch(path.name)]
    if names and NOTE not in names:
        raise InputError(f"{folder} holds files that this command did not write: move it, or choose another --output")


@contextlib.contextmanager
def open_shards(output: Path, provenance: dict) -> Iterator[Path]:
    """The folder of ``output``'s shards, locked. Left in place with what is finished on an error, else removed."""
    folder = shards_of(output)
    check_shards_folder(folder)
    with locked(folder, LOCK):
        write_atomically(folder / NOTE, json.dumps(provenance, indent=2) + "\n")
        try:
            yield folder
        except BaseException:
            if not any(SHARD.fullmatch(path.name) for path in folder.iterdir()):
                clear(folder)
            raise
        clear(folder)
    with contextlib.suppress(OSError):  # somebody's file is in it
        folder.rmdir()


def clear(folder: Path) -> None:
    """Delete what we write there. The mark goes last: a kill in between leaves a folder that is known as ours."""
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == LOCK, path.name == NOTE)):
        if OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_npz(path: Path, arrays: dict[str, np.ndarray], images: Iterable[np.ndarray], count: int) -> None:
    """An .npz of ``count`` ``images`` (n, H, W, C), given a part at a time, and ``arrays``."""
    parts = iter(images)
    first = next(parts)
    with writing(path), zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *first.shape[1:])}
            npy.write_array_header_1_0(entry, header)
            for part in itertools.chain([first], parts):
                entry.write(np.ascontiguousarray(part).tobytes())
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as entry:
                npy.write_array(entry, array)
    flush(path)


def write_shard(path: Path, images: np.ndarray, labels: np.ndarray, provenance: dict, again: int = 0) -> None:
    """``again``: how many of the images fp16 could not decode."""
    temporary = path.with_name(path.name + ".tmp")
    arrays = {"arr_1": labels, "provenance": np.array(json.dumps(provenance)), "again": np.array(again)}
    write_npz(temporary, arrays, [images], len(images))
    os.replace(temporary, path)


def read_shard(path: Path, labels: np.ndarray, image_shape: tuple[int, ...], provenance: dict) -> np.ndarray | None:
    """The images of a shard (n, H, W, C) if it is whole and what is asked for, else None: it is made again."""
    if not path.is_file():
        return None
    try:
        content = read_npz(path, "a shard of images")
        if provenance_of(content, path) != provenance:
            return None
    except InputError as error:
        print(f"made again: {error}", flush=True)
        return None
    images, found = content.get("arr_0"), content.get("arr_1")
    fits = images is not None and images.dtype == np.uint8 and images.shape == (len(labels), *image_shape)
    return images if fits and found is not None and np.array_equal(found, labels) else None


def merge_shards(shards: list[Path], output: Path, provenance: dict) -> int:
    """One .npz of all shards in order, a shard in memory at a time. -> how many images fp16 could not decode."""
    contents = (read_npz(shard, "a shard of images") for shard in shards)
    labels, counts = zip(*((content["arr_1"], int(content.get("again", 0))) for content in contents), strict=True)
    if again := sum(counts):
        provenance = provenance | {"decoder": f"{provenance['decoder']}, {again} images fp32"}
    images = (read_npz(shard, "a shard of images")["arr_0"] for shard in shards)
    temporary = shards_of(output) / WHOLE
    arrays = {"arr_1": np.concatenate(labels), "provenance": np.array(json.dumps(provenance))}
    write_npz(temporary, arrays, images, len(arrays["arr_1"]))
    os.replace(temporary, output)
    return again


def same_but_for_the_decoder(found: object, asked: dict) -> bool:
    """The precision of a decoder is known only once it was tried."""
    return isinstance(found, dict) and found | {"decoder": None} == asked | {"decoder": None}


def difference(output: Path, asked: dict) -> str:
    """The settings, files and versions of ``asked`` in which ``output`` was made otherwise, in words."""
    try:
        with parsing(output, "samples"), np.load(output) as file:
            made = provenance_of(file, output) or {}
    except InputError:  # a file of something else
        return ""
    changed = []
    for part in ("arguments", "versions"):
        old, new = made.get(part), asked[part]
        old = old if isinstance(old, dict) else {}
        changed += [f"{k} {old.get(k)}, now {new.get(k)}" for k in sorted(old | new) if old.get(k) != new.get(k)]
    changed += [f"another {name}" for name in ("generator_sha256", "vae_sha256") if made.get(name) != asked[name]]
    return printable(f" ({'; '.join(changed[:8])})") if changed else ""


def finished(output: Path, provenance: dict) -> bool:
    """Whether ``output`` is there, whole, and what is asked for, whatever precision its decoder took."""
    if not output.is_file():
        return False
    try:
        npz_headers(output, "samples")
        with parsing(output, "samples"), zipfile.ZipFile(output) as archive, np.load(output) as file:
            return archive.testzip() is None and same_but_for_the_decoder(provenance_of(file, output), provenance)
    except InputError:
        return False


# PNG files --------------------------------------------------------------------------------------------------------


def check_png_dir(folder: Path, overwrite: bool, provenance: dict | None = None) -> None:
    """``folder`` is new, empty, or one that this command filled: with ``provenance``, or to be replaced."""
    record = record_of(folder)
    if record and record["stage"] != "generate":
        raise InputError(f"--png-dir {folder} holds a {record['stage']}; choose another")
    same = provenance is not None and same_but_for_the_decoder(record.get("provenance"), provenance)
    check_output_dir(folder, overwrite or same or (bool(record) and provenance is None), "--png-dir")


def write_pngs(parts: Iterable[np.ndarray], folder: Path, content: dict) -> None:
    """``content``: the folder's record, written first, so that a folder that is cut short is known as ours."""
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder, content)
    number = 0
    for images in parts:
        for image in images:
            picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
            temporary = folder / "unfinished.tmp"
            temporary.write_bytes(png_bytes(picture))
            os.replace(temporary, folder / f"{number:06d}.png")
            number += 1
    for path in folder.glob("*.png"):  # of an earlier, larger set
        if PICTURE.fullmatch(path.name) and int(path.stem) >= number:
            path.unlink()
