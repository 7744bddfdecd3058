"""What was run, as the page's tables say it: when and where, and which arguments differ between the runs."""

import re
from datetime import timedelta

import numpy as np

from evaluation.report.runs import RunLog
from train_cc.io.fields import flag_of, marked
from train_cc.io.read import printable
from train_cc.setup.arguments import GROUPS

MACHINE = re.compile(r"on (\d+) x (\w+)(.*?), precision (\w+)")  # in log.txt, as setup/stage.py writes it


def shown(value: object) -> str:
    """An argument as the page shows it: a value, or a short list of values; whatever else there is, its type."""
    if isinstance(value, list):
        simple = len(value) <= 8 and not any(isinstance(each, dict) for each in value)
        return f"[{', '.join(map(shown, value))}]" if simple else "a list"
    return "an object" if isinstance(value, dict) else printable(str(value)[:200])


def what_was_run(runs: list[RunLog]) -> list[list[str]]:
    """When, where, how long, and with what: rows of a name and a cell for each run."""
    facts = [facts_of(run) for run in runs]
    return [[name, *(fact.get(name, "") for fact in facts)] for name in facts[0]]


def facts_of(run: RunLog) -> dict[str, str]:
    seconds = run.series.of_column("seconds")
    seconds = seconds[np.isfinite(seconds)]
    machine = next((match for _, line in run.lines if (match := MACHINE.search(line))), None)
    took = f"{timedelta(seconds=round(float(seconds.sum())))}" if len(seconds) and seconds.sum() < 1e9 else "?"
    versions = run.record.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    return {
        "stage": shown(run.record.get("stage", "?")),
        "began": f"{run.lines[0][0]:%Y-%m-%d %H:%M}" if run.lines else "?",
        "training took": f"{took}" + (f" ({np.median(seconds):.3g} s an update)" if len(seconds) else ""),
        "device": f"{machine[1]} x {machine[2]}{machine[3]}, precision {machine[4]}" if machine else "?",
        "updates in the log": f"{run.updates:,}",
        "commit": shown(run.record.get("commit") or "not recorded"),
        "versions": ", ".join(f"{name} {shown(versions[name])}" for name in ("python", "torch") if name in versions),
    }


def what_differs(runs: list[RunLog]) -> dict[str, list[list[str]]]:
    """Arguments by ``same`` and ``other``: those that all runs share, and those that differ, a cell for each run."""
    recipe, start = (marked(mark, *GROUPS.values()) for mark in ("recipe", "start"))
    names = dict.fromkeys([*recipe, *sorted({name for run in runs for name in run.arguments if isinstance(name, str)})])
    found: dict[str, list[list[str]]] = {"other": [], "same": []}
    for name in names:
        values = [shown(run.arguments.get(name, "")) for run in runs]
        differ = len(set(values)) > 1
        if name not in start and (differ or name in recipe):
            found["other" if differ else "same"].append([flag_of(printable(name)), *values])
    return found
