"""Jobs that wait for one another, side by side as cores allow.

`python -m scripts.jobs scripts/recipes/digits.toml teacher classifiers`

A job of such a file, [NAME], has a `title` with its usual length, the jobs that it `needs`, and its `commands`, which
begin with what is `common`: quoted as in a shell, $NAME a variable of the environment. Modules run in turn in one
process, since Python and torch take seconds to start; a launcher runs in its own. A command whose product is finished
is skipped, unless the job says `always`. `show`: on the terminal, not in a log.
"""

import contextlib
import importlib
import itertools
import os
import re
import shlex
import signal
import string
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from train_cc.io.errors import InputError, exits_on_input_error, report
from train_cc.io.fields import Parser, path
from train_cc.io.products import RECORD, is_whole, record_of
from train_cc.io.threads import usable_cores, without_ours

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
TAIL = 15  # lines of a log that a failure shows


@dataclass(frozen=True)
class Command:
    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Job:
    """``commands`` yields each command when the one before has ended well; without any the job is kept."""

    name: str
    commands: Iterator[Command]
    log: Path | None = None
    needs: list[str] = field(default_factory=list)
    title: str = ""  # with its usual length
    command: Command | None = None  # the next to start
    process: subprocess.Popen | None = None
    began: float = 0.0


# Running ----------------------------------------------------------------------------------------------------------


def run_all(jobs: list[Job], at_once: int, environment: Mapping[str, str]) -> None:
    """Run every job, ``at_once`` at a time, in order as far as their needs allow. A failure or a signal stops all."""
    waiting, running, finished_jobs, seconds = list(jobs), [], set(), []

    def ready() -> list[Job]:
        return [job for job in waiting if finished_jobs.issuperset(job.needs)]

    with signals_received() as received:
        try:
            while waiting or running:
                while len(running) < at_once and (job := next(iter(ready()), None)):
                    waiting.remove(job)
                    job.command, job.began = next(job.commands, None), time.monotonic()
                    minutes = time_left(seconds, len(waiting) + len(running) + 1, at_once)
                    line = (job.title or job.name + minutes) if job.command else f"{job.name}: kept"
                    line += f"; log: {job.log}" if job.command and job.log else ""
                    print(f"[{len(jobs) - len(waiting)}/{len(jobs)}] {line}", flush=True)
                    running.append(job) if job.command else finished_jobs.add(job.name)
                if waiting and not running:
                    needs = ", ".join(set(waiting[0].needs) - finished_jobs)
                    raise InputError(f"{waiting[0].name} waits for {needs}, which nobody makes")
                beside = at_once > 1 and len(running) + len(ready()) > 1
                for job in running:
                    if job.command:
                        start(job, environment, beside)
                time.sleep(0.1 if running else 0)
                if received:
                    raise SystemExit(128 + received[0])
                for job in [job for job in running if job.process.poll() is not None]:
                    if job.process.returncode:
                        raise SystemExit(failure(job))
                    job.command = next(job.commands, None)
                    if not job.command:
                        running.remove(job)
                        finished_jobs.add(job.name)
                        seconds.append(time.monotonic() - job.began)
        finally:  # trainings that still run write their checkpoint first
            alive = [job.process for job in running if job.process and job.process.poll() is None]
            for process in alive:
                os.killpg(process.pid, signal.SIGTERM)
            for process in alive:
                process.wait()


@contextlib.contextmanager
def signals_received() -> Iterator[list[int]]:
    """Collect the numbers of the signals that ask to stop. Ignored ones stay ignored, as SIGHUP under nohup."""
    received: list[int] = []
    numbers = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(job: Job, environment: Mapping[str, str], beside: bool) -> None:
    """Start the job's command in a session of its own, so that what it starts is stopped with it.

    Beside another job its waiting threads sleep at once (train_cc/io/threads.py); all jobs keep all threads.
    """
    # Unbuffered: an error is the last line of its log.
    variables = {"PYTHONUNBUFFERED": "1"} | ({"GOMP_SPINCOUNT": "0"} if beside else {})
    variables |= dict(environment) | job.command.variables
    if job.log:
        job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab" if job.process else "wb") if job.log else contextlib.nullcontext() as file:
        options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "start_new_session": True}
        job.process = subprocess.Popen(job.command.words, cwd=ROOT, env=variables, **options)
    job.command = None


def failure(job: Job) -> int:
    """The exit code of a failed job; shows the end of its log."""
    code = job.process.returncode if job.process.returncode > 0 else 128 - job.process.returncode
    lines = [f'"{job.name}" failed with exit code {code}']
    if job.log:
        text = job.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        lines = [f"{lines[0]}; the end of {job.log}:", *text.splitlines()[-TAIL:]]
    report("\n".join(lines))
    return code


def time_left(seconds: list[float], jobs: int, at_once: int) -> str:
    """The time left if each of the ``jobs`` takes the mean of ``seconds``."""
    if not seconds:
        return ""
    minutes = sum(seconds) / len(seconds) * jobs / min(at_once, jobs) / 60
    return f", about {minutes:.0f} min left" if minutes < 120 else f", about {minutes / 60:.1f} h left"


# Products ---------------------------------------------------------------------------------------------------------


def finished(product: Path) -> bool:
    """True for a file, a run with its export, and a folder of stage 0 whose record, if any, names its files."""
    if not product.is_dir() or (product / "generator" / "config.json").is_file():
        return product.exists()
    if not (product / RECORD).exists():  # a network from elsewhere
        return (product / "config.json").is_file() and any(product.glob("*.safetensors"))
    return is_whole(product, record_of(product))


def product_of(command: Command) -> Path:
    """The file or folder that a command makes."""
    flags = command.variables | dict(itertools.pairwise(command.words))
    return Path(next(flags[name] for name in ("--output-dir", "--output", "OUTPUT_DIR") if name in flags))


def require_finished(command: Command) -> None:
    """A command that was asked to stop ends well, but is not finished. Raises `InputError`."""
    if not finished(product_of(command)):
        raise InputError(f"{product_of(command)} is not finished; the same command continues")


# The file of jobs -------------------------------------------------------------------------------------------------


def words_of(text: object, where: str) -> list[str]:
    """The words of a command's flags, with the variables of the environment in them. Raises `InputError`."""
    if not isinstance(text, str) or "\0" in text:
        raise InputError(f"{where} is {str(text)[:80]!r}; flags are one string")
    try:
        words = [string.Template(word).substitute(os.environ) for word in shlex.split(text)]
    except KeyError as error:
        problem = f"the variable {error.args[0]} is not set: set it, or use the script in scripts/"
        raise InputError(f"{where}: {problem}") from None
    except ValueError as error:
        expected = "flags quoted as in a shell are expected, $$ for a plain $"
        raise InputError(f"{where} is {text[:80]!r}; {expected} ({error})") from None
    return [word for word in words if word]


def read_jobs(file: Path, names: list[str]) -> list[Job]:
    """The jobs of ``file``, or those of ``names``; needs that are not among them count as met. Raises `InputError`."""
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    (logs,) = words_of(content.pop("logs"), f"{file}: logs")
    if unknown := [name for name in names if name not in content]:
        raise InputError(f"{', '.join(unknown)} is no job of {file}; allowed: {', '.join(content)}")
    jobs, names = [], list(dict.fromkeys(names or content))
    for number, name in enumerate(names, 1):
        each = content[name]
        commands = [read_command(f"{each.get('common', '')} {text}", name) for text in each["commands"]]
        log = None if each.get("show") else Path(logs) / f"{number}-{name}.txt"
        needs = [other for other in each.get("needs", ()) if other in names]
        jobs.append(Job(name, commands_of(commands, each.get("always", False)), log, needs, each["title"]))
    return jobs


def read_command(text: str, name: str) -> Command:
    """``text``: NAME=VALUE for the variables, a module or bash, and flags."""
    words = words_of(text, name)
    variables = dict(word.split("=", 1) for word in itertools.takewhile(re.compile("[A-Z_]+=").match, words))
    return Command(words[len(variables) :], variables)


def commands_of(commands: list[Command], always: bool) -> Iterator[Command]:
    """Yield the commands that are left: launchers one by one, or all modules in one process."""
    unfinished = [command for command in commands if always or not finished(product_of(command))]
    if unfinished and unfinished[0].words[0] != "bash":
        modules = [word for command in unfinished for word in (",", *command.words)]
        yield Command([sys.executable, "-m", "scripts.jobs", *modules])
        return
    for command in unfinished:
        yield command
        require_finished(command)


def run_in_turn(words: list[str]) -> None:
    """Run commands in this process: each begins with a comma and a module."""
    while words:
        end = words.index(",", 1) if "," in words[1:] else len(words)
        (_, module, *flags), words = words[:end], words[end:]
        importlib.import_module(module).main(flags)
        require_finished(Command(flags))


@exits_on_input_error
def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    if words[:1] == [","]:
        run_in_turn(words)
        return
    parser = Parser(description=__doc__)
    parser.add_argument("file", type=path, help="the jobs, a TOML file")
    parser.add_argument("names", nargs="*", help="only these jobs; needs that are not among them count as met")
    args = parser.parse_args(words)
    run_all(read_jobs(args.file, args.names), usable_cores(), without_ours())


if __name__ == "__main__":
    main()
