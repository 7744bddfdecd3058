"""What the report shows of a run's folder and of what is beside it; what cannot be read is told, not raised."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.files import printable, read_figures
from evaluation.report.rules import Series
from train_cc.io.errors import InputError
from train_cc.io.read import read_json, require_folder
from train_cc.run.logbook import parse_json_lines


@dataclass
class RunLog:
    """What could be read of a run's folder; ``problems`` tells the rest."""

    name: str
    folder: Path
    record: dict = field(default_factory=dict)  # args.json
    series: Series = field(default_factory=Series)
    pictures: dict[int, Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


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


def read_run(folder: Path) -> RunLog:
    require_folder(folder, "a run's --output-dir")
    run = RunLog(printable(folder.resolve().name), folder)
    run.record = read_record(folder, run.problems)
    rows = read_rows(folder / "loss_logs" / "loss_gen_log.jsonl", run.problems)
    turns = read_rows(folder / "loss_logs" / "loss_gui_log.jsonl", run.problems)
    run.series = Series.of(rows, turns)
    for path in (folder / "samples").glob("step-*/grid.png"):
        number = re.fullmatch(r"step-(\d{1,15})", path.parent.name, re.ASCII)
        if number and path.is_file():
            run.pictures[int(number[1])] = path
    if not (folder / "generator" / "config.json").is_file():
        run.problems.append("there is no generator/: the run is not finished (still running, stopped or killed)")
    return run


def name_apart(runs: list[RunLog]) -> None:
    """Runs whose folders have one name are told apart by their parents'."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = printable(f"{run.folder.resolve().parent.name}/{run.folder.resolve().name}")


def find_results(runs: list[RunLog]) -> tuple[dict[str, dict], list[str]]:
    """Title -> row name -> figures, of the results and frontier beside the runs; and what cannot be read of them."""
    found, problems = {}, []
    for parent in dict.fromkeys(run.folder.resolve().parent for run in runs):
        for title, path in (("Results", parent / "results.json"), ("Frontier", parent / "frontier" / "frontier.json")):
            if not path.is_file():
                continue
            try:
                rows = read_figures(path)["rows"]
            except (InputError, OSError) as error:
                problems.append(printable(str(error)))
                continue
            found[printable(f"{title} ({path})")] = {printable(name): row["figures"] for name, row in rows.items()}
    return found, problems
