"""scripts/launch.py and scripts/env.sh: numbers, messages, exit codes, signals, environments.

This file is also the program that the launcher starts: small, so that what is timed is the launcher.
"""

import atexit
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import ROOT

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def program(what: str, folder: str) -> None:
    """What the launched processes do."""
    from train_cc.io.errors import InputError, exits_on_input_error

    rank = int(os.environ["RANK"])

    @exits_on_input_error
    def main() -> None:
        if what == "message in all" or (what == "message in one" and rank == 1):
            raise InputError("the teacher is nowhere")
        if what == "bug":
            raise ZeroDivisionError(f"in process {rank}")
        if what == "message in one":
            time.sleep(2)
            raise RuntimeError("Connection closed by peer")
        if what == "code":
            raise SystemExit(7)
        if what == "killed" and rank == 1:
            while not (Path(folder) / "up-0").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "killed":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in an update: it notices by its lost connection
            (Path(folder) / "up-0").touch()
            time.sleep(0.5)
            raise RuntimeError("Connection closed by peer")
        if what == "sleep":
            (Path(folder) / f"up-{rank}").touch()
            time.sleep(120)
        if what == "ends":
            atexit.register((Path(folder) / f"exit-{rank}").touch)
            sys.modules["late"] = Late(Path(folder) / f"torn-{rank}")
        if what.startswith("train"):
            train(Path(folder), rank, hangs=what == "train, hang")

    main()


class Late:
    """Leaves ``trace`` when Python tears itself down, as a thread of torch can then end the process."""

    def __init__(self, trace: Path):
        self.trace = os.fspath(trace)

    def __del__(self, open=open) -> None:
        open(self.trace, "w").close()


def train(folder: Path, rank: int, hangs: bool) -> None:
    """Updates of 0.2 seconds, and a checkpoint that takes 3."""
    from train_cc.run.stop import StopSignal

    StopSignal.patience = lambda self: 2
    with StopSignal() as stop:
        while not stop.name:
            with stop.update():
                time.sleep(0.2)
                (folder / f"up-{rank}").touch()
                while hangs and stop.name:
                    time.sleep(0.1)
        time.sleep(3)
    (folder / f"saved-{rank}").touch()


def launch(what: str, folder: Path, **variables: str) -> subprocess.Popen:
    environment = os.environ | NO_GPU | {"NUM_PROCESSES": "2"} | variables
    command = [sys.executable, "-m", "scripts.launch", "tests.scripts.test_launchers", what, str(folder)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal
    )


def as_in_a_terminal() -> None:
    """A shell in the background ignores SIGINT, nohup SIGHUP, and what it starts inherits that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def wait_until_up(process: subprocess.Popen, folder: Path) -> list[psutil.Process]:
    """-> the launched processes."""
    deadline = time.monotonic() + 90
    while not all((folder / f"up-{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return psutil.Process(process.pid).children()


# Messages and exit codes


@pytest.mark.parametrize(
    "what,code,told",
    [
        ("message in all", 2, "error: the teacher is nowhere"),
        ("message in one", 2, "error: the teacher is nowhere"),
        ("bug", 1, "ZeroDivisionError: in process"),
        ("code", 7, ""),
        ("killed", 137, "error: process 1 was ended by SIGKILL"),
        ("done", 0, ""),
    ],
)
def test_what_processes_say_is_shown_once_and_the_code_is_theirs(tmp_path, what, code, told):
    process = launch(what, tmp_path)
    _, shown = process.communicate(timeout=90)
    assert process.returncode == code, shown
    assert shown.count(told) == 1 if told else shown == ""
    assert shown.count("Traceback") == (what == "bug")
    if what == "killed":  # what follows from it has a line of its own
        assert shown.splitlines()[1:] == ["process 0 after it: RuntimeError: Connection closed by peer"]
    elif what != "bug":
        assert len(shown.splitlines()) == bool(told)


# Signals


def test_a_process_that_is_done_ends_before_python_tears_itself_down(tmp_path):
    """What libraries registered for the exit is done before."""
    command = [sys.executable, "-m", "tests.scripts.test_launchers", "ends", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"RANK": "7"}, check=True, capture_output=True)
    assert (tmp_path / "torn-7").exists()  # so it is by itself
    process = launch("ends", tmp_path)
    _, shown = process.communicate(timeout=90)
    assert process.returncode == 0 and shown == ""
    assert {file.name for file in tmp_path.iterdir()} == {"exit-0", "exit-1", "exit-7", "torn-7"}


def test_a_stop_that_reaches_all_twice_saves_once_and_ends_well(tmp_path):
    """As by Slurm and systemd: launcher and processes are told, the launcher tells them too, and all of it again."""
    process = launch("train", tmp_path)
    workers = wait_until_up(process, tmp_path)
    for _ in range(2):
        for each in (process, *workers):
            each.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()
    assert shown == ""


def test_a_killed_launcher_ends_its_processes_which_save(tmp_path):
    process = launch("train", tmp_path)
    workers = wait_until_up(process, tmp_path)
    process.kill()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()


def test_an_update_that_does_not_end_after_a_stop_is_ended(tmp_path):
    process = launch("train, hang", tmp_path)
    wait_until_up(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 2 and shown.count("the update does not end") == 1, shown
    assert not (tmp_path / "saved-0").exists()


STUCK = """
import signal, time
from train_cc.io.errors import exits_on_input_error
from train_cc.run.stop import StopSignal

@exits_on_input_error
def main():
    StopSignal.FIRST_UPDATE = 2
    with StopSignal() as stop, stop.update():
        print("up", flush=True)
        {does}

main()
"""


@pytest.mark.parametrize(
    "does,number,words",
    [
        ("time.sleep(600)", signal.SIGTERM, "the update does not end"),
        ("time.sleep(600)", signal.SIGINT, "the update does not end"),
        (
            "while not stop.name: time.sleep(.1)\n        raise RuntimeError('g++ gone')",
            signal.SIGTERM,
            "g++ gone",
        ),
    ],
)
def test_one_process_whose_update_cannot_end_is_ended(does, number, words):
    """As when the signal ended a compiler: the main thread sleeps for ever, or gets its error."""
    command = [sys.executable, "-c", STUCK.replace("{does}", does)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 2 and words in shown and "what is saved stays" in shown, shown
    assert shown.count("error: ") == 1 and "Traceback" not in shown


@pytest.mark.slow
def test_sigterm_to_all_while_blocks_are_compiled_ends_the_run(teacher, tmp_path):
    """The compilers die of it, too. Their cache is empty, so that they have work."""
    from tests.conftest import flags  # with torch: not in the processes that this file is run in

    command = [sys.executable, "-m", "train_cc.cold_start", *flags(teacher, tmp_path / "run", "--compile")]
    environment = os.environ | NO_GPU | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "shown").open("w+") as shown:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=shown, start_new_session=True)
        deadline = time.monotonic() + 300
        while not compiles(process.pid, tmp_path / "shown"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) in (0, 2)
    assert "SIGTERM: the run " in (tmp_path / "shown").read_text()
    assert "Traceback" not in (tmp_path / "shown").read_text()


def compiles(pid: int, shown: Path) -> bool:
    """True while the first update's blocks are at the C++ compiler."""
    children = psutil.Process(pid).children(recursive=True)
    return "generator updates" in shown.read_text() and any("cc1plus" in child.name() for child in children)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)], ids=str)
def test_a_signal_before_training_ends_all_quietly(tmp_path, number):
    process = launch("sleep", tmp_path)
    workers = wait_until_up(process, tmp_path)
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 128 + number and shown == "stopped\n"
    assert not psutil.wait_procs(workers, timeout=5)[1]


def test_a_second_request_counts_after_ten_seconds_alone(monkeypatch):
    from train_cc.run import stop as stop_room

    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
    now = [100.0]
    monkeypatch.setattr(stop_room.time, "monotonic", lambda: now[0])
    with stop_room.StopSignal() as stop:
        for later in (0, 1, 8.9):
            now[0] = 100 + later
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.name == "SIGINT"
        now[0] = 110.1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_patience_grows_with_the_updates(monkeypatch):
    from train_cc.run import stop as stop_room

    now = [0.0]
    monkeypatch.setattr(stop_room.time, "monotonic", lambda: now[0])
    stop = stop_room.StopSignal()
    assert stop.patience() == 45
    for seconds, patience in ((1, 60), (100, 300), (2, 300)):
        with stop.update():
            now[0] += seconds
        assert stop.patience() == patience


# Numbers


NODES = {"NUM_NODES": "2", "NUM_PROCESSES": "4", "NODE_RANK": "1", "MAIN_ADDRESS": "localhost"}
MEET = {"NUM_NODES": "4", "NODE_RANK": "0", "MAIN_ADDRESS": "a"}


@pytest.mark.parametrize(
    "variables,told",
    [
        ({"NUM_PROCESSES": "abc"}, "NUM_PROCESSES is abc; allowed: a whole number"),
        ({"NUM_PROCESSES": "0"}, "NUM_PROCESSES is 0; allowed"),
        ({"NUM_PROCESSES": "-1"}, "NUM_PROCESSES is -1; allowed"),
        ({"NUM_PROCESSES": "1.5"}, "NUM_PROCESSES is 1.5; allowed"),
        ({"NUM_PROCESSES": "1000000"}, "NUM_PROCESSES is 1000000; allowed"),
        ({"NUM_NODES": "two"}, "NUM_NODES is two; allowed"),
        ({"NUM_NODES": "0"}, "NUM_NODES is 0; allowed"),
        (NODES | {"NUM_PROCESSES": "3"}, "NUM_PROCESSES is 3; allowed: a multiple of the 2 nodes"),
        (NODES | {"NODE_RANK": "2"}, "NODE_RANK is 2; allowed: 0 to 1"),
        (NODES | {"NODE_RANK": ""}, "NODE_RANK is missing"),
        (NODES | {"MAIN_ADDRESS": ""}, "MAIN_ADDRESS is missing"),
        (NODES | {"MAIN_PORT": "99999"}, "MAIN_PORT is 99999; allowed"),
    ],
)
def test_numbers_that_cannot_be(variables, told):
    from scripts.launch import make_plan
    from train_cc.io.errors import InputError

    with pytest.raises(InputError, match=told):
        make_plan(NO_GPU | variables)


@pytest.mark.parametrize(
    "variables,expected",
    [
        (NO_GPU, (1, 1)),
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, (2, 1)),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, (1, 1)),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,2"}, (1, 1)),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "NUM_PROCESSES": "1"}, (1, 1)),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "NUM_NODES": "2", "NODE_RANK": "0", "MAIN_ADDRESS": "a"}, (4, 2)),
        (NO_GPU | {"ACCELERATE_CONFIG": "scripts/accelerate/ddp.yaml"}, (1, 1)),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "ACCELERATE_CONFIG": "scripts/accelerate/ddp.yaml"}, (2, 1)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "ACCELERATE_CONFIG": "scripts/accelerate/fsdp2.yaml"}, (4, 1)),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "ACCELERATE_CONFIG": "scripts/accelerate/nodes_fsdp2.yaml", **MEET}, (8, 4)),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "ACCELERATE_CONFIG": "scripts/accelerate/one_cpu.yaml"}, (1, 1)),
    ],
    ids=str,
)
def test_how_many_processes(variables, expected):
    from scripts.launch import make_plan

    plan = make_plan(variables)
    assert (plan.processes, plan.nodes) == expected and plan.environment["NUM_PROCESSES"] == str(expected[0])


def test_every_config_of_ours_is_handed_on():
    from scripts.launch import make_plan

    found = {}
    for path in (ROOT / "scripts" / "accelerate").glob("*.yaml"):
        more = {"CUDA_VISIBLE_DEVICES": "0,1", "NODE_RANK": "0", "MAIN_ADDRESS": "a"}
        found[path.name] = make_plan(more | {"ACCELERATE_CONFIG": str(path)})
    assert {name for name, plan in found.items() if plan.environment["ACCELERATE_USE_FSDP"] == "true"} == {
        "fsdp2.yaml",
        "nodes_fsdp2.yaml",
    }
    assert all(plan.environment["ACCELERATE_MIXED_PRECISION"] == "no" for plan in found.values())
    assert all(plan.environment["FSDP_VERSION"] == "2" for plan in found.values())
    assert found["nodes.yaml"].nodes == 2 and found["nodes.yaml"].processes == 4


@pytest.mark.parametrize(
    "content,told",
    [
        ("distributed_type: DEEPSPEED", "distributed_type is DEEPSPEED; allowed"),
        ("mixed_precision: fp8", "mixed_precision is fp8; allowed"),
        ("dynamo_config: {dynamo_backend: INDUCTOR}", "dynamo_config, which nothing here follows"),
        ("fsdp_config: 3", "damaged or something else"),
        ("num_processes: many\nnum_machines: 1", "NUM_PROCESSES is many; allowed"),
        ("- a list", "damaged or something else"),
        ("a: [", "damaged or something else"),
        ("", "damaged or something else"),
    ],
)
def test_odd_configs(tmp_path, content, told):
    from scripts.launch import make_plan
    from train_cc.io.errors import InputError

    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(InputError, match=told):
        make_plan({"CUDA_VISIBLE_DEVICES": "0,1", "ACCELERATE_CONFIG": str(tmp_path / "c.yaml")})


@pytest.mark.slow
def test_two_nodes_on_one_machine(tmp_path):
    nodes = {"NUM_NODES": "2", "MAIN_ADDRESS": "127.0.0.1", "MAIN_PORT": "29871"}
    for what, code in (("done", 0), ("message in all", 2)):
        both = [launch(what, tmp_path, NODE_RANK=str(rank), **nodes) for rank in (0, 1)]
        shown = [process.communicate(timeout=120)[1] for process in both]
        assert [process.returncode for process in both] == [code, code], shown
        assert all(each.count("the teacher is nowhere") == (code == 2) for each in shown)


# The environment: python3, .venv's python and uv are replaced by scripts that note what they are asked

PYTHON3 = """#!/bin/bash
echo "python3 $*" >> "$NOTED"
[ "$1" = -c ] && exit 0
[ "$1 $2" = "-m venv" ] || exit 1
[ "$3" = --clear ] && rm -rf "$4"
mkdir -p "$4/bin"; cp "$STUBS/python" "$4/bin/python"; touch "$4/pyvenv.cfg"
[ -n "$DIES_IN_VENV" ] && kill -9 $PPID
echo 'VIRTUAL_ENV="$PWD/.venv"; PATH="$PWD/.venv/bin:$PATH"' > "$4/bin/activate"
"""
PYTHON = """#!/bin/bash
prefix=$(dirname "$(dirname "$0")")
case "$1 $2 $3" in
    "- "*) [ -e "$prefix/installed" ] ;;
    "-m pip --version") [ ! -e "$prefix/no-pip" ] ;;
    "-m pip install") echo "pip $*" >> "$NOTED"; touch "$prefix/installed"; [ -z "$DIES_IN_PIP" ] || kill -9 $PPID ;;
    *) echo "run by $prefix" >> "$NOTED" ;;
esac
"""
UV = """#!/bin/bash
echo "uv $*" >> "$NOTED"; touch "$VIRTUAL_ENV/installed"
"""


class Machine:
    """A checkout of two files, and stubs in front of the PATH."""

    def __init__(self, folder: Path):
        self.root, self.stubs, self.noted = folder / "checkout", folder / "stubs", folder / "noted"
        (self.root / "scripts").mkdir(parents=True)
        self.stubs.mkdir()
        (self.root / "scripts" / "env.sh").write_text((ROOT / "scripts" / "env.sh").read_text())
        (self.root / "requirements.txt").write_text("torch\n")
        for name, content in (("python3", PYTHON3), ("python", PYTHON), ("uv", UV)):
            (self.stubs / name).write_text(content)
            (self.stubs / name).chmod(0o755)

    def active(self, *files: str) -> dict[str, str]:
        """An environment that uv made, with ``files`` in it."""
        prefix = self.root.parent / "active"
        (prefix / "bin").mkdir(parents=True)
        (prefix / "bin" / "python").write_text(PYTHON)
        (prefix / "bin" / "python").chmod(0o755)
        (prefix / "pyvenv.cfg").write_text("home = /usr/bin\nuv = 0.9.1\n")
        for name in files:
            (prefix / name).touch()
        return {"VIRTUAL_ENV": str(prefix), "PATH": f"{prefix}/bin:{self.stubs}:{os.environ['PATH']}"}

    def start(self, **variables: str) -> tuple[int, list[str]]:
        """-> the exit code, and what was asked of the stubs."""
        self.noted.write_text("")
        environment = {"PATH": f"{self.stubs}:{os.environ['PATH']}", "NOTED": str(self.noted)}
        environment |= {"STUBS": str(self.stubs)} | variables
        done = subprocess.run(["bash", "-c", "source scripts/env.sh; python x"], cwd=self.root, env=environment)
        return done.returncode, self.noted.read_text().splitlines()


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


INSTALL = "pip -m pip install --quiet --disable-pip-version-check -r requirements.txt"
AGAIN = INSTALL.replace("-r ", "--ignore-installed -r ")


def test_an_environment_is_made_once(machine):
    code, noted = machine.start()
    assert code == 0 and noted[1:] == ["python3 -m venv --clear .venv", INSTALL, f"run by {machine.root}/.venv"]
    assert machine.start() == (0, [f"run by {machine.root}/.venv"])


@pytest.mark.parametrize("where,again", [("DIES_IN_VENV", INSTALL), ("DIES_IN_PIP", AGAIN)])
def test_an_interrupted_making_is_repaired_by_the_next_start(machine, where, again):
    assert machine.start(**{where: "1"})[0] != 0
    code, noted = machine.start()
    assert code == 0 and again in noted and noted[-1] == f"run by {machine.root}/.venv"
    assert machine.start() == (0, noted[-1:])


def test_an_environment_of_uv_is_used(machine):
    active = machine.active("no-pip", "installed")
    assert machine.start(**active) == (0, [f"run by {active['VIRTUAL_ENV']}"])
    assert not (machine.root / ".venv").exists()


def test_an_environment_of_uv_is_filled_by_uv(machine):
    active = machine.active("no-pip")
    code, noted = machine.start(**active)
    prefix = active["VIRTUAL_ENV"]
    assert code == 0 and noted == [
        f"uv pip install --quiet --python {prefix}/bin/python -r requirements.txt",
        f"run by {prefix}",
    ]


def test_what_is_no_environment_is_left_alone(machine):
    (machine.root / ".venv").mkdir()
    (machine.root / ".venv" / "thesis.tex").write_text("mine")
    assert machine.start()[0] == 2
    assert [path.name for path in (machine.root / ".venv").iterdir()] == ["thesis.tex"]


def test_this_environment_satisfies_without_pip(tmp_path):
    (tmp_path / "pip.py").write_text("raise ImportError('as in an environment that uv made')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "VIRTUAL_ENV": sys.prefix}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", "-c", "source scripts/env.sh; command -v python"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(Path(sys.executable).parent / "python"), done.stderr


if __name__ == "__main__":
    program(*sys.argv[1:])
