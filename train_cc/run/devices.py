"""The devices and process groups of all commands: one way to open them, and to say why they cannot be used."""

import contextlib
import math
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.device_mesh import DeviceMesh

from train_cc.io.errors import FIRST, InputError
from train_cc.io.processes import Place, devices_listed, gpus_shown, started
from train_cc.io.read import first_line

T = TypeVar("T")
# How long a process waits for the others. Some wait while one hashes, downloads or ends its part of a sampling.
TIMEOUT = timedelta(hours=6)
SHARDS_TIMEOUT = timedelta(days=2)  # with its shards done, a process waits for the slowest
MEETING = timedelta(minutes=10)  # until all processes have come to the address where they meet
ON_THE_CPU = "CUDA_VISIBLE_DEVICES= (empty) before the command runs on the CPU"


def why_not() -> str:
    """The reason why torch has no CUDA here."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a wheel without CUDA: install one with it (https://pytorch.org)"
    try:
        torch.cuda.init()
    except Exception as error:  # of the driver, whatever it says
        return f"torch {torch.__version__} for CUDA {torch.version.cuda} says: {first_line(error)}"
    return f"torch {torch.__version__} for CUDA {torch.version.cuda} finds none of them"


def require_usable_gpus() -> None:
    """Raises `InputError` for GPUs that are shown and cannot be used: an old driver, a wrong wheel, a card too new."""
    words = devices_listed(os.environ)
    listed = words or []
    visible = f"CUDA_VISIBLE_DEVICES is {','.join(listed)} (gpu_ids of an accelerate config set it too)"
    if not torch.cuda.is_available():
        if words != [] and (gpus := gpus_shown()):  # [] hides all
            raise InputError(
                f"nvidia-smi shows {len(gpus)} GPU(s), but torch cannot use them. {why_not()}. {ON_THE_CPU}"
            )
        if listed:
            raise InputError(f"{visible}, but there is no GPU here that torch can use. {why_not()}. {ON_THE_CPU}")
        return
    if len(listed) > torch.cuda.device_count():
        raise InputError(
            f"{visible}, but torch finds {torch.cuda.device_count()} of these {len(listed)} devices; list those that "
            "nvidia-smi -L shows, each once (of MIG instances a process sees one)"
        )
    place = int(os.environ.get("LOCAL_RANK", 0))
    if place >= torch.cuda.device_count():
        raise InputError(
            f"NUM_PROCESSES asks for more than the {torch.cuda.device_count()} visible GPU(s) of this machine, one "
            "process each"
        )
    try:
        torch.zeros(1, device=f"cuda:{place}").add_(1).item()
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(place)
        raise InputError(
            f"{torch.cuda.get_device_name(place)} (sm_{major}{minor}) cannot compute with torch {torch.__version__}, "
            f"which has kernels for {' '.join(torch.cuda.get_arch_list())}: {first_line(error)}. {ON_THE_CPU}"
        ) from error


def device() -> torch.device:
    """The device of a command that is one process. Raises `InputError` for a GPU that cannot be used."""
    require_usable_gpus()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Several processes ------------------------------------------------------------------------------------------------


def open_processes(timeout: timedelta = TIMEOUT, exact: bool = False) -> PartialState:
    """The processes that were started, in one group that waits for ``timeout``. Raises `InputError`.

    ``exact``: one process is refused where NUM_PROCESSES asks for several.
    """
    require_usable_gpus()
    if dist.is_initialized():
        return PartialState(cpu=not torch.cuda.is_available())
    place = started(exact)
    complete_environment(place)
    if "LOCAL_RANK" in os.environ:
        store = meet(place) if place.count > 1 else dist.HashStore()
        store.set_timeout(timeout)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.count, timeout=timeout)
    return PartialState(cpu=not torch.cuda.is_available())


def complete_environment(place: Place) -> None:
    """A pod of a cluster may have no LOCAL_RANK: it is one process, with one GPU or none. Raises `InputError`."""
    if place.count > 1 and "LOCAL_RANK" not in os.environ:
        if torch.cuda.device_count() > 1:
            raise InputError(
                f"WORLD_SIZE is {place.count}, but LOCAL_RANK is missing: which of the {torch.cuda.device_count()} "
                "GPUs here is this process to use? Start it by a launcher of scripts/ (docs/multi_gpu.md)"
            )
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def meet(place: Place) -> dist.Store:
    """The store of all processes, once each has come. Raises `InputError` that names those that have not."""
    where = f"{place.address}:{place.port}"
    hosts = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def answers() -> bool:  # a TCPStore that tries fills the screen with its warnings
        with contextlib.suppress(OSError):
            socket.create_connection((place.address, place.port), timeout=5).close()
            return True
        return False

    if not hosts:
        patiently(answers, place, lambda: f"process 0 at {where}")
    try:
        end = (place.address, place.port, place.count, hosts, MEETING)
        store = dist.TCPStore(*end, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        raise InputError(f"process {place.rank} cannot use MASTER_PORT of {where}: {first_line(error)}") from None
    store = dist.PrefixStore(f"dmdr-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    keys = [f"process-{rank}" for rank in range(place.count)]

    def absent() -> str:
        if place.rank > 0:  # one looks for all
            return f"the others at {where}"
        ranks = [rank for rank, key in enumerate(keys) if not store.check([key])]
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        return f"process {', '.join(map(str, ranks[:8]))}{more} at {where}"

    try:
        store.set(keys[place.rank], "")
        patiently(lambda: store.check(keys), place, absent)
    except dist.DistError as error:
        raise InputError(f"process 0 at {where} ended while the others came: {first_line(error)}") from None
    return store


def patiently(attempt: Callable[[], T], place: Place, whom: Callable[[], str]) -> T:
    """The first true result of ``attempt()``; says for ``whom()`` it waits. Raises `InputError` after `MEETING`."""
    who = "process 0" if place.rank == 0 else "one"
    began = last = time.monotonic()
    while not (result := attempt()):
        waited = time.monotonic() - began
        if waited > MEETING.total_seconds():
            raise InputError(
                f"{who} of {place.count} processes waited {waited / 60:.0f} minutes in vain for {whom()}: start all "
                "with the same WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or unset WORLD_SIZE for a single process"
            )
        if time.monotonic() - last > FIRST:
            last = time.monotonic()
            print(f"{who} of {place.count} processes waits for {whom()}, {waited:.0f} s", file=sys.stderr, flush=True)
        time.sleep(min(0.05 + waited / 20, 1))
    return result


def mesh_of(device_type: str, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """All processes as a mesh of ``shape``; its groups wait for `TIMEOUT`, where torch's own would take its default."""
    if len(shape) == 1:
        return DeviceMesh.from_group(dist.group.WORLD, device_type, mesh_dim_names=names)
    ranks = torch.arange(math.prod(shape)).view(shape)
    groups = [dist.new_subgroups_by_enumeration(rows.tolist(), TIMEOUT)[0] for rows in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=names)
