"""The files of this room: images as .npz, figures as JSON, pictures. Checked here, where they come in."""

import hashlib
import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from train_cc.io.errors import InputError
from train_cc.io.figures import columns_of, markdown_table
from train_cc.io.products import record_of, write_atomically
from train_cc.io.read import npz_headers, parsing, read_json, read_npz, require_plain, sha256

HEADLINE = 50_000  # images of a figure that needs no suffix
OF_SETS = ("Recall", "Precision", "Density", "Coverage", "SW")  # their count is that of a set, not of all samples
OF_NO_COUNT = ("accuracy", "KID", "FDr", "SWr")
HELD_OUT = "held-out real"  # the name of the ceiling's row
MAX_LABEL = 99_999  # a label beyond is no label
IMAGES = "an .npz with arr_0 uint8 (N, H, W, C), C of 1 or 3, or a folder of images"
REFERENCE = f"{IMAGES}, or an .npz of mu and sigma"
LEAST_IMAGES = 4  # precision and recall need three neighbours


# Images -----------------------------------------------------------------------------------------------------------


def image_shape(path: Path, what: str = "generated") -> tuple[int, ...]:
    """(N, H, W, C) of an .npz or a folder of images, without reading them all. Raises `InputError`."""
    headers = {} if path.is_dir() else npz_headers(path, IMAGES)
    shape = folder_shape(path) if path.is_dir() else array_shape(headers, path, IMAGES)
    if not all(0 < n < 2**31 for n in shape[1:]):
        raise InputError(f"{path} has images {shape}; {IMAGES} is expected")
    if shape[0] < LEAST_IMAGES:
        raise InputError(f"{LEAST_IMAGES} {what} images or more are needed, {path} holds {shape[0]}")
    labels = headers.get("arr_1")
    if labels is not None:
        if labels[0] != shape[:1]:
            raise InputError(f"{path} has {shape[0]} images and labels of shape {labels[0]}")
        if labels[1].kind not in "iu":
            raise InputError(f"{path} has labels of type {labels[1]}; whole numbers are expected")
    return shape


def array_shape(headers: Mapping[str, tuple], path: Path, expected: str) -> tuple[int, ...]:
    """(N, H, W, C) of arr_0; ``headers``: name -> shape and dtype of each array. Raises `InputError`."""
    if "arr_0" not in headers:
        names = f" but {', '.join(headers)[:200]}" if headers else ""
        raise InputError(f"{path} has no arr_0{names}; {expected} is expected")
    shape, dtype = headers["arr_0"]
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
        hint = ""
        if dtype.kind == "f":
            hint = "; of values x in [0, 1] these are (255 * x).round().astype(numpy.uint8)"
        elif len(shape) == 4 and shape[1] in (1, 3):
            hint = "; of (N, C, H, W) these are arr_0.transpose(0, 2, 3, 1)"
        raise InputError(f"{path} has arr_0 {dtype} {shape}; {expected} is expected{hint}")
    return shape


def require_range(images: np.ndarray, path: Path) -> None:
    """Not all values are 0 or 1, as of images in [0, 1] that were cast without a scale. Raises `InputError`."""
    if images.max() <= 1:
        raise InputError(f"{path} holds no value above 1; images in [0, 255] are expected, not in [0, 1]")


def reference_shape(path: Path) -> tuple[int, ...] | None:
    """`image_shape`; None for a file of mu and sigma without images."""
    if path.is_dir():
        return image_shape(path, "reference")
    headers = npz_headers(path, REFERENCE)
    if headers.keys() & {"mu", "sigma"} and "arr_0" not in headers:
        return None
    array_shape(headers, path, REFERENCE)
    return image_shape(path, "reference")


def read_reference(path: Path) -> dict[str, np.ndarray]:
    """`read_images`; mu and sigma of a file without images. Raises `InputError`."""
    return read_npz(path, REFERENCE) if reference_shape(path) is None else read_images(path, "reference")


def folder_shape(folder: Path) -> tuple[int, ...]:
    from evaluation.images import open_samples  # torch takes seconds to import: an .npz does without

    images = open_samples(folder)
    channels, height, width = images.shape
    return len(images), height, width, channels


def content_sha256(path: Path) -> str:
    """The hash of a file, or of a folder's files with their names, also those of class folders."""
    if not path.is_dir():
        return sha256(path)
    files = sorted(each for each in path.rglob("*") if each.is_file())
    names = "".join(f"{each.relative_to(path)} {sha256(each)}\n" for each in files)
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """An image folder as an .npz would have it; ``classes``: the class folders. Raises `InputError`."""
    from evaluation.images import batches_of, choose_workers, open_samples

    images = open_samples(folder)
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


def read_images(path: Path, what: str = "generated") -> dict[str, np.ndarray]:
    """``arr_0`` uint8 (N, H, W, C) and whatever is beside it. Raises `InputError`."""
    image_shape(path, what)
    content = read_folder(path) if path.is_dir() else read_npz(path, IMAGES)
    require_range(content["arr_0"], path)
    labels = content.get("arr_1")
    if labels is not None and not (labels.min() >= 0 and labels.max() <= MAX_LABEL):
        raise InputError(f"{path} has labels from {labels.min()} to {labels.max()}; 0 to {MAX_LABEL} are expected")
    return content


def provenance_of(content: Mapping[str, np.ndarray], path: Path) -> dict | None:
    """What evaluation.generate wrote of itself; None in files of others. Raises `InputError` where it is damaged."""
    if "provenance" not in content:
        return None
    told = content["provenance"]
    if told.shape != () or told.dtype.kind != "U":
        raise InputError(f"{path}: its provenance is {told.dtype} {told.shape}; JSON text is expected")
    with parsing(path, "a provenance that is JSON text"):
        found = json.loads(str(told))
    if not isinstance(found, dict):
        raise InputError(f"{path}: its provenance is a {type(found).__name__}; a JSON object is expected")
    require_plain(found, path)
    return found


# Figures ----------------------------------------------------------------------------------------------------------


def write_figures(path: Path, rows: dict[str, dict], **more: object) -> None:
    """JSON of ``rows`` and what else belongs to them; `train_cc.io.figures.read_figures` reads it."""
    content = {"rows": rows} | more
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=2, default=str, allow_nan=False) + "\n")


def apart(paths: Iterable[tuple[str, Path | None]]) -> None:
    """No two outputs are one file. Raises `InputError`."""
    seen: dict[str, str] = {}
    for flag, path in paths:
        if path is not None and seen.setdefault(real := os.path.realpath(path), flag) != flag:
            raise InputError(f"{seen[real]} and {flag} are both {path}; choose two")


def count_suffix(count: int) -> str:
    """ "" for a headline count, else "-5k" and the like."""
    return "" if count >= HEADLINE else f"-{count / 1000:g}k"


def heads_of(columns: Iterable[str], count: int, size: int | None = None) -> list[str]:
    """How the metrics' columns are headed. ``size``: of the sets; None: ``count``."""
    counts = {name: size or count for name in OF_SETS}
    return [name + ("" if name in OF_NO_COUNT else count_suffix(counts.get(name, count))) for name in columns]


def named_space(features: str) -> str:
    """A feature space as people call it: a classifier's folder by its last name, and the architecture in it."""
    kind, _, folder = features.partition(":")
    config = Path(folder) / "config.json"
    if kind != "classifier" or not config.is_file():
        return features
    return f"{Path(folder).name} ({read_json(config, 'a classifier').get('architecture')})"


def shown(metric: str, value: float) -> str:
    """KID and SW are of any size: three digits of them count."""
    if metric in ("KID", "SW"):
        return f"{value:.3g}"
    return f"{value:.{2 if metric in ('FID', 'IS', 'FDr', 'SWr') else 3}f}"


def cell_of(row: dict, metric: str) -> str:
    if metric not in row["figures"]:
        return "-"
    cell = shown(metric, row["figures"][metric])
    if metric in row.get("standard_errors", {}):
        cell += f" +- {row['standard_errors'][metric]:.1g}"
    elif metric in row.get("intervals", {}):
        cell += " ({} to {})".format(*(shown(metric, end) for end in row["intervals"][metric]))
    return cell


def table(rows: dict[str, dict], count: int, size: int | None = None) -> str:
    """A Markdown table, a line a row; ``rows``: name -> {"figures", "intervals", "standard_errors"}."""
    columns = columns_of(rows.values())
    lines = [[name, *(cell_of(row, each) for each in columns)] for name, row in rows.items()]
    return markdown_table(["", *heads_of(columns, count, size)], lines)


def rewarded_by(made_by: dict | None, features_sha256: str) -> bool:
    """Whether the network of hash ``features_sha256`` rewarded the generator of the samples with that provenance."""
    rewards = (made_by or {}).get("rewards_sha256")
    return isinstance(rewards, list) and features_sha256 in rewards


def rewarded_here(made_by: Iterable[tuple[str, dict | None]], features_sha256: str) -> list[str]:
    """A line that names the rows, of (name, provenance), that the space of that hash rewarded; none where it did not.

    A reward moves its own space first: figures there say little.
    """
    names = dict.fromkeys(name for name, each in made_by if rewarded_by(each, features_sha256))
    return [f"This space rewarded {', '.join(names)}: judge it in a space that no reward used."] if names else []


def rewarded_within(rows: dict[str, dict]) -> list[str]:
    """A line a row of means over spaces, where spaces are among them that rewarded it."""
    return [
        f"Spaces that rewarded it are in the mean of {name}: {', '.join(row['rewarded_in'])}."
        for name, row in rows.items()
        if row.get("rewarded_in")
    ]


def over_seeds(rows: dict[str, dict]) -> dict[str, list[dict]]:
    """Rows named "NAME, seed N", together by NAME, in their order. Raises `InputError` for another name."""
    found: dict[str, list[dict]] = {}
    for name, row in rows.items():
        match = re.fullmatch(rf"(.*), seed \d+|({HELD_OUT})", name)
        if match is None:
            raise InputError(f"--over-seeds: the row is named {name!r}; 'NAME, seed N' is expected")
        found.setdefault(match[1] or match[2], []).append(row)
    return found


def table_over_seeds(rows: dict[str, dict], count: int, size: int | None = None) -> str:
    """A Markdown table of means over seeds, each with the standard deviation of one seed."""
    columns, lines = columns_of(rows.values()), []
    for name, group in over_seeds(rows).items():
        cells = [name, len(group)]
        for column in columns:
            values = [row["figures"][column] for row in group if column in row["figures"]]
            spread = f" +- {shown(column, statistics.stdev(values))}" if len(values) > 1 else ""
            cells.append(f"{shown(column, statistics.mean(values))}{spread}" if values else "-")
        lines.append(cells)
    return markdown_table(["", "seeds", *heads_of(columns, count, size)], lines)


def suffered(rows: dict[str, dict], together: bool = False, number: int = 3) -> list[str]:
    """A line a row: the classes whose recall fell most against the first row; without recall, their accuracy.

    ``together``: rows that differ by their seed are one, by the mean.
    """
    groups = over_seeds(rows) if together else {name: [row] for name, row in rows.items()}
    groups = {name: group for name, group in groups.items() if name != HELD_OUT}
    (first, base), *others = groups.items()
    which = next((each for each in ("recall", "accuracy") if base[0].get("classes", {}).get(each)), None)
    before = {} if which is None else by_class(base, which)
    lines = []
    for name, group in others if before else ():
        if not (after := by_class(group, which)):
            continue  # samples without labels
        change = sorted((after[k] - before[k], k) for k in before.keys() & after.keys())
        worst = ", ".join(f"{k} ({before[k]:.2f} to {before[k] + d:.2f})" for d, k in change[:number] if d < 0)
        lines.append(f"{name}: {which} against {first} fell most in class {worst}" if worst else f"{name}: in none")
    return lines


def by_class(group: list[dict], which: str) -> dict[int, float]:
    """Class -> the mean over the rows of one name; {} where a row has none."""
    lists = [row.get("classes", {}).get(which) for row in group]
    if not all(lists):
        return {}
    return {k: statistics.mean(v) for k, v in enumerate(zip(*lists, strict=False)) if None not in v}
