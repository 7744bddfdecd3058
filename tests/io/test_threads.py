"""train_cc/io/threads.py: what OpenMP is told."""

import os
import subprocess
import sys

import pytest

from tests import ROOT
from train_cc.io import threads

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
def test_a_containers_quota_counts(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.quota(tmp_path) == cores


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
    """The other commands import torch inside of `main` (tests/scripts/test_structure.py)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "passive"
