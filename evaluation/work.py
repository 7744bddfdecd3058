"""Jobs that need one another, several at once: their commands, their progress, and the first failure."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.asked import ROOT
from train_cc.io.errors import InputError


@dataclass(frozen=True)
class Job:
    """``do`` returns whether anything had to be made; ``needs`` are names of jobs that come before it.

    ``typical``: its seconds say how long the others take.
    """

    name: str
    do: Callable[[], bool]
    needs: list[str] = field(default_factory=list)
    typical: bool = True


class Processes:
    """Commands that are stopped together."""

    def __init__(self):
        self._running: set[subprocess.Popen] = set()
        self._lock, self._stopped = threading.Lock(), False

    def run(self, command: list[str], log: Path, **variables: object) -> None:
        """Raises `InputError` with the end of the log where the command fails."""
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            with self._lock:
                if self._stopped:
                    raise InputError("stopped")
                # A session of its own: what the launcher starts is stopped with it.
                options = {"stdout": file, "stderr": file, "start_new_session": True}
                process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
        if code:
            told = "".join(log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-3:]).strip()
            raise InputError(f"{' '.join(command)} failed with exit code {code}; its log is {log}:\n{told}")

    def stop(self) -> None:
        """Ask what is running to end, as a scheduler does: trainings write their checkpoint first."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)


def run_all(jobs: list[Job], processes: Processes, at_once: int) -> None:
    """Every job, ``at_once`` at a time, in order as far as they can. The first failure, and a signal, stop all."""

    def terminated(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, terminated) for number in numbers}
    pool = ThreadPoolExecutor(at_once)
    try:
        follow(jobs, pool, at_once)
    except BaseException:
        processes.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def follow(jobs: list[Job], pool: ThreadPoolExecutor, at_once: int) -> None:
    waiting, running, done, taken = list(jobs), {}, set(), []
    while waiting or running:
        for job in [job for job in waiting if done.issuperset(job.needs)][: at_once - len(running)]:
            waiting.remove(job)
            running[pool.submit(job.do)] = (job, time.monotonic())
        if not running:
            raise InputError(
                f"{waiting[0].name} waits for {', '.join(set(waiting[0].needs) - done)}, which nobody makes"
            )
        finished: set[Future] = wait(running, return_when=FIRST_COMPLETED).done
        for future in finished:
            job, began = running.pop(future)
            made, seconds = future.result(), time.monotonic() - began
            done.add(job.name)
            if made and job.typical:
                taken.append(seconds)
            left = remaining(taken, len(waiting) + len(running), at_once)
            print(f"[{len(done)}/{len(jobs)}] {job.name}: {f'{seconds:.0f} s' if made else 'kept'}{left}", flush=True)


def remaining(taken: list[float], jobs: int, at_once: int) -> str:
    """The time left, if each of the ``jobs`` takes what those that had to be made took."""
    if not taken or not jobs:
        return ""
    minutes = sum(taken) / len(taken) * jobs / min(at_once, jobs) / 60
    return f"; about {minutes:.0f} min left" if minutes < 120 else f"; about {minutes / 60:.1f} h left"
