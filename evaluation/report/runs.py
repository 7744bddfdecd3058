"""What the report shows of a run's folder and of what is beside it; what cannot be read is told, not raised."""

import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from evaluation.files import HELD_OUT
from evaluation.report.rules import Series
from train_cc.io.errors import InputError
from train_cc.io.figures import read_figures
from train_cc.io.read import printable, read_json, require_folder, sha256
from train_cc.io.weights import WEIGHTS_NAME
from train_cc.run.folder import CHECKPOINT_STEP, exported_step
from train_cc.run.logbook import parse_json_lines

LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)")


@dataclass
class RunLog:
    """What could be read of a run's folder; ``problems`` tells the rest."""

    name: str
    folder: Path
    record: dict = field(default_factory=dict)  # args.json
    series: Series = field(default_factory=Series)
    pictures: dict[int, Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    generator_sha256: str = ""  # of generator/, where it is there
    exported: int | None = None  # the step of generator/, where it says so
    lines: list[tuple[datetime, str]] = field(default_factory=list)  # of log.txt

    @property
    def arguments(self) -> dict:
        return self.record.get("arguments", {})

    @property
    def updates(self) -> int:
        """How many updates are in the log."""
        return len(self.series.steps)

    @property
    def finished(self) -> bool:
        """Whether the generator is there, and of the last update: a finished run can be continued to a later one."""
        return bool(self.generator_sha256) and self.exported in (None, self.arguments.get("max_train_steps"))

    @property
    def stopped(self) -> str:
        """Why the run stopped itself, if it did: its last line says so."""
        return self.lines[-1][1] if self.lines and ". Stopped; " in self.lines[-1][1] else ""


@dataclass
class Table:
    """Rows of figures of one file, in one feature space."""

    title: str
    rows: dict[str, dict[str, float]]  # name -> figures
    made_by: dict[str, dict] = field(default_factory=dict)  # name -> what evaluation.generate wrote of the samples
    count: int = 0  # images of a row; 0: not recorded
    set_size: int | None = None  # of the sets of recall and precision; None: of all images
    space: str = ""
    space_sha256: str = ""  # of the network whose features it is


def read_rows(path: Path, problems: list[str]) -> list[dict]:
    """The whole rows of a jsonl file; what is torn or missing goes to ``problems``."""
    if not path.is_file():
        problems.append(f"{path.name} is missing")
        return []
    found, torn = parse_json_lines(path.read_text(encoding="utf-8", errors="replace"))
    rows = [row for row in found if isinstance(row, dict) and is_step(row.get("step"))]
    torn += len(found) - len(rows)
    if torn:
        problems.append(f"{path.name}: {torn} line(s) cannot be read and are left out")
    if not rows:
        problems.append(f"{path.name} has no rows yet")
    return rows


def is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def read_record(folder: Path, problems: list[str]) -> dict:
    """args.json, or {} where it cannot be read."""
    path = folder / "args.json"
    if not path.is_file():
        problems.append("args.json is missing")
        return {}
    try:
        record = read_json(path, "a run's record")
        if not isinstance(record.get("arguments"), dict):
            raise InputError(f"{path} has no arguments; a run's record is expected")
    except InputError as error:
        problems.append(printable(str(error)))
        return {}
    return record


def read_log(path: Path) -> list[tuple[datetime, str]]:
    """The dated lines of log.txt; [] where there is none."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := LOG_LINE.match(line):
            try:
                found.append((datetime.fromisoformat(match[1]), printable(match[2])))
            except ValueError:
                continue
    return found


def read_run(folder: Path) -> RunLog:
    require_folder(folder, "a run's --output-dir")
    run = RunLog(printable(folder.resolve().name), folder)
    run.record = read_record(folder, run.problems)
    rows = read_rows(folder / "loss_logs" / "loss_gen_log.jsonl", run.problems)
    turns = read_rows(folder / "loss_logs" / "loss_gui_log.jsonl", run.problems)
    run.series = Series.of(rows, turns)
    run.lines = read_log(folder / "log.txt")
    for path in (folder / "samples").glob("step-*/grid.png"):
        number = re.fullmatch(CHECKPOINT_STEP, path.parent.name)
        if number and path.is_file():
            run.pictures[int(number[1])] = path
    generator = folder / "generator"
    if (generator / "config.json").is_file() and (generator / WEIGHTS_NAME).is_file():
        run.generator_sha256, run.exported = sha256(generator / WEIGHTS_NAME), exported_step(folder)
    return run


def name_apart(runs: list[RunLog]) -> None:
    """Runs whose folders have one name are told apart by their parents'."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = printable(f"{run.folder.resolve().parent.name}/{run.folder.resolve().name}")


def find_tables(runs: list[RunLog]) -> tuple[list[Table], list[str]]:
    """The figures in the runs' folders and beside them; and what cannot be read of them."""
    found, problems = [], []
    parents = dict.fromkeys(run.folder.resolve().parent for run in runs)
    paths = [path for parent in parents for path in (parent / "results.json", parent / "frontier" / "frontier.json")]
    paths += [path for run in runs for path in sorted(run.folder.resolve().glob("*/figures.json"))]
    for path in filter(Path.is_file, paths):
        try:
            found += tables_of(read_figures(path), path)
        except (InputError, OSError) as error:
            problems.append(printable(str(error)))
    return found, problems


def tables_of(content: dict, path: Path) -> list[Table]:
    """One per feature space."""
    found = [table_of(each, path) for each in (content, *content.get("more_spaces", []))]
    for table in found:
        table.set_size = content["set_size"] if is_step(content.get("set_size")) else None
    return found


def table_of(content: dict, path: Path) -> Table:
    table = Table(printable(f"{path.parent.name}/{path.name}"), {})
    table.space = printable(str(content.get("features", ""))[:200])
    table.space_sha256 = str(content.get("features_sha256", ""))
    for name, row in content["rows"].items():
        table.rows[printable(name)] = row["figures"]
        made_by, count = row.get("generation"), row.get("images")
        table.made_by[printable(name)] = made_by if isinstance(made_by, dict) else {}
        if name != HELD_OUT:  # its images can be fewer
            table.count = count if is_step(count) else table.count
    return table
