"""What a run writes down: its arguments, its log, and one JSON object a line of losses."""

import json
import logging
import math
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from train_cc.io.write import write_atomically

logger = logging.getLogger("train_cc")


RUN_CONTENT = (".lock", "checkpoints", "generator", "loss_logs", "samples", "dmdr", "args.json", "log.txt")


def clear_output_dir(folder: Path) -> None:
    """Delete an earlier run in ``folder``; what no run writes stays, and the lock that this run holds."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / name for name in RUN_CONTENT if name != ".lock"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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
    for handler in (logging.FileHandler(folder / "log.txt"), AboveProgressBars(logging.INFO)):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)


class JsonLines:
    """An append-only file of one JSON object a line, flushed at every call."""

    def __init__(self, path: Path, keep_until_step: int = 0):
        """Rows whose ``step`` lies after ``keep_until_step``, and a torn last line, are dropped."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_json_lines(path) if row["step"] <= keep_until_step] if path.exists() else []
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")

    def write(self, rows: Iterable[dict]) -> None:
        self._file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._file.flush()


def read_json_lines(path: Path) -> list[dict]:
    """All whole rows of ``path``; a line that a kill tore is left out."""
    return parse_json_lines(path.read_text())[0]


def parse_json_lines(text: str) -> tuple[list, int]:
    """-> what the whole lines hold, and how many lines are torn."""
    rows, torn = [], 0
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            torn += 1
    return rows, torn


def not_finite(row: dict) -> list[str]:
    """The names of a row's values that are not finite numbers."""
    return [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
