"""The processes that were started, by the variables of torchrun, MPI and Slurm. No torch: the launcher reads it too."""

import argparse
import os
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

from train_cc.io.errors import InputError
from train_cc.io.fields import integer

MOST = 2**20
NO_DEVICE = ("", "-1", "NoDevFiles", "none", "void")  # words for none: CUDA's, Slurm's, the container toolkit's
# Of Open MPI; of MPICH, Intel MPI and srun --mpi=pmi2; of MVAPICH2. accelerate reads them.
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
NVIDIA_SMI = 60  # seconds
ONE_A_NODE = (
    "Start one task per node: the launchers of scripts/ start its processes, with NUM_NODES, NODE_RANK and "
    "MAIN_ADDRESS on several nodes (docs/multi_gpu.md)"
)


class Place(NamedTuple):
    """This process among all, and the address where they meet."""

    rank: int
    count: int
    address: str
    port: int


def count_of(environment: Mapping[str, str], name: str, low: int, high: int, default: object) -> int:
    """The whole number in variable ``name``, else ``default``. Raises `InputError` that says what is allowed."""
    try:
        return integer(low, high)(environment.get(name) or str(default))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{name} {error}") from None


def devices_listed(environment: Mapping[str, str]) -> list[str] | None:
    """The devices of CUDA_VISIBLE_DEVICES, or None if it is not set. CUDA stops reading at the first that is none."""
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is None:
        return None
    words = [word.strip() for word in visible.split(",")]
    return words[: next((i for i, word in enumerate(words) if word in NO_DEVICE), len(words))]


def gpus_shown() -> list[str]:
    """The lines of ``nvidia-smi -L`` that are of GPUs; none without such a command. Raises `InputError` if it hangs."""
    try:
        text = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI).stdout
    except subprocess.TimeoutExpired:
        raise InputError(
            f"nvidia-smi -L gave no answer in {NVIDIA_SMI} s, as when a GPU or its driver hangs. Try it by itself; "
            "CUDA_VISIBLE_DEVICES (0,1 and so on; empty: the CPU) before the command goes without it"
        ) from None
    except OSError:
        return []
    return [line for line in text.splitlines() if line.startswith("GPU ")]


def tasks(environment: Mapping[str, str]) -> tuple[str, int]:
    """The variable by which MPI or srun counts the tasks that it started, and their number; ("", 1) without one.

    A batch script and the shell of `srun --pty` have Slurm's variables too, and are one task.
    """
    names = list(MPI)
    step = "SLURM_STEP_ID" in environment or environment.get("SLURM_PROCID", "0") != "0"
    if step and "SLURM_PTY_PORT" not in environment:
        names.append("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS")
    counts = {name: count_of(environment, name, 0, MOST, 1) for name in names}
    name = max(counts, key=counts.get)
    return (name, counts[name]) if counts[name] > 1 else ("", 1)


def require_no_other_tasks(environment: Mapping[str, str], expected: int) -> None:
    """Raises `InputError` where MPI or srun started more than the ``expected`` processes, which cannot meet."""
    name, count = tasks(environment)
    if count > expected:
        raise InputError(
            f"{name} is {count}: mpirun or srun started {count} processes that do not know of each other "
            f"(WORLD_SIZE is {environment.get('WORLD_SIZE') or 'not set'}). {ONE_A_NODE}. For a single process unset "
            f"{name}"
        )


def require_same_count(expected: int, count: int) -> None:
    """Raises `InputError` where ``expected`` processes were asked for and WORLD_SIZE or the start is ``count``."""
    if expected == count:
        return
    if count == 1:
        raise InputError(f"NUM_PROCESSES is {expected}, but 1 process(es) were started: use a launcher of scripts/")
    raise InputError(
        f"NUM_PROCESSES is {expected}, but WORLD_SIZE is {count}, as clusters set it for their pods. For a run of "
        f"{expected} process(es) unset WORLD_SIZE, RANK and MASTER_ADDR. {ONE_A_NODE}"
    )


def require_alone(environment: Mapping[str, str], processes: int, nodes: int) -> None:
    """Raises `InputError` where a launcher of ``processes`` is one of several that something else started."""
    require_no_other_tasks(environment, nodes)
    pods = environment.get("PET_NNODES") or "1"  # of torchrun, as Kubeflow sets it; MIN:MAX if elastic
    if nodes == 1 and pods not in ("1", "1:1"):
        raise InputError(f"PET_NNODES is {pods}, but NUM_NODES is 1. {ONE_A_NODE}. For a single node unset PET_NNODES")
    count = count_of(environment, "WORLD_SIZE", 1, MOST, 1)
    if nodes == 1 and count > 1:
        require_same_count(processes, count)


def started(exact: bool = False) -> Place:
    """This process among all that were started. Raises `InputError`, before anything waits, if they cannot meet.

    ``exact``: one process is refused where NUM_PROCESSES asks for several.
    """
    environment = os.environ
    count = count_of(environment, "WORLD_SIZE", 1, MOST, 1)
    require_no_other_tasks(environment, count)
    expected = count_of(environment, "NUM_PROCESSES", 1, MOST, count)
    if exact or count > 1:
        require_same_count(expected, count)
    if count == 1:
        return Place(0, 1, "", 0)
    missing = [name for name in ("RANK", "MASTER_ADDR") if not environment.get(name)]
    if missing:
        raise InputError(f"WORLD_SIZE is {count}, but {' and '.join(missing)} not set. {ONE_A_NODE}")
    rank = count_of(environment, "RANK", 0, count - 1, "")
    count_of(environment, "LOCAL_RANK", 0, count - 1, 0)
    count_of(environment, "LOCAL_WORLD_SIZE", 1, count, 1)
    return Place(rank, count, environment["MASTER_ADDR"], count_of(environment, "MASTER_PORT", 1, 65535, 29500))
