"""One rule for threads on the CPU: the cores that a process may use, shared by the processes beside it.

A thread that waits looks for its next work for some tens of microseconds, and then sleeps. Spinning for long, as OpenMP
does by itself, takes a core from other processes: beside these, two spinning threads are several times slower than one.
With a wait ten times shorter small networks take twice as long on some processors (docs/benchmarks.md). Variables that
the user has set are respected.
"""

import os
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
SPINS = 10_000  # looks of GNU's OpenMP, torch's on Linux; others sleep at once
_ours: dict[str, str] = {}  # what this process has set, and may set again


def quota(cgroup: Path = CGROUP) -> float:
    """Cores that a container may use, by its quota of time; infinity where there is none."""
    try:
        if (cgroup / "cpu.max").exists():  # version 2
            time, period = (cgroup / "cpu.max").read_text().split()
        else:
            time, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        cores = float(time) / float(period)  # "max" is no number
    except (OSError, ValueError):
        return float("inf")
    return cores if cores > 0 else float("inf")


def usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    there = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, int(min(there, quota())))


def share_cores(processes: int = 1) -> None:
    """Settle OpenMP's threads for this process and those that it starts, ``processes`` of them at once.

    Does nothing once torch is imported: OpenMP has read its variables then.
    """
    if "torch" in sys.modules:
        return
    variables = {"OMP_NUM_THREADS": str(max(1, usable_cores() // processes)), "OMP_WAIT_POLICY": "passive"}
    if os.environ.get("OMP_WAIT_POLICY") in (None, "", _ours.get("OMP_WAIT_POLICY")):
        variables["GOMP_SPINCOUNT"] = str(SPINS)
    for name, value in variables.items():
        if os.environ.get(name) in (None, "", _ours.get(name)):
            os.environ[name] = _ours[name] = value


def without_ours() -> dict[str, str]:
    """The environment without what `share_cores` has set: a command that gets it settles its own threads."""
    return {name: value for name, value in os.environ.items() if _ours.get(name) != value}
