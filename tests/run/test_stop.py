"""train_cc/run/stop.py: an update that ends after a request, and one that cannot."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import ROOT
from tests.conftest import flags
from train_cc.run import stop as stop_room

STUCK = """
import signal, time
from train_cc.io.errors import exits_on_input_error
from train_cc.run.stop import StopSignal

@exits_on_input_error
def main():
    StopSignal.FIRST_UPDATE = 1
    with StopSignal() as stop, stop.update():
        print("up", flush=True)
        {does}

main()
"""


@pytest.mark.parametrize(
    "does,number,words",
    [
        ("time.sleep(600)", signal.SIGINT, "the update does not end"),
        ("while not stop.name: time.sleep(.1)\n        raise RuntimeError('g++ gone')", signal.SIGTERM, "g++ gone"),
    ],
)
def test_one_process_whose_update_cannot_end_is_ended(does, number, words):
    command = [sys.executable, "-c", STUCK.replace("{does}", does)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 2 and words in shown and "what is saved stays" in shown, shown
    assert shown.count("error: ") == 1 and "Traceback" not in shown


def test_a_second_request_counts_only_after_ten_seconds(monkeypatch):
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
    now = [0.0]
    monkeypatch.setattr(stop_room.time, "monotonic", lambda: now[0])
    stop = stop_room.StopSignal()
    assert stop.patience() == 45
    for seconds, patience in ((1, 60), (100, 300), (2, 300)):
        with stop.update():
            now[0] += seconds
        assert stop.patience() == patience


@pytest.mark.slow
def test_sigterm_to_all_while_blocks_are_compiled_ends_the_run(teacher, tmp_path):
    """The compilers die of it, too. Their cache is empty, so that they have work."""
    command = [sys.executable, "-m", "train_cc.cold_start", *flags(teacher, tmp_path / "run", "--compile")]
    variables = {"CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "shown").open("w+") as shown:
        options = {"env": os.environ | variables, "stderr": shown, "start_new_session": True}
        process = subprocess.Popen(command, cwd=ROOT, **options)
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
