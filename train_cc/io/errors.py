"""Messages on stderr: wrong input (exit code 2, no traceback), and the progress of a slow step every 10 seconds."""

import contextlib
import errno
import functools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from train_cc.io.threads import share_cores

# What a path or a disk can do to a command that is right. Any other OSError is a bug, and looks like one.
NAMES = (
    "ENOENT EACCES EPERM EROFS ENOSPC EDQUOT EFBIG ENAMETOOLONG ENOTDIR EISDIR ELOOP EIO EEXIST EXDEV ENOTEMPTY ESTALE"
)
OF_THE_DISK = {getattr(errno, name) for name in NAMES.split()}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FREE = ": free some space, or raise the limit (a quota, ulimit -f), and give the same command again"
# Words of torch.save and numpy for a file that could not be written, in place of a number.
WRITING_FAILED = re.compile(
    r"PytorchStreamWriter failed|inline_container.* unexpected pos|iostream error|write\(\): fd|"
    r"\d+ requested and \d+ written"
)


class InputError(ValueError):
    """Something that was given cannot be used. The message says what was given, what is allowed and what to do."""


def message_of(error: BaseException) -> str | None:
    """The sentence for a person, or None where ``error`` is a bug and deserves its traceback."""
    if isinstance(error, InputError):
        return str(error)
    if (message := disk_message(error)) is not None:
        return message
    text = str(error)
    of_the_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in text
    if not of_the_cpu and not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
        return None
    detail = f" ({text.splitlines()[0]})" if text else ""
    return f"out of memory{detail}; lower --batch-size, or see --dry-run for what a run needs"


def disk_message(error: BaseException) -> str | None:
    """The sentence for what a path or a disk did, also if a library has its own words for it; None for other errors."""
    text = str(error)
    rust = re.search(r"(?:\(os error |Os { code: )(\d+)", text)  # safetensors, new and old
    number = int(rust[1]) if rust else getattr(error, "errno", None)
    if number in OF_THE_DISK and (rust or isinstance(error, OSError)):
        where = f"{error.filename}: " if getattr(error, "filename", None) is not None else ""
        return f"{where}{os.strerror(number)}{FREE if number in FULL else ''}"
    if isinstance(error, OSError | RuntimeError) and WRITING_FAILED.search(text):
        return f"a file cannot be written whole ({text.splitlines()[0][:120]}){FREE}"
    return None


def report(message: str) -> None:
    """Show ``message`` on stderr. Under the launcher of several processes it shows what they report, each text once."""
    folder = os.environ.get("DMDR_ERRORS")
    if folder:
        file = Path(folder) / f"rank-{os.environ.get('RANK', 0)}"
        file.write_text(message, encoding="utf-8", errors="backslashreplace")
    else:
        print(f"error: {message}", file=sys.stderr)


def exits_on_input_error(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command's ``main``: an `InputError` becomes its message on stderr and exit code 2; Ctrl-C ends quietly.

    Commands import torch inside of ``main``; before it runs, the threads are settled (io/threads.py).
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text
        share_cores()
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise SystemExit(130) from None
        except Exception as error:
            message = message_of(error)
            if message is None:
                raise
            report(message)
            raise SystemExit(2) from None

    return wrapped


# Progress ------------------------------------------------------------------------------------------------------------


FIRST, EVERY = 5.0, 10.0  # seconds: what is done by then needs no words


@contextlib.contextmanager
def beating(call: Callable[[int], None], first: float = FIRST, every: float = EVERY) -> Iterator[None]:
    """``call(seconds)`` from a thread: after ``first`` seconds inside, and again ``every`` few."""
    finished, began = threading.Event(), time.monotonic()

    def beat() -> None:
        wait = first
        while not finished.wait(wait):
            call(round(time.monotonic() - began))
            wait = every

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


@contextlib.contextmanager
def saying(what: str) -> Iterator[None]:
    """ "``what``, 5 s", "``what``, 15 s", and so on, as long as it lasts."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with beating(lambda seconds: print(f"{what}, {seconds} s", file=sys.stderr, flush=True)):
        yield


def note(text: str) -> None:
    """A line that a person must see, on stderr, from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)
