"""Progress messages on stderr, from rank 0, every 10 s of a slow step."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

FIRST, EVERY = 5.0, 10.0  # seconds: what is done by then needs no words


@contextlib.contextmanager
def beating(call: Callable[[int], None], first: float = FIRST, every: float = EVERY) -> Iterator[None]:
    """``call(seconds)`` from a thread: after ``first`` seconds inside, and again ``every`` few."""
    done, began = threading.Event(), time.monotonic()

    def beat() -> None:
        wait = first
        while not done.wait(wait):
            call(round(time.monotonic() - began))
            wait = every

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
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
