"""Samples and statistics in the making: parts that the next start uses, and at the end one .npz, or PNG files."""

import contextlib
import itertools
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from accelerate import PartialState
from numpy.lib import format as npy
from PIL import Image

from evaluation.samples.files import provenance_of
from train_cc.io.errors import InputError
from train_cc.io.products import Place, check_product, flush, place_of, product, writing
from train_cc.io.read import npz_headers, parsing, printable, read_npz
from train_cc.run.pictures import png_bytes


@contextlib.contextmanager
def in_parts(
    target: Path, content: Mapping, overwrite: bool, read: Callable[[Path], Mapping], processes: PartialState
) -> Iterator[Place | None]:
    """`product` for all processes, which share its storage: the main process writes ``place.new``.

    None: ``target`` is there already.
    """
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
    temporary = path.with_name(path.name + ".tmp")
    with writing(path), temporary.open("wb") as file:
        np.savez(file, **arrays)
    flush(temporary)
    os.replace(temporary, path)


# Samples ----------------------------------------------------------------------------------------------------------


def samples_record(provenance: Mapping) -> dict:
    """The record of samples: their provenance, but for the decoder's precision, which is known once it was tried."""
    rest = {name: value for name, value in provenance.items() if name != "decoder"}
    return {"stage": "generate", "libraries": provenance.get("versions")} | rest


def read_samples_record(path: Path, whole: bool = True) -> dict:
    """The `samples_record` of a file; {} for another or a damaged one. ``whole``: all of it is checked."""
    try:
        npz_headers(path, "samples")
        with parsing(path, "samples"), zipfile.ZipFile(path) as archive, np.load(path) as file:
            damaged = whole and archive.testzip() is not None
            provenance = None if damaged else provenance_of(file, path)
    except InputError:
        return {}
    return samples_record(provenance) if provenance else {}


def check_settings(output: Path, content: Mapping) -> None:
    """Raises `InputError` with the settings, files and versions in which the samples of ``output`` differ, if any."""
    made, changed = read_samples_record(output, whole=False) if output.is_file() else {}, []
    for part in ("arguments", "libraries"):
        old, new = made.get(part), content[part]
        old = old if isinstance(old, dict) else {}
        changed += [f"{k} {old.get(k)}, now {new.get(k)}" for k in sorted(old | new) if old.get(k) != new.get(k)]
    changed += [f"another {name}" for name in ("generator_sha256", "vae_sha256") if made.get(name) != content[name]]
    if made and changed:
        words = printable("; ".join(changed[:8]))
        raise InputError(f"{output} exists, made otherwise ({words}); give another --output, or --overwrite")


def read_part(path: Path, labels: np.ndarray, image_shape: tuple[int, ...], provenance: dict) -> np.ndarray | None:
    """The images of a part (n, H, W, C) if it is whole and of these labels, else None: it is made again."""
    if not path.is_file():
        return None
    try:
        content = read_npz(path, "a part of samples")
        same = provenance_of(content, path) == provenance and np.array_equal(content.get("arr_1"), labels)
    except InputError as error:
        print(f"made again: {error}", flush=True)
        return None
    images = content.get("arr_0")
    fits = images is not None and images.dtype == np.uint8 and images.shape == (len(labels), *image_shape)
    return images if same and fits else None


def write_npz(path: Path, images: Iterable[np.ndarray], **arrays: np.ndarray) -> None:
    """An .npz of ``arrays`` and of as many ``images`` (n, H, W, C) as labels ``arr_1``, a part in memory at a time."""
    parts = iter(images)
    first = next(parts)
    with writing(path), zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            shape = (len(arrays["arr_1"]), *first.shape[1:])
            npy.write_array_header_1_0(entry, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for part in itertools.chain([first], parts):
                entry.write(np.ascontiguousarray(part).tobytes())
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as entry:
                npy.write_array(entry, array)


def images_of(parts: Iterable[Path]) -> Iterator[np.ndarray]:
    for path in parts:
        yield read_npz(path, "images")["arr_0"]


def merge_samples(parts: list[Path], path: Path, provenance: dict) -> int:
    """Write one .npz of all parts in their order. Return how many images fp16 could not decode, which is noted."""
    labels, again = [], 0
    for part in parts:
        with parsing(part, "a part of samples"), np.load(part) as file:
            labels.append(file["arr_1"])
            again += int(file["again"])
    if again:
        provenance["decoder"] += f", {again} images fp32"
    text = np.array(json.dumps(provenance))
    write_npz(path, images_of(parts), arr_1=np.concatenate(labels), provenance=text)
    return again


def write_pngs(parts: Iterable[Path], folder: Path, provenance: dict, overwrite: bool) -> None:
    """All images of ``parts`` as PNG files."""
    content = samples_record(provenance) | {"provenance": provenance}
    with product(folder, content, overwrite, "--png-dir") as place:
        for number, image in enumerate(itertools.chain.from_iterable(images_of(parts)) if place else ()):
            picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
            (place.new / f"{number:06d}.png").write_bytes(png_bytes(picture))
