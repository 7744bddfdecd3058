"""The figures of samples, as JSON: their names, which way is better, and the file checked where it comes in."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from train_cc.io.errors import InputError
from train_cc.io.products import write_atomically
from train_cc.io.read import parsing, read_json, require_plain

METRICS = ("FID", "Recall", "IS", "Precision", "accuracy", "Density", "Coverage", "KID", "SW", "FDr", "SWr")
METRICS += ("ADM recall", "ADM precision")  # of all images against all, whatever their counts
LOWER_IS_BETTER = ("FID", "KID", "SW", "FDr", "SWr")  # of the others higher
FIGURES = "the figures that evaluation.evaluate or evaluation.frontier writes"


def columns_of(rows: Iterable[dict]) -> list[str]:
    """The metrics that some row has, in the order of `METRICS`."""
    return [metric for metric in METRICS if any(metric in row["figures"] for row in rows)]


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table as GitHub reads it; a bar or a line's end within a cell stays within it."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in (head, *lines)]
    first, *more = (f"| {' | '.join(line)} |" for line in cells)
    return "\n".join([first, "|---" * len(head) + "|", *more])


def with_arrow(metric: str, head: str | None = None) -> str:
    """``head``, or the metric's name, with the direction that is better."""
    return f"{head or metric} {'↓' if metric in LOWER_IS_BETTER else '↑'}"


def write_figures(path: Path, rows: dict[str, dict], **more: object) -> None:
    """JSON of ``rows`` and of what else belongs to them."""
    content = {"rows": rows} | more
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=2, default=str, allow_nan=False) + "\n")


def read_figures(path: Path) -> dict:
    """The content of `write_figures`; every row has "figures", of numbers. Raises `InputError`."""
    record = read_json(path, FIGURES)
    require_plain(record, path)
    if "rows" not in record:  # a frontier.json once held the rows only
        record = {"rows": record}
    with parsing(path, FIGURES):
        for space in (record, *record.get("more_spaces", [])):
            if not space["rows"]:
                raise InputError(f"{path} has no rows; {FIGURES} are expected")
            for row in space["rows"].values():
                for name in row["figures"].keys() & set(METRICS):
                    for value in (row["figures"][name], *row.get("intervals", {}).get(name, ())):
                        math.hypot(value)  # raises TypeError unless it is a number
    return record
