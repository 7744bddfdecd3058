"""Nobody waits for ever, and nobody gives up on a slow process: groups' timeouts, the meeting of processes, checkpoints
that are not the same on all nodes. This file is also the program that two processes run.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import evaluation.statistics
from evaluation import generate
from tests import ROOT
from tests.conftest import flags, run_cold_start, words
from tests.evaluation.test_statistics import digits
from train_cc.io.errors import InputError
from train_cc.io.processes import Place
from train_cc.run import devices

LIMIT, SLOW = 2, 4  # seconds: torch's default for a group in these processes, and what one of them takes longer
PHASES = {
    "loading": ("train_cc.setup.stage", "build"),
    "first cycle": ("train_cc.distillation.loop", "generator_turn"),
    "preview": ("train_cc.distillation.loop", "show"),
    "checkpoint": ("train_cc.distillation.loop", "save"),
    "export": ("train_cc.distillation.loop", "export"),
    "shard of samples": ("evaluation.samples.sampling", "generate_batch"),
    "shard of statistics": ("evaluation.samples.gathering", "part_moments"),
    "benchmark": ("evaluation.benchmark", "write_random_inputs"),
}
DONE: list[str] = []


def slow_down(phase: str) -> None:
    """The last process takes longer in ``phase``, the first time that it comes there."""
    module, name = PHASES[phase]
    call = getattr(import_module(module), name)

    def slow(*arguments, **options):
        last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        if last and phase not in DONE:
            time.sleep(SLOW)
        DONE.append(phase)
        return call(*arguments, **options)

    setattr(import_module(module), name, slow)


def worker(jobs: list[dict]) -> None:
    dist.distributed_c10d.default_pg_timeout = timedelta(seconds=LIMIT)
    for each in jobs:
        os.environ |= each.get("environment", {})
        if "folder" in each:  # each process sees storage of its own
            os.chdir(Path(each["folder"]) / os.environ["RANK"])
        DONE.clear()
        for phase in each["slow"]:
            slow_down(phase)
        import_module(each["command"]).main(each["flags"])
        assert set(each["slow"]) <= set(DONE), f"{each['slow']} were not all reached: {DONE}"
        assert not each.get("once") or len(DONE) == 1, f"{len(DONE)} parts were made by one of two processes"


def job(command: str, *arguments: object, slow: Sequence[str] = (), **more: object) -> dict:
    return {"command": command, "flags": words(*arguments), "slow": list(slow)} | more


def run_jobs(*jobs: dict, count: int = 2) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.launch", "tests.io.test_processes", json.dumps(jobs, default=str)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUM_PROCESSES": str(count), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_two_processes_share_the_parts_await_each_other_and_refuse_checkpoints_that_differ(
    teacher, reward_folder, tmp_path
):
    """Nobody gives up on a slow process after torch's default, and the files are those of one process.

    The checkpoints are of the same name and sizes, on disks of their own: each process would continue another run.
    """
    images = ["--generator", teacher, "--num-images", 6, "--shard-size", 3, "--output"]
    space = f"classifier:{reward_folder}"
    statistics = ["--images", digits(tmp_path / "real.npz"), "--space", space, "--shard-size", 40, "--output"]
    generate.main(words(*images, tmp_path / "samples-1.npz"))
    evaluation.statistics.main(words(*statistics, tmp_path / "statistics-1.npz"))
    for rank in (0, 1):
        output = tmp_path / str(rank) / "run"
        run_cold_start(teacher, output, "--max-train-steps", 1, "--seed", rank, "--num-previews", 0)
    done = run_jobs(
        job("evaluation.generate", *images, tmp_path / "samples-2.npz", slow=["shard of samples"], once=True),
        job(
            "evaluation.statistics", *statistics, tmp_path / "statistics-2.npz", slow=["shard of statistics"], once=True
        ),
        job("train_cc.cold_start", *flags(teacher, Path("run"), "--auto-resume", "--num-previews", 0), folder=tmp_path),
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "step-1.pt and its files are not the same for all processes" in done.stderr
    for name in ("samples", "statistics"):
        with np.load(tmp_path / f"{name}-1.npz") as one, np.load(tmp_path / f"{name}-2.npz") as two:
            for array in one.keys() - {"space", "provenance"}:
                atol = 1 if name == "samples" else 1e-10
                np.testing.assert_allclose(two[array].astype(float), one[array], rtol=0, atol=atol, err_msg=array)


def test_the_groups_of_a_mesh_of_nodes_have_our_timeout(monkeypatch):
    monkeypatch.setattr(dist.distributed_c10d, "default_pg_timeout", timedelta(seconds=LIMIT))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore(), timeout=devices.TIMEOUT)
    try:
        mesh = devices.mesh_of("cpu", (1, 1), ("replicate", "shard"))
        groups = [mesh.get_group(name) for name in ("replicate", "shard")]
        limits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    finally:
        dist.destroy_process_group()
    assert limits == [devices.TIMEOUT] * 2 and timedelta(hours=1) <= devices.TIMEOUT


def training_job(command: str, teacher: Path, output: Path, *more: object, sharded: bool, **environment: str) -> dict:
    environment |= {"ACCELERATE_USE_FSDP": str(sharded).lower()}
    slow = ["loading", "first cycle", "preview", "checkpoint", "export"]
    arguments = flags(teacher, output, "--max-train-steps", 2, *more)
    return job(command, *arguments, slow=slow, environment=environment)


@pytest.mark.slow
def test_a_slow_process_is_awaited_in_every_phase(teacher, tmp_path):
    """Training by DDP and FSDP2, the second stage and the benchmark; then by two nodes of two."""
    cold = "train_cc.cold_start"
    more = ("--resume-ckpt", tmp_path / "ddp/checkpoints/torch_units/step-2.pt", "--max-train-steps", 3)
    tiny = ("--size", "SiT-S/2", "--cycles", 1, "--batch-size", 1, "--ratio-update", 1, "--mixed-precision", "no")
    for count, jobs in (
        (2, [
            training_job(cold, teacher, tmp_path / "ddp", sharded=False),
            training_job(cold, teacher, tmp_path / "fsdp2", sharded=True),
            training_job("train_cc.dmdr_refl", teacher, tmp_path / "2", *more, "--encoder-type", "none", sharded=False),
            job("evaluation.benchmark", *tiny, slow=["benchmark"]),
        ]),
        (4, [training_job(cold, teacher, tmp_path / "nodes", sharded=True, LOCAL_WORLD_SIZE="2")]),
    ):  # fmt: skip
        done = run_jobs(*jobs, count=count)
        assert done.returncode == 0, done.stderr[-3000:]


# The meeting ------------------------------------------------------------------------------------------------------


@pytest.fixture
def port(monkeypatch) -> int:
    """A free port, where processes wait for a second."""
    monkeypatch.setattr(devices, "MEETING", timedelta(seconds=1))
    monkeypatch.setattr(devices, "FIRST", 0.25)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("rank,absent", [(0, "process 1, 2 at"), (2, "process 0 at")])
def test_a_meeting_has_a_limit_and_names_the_absent(port, capfd, rank, absent):
    with pytest.raises(InputError, match=f"of 3 processes waited .* in vain for {absent} localhost:{port}"):
        devices.meet(Place(rank, 3, "localhost", port))
    lines = [line for line in capfd.readouterr().err.splitlines() if f"waits for {absent} localhost:{port}" in line]
    assert 1 <= len(lines) <= 4


def test_a_taken_port_is_one_message(port):
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        with pytest.raises(InputError, match=f"process 0 cannot use MASTER_PORT of localhost:{port}"):
            devices.meet(Place(0, 2, "localhost", port))


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
