"""Start a module as one process a visible GPU, or one on the CPU: `python -m scripts.launch train_cc.cold_start FLAGS`.

NUM_PROCESSES and ACCELERATE_CONFIG override; with several nodes: NUM_NODES, NODE_RANK, MAIN_ADDRESS, MAIN_PORT, where
NUM_PROCESSES counts those of all nodes. One process needs no launcher, and is not given one. Several are torchrun's,
with three differences: what they have to say is shown once, and the exit code is theirs; a signal is handed on to them,
and they are waited for, however long a checkpoint takes; and they end when the launcher was killed.
"""

import atexit
import contextlib
import logging
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from scripts.processes import Plan, make_plan, visible_gpus
from train_cc.io.errors import InputError, exits_on_input_error, report
from train_cc.io.processes import require_alone
from train_cc.io.saying import saying
from train_cc.io.threads import share_cores

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

        for name in [name for name in os.environ if name.startswith("PET_")]:
            del os.environ[name]  # torchrun's own flags, as a cluster sets them for its pods
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
    import psutil

    with tempfile.TemporaryDirectory(prefix="dmdr-") as folder, handed_to_children() as came:
        os.environ |= {"DMDR_ERRORS": folder, "DMDR_LAUNCHER": str(os.getpid())}
        outcome: list[BaseException] = []
        # Not in the main thread: there torch would take the signals for itself, and kill after 30 seconds.
        thread = threading.Thread(target=torchrun, args=(plan, words, outcome), daemon=True)
        thread.start()
        here = f"node {plan.rank} of {plan.nodes}: waiting for the other nodes at {plan.address}:{plan.port}"
        with saying(here) if plan.nodes > 1 else contextlib.nullcontext():
            while thread.is_alive() and not psutil.Process().children():
                thread.join(0.2)
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
    if bugs and not came:
        print(bugs[0].read_text(), end="", file=sys.stderr)
        others = f", {len(bugs) - 1} more after it" if len(bugs) > 1 else ""
        print(f"error: process {bugs[0].name[4:]} failed first, with the traceback above{others}", file=sys.stderr)
        return 1
    if came:
        for file in bugs:  # such as of a compiler that the same signal ended
            print(f"process {file.name[4:]} after it: {file.read_text().splitlines()[-1]}", file=sys.stderr)
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
    if not dry:
        require_alone(os.environ, plan.processes, plan.nodes)
    os.environ |= plan.environment
    share_cores(plan.processes // plan.nodes)
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
