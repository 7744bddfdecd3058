"""The figures of samples, as JSON: their names, which way is better, and the file checked where it comes in."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from train_cc.io.errors import InputError
from train_cc.io.read import Number, check_numbers, printable, read_json, require_plain

METRICS = ("FID", "Recall", "IS", "Precision", "accuracy", "Density", "Coverage", "KID", "SW", "FDr", "SWr")
METRICS += ("ADM recall", "ADM precision")  # of all images against all, whatever their counts
LOWER_IS_BETTER = ("FID", "KID", "SW", "FDr", "SWr")  # of the others higher
FIGURES = "the figures that evaluation.evaluate or evaluation.frontier writes"
A_FIGURE = Number(float, -1e100, 1e100)


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


def read_figures(path: Path) -> dict:
    """The figures of `evaluation.files.write_figures`; every row has "figures", of numbers. Raises `InputError`."""
    record = read_json(path, FIGURES)
    require_plain(record, path)
    if "rows" not in record:  # a frontier.json once held the rows alone
        record = {"rows": record}
    more = record.get("more_spaces", [])
    if not isinstance(more, list) or not all(isinstance(each, dict) for each in more):
        raise InputError(f"{path}: more_spaces is no list of figures; {FIGURES} are expected")
    for each in (record, *more):
        check_rows(each.get("rows"), path)
    return record


def check_rows(rows: object, path: Path) -> None:
    if not isinstance(rows, dict) or not rows:
        raise InputError(f"{path} has no rows; {FIGURES} are expected")
    for name, row in rows.items():
        if not isinstance(row, dict) or not isinstance(row.get("figures"), dict):
            raise InputError(f"{path}: row {name[:80]!r} has no figures; {FIGURES} are expected")
        check_numbers(row["figures"], dict.fromkeys(METRICS, A_FIGURE), f"{path}, row {printable(name)[:80]}")
        check_intervals(row.get("intervals", {}), f"{path}, row {printable(name)[:80]}")


def check_intervals(intervals: object, source: str) -> None:
    if not isinstance(intervals, dict):
        raise InputError(f"{source}: intervals are a {type(intervals).__name__}; a JSON object is expected")
    for name in intervals.keys() & set(METRICS):
        ends = intervals[name]
        if not isinstance(ends, list) or len(ends) != 2 or any(A_FIGURE.problem(end) for end in ends):
            raise InputError(f"{source}: the interval of {name} is not two numbers")
