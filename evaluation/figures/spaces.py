"""All rows in all spaces: a reference and its stored statistics, the held-out images, and the means over the spaces."""

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from evaluation.figures.row import Embedded, Reference, around, embed, row_of
from evaluation.figures.tables import HELD_OUT, rewarded_by
from evaluation.samples.files import LEAST_IMAGES, provenance_of, read_images, read_reference
from train_cc.draws import rng_of
from train_cc.io.errors import InputError
from train_cc.models.features import SPATIAL, FeatureSpace, load_space
from train_cc.rewards.statistics import check_statistics, read_space
from train_cc.run.devices import device

HALVES = "halves"
SPLIT = 24  # first key of the draws
MOST_COMMON = 0.01  # of the held-out images may be in the reference too: data sets hold a few twice
FD_AND_SW = ("FDr", "SWr")
OF_INCEPTION = 2048  # its features' width
NO_IMAGES = (
    "the reference holds mu and sigma without images: FID and IS; recall, precision, density, coverage, KID, SW and "
    "the ratios to held-out images need the reference's images"
)


def read_real(reference: Path, held_out: str | None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """The reference and the held-out images: of a file, or by `HALVES` of the reference. Raises `InputError`."""
    content = read_reference(reference)
    if held_out is None:
        return content, None
    if held_out == HALVES:
        return halves(content, reference)
    path = Path(held_out)
    others = read_images(path, "held-out")
    if others["arr_0"].shape[1:] != content["arr_0"].shape[1:]:
        shapes = f"{others['arr_0'].shape[1:]}, the reference {content['arr_0'].shape[1:]}"
        raise InputError(f"--held-out {path} holds images {shapes}")
    digests = {digest(image) for image in content["arr_0"]}
    common = sum(digest(image) in digests for image in others["arr_0"])
    if common > MOST_COMMON * len(others["arr_0"]):
        raise InputError(
            f"{common} of the {len(others['arr_0'])} images of --held-out {path} are in the reference {reference}: "
            f"they are not held out. Give other real images, or --held-out {HALVES}, which splits the reference"
        )
    return content, others


def digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()


def halves(content: dict[str, np.ndarray], path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Two disjoint random halves of the images and labels, always the same; all else in the file is in the first."""
    half = len(content["arr_0"]) // 2
    if half < LEAST_IMAGES:
        raise InputError(f"{path} holds {len(content['arr_0'])} images; two halves need {2 * LEAST_IMAGES} or more")
    order = torch.randperm(len(content["arr_0"]), generator=rng_of(SPLIT, len(content["arr_0"]))).numpy()
    images = {name: content[name] for name in ("arr_0", "arr_1") if name in content}
    parts = [{name: value[rows] for name, value in images.items()} for rows in (order[:half], order[half : 2 * half])]
    return content | parts[0], parts[1]


def load_spaces(settings: argparse.Namespace, shape: tuple[int, ...] | None) -> list[FeatureSpace]:
    """``shape``: (H, W, C) of the images; None: not known, and no space of pixels then.

    Raises `InputError`, also for one space under two names.
    """
    files = (settings.dinov2_backbone, settings.inception_weights)
    spaces = [load_space(name, device(), *files, image_shape=shape) for name in settings.space]
    names: dict[str, str] = {}
    for space in spaces:
        identity = json.dumps([space.sha256, space.preprocessing])
        if names.setdefault(identity, space.name) != space.name:
            raise InputError(f"--space {names[identity]} and {space.name} are one space: its figures would count twice")
    return spaces


def stored_by_space(content: Mapping[str, np.ndarray], path: Path, spaces: list[FeatureSpace]) -> dict[str, tuple]:
    """mu and sigma that a reference stores, under the name of their one space; {} if it stores none.

    A file of evaluation.statistics names its space. ADM's does not: 2 048 wide, they are Inception's and nobody else's.
    Its mu_s and sigma_s are those of sFID. Raises `InputError` if no space fits or several do, and if one of ``spaces``
    has neither statistics nor images.
    """
    if not content.keys() & {"mu", "sigma"}:
        return {}
    if not {"mu", "sigma"} <= content.keys():
        raise InputError(f"{path} stores {'mu' if 'mu' in content else 'sigma'} only; both are expected, or none")
    mu, sigma = check_statistics(content["mu"], content["sigma"], str(path))
    size, inception = len(mu), [space for space in spaces if space.name == "inception"]
    if "space" in content:
        recorded = read_space(content["space"], path)
        keys = ("sha256", "preprocessing")
        fitting = [space for space in spaces if all(space.describe()[key] == recorded.get(key) for key in keys)]
        if not fitting:
            raise InputError(
                f"{path} stores statistics of {recorded.get('name')}, by both hashes none of the spaces here"
            )
    elif size == OF_INCEPTION and not inception:
        raise InputError(f"{path} stores mu {mu.shape} of Inception's features: ask for that space, too")
    else:
        fitting = inception or spaces
    fitting = [space for space in fitting if space.size == size]
    if not fitting:
        sizes = ", ".join(f"{space.name} has {space.size}" for space in spaces)
        raise InputError(f"{path} stores mu {mu.shape}, but {sizes} features")
    if len(fitting) > 1:
        names = " and ".join(space.name for space in fitting)
        raise InputError(f"{path} stores mu {mu.shape}, which can be of {names}: ask for one of them")
    stored = {fitting[0].name: (mu, sigma)}
    if "mu_s" in content and "sigma_s" in content and any(space.name == SPATIAL for space in spaces):
        stored[SPATIAL] = check_statistics(content["mu_s"], content["sigma_s"], str(path))
    without = [space.name for space in spaces if space.name not in stored]
    if "arr_0" not in content and without:
        raise InputError(
            f"{path} holds mu and sigma of {' and '.join(stored)} without images, and {', '.join(without)} needs "
            "images: leave that space out, or give a reference with images"
        )
    return stored


def judge(
    settings: argparse.Namespace, samples: dict[str, Path], space: FeatureSpace, real: tuple, stored: dict, size: int
) -> dict:
    """All rows in one space, as they are written.

    ``real``: of `read_real`; ``stored``: of `stored_by_space`; ``size``: of the sets.
    """
    (real_images, held_out), halved = real, settings.held_out == HALVES

    def embedded(content: Mapping[str, np.ndarray], path: Path, what: str) -> Embedded:
        return embed(content, path, space, settings.batch_size, what)

    images = embedded(real_images, settings.reference, "reference") if "arr_0" in real_images else None
    reference = Reference(images, stored.get(space.name))
    if space.name in stored and "space" not in real_images:
        reference.source += f"; the file names no network: by their size, {space.size}, a guess, of {space.name}"
    rows, ceiling = {}, None
    if held_out is not None:
        others = embedded(held_out, settings.reference if halved else Path(settings.held_out), "held-out")
        ceiling = row_of(others, reference, size, ceiling=True)
    if settings.adm:
        reference.whole = torch.cat([reference.features, others.features]) if halved else reference.features
    for name, path in samples.items():
        content = read_images(path)
        generated, provenance = embedded(content, path, "generated"), provenance_of(content, path)
        del content  # at full size 10 GB
        row = row_of(generated, reference, size, settings.bootstrap, ceiling and ceiling["distances"])
        rows[name] = row | {"generation": provenance}
    if ceiling is not None:
        compared = ceiling["images"] == len(generated.features)  # else its FID and IS do not compare
        figures = {name: value for name, value in ceiling["figures"].items() if compared or name not in ("FID", "IS")}
        rows[HELD_OUT] = ceiling | {"figures": figures | dict.fromkeys(FD_AND_SW, 1.0), "generation": None}
    source = {"features": space.name, "features_sha256": space.sha256, "fid_reference": reference.source}
    return source | ({"missing": NO_IMAGES} if images is None else {}) | {"rows": rows}


def over_spaces(judged: list[dict]) -> dict[str, dict]:
    """The rows' FDr and SWr, each the mean over the spaces, with intervals if there are draws.

    A row's "rewarded_in" names the spaces among them that rewarded it.
    """
    means: dict[str, dict] = {}
    for name, first in judged[0]["rows"].items():
        rows = [each["rows"][name] for each in judged]
        figures = {key: float(np.mean([row["figures"][key] for row in rows])) for key in FD_AND_SW}
        means[name] = {"figures": figures, "images": first["images"]}
        if rewarded := [
            each["features"] for each in judged if rewarded_by(first["generation"], each["features_sha256"])
        ]:
            means[name]["rewarded_in"] = rewarded
        if "draws" in first:
            draws = {key: np.mean([row["draws"][key] for row in rows], axis=0).tolist() for key in FD_AND_SW}
            means[name]["intervals"] = {key: around(figures[key], draws[key]) for key in FD_AND_SW}
    return means


def judge_all(settings: argparse.Namespace, samples: dict[str, Path], shape: tuple[int, ...]) -> tuple:
    """Return all rows of each space, their means over the spaces ({} without held-out images), and the sets' size.

    ``samples``: name -> file; ``shape``: (N, H, W, C) of one.
    """
    spaces = load_spaces(settings, shape[1:])
    real = read_real(settings.reference, settings.held_out)
    stored = stored_by_space(real[0], settings.reference, spaces)
    size = min([shape[0], *(len(each["arr_0"]) for each in real if each and "arr_0" in each)])
    judged = [judge(settings, samples, space, real, stored, size) for space in spaces]
    return judged, over_spaces(judged) if settings.held_out is not None else {}, size


def check_inputs(settings: argparse.Namespace, shape: tuple[int, ...] | None) -> None:
    """`--check`: all but the features of all images. ``shape``: (N, H, W, C) of the reference, if it has images."""
    spaces = load_spaces(settings, shape and shape[1:])
    content, _ = read_real(settings.reference, settings.held_out)
    stored_by_space(content, settings.reference, spaces)
    for space in spaces if shape else ():
        space.of(content["arr_0"][:LEAST_IMAGES], LEAST_IMAGES)
    names = ", ".join(space.name for space in spaces)
    what = f"{shape[0]} images, {names}" if shape else f"{names}; {NO_IMAGES}"
    print(f"{settings.reference} can be evaluated against: {what}")
