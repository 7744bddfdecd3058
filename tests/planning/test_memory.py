"""The simulated cycle against real ones: FLOP, what is alive, sharding, and the peak that a process allocates.

This file is also the program that is measured: `python -m tests.planning.test_memory SIZE BATCH`, one thread.
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.conftest import RandomNetworks, build_run, flags
from train_cc import cold_start
from train_cc.distillation.loop import cycle
from train_cc.models.backbone import SIT_SIZES
from train_cc.planning.memory import GIB, MOST_CHUNKS, Cost, simulate
from train_cc.run.meters import FlopCounter
from train_cc.run.session import open_session
from train_cc.setup.build import build


def simulated(teacher, output, *more, processes=1) -> Cost:
    args = cold_start.stage_parser().parse_args(flags(teacher, output, "--num-previews", 0, *more))
    return simulate(args, args.mixed_precision, processes)


def training_peak(cost: Cost) -> int:
    return max(value for name, value in cost.peaks.items() if name.startswith("training"))


@pytest.fixture
def sharded(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")


def test_flop_are_those_of_a_real_cycle(teacher, tmp_path):
    """More estimator turns and accumulated batches than the simulation goes through."""
    more = ["--ratio-update", 2, "--gradient-accumulation-steps", MOST_CHUNKS + 3]
    run = build_run(teacher, tmp_path / "run", *more)
    with FlopCounter() as counter:
        cycle(run, 0)
    assert counter.total > 0 and simulated(teacher, tmp_path / "other", *more).flop == counter.total


def test_a_run_is_resumed_in_what_it_holds_between_cycles(teacher, tmp_path):
    cost = simulated(teacher, tmp_path, "--ema-decay", 0.9)
    trained, _ = cost.parameters["generator"]
    assert cost.resident["generator moments"] == pytest.approx(8 * trained, rel=0.2)  # each is rounded up to 512 bytes
    assert cost.resident["EMA"] == pytest.approx(4 * trained, rel=0.2)
    (rest,) = (value for name, value in cost.resident.items() if name.startswith("other"))
    assert 0 <= rest < 8192
    assert cost.peaks["resuming"] == pytest.approx(sum(cost.resident.values()), rel=0.05)
    assert cost.peak() == max(value for name, value in cost.peaks.items() if "sampling" not in name)


def test_under_ddp_gradients_stay_in_their_buckets(teacher, tmp_path):
    single, ddp = (simulated(teacher, tmp_path, processes=processes) for processes in (1, 2))
    trained = 4 * single.parameters["generator"][0]
    assert trained <= sum(ddp.resident.values()) - sum(single.resident.values()) < 1.3 * trained


def test_accumulation_under_fsdp2_holds_whole_gradients(teacher, tmp_path, sharded):
    more = ["--batch-size", 1, "--gradient-accumulation-steps"]
    once, twice = (simulated(teacher, tmp_path, *more, chunks, processes=2) for chunks in (1, 2))
    trained = 4 * once.parameters["generator"][0]
    grown = twice.peaks["training, generator turn"] - once.peaks["training, generator turn"]
    assert 0.8 * trained < grown < 1.2 * trained
    assert once.sharded_over == 2 and twice.sent > once.sent > 0


def test_nodes_hold_a_copy_each_unless_all_are_sharded_over(teacher, tmp_path, sharded, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    node, everyone = (simulated(teacher, tmp_path, "--shard-over", over, processes=8) for over in ("node", "all"))
    assert (node.sharded_over, everyone.sharded_over) == (4, 8)
    assert node.resident["generator moments"] > 1.3 * everyone.resident["generator moments"]  # rounded up to 512 bytes
    # A whole moment is there for a while.
    resuming, training = everyone.peaks["resuming"], training_peak(everyone)
    assert sum(everyone.resident.values()) < resuming <= training < max(everyone.peaks.values())


@pytest.mark.parametrize(
    ("row", "processes"),
    [("| (nothing) | 64 |", 1), pytest.param("fsdp2.yaml` | 512 |", 8, marks=pytest.mark.slow)],
)
def test_a_row_of_the_page_is_what_is_simulated(monkeypatch, row, processes):
    """docs/memory.md; the README has the same peaks."""
    (line,) = [line for line in (ROOT / "docs" / "memory.md").read_text().splitlines() if row in line]
    _, training, resuming, *_ = [cell.strip() for cell in line.split("|")][2:]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(processes > 1).lower())
    args = cold_start.stage_parser().parse_args(["--teacher", "SiT-XL/2", "--output-dir", "-", "--num-previews", "0"])
    cost = simulate(args, "bf16", processes)
    assert abs(training_peak(cost) / GIB - float(training)) < 0.16  # the page's has the decoder of the previews: 0.09
    assert abs(cost.peaks["resuming"] / GIB - float(resuming)) < 0.16


# The peak of a real process on a CPU, beyond its libraries -----------------------------------------------------------

# Each tensor of a page and more in pages of its own, given back when it is freed: else freed memory counts as held.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_MMAP_MAX_": "10000000", "MALLOC_ARENA_MAX": "1"}


def arguments(size: str, batch: int):
    words = ["--teacher", size, "--output-dir", "-", "--vae", "stabilityai/sd-vae-ft-ema", "--mixed-precision", "no"]
    words += ["--batch-size", str(batch), "--num-previews", "0", "--ratio-update", "1"]
    return cold_start.stage_parser().parse_args(words)


def resident(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure(size: str, batch: int) -> int:
    """Return the peak of a second cycle, less what the process held after cycles of a small run."""

    def two_cycles(config: dict, batch: int) -> None:
        session = open_session("no")
        run = build(arguments(size, batch), session, RandomNetworks(session, config))
        cycle(run, 0)
        tidy()
        cycle(run, 1)

    two_cycles(SIT_SIZES["SiT-S/8"] | {"depth": 2, "hidden_size": 96}, 1)
    before = tidy()
    two_cycles(SIT_SIZES[size], batch)
    return resident("VmHWM") - before


def tidy() -> int:
    """Forget the peak so far; return the bytes that are resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


@pytest.mark.slow
@pytest.mark.parametrize(("size", "batch"), [("SiT-B/2", 8), ("SiT-XL/2", 1)])
def test_the_simulated_peak_is_that_of_a_real_run(size, batch):
    environment = os.environ | MALLOC | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.planning.test_memory", size, str(batch)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    cost = simulate(arguments(size, batch), "no", 1)
    peak = training_peak(cost)
    print(f"\n{size}, batch {batch}: simulated {peak / GIB:.2f} GiB, measured {measured / GIB:.2f} GiB")
    assert peak == pytest.approx(measured, rel=0.05)


if __name__ == "__main__":
    print(measure(sys.argv[1], int(sys.argv[2])))
