"""Start a module as one process a visible GPU, or one on the CPU: `python -m scripts.launch train_cc.cold_start FLAGS`.

NUM_PROCESSES and ACCELERATE_CONFIG override; with several nodes: NUM_NODES, NODE_RANK, MAIN_ADDRESS, MAIN_PORT, where
NUM_PROCESSES counts those of all nodes. One process needs no launcher, and is not given one. Several are torchrun's,
with three differences: what they have to say is shown once, and the exit code is theirs; a signal is handed on to them,
and they are waited for, however long a checkpoint takes; and they end when the launcher was killed.
"""

import argparse
import atexit
import contextlib
import logging
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from train_cc.io.errors import InputError, exits_on_input_error, report
from train_cc.io.flags import integer
from train_cc.io.read import parsing

MOST_ON_A_NODE = 256
# Sections of an accelerate config that ask for what this project does not do.
NOT_DONE = ("deepspeed_config", "megatron_lm_config", "dynamo_config", "parallelism_config", "fp8_config", "tpu_config")


@dataclass
class Plan:
    """``processes`` over all nodes; ``environment``: what is handed on to each."""

    processes: int
    nodes: int = 1
    rank: int = 0
    address: str = ""
    port: int = 29500
    environment: dict[str, str] = field(default_factory=dict)


# From the environment to a plan -----------------------------------------------------------------------------------


def number(environment: Mapping[str, str], name: str, low: int, high: int, default: object) -> int:
    """The whole number in variable ``name``, else ``default``. Raises `InputError` that says what is allowed."""
    try:
        return integer(low, high)(environment.get(name) or str(default))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{name} {error}") from None


def visible_gpus(environment: Mapping[str, str]) -> int:
    if "CUDA_VISIBLE_DEVICES" in environment:
        listed = [word.strip() for word in environment["CUDA_VISIBLE_DEVICES"].split(",")]
        hidden = [i for i, word in enumerate(listed) if word in ("", "-1")]  # CUDA stops reading there
        return hidden[0] if hidden else len(listed)
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        return 0
    return len(re.findall(r"^GPU ", told, re.MULTILINE))


def read_config(path: Path) -> dict:
    """An accelerate config. Raises `InputError` for one that asks for what is not done here."""
    import yaml

    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        there = " ".join(sorted(map(str, Path("scripts/accelerate").glob("*.yaml"))))
        raise InputError(f"ACCELERATE_CONFIG is {path}, which {kind}; there are: {there}")
    expected = "an accelerate config, such as those in scripts/accelerate/,"
    with parsing(path, expected):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise InputError(f"{path} is no mapping; {expected} is expected")
    kind = str(config.get("distributed_type", "NO"))
    if kind not in ("NO", "False", "MULTI_GPU", "MULTI_CPU", "FSDP"):
        raise InputError(f"{path}: distributed_type is {kind}; allowed: NO, MULTI_GPU, MULTI_CPU, FSDP")
    asked = [name for name in NOT_DONE if config.get(name)]
    if asked:
        raise InputError(f"{path} has {', '.join(asked)}, which nothing here follows: remove it (--compile compiles)")
    precision = str(config.get("mixed_precision") or "no").lower()  # an unquoted no is False
    if precision not in ("no", "fp16", "bf16"):
        raise InputError(f"{path}: mixed_precision is {precision}; allowed: no, fp16, bf16")
    fsdp = config.get("fsdp_config") or {}
    if not isinstance(fsdp, dict):
        raise InputError(f"{path}: fsdp_config is {fsdp}; a mapping is expected")
    return config | {"mixed_precision": precision, "sharded": kind == "FSDP", "fsdp_config": fsdp}


def handed_on(config: dict, environment: Mapping[str, str]) -> dict[str, str]:
    """What accelerate's own launcher would set for its config, as far as it means something here."""
    variables = {
        "ACCELERATE_MIXED_PRECISION": config["mixed_precision"],
        "ACCELERATE_USE_FSDP": str(config["sharded"]).lower(),
        "FSDP_VERSION": str(config["fsdp_config"].get("fsdp_version", 2)),
    }
    if config.get("use_cpu") is True:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    elif config.get("gpu_ids", "all") != "all" and "CUDA_VISIBLE_DEVICES" not in environment:
        variables["CUDA_VISIBLE_DEVICES"] = str(config["gpu_ids"])
    return variables


def make_plan(environment: Mapping[str, str], only_shown: bool = False) -> Plan:
    """Raises `InputError` for numbers that cannot be and, unless ``only_shown``, for what nodes lack to meet."""
    config, variables = {}, {}
    if environment.get("ACCELERATE_CONFIG"):
        config = read_config(Path(environment["ACCELERATE_CONFIG"]))
        variables = handed_on(config, environment)
    gpus = visible_gpus(environment | variables)
    nodes = number(environment, "NUM_NODES", 1, 10_000, config.get("num_machines", 1))
    # Our own configs name no number. Without GPUs another one's, meant for GPUs, says nothing.
    usual = (config.get("num_processes") or gpus * nodes) if gpus else nodes
    processes = number(environment, "NUM_PROCESSES", 1, nodes * MOST_ON_A_NODE, usual)
    if processes % nodes:
        raise InputError(f"NUM_PROCESSES is {processes}; allowed: a multiple of the {nodes} nodes")
    plan = Plan(processes, nodes, environment=variables | {"NUM_PROCESSES": str(processes)})
    if nodes > 1 and not only_shown:
        plan.address = environment.get("MAIN_ADDRESS") or str(config.get("main_process_ip") or "")
        if not plan.address:
            raise InputError("MAIN_ADDRESS is missing: the address of node 0, for the others to meet there")
        if not environment.get("NODE_RANK"):
            raise InputError(f"NODE_RANK is missing: the number of this node, 0 to {nodes - 1}")
        plan.rank = number(environment, "NODE_RANK", 0, nodes - 1, "")
        plan.port = number(environment, "MAIN_PORT", 1, 65535, config.get("main_process_port") or 29500)
    if not gpus and "OMP_NUM_THREADS" not in environment:
        on_this_node = processes // nodes
        plan.environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // on_this_node))
    return plan


# A process of several ---------------------------------------------------------------------------------------------


def follow(launcher: int) -> None:
    """End with the launcher: once it is gone this process is asked to, and saves what it has if it is training."""

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def work(words: list[str]) -> None:
    """Run a module as one of the processes. What it dies of is left to the launcher to show."""
    atexit.register(end, 0)  # the first to be registered is the last to be called
    follow(int(os.environ["DMDR_LAUNCHER"]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher hands it on and says the rest
    sys.argv = words
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as told:
        code = told.code if isinstance(told.code, int) else int(told.code is not None)
    except BaseException:
        code, told = 1, traceback.format_exc()
        try:
            (Path(os.environ["DMDR_ERRORS"]) / f"bug-{os.environ['RANK']}").write_text(told)
        except OSError:  # the launcher is gone, and its folder
            print(told, file=sys.stderr)
    if code:  # at once: a library that tidies up could wait for the other processes for ever
        end(code)


def end(code: int) -> None:
    """End without Python's own tearing down: a thread of gloo or autograd that lets go of a tensor while Python goes
    ends the process by SIGABRT, all work done (pytorch/pytorch#190489)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# The launcher -----------------------------------------------------------------------------------------------------


def torchrun(plan: Plan, words: list[str], outcome: list[BaseException]) -> None:
    """Run all processes of this node to their end. What went wrong is appended to ``outcome``."""
    try:
        from torch.distributed import run

        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # we say it ourselves
        meet = ["--standalone"]
        if plan.nodes > 1:
            meet = ["--nnodes", plan.nodes, "--node_rank", plan.rank]
            meet += ["--master_addr", plan.address, "--master_port", plan.port]
        meet += ["--nproc_per_node", plan.processes // plan.nodes]
        if visible_gpus(os.environ):
            from accelerate.utils import check_cuda_p2p_ib_support

            if not check_cuda_p2p_ib_support():  # some consumer cards: NCCL would wait for ever
                os.environ |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
        run.run(run.parse_args([*map(str, meet), "--module", "scripts.launch", "--work", *words]))
    except BaseException as error:
        outcome.append(error)


@contextlib.contextmanager
def handed_to_children():
    """Signals go on to the processes. Yields the list of those that came."""
    import psutil

    came = []

    def hand_on(number: int, frame: object) -> None:
        came.append(number)
        processes = psutil.Process().children()
        if not processes:
            print("stopped", file=sys.stderr)
            os._exit(128 + number)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number if number == signal.SIGINT else signal.SIGTERM)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, hand_on)
    yield came


def run_processes(plan: Plan, words: list[str]) -> int:
    """-> the exit code of the job."""
    with tempfile.TemporaryDirectory(prefix="dmdr-") as folder, handed_to_children() as came:
        os.environ |= {"DMDR_ERRORS": folder, "DMDR_LAUNCHER": str(os.getpid())}
        outcome: list[BaseException] = []
        # Not in the main thread: there torch would take the signals for itself, and kill after 30 seconds.
        thread = threading.Thread(target=torchrun, args=(plan, words, outcome), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
        os.environ.pop("DMDR_ERRORS")  # from here on `report` is for the terminal
        return show(outcome[0], Path(folder), came, plan) if outcome else 0


def show(error: BaseException, folder: Path, came: list[int], plan: Plan) -> int:
    """Say once what the processes left in ``folder``; the first to fail is the cause. -> the exit code."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    if isinstance(error, DistError | RendezvousError):
        where = f"{plan.address}:{plan.port}" if plan.nodes > 1 else "this machine"
        report(f"the processes could not meet at {where}: {str(error).splitlines()[0]}")
        return 2
    if not isinstance(error, ChildFailedError):
        raise error
    left = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    messages = list(dict.fromkeys(file.read_text() for file in left if file.name.startswith("rank-")))
    bugs = [file for file in left if file.name.startswith("bug-")]
    if messages and not left[0].name.startswith("bug-"):
        for message in messages:
            report(message)
        return 2
    # Of what a signal has ended, torch's own SIGTERM and its SIGKILL after 30 seconds are no cause.
    first = min(failure.timestamp for failure in error.failures.values())
    killed = {
        rank: -failure.exitcode
        for rank, failure in error.failures.items()
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM and failure.timestamp <= first + 5
    }
    if killed and not came:
        rank, number = next(iter(killed.items()))
        out_of_memory = " (out of memory?)" if number == signal.SIGKILL else ""
        report(f"process {rank} was ended by {signal.Signals(number).name}{out_of_memory}; the others end with it")
        for file in bugs:
            print(f"process {file.name[4:]} after it: {file.read_text().splitlines()[-1]}", file=sys.stderr)
        return 128 + number
    if bugs:
        print(bugs[0].read_text(), end="", file=sys.stderr)
        others = f", {len(bugs) - 1} more after it" if len(bugs) > 1 else ""
        print(f"error: process {bugs[0].name[4:]} failed first, with the traceback above{others}", file=sys.stderr)
        return 1
    if came:
        print("stopped", file=sys.stderr)
        return 128 + came[0]
    return max(1, max(failure.exitcode for failure in error.failures.values()))


@exits_on_input_error
def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    if not words or words[0].startswith("-"):
        raise InputError("a module and its flags are expected, such as: python -m scripts.launch train_cc.cold_start")
    dry = "--dry-run" in words  # the plan of a run on any machine needs none of its processes
    plan = make_plan(os.environ, only_shown=dry)
    os.environ |= plan.environment
    alone = [sys.executable, "-m", *words]
    if dry:
        sizes = {"WORLD_SIZE": str(plan.processes), "LOCAL_WORLD_SIZE": str(plan.processes // plan.nodes)}
        os.execve(sys.executable, alone, os.environ | sizes)
    if plan.processes == 1:
        os.execv(sys.executable, alone)
    raise SystemExit(run_processes(plan, words))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
    else:
        main()
