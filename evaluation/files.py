"""The files of this room: images as .npz, figures as JSON, pictures. Checked here, where they come in."""

import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from train_cc.io.errors import InputError
from train_cc.io.read import Number, check_numbers, npz_headers, parsing, read_json, read_npz
from train_cc.io.write import mark_of, write_atomically

HEADLINE = 50_000  # images of a figure that needs no suffix
METRICS = ("FID", "Recall", "IS", "Precision", "accuracy")
IMAGES = "an .npz with arr_0 uint8 (N, H, W, C), C of 1 or 3"
FIGURES = "the figures that evaluation.evaluate or evaluation.frontier writes"
LEAST_IMAGES = 4  # precision and recall need three neighbours
A_FIGURE = Number(float, -1e100, 1e100)


def printable(text: str) -> str:
    """``text`` on one line, in what any terminal, page and font can show: a file's name can hold any byte."""
    return "".join(c if c.isprintable() else "?" for c in text)


# Images -----------------------------------------------------------------------------------------------------------


def image_shape(path: Path, what: str = "generated") -> tuple[int, ...]:
    """(N, H, W, C) of an .npz of images, from its headers. Raises `InputError` for anything else."""
    headers = npz_headers(path, IMAGES)
    if "arr_0" not in headers:
        raise InputError(f"{path} has no arr_0; {IMAGES} is expected")
    shape, dtype = headers["arr_0"]
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not all(0 < n < 2**31 for n in shape[1:]):
        raise InputError(f"{path} has arr_0 {dtype} {shape}; {IMAGES} is expected")
    if shape[0] < LEAST_IMAGES:
        raise InputError(f"{LEAST_IMAGES} {what} images or more are needed, {path} holds {shape[0]}")
    labels = headers.get("arr_1")
    if labels is not None and what == "generated":
        if labels[0] != shape[:1]:
            raise InputError(f"{path} has {shape[0]} images and labels of shape {labels[0]}")
        if labels[1].kind not in "iu":
            raise InputError(f"{path} has labels of type {labels[1]}; whole numbers are expected")
    return shape


def read_images(path: Path, what: str = "generated") -> dict[str, np.ndarray]:
    """``arr_0`` uint8 (N, H, W, C) and whatever is beside it. Raises `InputError`."""
    image_shape(path, what)
    return read_npz(path, IMAGES)


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


def require_plain(content: object, path: Path) -> None:
    """``content`` can be written as JSON again: finite numbers, not nested without end. Raises `InputError`."""
    with parsing(path, "JSON of finite numbers, not deeply nested"):
        json.dumps([[[[[[content]]]]]], indent=2, allow_nan=False)


# Figures ----------------------------------------------------------------------------------------------------------


def write_figures(path: Path, rows: dict[str, dict], kind: str = "figures", **more: object) -> None:
    """JSON of ``rows`` and what else belongs to them; `read_figures` reads it."""
    content = {"made_by": mark_of(kind), "rows": rows} | more
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=2, default=str, allow_nan=False) + "\n")


def read_figures(path: Path) -> dict:
    """What `write_figures` wrote; every row has "figures", of numbers. Raises `InputError`."""
    record = read_json(path, FIGURES)
    require_plain(record, path)
    if "rows" not in record:  # a frontier.json once held the rows alone
        record = {"rows": record}
    rows = record["rows"]
    if not isinstance(rows, dict) or not rows:
        raise InputError(f"{path} has no rows; {FIGURES} are expected")
    for name, row in rows.items():
        if not isinstance(row, dict) or not isinstance(row.get("figures"), dict):
            raise InputError(f"{path}: row {name[:80]!r} has no figures; {FIGURES} are expected")
        check_numbers(row["figures"], dict.fromkeys(METRICS, A_FIGURE), f"{path}, row {printable(name)[:80]}")
        check_intervals(row.get("intervals", {}), f"{path}, row {printable(name)[:80]}")
    return record


def check_intervals(intervals: object, source: str) -> None:
    if not isinstance(intervals, dict):
        raise InputError(f"{source}: intervals are a {type(intervals).__name__}; a JSON object is expected")
    for name in intervals.keys() & set(METRICS):
        ends = intervals[name]
        if not isinstance(ends, list) or len(ends) != 2 or any(A_FIGURE.problem(end) for end in ends):
            raise InputError(f"{source}: the interval of {name} is not two numbers")


def apart(paths: Iterable[tuple[str, Path | None]]) -> None:
    """No two outputs are one file. Raises `InputError`."""
    seen: dict[str, str] = {}
    for flag, path in paths:
        if path is not None and seen.setdefault(real := os.path.realpath(path), flag) != flag:
            raise InputError(f"{seen[real]} and {flag} are both {path}; choose two")


def count_suffix(count: int) -> str:
    """ "" for a headline count, else "-5k" and the like."""
    return "" if count >= HEADLINE else f"-{count / 1000:g}k"


def columns_of(rows: dict[str, dict], count: int) -> tuple[list[str], list[str]]:
    """-> the metrics that some row has, and how their columns are headed."""
    columns = [name for name in METRICS if any(name in row["figures"] for row in rows.values())]
    return columns, [name + ("" if name == "accuracy" else count_suffix(count)) for name in columns]


def digits_of(metric: str) -> int:
    return 2 if metric in ("FID", "IS") else 3


def table(rows: dict[str, dict], count: int) -> str:
    """A Markdown table, a line a row; ``rows``: name -> {"figures", "intervals"}."""
    columns, shown = columns_of(rows, count)
    lines = ["| | " + " | ".join(shown) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = []
        for column in columns:
            digits = digits_of(column)
            cell = f"{row['figures'][column]:.{digits}f}" if column in row["figures"] else "-"
            if column in row.get("intervals", {}):
                low, high = row["intervals"][column]
                cell += f" ({low:.{digits}f} to {high:.{digits}f})"
            cells.append(cell)
        lines.append(f"| {name.replace('|', '/')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over_seeds(rows: dict[str, dict]) -> dict[str, list[dict]]:
    """Rows named "NAME, seed N", together by NAME, in their order. Raises `InputError` for another name."""
    found: dict[str, list[dict]] = {}
    for name, row in rows.items():
        match = re.fullmatch(r"(.*), seed \d+", name)
        if match is None:
            raise InputError(f"--over-seeds: the row is named {name!r}; 'NAME, seed N' is expected")
        found.setdefault(match[1], []).append(row)
    return found


def table_over_seeds(rows: dict[str, dict], count: int) -> str:
    """A Markdown table of means over seeds, each with the standard deviation of one seed."""
    groups = over_seeds(rows)
    columns, shown = columns_of(rows, count)
    lines = ["| | seeds | " + " | ".join(shown) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, group in groups.items():
        cells = [str(len(group))]
        for column in columns:
            values, digits = [row["figures"][column] for row in group], digits_of(column)
            spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {name.replace('|', '/')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
