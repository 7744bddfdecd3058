"""The real images that are held out, for the ceiling row: another file, or one half of the reference."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evaluation.files import LEAST_IMAGES, read_images, read_reference
from train_cc.draws import rng_of
from train_cc.io.errors import InputError

HALVES = "halves"
SPLIT = 24  # first key of the draws
MOST_COMMON = 0.01  # of the held-out images may be in the reference too: data sets hold a few twice


@dataclass(frozen=True)
class Held:
    """What is measured against, what is held out (None: nothing), and the file that it comes from."""

    reference: dict[str, np.ndarray]
    out: dict[str, np.ndarray] | None
    path: Path | None


def hold_out(reference: Path, held_out: str | None) -> Held:
    """``held_out``: a file, or `HALVES`: the reference is split at random, once and for all. Raises `InputError`."""
    content = read_reference(reference)
    if held_out is None:
        return Held(content, None, None)
    if held_out == HALVES:
        return Held(*halves(content, reference), reference)
    path = Path(held_out)
    out = read_images(path, "held-out")
    if out["arr_0"].shape[1:] != content["arr_0"].shape[1:]:
        told = f"{out['arr_0'].shape[1:]}, the reference {content['arr_0'].shape[1:]}"
        raise InputError(f"--held-out {path} holds images {told}")
    known = {digest(image) for image in content["arr_0"]}
    common = sum(digest(image) in known for image in out["arr_0"])
    if common > MOST_COMMON * len(out["arr_0"]):
        raise InputError(
            f"{common} of the {len(out['arr_0'])} images of --held-out {path} are in the reference {reference}: "
            f"they are not held out. Give other real images, or --held-out {HALVES}, which splits the reference"
        )
    return Held(content, out, path)


def digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()


def halves(content: dict[str, np.ndarray], path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Two disjoint random halves of the images and their labels; whatever else the file stores stays with the first."""
    count = len(content["arr_0"])
    if count < 2 * LEAST_IMAGES:
        raise InputError(f"{path} holds {count} images; two halves need {2 * LEAST_IMAGES} or more")
    order = torch.randperm(count, generator=rng_of(SPLIT, count)).numpy()
    images = {name: content[name] for name in ("arr_0", "arr_1") if name in content}
    first, second = (
        {name: value[rows] for name, value in images.items()}
        for rows in (order[: count // 2], order[count // 2 : 2 * (count // 2)])
    )
    return content | first, second
