"""Logs of a run: readable lines, and one JSON object of losses per line."""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from train_cc.io.products import write_atomically

logger = logging.getLogger("train_cc")
BANDS = (0, 25, 50, 75)  # lower edges of the bands of t, in hundredths, as in the names of the columns
BY_BAND = "_by_band"  # ends the name of a figure that comes by band
OVERFLOW = "overflow_"  # begins the name of a column that counts overflows in fp16; a row without any has none


def band_columns(name: str) -> tuple[str, ...]:
    """The columns of figure ``name`` by band, such as score_gap_t00."""
    return tuple(f"{name}_t{low:02}" for low in BANDS)


class AboveProgressBars(logging.Handler):
    """Log lines to the terminal that do not break a progress bar in two."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to(folder: Path) -> None:
    """Readable lines to ``folder``/log.txt and to the terminal, on the process that calls this."""
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    file = logging.FileHandler(folder / "log.txt", encoding="utf-8", errors="backslashreplace")
    for handler in (file, AboveProgressBars(logging.INFO)):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)


class JsonLines:
    """An append-only file of one JSON object a line, flushed at every call."""

    def __init__(self, path: Path, keep_until_step: int):
        """Rows whose ``step`` lies after ``keep_until_step`` are dropped, and lines that cannot be read.

        Of these the last one may be what a kill tore; more are told in the log.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = []
        if path.exists():
            rows, torn = read_json_lines(path)
            earlier = [row for row in rows if row["step"] <= keep_until_step]
            if torn:
                logger.warning("WARNING: %s: %d line(s) could not be read and were dropped", path, torn)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in earlier))
        self._file = path.open("a")

    def write(self, rows: Iterable[dict]) -> None:
        """Write ``rows``; a number that is not finite, such as a norm that overflowed in fp16, becomes null."""
        self._file.write("".join(json.dumps(row | dict.fromkeys(not_finite(row))) + "\n" for row in rows))
        self._file.flush()


def read_json_lines(path: Path) -> tuple[list[dict], int]:
    """Return the rows of ``path``, objects with a whole number ``step``, and the number of its other lines."""
    rows, lines = [], path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):  # torn, thousands of digits, or nested without end
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows, len(lines) - len(rows)


def not_finite(row: dict) -> list[str]:
    """The names of a row's values that are not finite numbers."""
    return [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]


# Figures by band of t ---------------------------------------------------------------------------------------------


def columns(figures: dict[str, float | list[list[float]]]) -> dict[str, float | None]:
    """A row of the log: a figure by band becomes four columns, its sums by its counts; None where no sample was."""
    row: dict[str, float | None] = {}
    for name, value in figures.items():
        if name.endswith(BY_BAND):
            means = [each / count if count > 0 else None for each, count in zip(*value, strict=True)]
            row |= zip(band_columns(name.removesuffix(BY_BAND)), means, strict=True)
        else:
            row[name] = value
    return row
