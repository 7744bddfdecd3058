"""Jobs that wait for one another, side by side as cores allow.

`python -m scripts.jobs scripts/recipes/digits.toml teacher classifiers`

A job of such a file, [NAME], has a `title`, its usual length (`about`), the jobs that it `needs`, and its `commands`:
each one string, quoted as in a shell, $NAME a variable of the environment. Modules run in turn in one process, since
Python and torch take seconds to start; a launcher runs in its own. A command whose product is finished is skipped,
unless the job says `always`. `show`: on the terminal, not in a log.
"""

import contextlib
import functools
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from train_cc.io.errors import InputError, exits_on_input_error, report
from train_cc.io.flags import Parser, path
from train_cc.io.threads import usable_cores, without_ours
from train_cc.io.write import RECORD, record_of

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


@dataclass(frozen=True)
class Job:
    """``commands`` yields each command when the one before has ended well; without any the job is kept."""

    name: str
    commands: Callable[[], Iterator[Command]]
    log: Path | None = None
    needs: list[str] = field(default_factory=list)
    about: str = ""


@dataclass
class Running:
    job: Job
    commands: Iterator[Command]
    command: Command | None
    process: subprocess.Popen | None = None
    began: float = field(default_factory=time.monotonic)


# Running ----------------------------------------------------------------------------------------------------------


def run_all(jobs: list[Job], at_once: int, environment: Mapping[str, str]) -> None:
    """Run every job, ``at_once`` at a time, in order as far as their needs allow. A failure or a signal stops all."""
    running: list[Running] = []
    with signals_received() as received:
        try:
            follow(jobs, at_once, environment, running, received)
        finally:
            alive = [each.process for each in running if each.process is not None and each.process.poll() is None]
            for process in alive:
                os.killpg(process.pid, signal.SIGTERM)  # trainings write their checkpoint first
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


def follow(
    jobs: list[Job], at_once: int, environment: Mapping[str, str], running: list[Running], received: list[int]
) -> None:
    waiting, done, seconds = list(jobs), set(), []

    def ready() -> list[Job]:
        return [job for job in waiting if done.issuperset(job.needs)]

    def say(job: Job, text: str) -> None:
        print(f"[{len(jobs) - len(waiting)}/{len(jobs)}] {job.name}{text}", flush=True)

    while waiting or running:
        while ready() and len(running) < at_once:
            waiting.remove(job := ready()[0])
            commands = job.commands()
            if (command := next(commands, None)) is None:
                done.add(job.name)
                say(job, ": kept")
            else:
                about = job.about or time_left(seconds, len(waiting) + len(running) + 1, at_once)
                say(job, f"{about and f', {about}'}{f'; log: {job.log}' if job.log else ''}")
                running.append(Running(job, commands, command))
        if waiting and not running and not ready():
            raise InputError(
                f"{waiting[0].name} waits for {', '.join(set(waiting[0].needs) - done)}, which nobody makes"
            )
        beside = at_once > 1 and len(running) + len(ready()) > 1
        for each in running:
            if each.command is not None:
                each.process, each.command = start(each, environment, beside), None
        time.sleep(0.1 if running else 0)
        if received:
            raise SystemExit(128 + received[0])
        for each in [each for each in running if each.process.poll() is not None]:
            if each.process.returncode:
                fail(each.job, each.process.returncode)
            if (command := next(each.commands, None)) is not None:
                each.command = command
            else:
                running.remove(each)
                done.add(each.job.name)
                seconds.append(time.monotonic() - each.began)


def start(each: Running, environment: Mapping[str, str], beside: bool) -> subprocess.Popen:
    """Start a command in a session of its own, so that what it starts is stopped with it.

    Beside another job its waiting threads sleep at once (train_cc/io/threads.py); all jobs keep all threads.
    """
    variables = ({"GOMP_SPINCOUNT": "0"} if beside else {}) | dict(environment) | each.command.variables
    with contextlib.ExitStack() as stack:
        file = None
        if each.job.log is not None:
            each.job.log.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(each.job.log.open("wb" if each.process is None else "ab"))
        options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "start_new_session": True}
        return subprocess.Popen(each.command.words, cwd=ROOT, env=variables, **options)


def fail(job: Job, code: int) -> None:
    """Show the end of the job's log, and leave with its exit code."""
    code = 128 - code if code < 0 else code
    text = f'"{job.name}" failed with exit code {code}'
    if job.log is not None:
        lines = job.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
        text = "\n".join([f"{text}; the end of {job.log}:", *lines[-TAIL:]])
    report(text)
    raise SystemExit(code)


def time_left(seconds: list[float], jobs: int, at_once: int) -> str:
    """The time left if each of the ``jobs`` takes the mean of ``seconds``."""
    if not seconds or not jobs:
        return ""
    minutes = sum(seconds) / len(seconds) * jobs / min(at_once, jobs) / 60
    return f"about {minutes:.0f} min left" if minutes < 120 else f"about {minutes / 60:.1f} h left"


# Products ---------------------------------------------------------------------------------------------------------


def finished(product: Path) -> bool:
    """True for a file, a run with its export, and a folder of stage 0 whose record, if any, names its files."""
    if not product.is_dir() or (product / "generator" / "config.json").is_file():
        return product.exists()
    if not (product / RECORD).exists():  # a network from elsewhere
        return (product / "config.json").is_file() and any(product.glob("*.safetensors"))
    names = record_of(product).get("finished")
    return isinstance(names, list) and all((product / str(name)).is_file() for name in names)


def product_of(command: Command) -> Path:
    """The file or folder that a command makes."""
    named = command.variables | dict(itertools.pairwise(command.words))
    return Path(next(named[name] for name in ("--output-dir", "--output", "OUTPUT_DIR") if name in named))


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
        raise InputError(
            f"{where}: the variable {error.args[0]} is not set: set it, or use the script in scripts/"
        ) from None
    except ValueError as error:
        raise InputError(
            f"{where} is {text[:80]!r}; flags quoted as in a shell are expected, $$ for a plain $ ({error})"
        ) from None
    return [word for word in words if word]


def read_jobs(file: Path, names: list[str]) -> list[Job]:
    """The jobs of ``file``, or those of ``names``. Raises `InputError`."""
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    (logs,) = words_of(content.pop("logs"), f"{file}: logs")
    if unknown := [name for name in names if name not in content]:
        raise InputError(f"{', '.join(unknown)} is no job of {file}; allowed: {', '.join(content)}")
    jobs = []
    for name in dict.fromkeys(names or content):
        each, title = content[name], content[name]["title"]
        needs = [content[other]["title"] for other in each.get("needs", ()) if other in (names or content)]
        log = Path(logs) / f"{len(jobs) + 1}-{re.sub('[^A-Za-z0-9]', '_', title)}.txt"
        commands = functools.partial(commands_of, each["commands"], title, each.get("always", False))
        jobs.append(Job(title, commands, None if each.get("show") else log, needs, each["about"]))
    return jobs


def commands_of(texts: list[str], title: str, always: bool) -> Iterator[Command]:
    """What is left to run: launchers one by one, or all modules in one process."""
    commands = [read_command(text, title) for text in texts]
    left = [command for command in commands if always or not finished(product_of(command))]
    if left and left[0].words[0] != "bash":
        modules = [word for command in left for word in (",", *command.words)]
        yield Command([sys.executable, "-m", "scripts.jobs", *modules])
        return
    for command in left:
        yield command
        require_finished(command)


def read_command(text: str, title: str) -> Command:
    words = words_of(text, title)
    variables = itertools.takewhile(re.compile("[A-Z_]+=").match, words)
    variables = dict(word.split("=", 1) for word in variables)
    return Command(words[len(variables) :], variables)


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
