"""Samples and statistics in the making: parts that the next start uses, and at the end one .npz, or PNG files."""

import contextlib
import functools
import io
import itertools
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from accelerate import PartialState
from numpy.lib import format as npy
from PIL import Image

from evaluation.samples.files import provenance_of
from train_cc.io.errors import InputError
from train_cc.io.products import Place, check_product, differences, place_of, product, write_atomically, writing
from train_cc.io.read import parsing, printable, read_npz
from train_cc.run.pictures import png_bytes

PART = "a part of this command"


@contextlib.contextmanager
def in_parts(
    target: Path, content: Mapping, overwrite: bool, read: Callable[[Path], Mapping], processes: PartialState
) -> Iterator[Place | None]:
    """`product` for all processes, which share its storage: the main process writes ``place.new``.

    None: ``target`` is there already.
    """
    read = functools.cache(read)  # every byte of the file is checked, which may be gigabytes: once
    record = read(target) if target.is_file() and not overwrite else {}
    if record and (words := differences(record, content)):
        words = printable("; ".join(words[:8]))
        raise InputError(f"{target} exists, made with {words}; choose another --output, or replace it with --overwrite")
    there = check_product(target, content, overwrite, "--output", True, read)
    processes.wait_for_everyone()  # all have looked before any writes
    with contextlib.ExitStack() as stack:
        place = None if there else place_of(target)
        if processes.is_main_process:
            place = stack.enter_context(product(target, content, overwrite, "--output", True, read, keep=True))
        processes.wait_for_everyone()
        yield place


def write_part(path: Path, **arrays: np.ndarray) -> None:
    """Write a part whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getbuffer())


def is_whole_part(part: Path) -> bool:
    """False for a part that is missing, or damaged, which is printed."""
    try:
        return part.is_file() and bool(read_npz(part, PART))
    except InputError as error:
        print(f"made again: {error}", flush=True)
        return False


# Samples ----------------------------------------------------------------------------------------------------------


def samples_record(provenance: Mapping) -> dict:
    """The record of samples: their provenance, but for the decoder's precision, which is known once it was tried."""
    rest = {name: value for name, value in provenance.items() if name != "decoder"}
    return {"stage": "generate", "libraries": provenance.get("versions")} | rest


def read_samples_record(path: Path) -> dict:
    """The `samples_record` of a whole file; {} for another or a damaged one."""
    try:
        with parsing(path, "samples"), zipfile.ZipFile(path) as archive, np.load(path) as file:
            provenance = None if archive.testzip() else provenance_of(file, path)
    except InputError:
        return {}
    return samples_record(provenance) if provenance else {}


def images_of(parts: Iterable[Path]) -> Iterator[np.ndarray]:
    for path in parts:
        yield read_npz(path, "images")["arr_0"]


def merge_samples(parts: list[Path], path: Path, provenance: dict) -> int:
    """Write one .npz of all parts in their order, with one of them in memory.

    Return how many images fp16 could not decode, which ``provenance`` notes.
    """
    labels, again = [], 0
    for part in parts:
        with parsing(part, PART), np.load(part) as file:
            labels.append(file["arr_1"])
            again += int(file["again"])
    if again:
        provenance["decoder"] += f", {again} images fp32"
    arrays = {"arr_1": np.concatenate(labels), "provenance": np.array(json.dumps(provenance))}
    images = images_of(parts)
    first = next(images)
    with writing(path), zipfile.ZipFile(path, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            shape = (len(arrays["arr_1"]), *first.shape[1:])
            npy.write_array_header_1_0(entry, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for each in itertools.chain([first], images):
                entry.write(each.tobytes())
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as entry:
                npy.write_array(entry, array)
    return again


def write_pngs(parts: Iterable[Path], folder: Path, provenance: dict, overwrite: bool) -> None:
    """All images of ``parts`` as PNG files."""
    content = samples_record(provenance) | {"provenance": provenance}
    with product(folder, content, overwrite, "--png-dir") as place:
        for number, image in enumerate(itertools.chain.from_iterable(images_of(parts)) if place else ()):
            picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
            (place.new / f"{number:06d}.png").write_bytes(png_bytes(picture))
