"""All rows in all spaces: which statistics a reference stores, what is held out, and the means over the spaces."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from evaluation.figures import Embedded, Reference, around, embed, row_of
from evaluation.files import (
    HELD_OUT,
    LEAST_IMAGES,
    image_shape,
    provenance_of,
    read_images,
    read_reference,
    rewarded_by,
)
from evaluation.split import HALVES, Held
from train_cc.io.errors import InputError
from train_cc.models.features import SPATIAL, FeatureSpace, load_space
from train_cc.rewards.statistics import check_statistics, read_space

FD_AND_SW = ("FDr", "SWr")
OF_INCEPTION = 2048  # its features' width
NO_IMAGES = (
    "the reference holds mu and sigma without images: FID and IS; recall, precision, density, coverage, KID, SW and "
    "the ratios to held-out images need the reference's images"
)


def load_spaces(args: argparse.Namespace, shape: tuple[int, int, int] | None, device: str) -> list[FeatureSpace]:
    """``shape``: (H, W, C) of the images; None: not known, and no space of pixels then.

    Raises `InputError`, also for one space under two names.
    """
    spaces = [
        load_space(text, device, args.dinov2_backbone, args.inception_weights, image_shape=shape) for text in args.space
    ]
    seen: dict[str, str] = {}
    for space in spaces:
        identity = json.dumps([space.sha256, space.preprocessing])
        if seen.setdefault(identity, space.name) != space.name:
            raise InputError(f"--space {seen[identity]} and {space.name} are one space: its figures would count twice")
    return spaces


def stored_statistics(content: Mapping[str, np.ndarray], path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """mu and sigma that a reference stores, checked; None where it stores none. Raises `InputError`."""
    if "mu" not in content and "sigma" not in content:
        return None
    if "mu" not in content or "sigma" not in content:
        raise InputError(f"{path} stores {'mu' if 'mu' in content else 'sigma'} alone; both are expected, or none")
    return check_statistics(content["mu"], content["sigma"], str(path))


def stored_by_space(content: Mapping[str, np.ndarray], path: Path, spaces: list[FeatureSpace]) -> dict[str, tuple]:
    """The stored statistics under the name of the one space that they are of. Raises `InputError` where it is none.

    A file of evaluation.statistics names its space. ADM's does not: 2 048 wide, they are Inception's and nobody else's.
    Its mu_s and sigma_s are those of sFID.
    """
    stored = stored_statistics(content, path)
    if stored is None:
        return {}
    size, told = len(stored[0]), ", ".join(f"{space.name} has {space.size}" for space in spaces)
    if "space" in content:
        named = read_space(content["space"], path)
        keys = ("sha256", "preprocessing")
        fitting = [space for space in spaces if all(space.describe()[key] == named.get(key) for key in keys)]
        if not fitting:
            raise InputError(f"{path} stores statistics of {named.get('name')}, by both hashes none of the spaces here")
    else:
        fitting = [space for space in spaces if space.name == "inception"]
        if size == OF_INCEPTION and not fitting:
            raise InputError(f"{path} stores mu {stored[0].shape} of Inception's features: ask for that space, too")
        fitting = fitting or spaces
        fitting = [space for space in fitting if space.size == size]
    if not fitting or fitting[0].size != size:
        raise InputError(f"{path} stores mu {stored[0].shape}, but {told} features")
    if len(fitting) > 1:
        names = " and ".join(space.name for space in fitting)
        raise InputError(f"{path} stores mu {stored[0].shape}, which can be of {names}: ask for one of them alone")
    found = {fitting[0].name: stored}
    if "mu_s" in content and "sigma_s" in content and any(space.name == SPATIAL for space in spaces):
        found[SPATIAL] = check_statistics(content["mu_s"], content["sigma_s"], str(path))
    return found


def statistics_for(content: Mapping[str, np.ndarray], path: Path, spaces: list[FeatureSpace]) -> dict[str, tuple]:
    """`stored_by_space`, of every space if there are no images. Raises `InputError`."""
    found = stored_by_space(content, path, spaces)
    without = [space.name for space in spaces if space.name not in found]
    if "arr_0" not in content and without:
        raise InputError(
            f"{path} holds mu and sigma of {' and '.join(found)} without images, and {', '.join(without)} needs "
            "images: leave that space out, or give a reference with images"
        )
    return found


def check_reference(path: Path, spaces: list[FeatureSpace]) -> None:
    """All that is asked of a reference, without the features of all its images. Raises `InputError`."""
    content = read_reference(path)
    statistics_for(content, path, spaces)
    names = ", ".join(space.name for space in spaces)
    if "arr_0" not in content:
        print(f"{path} can be evaluated against: {names}; {NO_IMAGES}")
        return
    for space in spaces:
        space.of(content["arr_0"][:LEAST_IMAGES], LEAST_IMAGES)
    print(f"{path} can be evaluated against: {len(content['arr_0'])} images, {names}")


def judge(args: argparse.Namespace, names: list[str], space: FeatureSpace, held: Held, stored: dict) -> dict:
    """All rows in one space, as they are written. ``stored``: of `stored_by_space`."""
    images = "arr_0" in held.reference
    real = embed(held.reference, args.reference, space, args.batch_size, "reference") if images else None
    reference = Reference(real, stored.get(space.name))
    if space.name in stored and "space" not in held.reference:
        reference.source += f"; the file names no network: by their size, {space.size}, a guess, of {space.name}"
    size, rows, ceiling = set_size(args, held), {}, None
    if held.out is not None:
        embedded = embed(held.out, held.path, space, args.batch_size, "held-out")
        ceiling = row_of(embedded, reference, size, held=True)
    if args.adm:
        halved = args.held_out == HALVES
        reference.whole = torch.cat([reference.features, embedded.features]) if halved else reference.features
    real = ceiling and ceiling["distances"]
    for name, path in zip(names, args.samples, strict=True):
        embedded, provenance = embed_samples(path, space, args.batch_size)
        rows[name] = row_of(embedded, reference, size, args.bootstrap, real) | {"generation": provenance}
    if ceiling is not None:
        rows[HELD_OUT] = row_of_real(ceiling, image_shape(args.samples[0])[0])
    source = {"features": space.name, "features_sha256": space.sha256, "fid_reference": reference.source}
    return source | ({} if images else {"missing": NO_IMAGES}) | {"rows": rows}


def set_size(args: argparse.Namespace, held: Held) -> int:
    """As many images as all have: the samples, the reference, and what is held out."""
    real = [len(each["arr_0"]) for each in (held.reference, held.out) if each and "arr_0" in each]
    return min([image_shape(args.samples[0])[0], *real])


def row_of_real(row: dict, count: int) -> dict:
    """The ceiling: where its images are not as many as the samples, FID and IS are left out, which do not compare."""
    figures = row["figures"] | dict.fromkeys(FD_AND_SW, 1.0)
    if row["images"] != count:
        figures = {name: value for name, value in figures.items() if name not in ("FID", "IS")}
    return row | {"figures": figures, "generation": None}


def embed_samples(path: Path, space: FeatureSpace, batch: int) -> tuple[Embedded, dict | None]:
    """The images are let go before any figure is computed: at full size they are 10 GB."""
    content = read_images(path)
    provenance = provenance_of(content, path)
    return embed(content, path, space, batch, "generated"), provenance


def over_spaces(judged: list[dict]) -> dict[str, dict]:
    """The rows' FDr and SWr, each the mean over the spaces, with intervals where there are draws.

    A row's "rewarded_in" names the spaces among them that rewarded it.
    """
    rows: dict[str, dict] = {}
    for name, first in judged[0]["rows"].items():
        figures = [each["rows"][name]["figures"] for each in judged]
        means = {key: float(np.mean([figure[key] for figure in figures])) for key in FD_AND_SW}
        rows[name] = {"figures": means, "images": first["images"]}
        rewarded = [each["features"] for each in judged if rewarded_by(first["generation"], each["features_sha256"])]
        rows[name] |= {"rewarded_in": rewarded} if rewarded else {}
        if "draws" in first:
            draws = {
                key: np.mean([each["rows"][name]["draws"][key] for each in judged], axis=0).tolist()
                for key in FD_AND_SW
            }
            rows[name]["intervals"] = {key: around(means[key], draws[key]) for key in FD_AND_SW}
    return rows
