"""Start a module as one process a visible GPU, or one on the CPU: `python -m scripts.launch train_cc.cold_start FLAGS`.

NUM_PROCESSES and ACCELERATE_CONFIG override; with several nodes: NUM_NODES, NODE_RANK, MAIN_ADDRESS, MAIN_PORT, where
NUM_PROCESSES counts those of all nodes. One process needs no launcher, and is not given one. Several are torchrun's,
with three differences: their messages are shown once, and the exit code is theirs; a signal is handed on to them, and
they are waited for, however long a checkpoint takes; and they end if the launcher was killed.
"""

import atexit
import contextlib
import itertools
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

from scripts.jobs import signals_received
from scripts.processes import Plan, make_plan, visible_gpus
from train_cc.io.errors import InputError, exits_on_input_error, report
from train_cc.io.processes import require_alone
from train_cc.io.saying import saying
from train_cc.io.threads import share_cores

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


def torchrun(plan: Plan, words: list[str], errors: list[BaseException]) -> None:
    """Run all processes of this node to their end. An error is appended to ``errors``."""
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
        errors.append(error)


def run_processes(plan: Plan, words: list[str]) -> int:
    """Run the processes, hand signals on to them, and wait. Returns the exit code of the job."""
    import psutil

    children, errors = psutil.Process().children, []
    with tempfile.TemporaryDirectory(prefix="dmdr-") as folder, signals_received() as received:
        os.environ |= {"DMDR_ERRORS": folder, "DMDR_LAUNCHER": str(os.getpid())}
        # Not in the main thread: there torch takes the signals for itself, and below 2.12 it always kills after 30 s.
        thread = threading.Thread(target=torchrun, args=(plan, words, errors), daemon=True)
        thread.start()
        here = f"node {plan.rank} of {plan.nodes}: waiting for the other nodes at {plan.address}:{plan.port}"
        with saying(here) if plan.nodes > 1 else contextlib.nullcontext():
            while thread.is_alive() and not children():
                thread.join(0.2)
                if received and not children():
                    print("stopped", file=sys.stderr)
                    os._exit(128 + received[0])
        handed_on = set()  # a process can begin after the signal, or be missed while the others are counted
        while thread.is_alive():
            thread.join(0.2)
            for (count, number), process in itertools.product(enumerate(received), children()):
                if (count, process.pid) not in handed_on:
                    handed_on.add((count, process.pid))
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(number if number == signal.SIGINT else signal.SIGTERM)
        os.environ.pop("DMDR_ERRORS")  # from here on `report` is for the terminal
        return show(errors[0], Path(folder), received, plan) if errors else 0


def show(error: BaseException, folder: Path, received: list[int], plan: Plan) -> int:
    """Show each message in ``folder`` once; the first process to fail is the cause. Returns the exit code."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    if isinstance(error, DistError | RendezvousError):
        where = f"{plan.address}:{plan.port}" if plan.nodes > 1 else "this machine"
        report(f"the processes could not meet at {where}: {str(error).splitlines()[0]}")
        return 2
    if not isinstance(error, ChildFailedError):
        raise error
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    messages = dict.fromkeys(file.read_text() for file in files if file.name.startswith("rank-"))
    if messages and files[0].name.startswith("rank-"):
        for message in messages:
            report(message)
        return 2
    bugs = {file.name.removeprefix("bug-"): file.read_text() for file in files if file.name.startswith("bug-")}
    # Ranks that torch itself ended (SIGTERM, and SIGKILL after 30 seconds) did not cause the failure.
    first = min(failure.timestamp for failure in error.failures.values())
    killed = {
        rank: -failure.exitcode
        for rank, failure in error.failures.items()
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM and failure.timestamp <= first + 5
    }
    if not received and not killed:
        for rank, text in [*bugs.items()][:1]:
            others = f", {len(bugs) - 1} more after it" if len(bugs) > 1 else ""
            print(f"{text}error: process {rank} failed first, with the traceback above{others}", file=sys.stderr)
        return 1 if bugs else max(1, max(failure.exitcode for failure in error.failures.values()))
    rank, number = (None, received[0]) if received else next(iter(killed.items()))
    if rank is not None:
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
    raise SystemExit(run_processes(plan, words))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
    else:
        main()
