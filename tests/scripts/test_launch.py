"""scripts/launch.py: numbers, messages, exit codes, signals.

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

from scripts.launch import make_plan
from tests import ROOT
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.run.stop import StopSignal

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@exits_on_input_error
def program(what: str, folder: Path) -> None:
    """What the launched processes do."""
    rank = int(os.environ.get("RANK", 0))
    if what == "plan":
        print(os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"], file=sys.stderr)
    if what == "message in all" or (what == "message in one" and rank == 1):
        raise InputError("the teacher is nowhere")
    if what == "bug":
        raise ZeroDivisionError(f"in process {rank}")
    if what == "message in one":  # once it is asked to end, which it is not to wait for
        signal.signal(signal.SIGTERM, lambda number, frame: 1 / 0)
        time.sleep(120)
    if what in ("killed", "hangs") and rank == 1:
        while not (folder / "up-0").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL) if what == "killed" else sys.exit(3)
    if what in ("killed", "hangs"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in an update: it notices by its lost connection
        (folder / "up-0").touch()
        time.sleep(0.5 if what == "killed" else 600)
        raise RuntimeError("Connection closed by peer")
    if what == "sleep":
        (folder / f"up-{rank}").touch()
        time.sleep(120)
    if what == "ends":
        atexit.register((folder / f"exit-{rank}").touch)
        sys.modules["late"] = Late(folder / f"torn-{rank}")
    if what == "train":  # updates of 0.2 seconds, and a checkpoint that takes one
        with StopSignal() as stop:
            while not stop.name:
                time.sleep(0.2)
                (folder / f"up-{rank}").touch()
            time.sleep(1)
        (folder / f"saved-{rank}").touch()


class Late:
    """Leaves ``trace`` when Python tears itself down, as a thread of torch can then end the process."""

    def __init__(self, trace: Path):
        self.trace = os.fspath(trace)

    def __del__(self, open=open) -> None:
        open(self.trace, "w").close()


def launch(what: str, folder: Path, *more: str, **variables: str) -> subprocess.Popen:
    environment = os.environ | NO_GPU | {"NUM_PROCESSES": "2"} | variables
    command = [sys.executable, "-m", "scripts.launch", "tests.scripts.test_launch", what, str(folder), *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal
    )


def as_in_a_terminal() -> None:
    """A shell in the background ignores SIGINT, nohup SIGHUP, and what it starts inherits that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def processes_of(launcher: subprocess.Popen, folder: Path) -> list[psutil.Process]:
    """The launched processes, once all are up."""
    deadline = time.monotonic() + 90
    while not all((folder / f"up-{rank}").exists() for rank in (0, 1)):
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return psutil.Process(launcher.pid).children()


# Messages, exit codes, signals ------------------------------------------------------------------------------------

AFTER_IT = ["process 0 after it: RuntimeError: Connection closed by peer"]


@pytest.mark.parametrize(
    "what,code,words,more",
    [
        ("message in one", 2, "error: the teacher is nowhere", []),
        ("bug", 1, "ZeroDivisionError: in process", None),
        pytest.param("hangs", 3, "", [], marks=pytest.mark.slow),  # for half a minute
        ("killed", 137, "error: process 1 was ended by SIGKILL", AFTER_IT),
    ],
)
def test_messages_are_shown_once_and_the_exit_code_is_that_of_the_processes(tmp_path, what, code, words, more):
    launcher = launch(what, tmp_path)
    _, shown = launcher.communicate(timeout=25 if what != "hangs" else 90)
    assert launcher.returncode == code, shown
    assert shown.count(words) == 1 if words else shown == ""
    assert shown.count("Traceback") == (what == "bug")
    assert more is None or shown.splitlines()[1:] == more


def test_a_process_that_is_done_ends_before_python_tears_itself_down(tmp_path):
    """What libraries registered for the exit is done before."""
    assert launch("ends", tmp_path).wait(timeout=90) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"exit-0", "exit-1"}


@pytest.mark.parametrize("all_twice", [True, False])
def test_a_stop_saves_once_and_ends_well(tmp_path, all_twice):
    """To the launcher alone, or as by Slurm and systemd: to the launcher and its processes, and all of it again."""
    launcher = launch("train", tmp_path)
    workers = processes_of(launcher, tmp_path)
    for _ in range(2 if all_twice else 1):
        for each in (launcher, *(workers if all_twice else ())):
            each.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    _, shown = launcher.communicate(timeout=60)
    assert launcher.returncode == 0 and shown == "", shown
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()


def test_a_killed_launcher_ends_its_processes_which_save(tmp_path):
    launcher = launch("train", tmp_path)
    workers = processes_of(launcher, tmp_path)
    launcher.kill()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)], ids=str)
def test_a_signal_before_training_ends_all_quietly(tmp_path, number):
    launcher = launch("sleep", tmp_path)
    workers = processes_of(launcher, tmp_path)
    launcher.send_signal(number)
    _, shown = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + number and shown == "stopped\n"
    assert not psutil.wait_procs(workers, timeout=5)[1]


def test_two_nodes_on_one_machine(tmp_path):
    nodes = {"NUM_NODES": "2", "MAIN_ADDRESS": "127.0.0.1", "MAIN_PORT": "29871"}
    for what, code in (("ends", 0), ("message in all", 2)):
        both = [launch(what, tmp_path, NODE_RANK=str(rank), **nodes) for rank in (0, 1)]
        shown = [launcher.communicate(timeout=90)[1] for launcher in both]
        assert [launcher.returncode for launcher in both] == [code, code], shown
        assert all(each.count("the teacher is nowhere") == (code == 2) for each in shown)
    assert {file.name for file in tmp_path.iterdir()} == {"exit-0", "exit-1"}


def test_a_plan_is_made_by_one_process_without_nodes_to_meet(tmp_path):
    launcher = launch("plan", tmp_path, "--dry-run", NUM_NODES="2", NUM_PROCESSES="16")
    assert launcher.communicate(timeout=90)[1] == "16 8\n"


# Numbers ----------------------------------------------------------------------------------------------------------

TWO_GPUS = {"CUDA_VISIBLE_DEVICES": "0,1"}
NODES = {"NUM_NODES": "2", "NODE_RANK": "1", "MAIN_ADDRESS": "localhost"}


def config(name: str) -> dict[str, str]:
    return {"ACCELERATE_CONFIG": f"scripts/accelerate/{name}.yaml"}


def plan_of(source: dict[str, str] | str, folder: Path):
    """The plan of variables, or of the text of a config."""
    if isinstance(source, dict):
        return make_plan(source)
    (folder / "c.yaml").write_text(source)
    return make_plan({"ACCELERATE_CONFIG": str(folder / "c.yaml")})


@pytest.mark.parametrize(
    "variables,processes,nodes,fsdp",
    [
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, 2, 1, None),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,2"}, 1, 1, None),
        (TWO_GPUS | {"NUM_PROCESSES": "1"}, 1, 1, None),
        (TWO_GPUS | NODES, 4, 2, None),
        (NO_GPU | config("ddp"), 1, 1, "false"),
        (TWO_GPUS | config("ddp"), 2, 1, "false"),
        (TWO_GPUS | config("fsdp2"), 2, 1, "true"),
        (TWO_GPUS | NODES | config("nodes") | {"NUM_NODES": ""}, 4, 2, "false"),
        (TWO_GPUS | NODES | config("nodes_fsdp2") | {"NUM_NODES": "4"}, 8, 4, "true"),
        (TWO_GPUS | config("one_cpu"), 1, 1, "false"),
        ("gpu_ids: 0,2,3", 3, 1, "false"),
    ],
    ids=str,
)
def test_how_many_processes_and_what_a_config_says(tmp_path, variables, processes, nodes, fsdp):
    plan = plan_of(variables, tmp_path)
    assert (plan.processes, plan.nodes) == (processes, nodes)
    assert plan.environment["NUM_PROCESSES"] == str(processes)
    assert plan.environment.get("ACCELERATE_USE_FSDP") == fsdp
    names = ("ACCELERATE_MIXED_PRECISION", "FSDP_VERSION")
    assert fsdp is None or [plan.environment[name] for name in names] == ["no", "2"]


@pytest.mark.parametrize(
    "variables,words",
    [
        ({"NUM_PROCESSES": "abc"}, "NUM_PROCESSES is abc; allowed: a whole number"),
        ({"NUM_PROCESSES": "1000000"}, "NUM_PROCESSES is 1000000; allowed"),
        (NODES | {"NUM_PROCESSES": "3"}, "NUM_PROCESSES is 3; allowed: a multiple of the 2 nodes"),
        (NODES | {"NODE_RANK": "2"}, "NODE_RANK is 2; allowed: 0 to 1"),
        (NODES | {"NODE_RANK": ""}, "NODE_RANK is missing"),
        (NODES | {"MAIN_ADDRESS": ""}, "MAIN_ADDRESS is missing"),
        (NODES | {"MAIN_PORT": "99999"}, "MAIN_PORT is 99999; allowed"),
        ("distributed_type: DEEPSPEED", "distributed_type is DEEPSPEED; allowed"),
        ("mixed_precision: fp8", "mixed_precision is fp8; allowed"),
        ("dynamo_config: {dynamo_backend: INDUCTOR}", "dynamo_config, which nothing here follows"),
        ("a: [", "damaged or something else"),
    ],
    ids=str,
)
def test_numbers_and_configs_that_cannot_be(tmp_path, variables, words):
    with pytest.raises(InputError, match=words):
        plan_of(variables, tmp_path)


if __name__ == "__main__":
    program(sys.argv[1], Path(sys.argv[2]))
