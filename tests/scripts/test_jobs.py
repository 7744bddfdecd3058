"""scripts/jobs.py: jobs side by side, their logs, what is kept, the first failure, signals. And the recipes' files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.jobs import Job, finished, read_jobs, run_all, time_left
from tests import ROOT
from tests.scripts.test_launch import as_in_a_terminal
from train_cc.io.errors import InputError

RUN = """
import sys
from pathlib import Path
from scripts.jobs import read_jobs, run_all
from train_cc.io.errors import exits_on_input_error
from train_cc.io.threads import without_ours
exits_on_input_error(lambda: run_all(read_jobs(Path(sys.argv[1]), []), int(sys.argv[2]), without_ours()))()
print("end")
"""
# Jobs of these tests are bash functions; each makes a file of its name.
FUNCTIONS = """
cd "$HERE"
meet() { touch "$1"; for i in {1..400}; do [ -e "$2" ] && echo "met $2" && return; sleep 0.02; done; false; }
show() { echo "${GOMP_SPINCOUNT:-not set}"; }
long() { trap 'sleep 0.3; echo saved >> noted; exit 0' TERM; touch up; while :; do sleep 0.02; done; }
bad() { until [ -e up ]; do sleep 0.02; done; for i in {1..30}; do echo "line $i"; done; exit "$1"; }
"$@" && touch "$OUTPUT_DIR"
"""


def start(folder: Path, *jobs: tuple, cores: int = 2) -> subprocess.Popen:
    """``jobs``: title, words of a function, titles of needs."""
    (folder / "functions.sh").write_text(FUNCTIONS)
    text = 'logs = "$HERE/logs"\n'
    for title, words, *needs in jobs:
        command = f"OUTPUT_DIR='$HERE/made {title}' bash $HERE/functions.sh {words}"
        text += f'["{title}"]\ntitle = "{title}, soon"\nneeds = {needs}\ncommands = ["{command}"]\n'
    (folder / "jobs.toml").write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder / "jobs.toml"), str(cores)],
        cwd=ROOT,
        env=environment | {"HERE": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_in_a_terminal,
    )


def logs(folder: Path) -> list[str]:
    return [log.read_text().strip() for log in sorted((folder / "logs").iterdir())]


def test_jobs_run_side_by_side_and_are_kept_when_they_are_finished(tmp_path):
    jobs = [("first", "meet a b"), ("second", "meet b a"), ("last", "echo end", "first", "second")]
    shown, errors = start(tmp_path, *jobs).communicate(timeout=30)
    lines = [f"[{i}/3] {name}, soon; log: {tmp_path}/logs/{i}-{name}.txt" for i, (name, *_) in enumerate(jobs, 1)]
    assert errors == "" and shown.splitlines() == [*lines, "end"]
    assert logs(tmp_path) == ["met b", "met a", "end"]
    (tmp_path / "made second").unlink()
    shown, _ = start(tmp_path, *jobs).communicate(timeout=30)
    assert shown.splitlines() == ["[1/3] first: kept", lines[1], "[3/3] last: kept", "end"]


@pytest.mark.parametrize("cores,spins", [(2, ["0", "0", "not set"]), (1, ["not set"] * 3)], ids=str)
def test_threads_of_jobs_side_by_side_sleep_at_once(tmp_path, cores, spins):
    process = start(tmp_path, ("a", "show"), ("b", "show"), ("alone", "show", "a", "b"), cores=cores)
    assert process.wait(timeout=30) == 0 and logs(tmp_path) == spins


@pytest.mark.parametrize("cores,code", [(2, 3), (1, 2)], ids=str)
def test_the_first_failure_stops_the_others_and_is_shown(tmp_path, cores, code):
    if cores == 1:
        (tmp_path / "up").touch()
    process = start(tmp_path, ("bad", f"bad {code}"), ("long", "long"), ("third", "echo third"), cores=cores)
    shown, errors = process.communicate(timeout=30)
    assert process.returncode == code and "end" not in shown.splitlines()
    message, *tail = errors.splitlines()
    assert message == f'error: "bad" failed with exit code {code}; the end of {tmp_path}/logs/1-bad.txt:'
    assert tail == [f"line {i}" for i in range(16, 31)]
    assert not (tmp_path / "made third").exists()
    assert (tmp_path / "noted").exists() == (cores == 2)  # the long one was waited for


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_signal_stops_all_jobs_and_waits_for_them(tmp_path, number):
    process = start(tmp_path, ("a", "long"), ("b", "echo b", "a"))
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    shown, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number and errors == "" and "end" not in shown.splitlines()
    assert (tmp_path / "noted").read_text() == "saved\n"


MODULE = """
import os
from pathlib import Path

def main(words):
    print("in", os.getpid())
    if "--stops" not in words:
        Path(words[1]).touch()
"""
LAUNCHER = 'echo "in $$"; [ "$1" = --stops ] || touch "$OUTPUT_DIR"'


@pytest.mark.parametrize("command", ["some_command --output {}", "OUTPUT_DIR={} bash {}/../launcher.sh"])
def test_commands_of_a_job_run_in_turn_until_one_is_not_finished(tmp_path, command):
    """Modules in one process, launchers each in its own."""
    (tmp_path / "some_command.py").write_text(MODULE)
    (tmp_path / "launcher.sh").write_text(LAUNCHER)
    (tmp_path / "made").mkdir()
    made = [command.format(tmp_path / "made" / name, tmp_path / "made") for name in "abc"]
    made[1] += " --stops"
    (tmp_path / "jobs.toml").write_text(f"logs = '{tmp_path}/logs'\n[a]\ntitle = 'a'\ncommands = {made}\n")
    words = [sys.executable, "-m", "scripts.jobs", str(tmp_path / "jobs.toml")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and f"{tmp_path}/made/b is not finished; the same command continues" in done.stderr
    first, second = re.findall(r"^in (\d+)$", (tmp_path / "logs" / "1-a.txt").read_text(), re.MULTILINE)
    assert (first == second) == ("bash" not in command)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["a"]


def test_what_is_finished(tmp_path):
    """A file; a run with its export; a network whose record, if it has one, names files that are there."""
    assert not finished(tmp_path / "file")
    (tmp_path / "file").touch()
    assert finished(tmp_path / "file") and not finished(tmp_path)
    (tmp_path / "config.json").touch()
    assert not finished(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert finished(tmp_path)  # from elsewhere
    record = {"made_by": "made by DMDR", "stage": "teacher", "arguments": {}}
    for more, whole in (({}, False), ({"finished": ["file"]}, True), ({"finished": ["x"]}, False)):
        (tmp_path / "args.json").write_text(json.dumps(record | more))
        assert finished(tmp_path) == whole, more
    (tmp_path / "generator").mkdir()
    (tmp_path / "generator" / "config.json").touch()
    assert finished(tmp_path)


def test_what_nobody_makes_and_what_is_not_set_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="waits for x, which nobody makes"):
        run_all([Job("d", iter(()), needs=["x"])], 1, {})
    monkeypatch.delenv("DIGITS", raising=False)
    with pytest.raises(InputError, match="the variable DIGITS is not set"):
        read_jobs(ROOT / "scripts/recipes/digits.toml", ["teacher"])
    monkeypatch.setenv("DIGITS", str(tmp_path))
    with pytest.raises(InputError, match=r"nonsense is no job of .*; allowed: teacher, classifiers, "):
        read_jobs(ROOT / "scripts/recipes/digits.toml", ["teacher", "nonsense"])


def test_the_time_left_is_that_of_what_had_to_be_made():
    assert time_left([], 5, 1) == ""
    assert time_left([60.0, 180.0], 6, 2) == ", about 6 min left"
    assert time_left([3600.0], 10, 2) == ", about 5.0 h left"
    assert time_left([120.0], 1, 4) == ", about 2 min left"
