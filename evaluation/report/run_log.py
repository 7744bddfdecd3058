"""A run's folder and the figures beside it, as the report reads them; a problem in words for what cannot be read."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from evaluation.figures.tables import HELD_OUT
from train_cc.io.errors import InputError
from train_cc.io.figures import read_figures
from train_cc.io.read import printable, read_json, sha256
from train_cc.io.weights import WEIGHTS_NAME
from train_cc.run.folder import CHECKPOINT_STEP, exported_step
from train_cc.run.logbook import read_json_lines

LARGEST = 1e100  # what a log can say of a loss, and an axis can show
LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d):\d\d (.*)")


def finite_or_nan(value: object) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and -LARGEST < value < LARGEST else float("nan")


@dataclass
class Series:
    """The columns of a run's log over its generator updates; NaN where a row has no such value."""

    steps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: list[dict], turns: list[dict]) -> "Series":
        """``rows``: of generator turns. ``turns``: of estimator turns, averaged over those of an update.

        Every row has a whole number ``step``; any other value that is not a finite number is left out.
        """
        by_step: dict[int, dict[str, list[float]]] = {}
        for turn in turns:
            for name in sorted(turn.keys() - {"step", "iteration", "seconds"}):
                if np.isfinite(value := finite_or_nan(turn[name])):
                    by_step.setdefault(turn["step"], {}).setdefault(name, []).append(value)
        merged = [
            {name: sum(values) / len(values) for name, values in by_step.get(row["step"], {}).items()} | row
            for row in rows
        ]
        names = dict.fromkeys(name for row in merged for name in row)
        columns = {name: np.array([finite_or_nan(row.get(name)) for row in merged]) for name in names}
        return cls(np.array([row["step"] for row in merged], float), columns)

    def has(self, name: str) -> bool:
        return bool(np.isfinite(self.of_column(name)).any())

    def of_column(self, name: str) -> np.ndarray:
        return self.columns.get(name, np.full(len(self.steps), np.nan))

    def part(self, name: str, begin: float, end: float) -> float:
        """The median of a column between two fractions of the run; NaN if it has no values there."""
        values = self.of_column(name)
        values = values[int(begin * len(values)) : max(1, int(end * len(values)))]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else float("nan")


@dataclass
class RunLog:
    """The readable part of a run's folder; ``problems`` names the rest."""

    name: str
    folder: Path
    record: dict = field(default_factory=dict)  # args.json
    series: Series = field(default_factory=Series)
    pictures: dict[int, Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    generator_sha256: str = ""  # of generator/, if it exists
    exported: int | None = None  # the step of generator/, if recorded
    lines: list[tuple[str, str]] = field(default_factory=list)  # of log.txt: the minute and the text

    def recorded(self, name: str) -> dict:
        """A part of args.json, or {} if it has none."""
        part = self.record.get(name)
        return part if isinstance(part, dict) else {}

    @property
    def arguments(self) -> dict:
        return self.recorded("arguments")

    @property
    def updates(self) -> int:
        """The number of updates in the log."""
        return len(self.series.steps)

    @property
    def finished(self) -> bool:
        """True if generator/ exists and is of the last update: a finished run can be continued to a later one."""
        return bool(self.generator_sha256) and self.exported in (None, self.arguments.get("max_train_steps"))

    @property
    def stopped(self) -> str:
        """The last line of a run that stopped itself, which gives the reason; else ""."""
        return self.lines[-1][1] if self.lines and ". Stopped; " in self.lines[-1][1] else ""


@dataclass
class FigureTable:
    """Rows of figures of one file, in one feature space."""

    title: str
    rows: dict[str, dict[str, float]]  # name -> figures
    made_by: dict[str, dict] = field(default_factory=dict)  # name -> the provenance of its samples
    count: int = 0  # images of a row; 0: not recorded
    set_size: int | None = None  # of the sets of recall and precision; None: of all images
    space: str = ""
    space_sha256: str = ""  # of the space's network


def is_step(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def read_rows(path: Path, problems: list[str]) -> list[dict]:
    """The whole rows of a jsonl file; torn ones go to ``problems``."""
    if not path.is_file():
        problems.append(f"{path.name} is missing")
        return []
    lines, torn = read_json_lines(path)
    rows = [row for row in lines if is_step(row["step"])]
    if torn := torn + len(lines) - len(rows):
        problems.append(f"{path.name}: {torn} line(s) cannot be read and are left out")
    if not rows:
        problems.append(f"{path.name} has no rows yet")
    return rows


def read_record(folder: Path, problems: list[str]) -> dict:
    """args.json, or {} if it cannot be read."""
    path = folder / "args.json"
    try:
        record = read_json(path, "a run's record")
        if isinstance(record.get("arguments"), dict):
            return record
        problems.append(printable(f"{path} has no arguments; a run's record is expected"))
    except InputError as error:
        problems.append(printable(str(error)) if path.exists() else "args.json is missing")
    return {}


def read_run(folder: Path) -> RunLog:
    run = RunLog(printable(folder.resolve().name), folder)
    run.record = read_record(folder, run.problems)
    rows, turns = (read_rows(folder / "loss_logs" / f"loss_{name}_log.jsonl", run.problems) for name in ("gen", "gui"))
    run.series = Series.of(rows, turns)
    if (folder / "log.txt").is_file():
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        run.lines = [(match[1], printable(match[2])) for match in map(LOG_LINE.match, lines) if match]
    for path in (folder / "samples").glob("step-*/grid.png"):
        number = re.fullmatch(CHECKPOINT_STEP, path.parent.name)
        if number and path.is_file():
            run.pictures[int(number[1])] = path
    generator = folder / "generator"
    if (generator / "config.json").is_file() and (generator / WEIGHTS_NAME).is_file():
        run.generator_sha256, run.exported = sha256(generator / WEIGHTS_NAME), exported_step(folder)
    return run


def read_runs(folders: list[Path]) -> list[RunLog]:
    """The runs, each under its folder's name; folders of the same name also under their parents'."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = printable("/".join(run.folder.resolve().parts[-2:]))
    return runs


def find_tables(runs: list[RunLog]) -> tuple[list[FigureTable], list[str]]:
    """The figures in the runs' folders and beside them, and the problems of those that cannot be read."""
    tables, problems = [], []
    parents = dict.fromkeys(run.folder.resolve().parent for run in runs)
    paths = [path for parent in parents for path in (parent / "results.json", parent / "frontier" / "frontier.json")]
    paths += [path for run in runs for path in sorted(run.folder.resolve().glob("*/figures.json"))]
    for path in filter(Path.is_file, paths):
        try:
            content = read_figures(path)
        except (InputError, OSError) as error:
            problems.append(printable(str(error)))
            continue
        size = content["set_size"] if is_step(content.get("set_size")) else None
        tables += [table_of(each, path, size) for each in (content, *content.get("more_spaces", []))]
    return tables, problems


def table_of(content: dict, path: Path, set_size: int | None) -> FigureTable:
    table = FigureTable(printable(f"{path.parent.name}/{path.name}"), {}, set_size=set_size)
    table.space = printable(str(content.get("features", ""))[:200])
    table.space_sha256 = str(content.get("features_sha256", ""))
    for name, row in content["rows"].items():
        table.rows[printable(name)] = row["figures"]
        table.made_by[printable(name)] = row["generation"] if isinstance(row.get("generation"), dict) else {}
        if name != HELD_OUT and is_step(row.get("images")):  # images held out can be fewer
            table.count = row["images"]
    return table
