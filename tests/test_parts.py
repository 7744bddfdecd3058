"""scripts/parts.sh: parts side by side, their logs, the first failure, signals. And what OpenMP is told."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from scripts import in_turn
from tests.test_launchers import as_in_a_terminal
from train_cc.io import threads

ROOT = Path(__file__).resolve().parents[1]


def start(folder: Path, script: str, cores: int = 2) -> subprocess.Popen:
    """``script`` runs in ``folder``, where ``python`` says that there are so many cores."""
    stub = folder / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(f"#!/bin/bash\necho {cores}\n")
    stub.chmod(0o755)
    text = f"set -euo pipefail; source {ROOT}/scripts/parts.sh; PARTS=3 LOGS=logs; {script}; echo end"
    return subprocess.Popen(
        ["bash", "-c", text],
        cwd=folder,
        env=os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_in_a_terminal,
    )


MEET = """meet() { touch "$1"; for i in {1..400}; do [ -e "$2" ] && echo "met $2" && return; sleep 0.02; done; false; }
part "the first" "about 1 s" meet a b; part "second" "soon" meet b a; run_parts"""


def test_parts_run_side_by_side_and_write_to_logs(tmp_path):
    process = start(tmp_path, MEET + '; part "last" "soon" echo "a   b"; run_parts')
    shown, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert shown.splitlines() == [
        "[1/3] the first, about 1 s; log: logs/1-the_first.txt",
        "[2/3] second, soon; log: logs/2-second.txt",
        "[3/3] last, soon; log: logs/3-last.txt",
        "end",
    ]
    assert [log.read_text() for log in sorted((tmp_path / "logs").iterdir())] == ["met b\n", "met a\n", "a   b\n"]


def test_threads_of_parts_side_by_side_sleep_at_once(tmp_path):
    show = 'show() { echo "${GOMP_SPINCOUNT:-not set}"; }; '
    pair = "part a soon show; part b soon show; run_parts; part alone soon show; run_parts"
    process = start(
        tmp_path, f"unset GOMP_SPINCOUNT; {show}{pair}; export GOMP_SPINCOUNT=7; part own soon show; {pair}"
    )
    assert process.wait(timeout=30) == 0
    told = {log.name: log.read_text().strip() for log in (tmp_path / "logs").iterdir()}
    assert [told[name] for name in ("1-a.txt", "2-b.txt", "3-alone.txt")] == ["0", "0", "not set"]
    assert told["4-own.txt"] == told["5-a.txt"] == "7"


def test_on_one_core_they_follow_one_another(tmp_path):
    one = 'one() { echo "$1 begins" >> noted; sleep 0.1; echo "$1 ends" >> noted; }; '
    process = start(tmp_path, one + "part a soon one a; part b soon one b; run_parts", cores=1)
    assert process.wait(timeout=30) == 0
    assert (tmp_path / "noted").read_text().splitlines() == ["a begins", "a ends", "b begins", "b ends"]


LONG = """long() { trap 'sleep 0.3; echo saved >> noted; exit 0' TERM; touch up; while :; do sleep 0.02; done; }
bad() { until [ -e up ]; do sleep 0.02; done; for i in {1..30}; do echo "line $i"; done; false; echo "never"; }
"""


@pytest.mark.parametrize("cores,saved", [(2, True), (1, False)], ids=str)
def test_the_first_failure_stops_the_others_and_is_shown(tmp_path, cores, saved):
    if not saved:
        (tmp_path / "up").touch()
    parts = "part bad soon bad; part long soon long; part third soon touch third; run_parts"
    process = start(tmp_path, LONG + parts, cores)
    shown, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "end" not in shown.splitlines()
    told, *tail = errors.splitlines()
    assert told == 'error: the part "bad" failed; the end of logs/1-bad.txt:'
    assert tail == [f"line {i}" for i in range(16, 31)]
    assert (tmp_path / "noted").exists() == saved and not (tmp_path / "third").exists()


def test_a_failure_keeps_its_exit_code(tmp_path):
    process = start(tmp_path, "part bad soon bash -c 'echo no such flag; exit 2'; run_parts")
    assert process.wait(timeout=30) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=str)
def test_a_signal_to_the_script_alone_ends_all_parts_too(tmp_path, number):
    process = start(tmp_path, LONG + "part a soon long; run_parts")
    deadline = time.monotonic() + 30
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    shown, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and errors == "" and "end" not in shown.splitlines()
    assert (tmp_path / "noted").read_text() == "saved\n"  # it was waited for


def test_one_process_runs_a_command_several_times(monkeypatch):
    ran = []
    command = types.SimpleNamespace(main=ran.append)
    monkeypatch.setattr(in_turn.importlib, "import_module", {"a.command": command}.__getitem__)
    in_turn.main(["a.command", "--x", "1", ",", "--y", "2", ",", "--z"])
    assert ran == [["--x", "1", "--y", "2"], ["--x", "1", "--z"]]
    with pytest.raises(SystemExit):
        in_turn.main(["a.command", "--x"])


# Threads


SHOW = """
import os, sys
from train_cc.io.errors import exits_on_input_error
from train_cc.io.threads import share_cores
exits_on_input_error(share_cores)(*map(int, sys.argv[1:]))
print(os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    "processes,variables,expected",
    [
        ([], {}, f"{threads.usable_cores()} passive 10000"),
        ([10_000], {}, "1 passive 10000"),
        ([10_000], {"OMP_NUM_THREADS": "7"}, "7 passive 10000"),
        ([], {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "active"}, "7 active None"),
        ([10_000], {"GOMP_SPINCOUNT": "0"}, "1 passive 0"),
    ],
    ids=str,
)
def test_what_openmp_is_told(processes, variables, expected):
    """By the command, again by one that starts others, and never against the user."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", SHOW, *map(str, processes)]
    done = subprocess.run(command, cwd=ROOT, env=kept | variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    "files,cores",
    [
        ({}, float("inf")),
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    ],
    ids=str,
)
def test_a_containers_quota_counts(tmp_path, files, cores, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.quota(tmp_path) == cores
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "quota", lambda: cores)
    assert threads.usable_cores() == (8 if cores == float("inf") else max(1, int(cores)))


WITHOUT_TORCH = """
import os, sys
class Absent:
    def find_spec(self, name, *more):
        if name == "torch":
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
try:
    import evaluation.benchmark
except ImportError:
    print(os.environ.get("OMP_WAIT_POLICY"))
"""


def test_the_benchmark_tells_openmp_before_it_imports_torch():
    """The other commands import torch inside of `main` (tests/test_structure.py)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "passive"


def test_nothing_is_told_once_openmp_has_read_it(monkeypatch):
    import torch  # noqa: F401

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    threads.share_cores()
    assert "OMP_WAIT_POLICY" not in os.environ
