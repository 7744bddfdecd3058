"""Images of samples and references, an .npz or a folder, and their provenance: checked where they are read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from train_cc.io.errors import InputError
from train_cc.io.products import record_of
from train_cc.io.read import (
    MAX_LABEL,
    images_shape,
    npz_headers,
    parsing,
    read_npz,
    require_plain,
    require_scale,
    sha256,
)

if TYPE_CHECKING:
    import numpy as np

IMAGE_FILES = "an .npz with arr_0 uint8 (N, H, W, C), C of 1 or 3, or a folder of images"
REFERENCE = f"{IMAGE_FILES}, or an .npz of mu and sigma"
LEAST_IMAGES = 4  # precision and recall need three neighbours


def image_shape(path: Path, what: str = "generated") -> tuple[int, ...]:
    """(N, H, W, C) of an .npz or a folder of images, without reading them all. Raises `InputError`."""
    headers: Mapping[str, tuple] = {}
    expected = REFERENCE if what == "reference" else IMAGE_FILES
    if path.is_dir():
        from train_cc.images import open_folder  # torch takes seconds: an .npz does without

        images = open_folder(path)
        shape = (len(images), *images.shape[1:], images.shape[0])
    else:
        headers = npz_headers(path, expected)
        shape = images_shape(headers, path, expected)
    if not all(0 < n < 2**31 for n in shape[1:]):
        raise InputError(f"{path} has images {shape}; {expected} is expected")
    if shape[0] < LEAST_IMAGES:
        raise InputError(f"{LEAST_IMAGES} {what} images or more are needed, {path} holds {shape[0]}")
    labels, dtype = headers.get("arr_1", (shape[:1], None))
    if labels != shape[:1] or (dtype is not None and dtype.kind not in "iu"):
        raise InputError(f"{path} has {shape[0]} images and labels {dtype} {labels}; a whole number each is expected")
    return shape


def reference_shape(path: Path) -> tuple[int, ...] | None:
    """`image_shape`; None for a file of mu and sigma without images."""
    names = npz_headers(path, REFERENCE).keys() if path.is_file() else set()
    return None if names & {"mu", "sigma"} and "arr_0" not in names else image_shape(path, "reference")


def read_reference(path: Path) -> dict[str, "np.ndarray"]:
    """`read_images`; mu and sigma of a file without images. Raises `InputError`."""
    return read_npz(path, REFERENCE) if reference_shape(path) is None else read_images(path, "reference")


def content_sha256(path: Path) -> str:
    """The hash of a file, or of a folder's files with their names, also those of class folders."""
    if not path.is_dir():
        return sha256(path)
    files = sorted(each for each in path.rglob("*") if each.is_file())
    names = "".join(f"{each.relative_to(path)} {sha256(each)}\n" for each in files)
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def read_folder(folder: Path) -> dict[str, "np.ndarray"]:
    """An image folder as an .npz would have it; ``classes``: the class folders. Raises `InputError`."""
    import numpy as np

    from train_cc.images import batches_of, choose_workers, open_folder

    images = open_folder(folder)
    batches = [range(first, min(first + 250, len(images))) for first in range(0, len(images), 250)]
    read = batches_of(images, batches, choose_workers(1) if len(batches) > 1 else 0)
    content = {"arr_0": np.concatenate([batch.permute(0, 2, 3, 1).numpy() for batch in read])}
    if images.labels is not None:
        content["arr_1"] = images.labels.numpy()
    if "classes" in images.source:
        content["classes"] = np.array(images.source["classes"])
    if provenance := record_of(folder).get("provenance"):  # of evaluation.generate --png-dir
        content["provenance"] = np.array(json.dumps(provenance))
    return content


def read_images(path: Path, what: str = "generated") -> dict[str, "np.ndarray"]:
    """``arr_0`` uint8 (N, H, W, C) and whatever is beside it. Raises `InputError`."""
    image_shape(path, what)
    content = read_folder(path) if path.is_dir() else read_npz(path, IMAGE_FILES)
    require_scale(content["arr_0"], path)
    labels = content.get("arr_1")
    if labels is not None and not (labels.min() >= 0 and labels.max() <= MAX_LABEL):
        raise InputError(f"{path} has labels from {labels.min()} to {labels.max()}; 0 to {MAX_LABEL} are expected")
    return content


def provenance_of(content: Mapping[str, "np.ndarray"], path: Path) -> dict | None:
    """The record of the command that made the samples; None in files of others. Raises `InputError` if damaged."""
    if "provenance" not in content:
        return None
    with parsing(path, "a provenance that is a JSON object"):
        provenance = {**json.loads(str(content["provenance"]))}
    require_plain(provenance, path)
    return provenance
