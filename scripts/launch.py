"""Start a module as one process a visible GPU, or one on the CPU: `python -m scripts.launch train_cc.cold_start FLAGS`.

NUM_PROCESSES and ACCELERATE_CONFIG override; with several nodes: NUM_NODES, NODE_RANK, MAIN_ADDRESS, MAIN_PORT, where
NUM_PROCESSES counts those of all nodes. One process needs no launcher, and has none. Several get torchrun's variables,
but their messages are shown once, and the exit code is theirs; a signal is handed on to them, and they are waited for,
however long a checkpoint takes (torchrun kills after 30 s below torch 2.12); and they end if the launcher was killed.
"""

import atexit
import contextlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from scripts.jobs import signals_received
from train_cc.io.errors import InputError, exits_on_input_error, report
from train_cc.io.processes import count_of, devices_listed, gpus_shown, require_alone
from train_cc.io.read import parsing
from train_cc.io.threads import share_cores

MOST_ON_A_NODE = 256
GRACE = 30  # seconds from the first failure until the other processes are killed
CONFIG = "an accelerate config, such as those in scripts/accelerate/,"
KINDS, PRECISIONS = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP"), ("no", "fp16", "bf16")
# Sections of an accelerate config that ask for what this project does not do.
NOT_DONE = ("deepspeed_config", "megatron_lm_config", "dynamo_config", "parallelism_config", "fp8_config", "tpu_config")


# The number of processes ------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """``processes`` over all nodes; ``environment``: variables of each."""

    processes: int
    nodes: int
    environment: dict[str, str]
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0


def visible_gpus(environment: Mapping[str, str]) -> int:
    listed = devices_listed(environment)
    return len(gpus_shown() if listed is None else listed)


def read_config(path: Path) -> tuple[dict, dict[str, str]]:
    """An accelerate config, and the variables that accelerate's own launcher would set, as far as they count here.

    Raises `InputError` for a config that asks for what is not done here.
    """
    import yaml

    if not path.exists():
        raise InputError(f"ACCELERATE_CONFIG is {path}, which does not exist; {CONFIG} is expected")
    with parsing(path, CONFIG):
        config = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        fsdp = dict(config.get("fsdp_config") or {})
    if unused := [name for name in NOT_DONE if config.get(name)]:
        raise InputError(f"{path} has {', '.join(unused)}, which nothing here follows: remove it (--compile compiles)")
    kind = config.get("distributed_type") or "NO"  # an unquoted no is False
    precision = str(config.get("mixed_precision") or "no").lower()
    for name, value, allowed in (("distributed_type", kind, KINDS), ("mixed_precision", precision, PRECISIONS)):
        if value not in allowed:
            raise InputError(f"{path}: {name} is {value}; allowed: {', '.join(allowed)}")
    variables = {"ACCELERATE_MIXED_PRECISION": precision, "ACCELERATE_USE_FSDP": str(kind == "FSDP").lower()}
    return config, variables | {"FSDP_VERSION": str(fsdp.get("fsdp_version", 2))}


def make_plan(environment: Mapping[str, str], dry: bool = False) -> Plan:
    """Raises `InputError` for numbers that cannot be and, unless ``dry``, for what nodes lack to meet."""
    config, variables = {}, {}
    if path := environment.get("ACCELERATE_CONFIG"):
        config, variables = read_config(Path(path))
    if config.get("use_cpu") is True:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    elif config.get("gpu_ids", "all") != "all" and "CUDA_VISIBLE_DEVICES" not in environment:
        listed = config["gpu_ids"]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, listed if isinstance(listed, list) else [listed]))
    gpus = visible_gpus(environment | variables)
    nodes = count_of(environment, "NUM_NODES", 1, 10_000, config.get("num_machines", 1))
    # Our own configs name no number. Without GPUs another one's, meant for GPUs, says nothing.
    usual = (config.get("num_processes") or gpus * nodes) if gpus else nodes
    processes = count_of(environment, "NUM_PROCESSES", 1, nodes * MOST_ON_A_NODE, usual)
    if processes % nodes:
        raise InputError(f"NUM_PROCESSES is {processes}; allowed: a multiple of the {nodes} nodes")
    plan = Plan(processes, nodes, variables | {"NUM_PROCESSES": str(processes)})
    if nodes == 1 or dry:
        return plan
    address = environment.get("MAIN_ADDRESS") or str(config.get("main_process_ip") or "")
    if not address:
        raise InputError("MAIN_ADDRESS is missing: the address of node 0, for the others to meet there")
    if not environment.get("NODE_RANK"):
        raise InputError(f"NODE_RANK is missing: the number of this node, 0 to {nodes - 1}")
    rank = count_of(environment, "NODE_RANK", 0, nodes - 1, "")
    port = count_of(environment, "MAIN_PORT", 1, 65535, config.get("main_process_port") or 29500)
    return plan._replace(rank=rank, address=address, port=port)


# A process of several ---------------------------------------------------------------------------------------------


def follow_launcher() -> None:
    """Stop with the launcher: once it is gone, this process gets SIGTERM, and saves what it has if it is training."""
    while os.getppid() == int(os.environ["DMDR_LAUNCHER"]):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def work(words: list[str]) -> None:
    """Run a module as one of the processes. Its messages and its traceback are the launcher's to show."""
    atexit.register(end, 0)  # the first to be registered is the last to be called
    threading.Thread(target=follow_launcher, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher hands it on and says the rest
    sys.argv, code = words, 0
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        code = 1
        try:
            (Path(os.environ["DMDR_ERRORS"]) / f"bug-{os.environ['RANK']}").write_text(traceback.format_exc())
        except OSError:  # the launcher is gone, and its folder
            traceback.print_exc()
    if code:  # at once: a library that tidies up could wait for the other processes for ever
        end(code)


def end(code: int) -> None:
    """End without Python's own tearing down: a thread of gloo or autograd that lets go of a tensor while Python goes
    ends the process by SIGABRT, all work done (pytorch/pytorch#190489)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# The launcher -----------------------------------------------------------------------------------------------------


def run_processes(plan: Plan, words: list[str]) -> int:
    """Run this node's processes, hand signals on to them, and wait. Returns the exit code of the job."""
    here, port = plan.processes // plan.nodes, plan.port
    if not port:
        with socket.create_server((plan.address, 0)) as server:
            port = server.getsockname()[1]  # a free one
    with tempfile.TemporaryDirectory(prefix="dmdr-") as folder, signals_received() as received:
        variables = {"MASTER_ADDR": plan.address, "MASTER_PORT": port, "WORLD_SIZE": plan.processes}
        variables |= {"LOCAL_WORLD_SIZE": here, "DMDR_ERRORS": folder, "DMDR_LAUNCHER": os.getpid()}
        command, processes = [sys.executable, "-m", "scripts.launch", "--work", *words], {}
        for place in range(here):
            own = variables | {"RANK": plan.rank * here + place, "LOCAL_RANK": place}
            environment = os.environ | {name: str(value) for name, value in own.items()}
            processes[own["RANK"]] = subprocess.Popen(command, env=environment, start_new_session=True)
        first, failed_at, handed_on = {}, 0.0, 0
        while any(process.poll() is None for process in processes.values()):
            time.sleep(0.1)
            for number in received[handed_on:]:
                handed_on += 1
                send(number if number == signal.SIGINT else signal.SIGTERM, processes.values())
            if not first and (first := failures(processes)):
                failed_at = time.monotonic()
                send(signal.SIGTERM, processes.values())
            if first and time.monotonic() > failed_at + GRACE:
                send(signal.SIGKILL, processes.values())
        first = first or failures(processes)
        return show(first, Path(folder), received) if first else 0


def failures(processes: Mapping[int, subprocess.Popen]) -> dict[int, int]:
    """The ranks that failed, with their exit codes."""
    return {rank: process.poll() for rank, process in processes.items() if process.poll()}


def send(number: int, processes: Iterable[subprocess.Popen]) -> None:
    """A signal to each process, SIGKILL to its children too."""
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)


def show(first: dict[int, int], folder: Path, received: list[int]) -> int:
    """Show each message in ``folder`` once; ``first``, the first processes to fail, are the cause. Returns the code."""
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    if files and files[0].name.startswith("rank-"):
        for message in dict.fromkeys(file.read_text() for file in files if file.name.startswith("rank-")):
            report(message)
        return 2
    bugs = {file.name.removeprefix("bug-"): file.read_text() for file in files if file.name.startswith("bug-")}
    rank, code = min(first.items(), key=lambda item: item[1])  # a signal's is negative
    if not received and code > 0:
        for failed, text in [*bugs.items()][:1]:
            others = f", {len(bugs) - 1} more after it" if len(bugs) > 1 else ""
            print(f"{text}error: process {failed} failed first, with the traceback above{others}", file=sys.stderr)
        return 1 if bugs else max(first.values())
    number = received[0] if received else -code
    if not received:
        out_of_memory = " (out of memory?)" if number == signal.SIGKILL else ""
        report(f"process {rank} was ended by {signal.Signals(number).name}{out_of_memory}; the others end with it")
    for later, text in bugs.items():  # such as of a compiler that the same signal ended
        print(f"process {later} after it: {text.splitlines()[-1]}", file=sys.stderr)
    if received:
        print("stopped", file=sys.stderr)
    return 128 + number


@exits_on_input_error
def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    if not words or words[0].startswith("-"):
        raise InputError("a module and its flags are expected, such as: python -m scripts.launch train_cc.cold_start")
    dry = "--dry-run" in words  # the plan of a run on any machine needs none of its processes
    plan = make_plan(os.environ, dry)
    here = plan.processes // plan.nodes
    if not dry:
        require_alone(os.environ, plan.processes, plan.nodes)
    os.environ |= plan.environment
    share_cores(here)
    if dry:
        os.environ |= {"WORLD_SIZE": str(plan.processes), "LOCAL_WORLD_SIZE": str(here)}
    if dry or plan.processes == 1:
        os.execv(sys.executable, [sys.executable, "-m", *words])
    if visible_gpus(os.environ):
        from accelerate.utils import check_cuda_p2p_ib_support

        if not check_cuda_p2p_ib_support():  # some consumer cards: NCCL would wait for ever
            os.environ |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    raise SystemExit(run_processes(plan, words))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
    else:
        main()
