"""A request to stop: the update under way is finished, saved, and the run ends well."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from train_cc.io.errors import report


class StopSignal:
    """SIGTERM and SIGINT ask the run to stop after the current update.

    Repeated within 10 seconds it is the same request (Slurm and systemd tell the launcher and its processes alike, and
    the launcher tells them too); later it stops the run at once. As one process of several a run can wait for ever for
    another that is gone: where an update does not end after the request, the process does.
    """

    SAME_REQUEST = 10.0  # seconds

    def __init__(self):
        self.name = ""
        self._asked = 0.0
        self._began: float | None = None  # the update that is being made
        self._longest: float | None = None

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        self._over = threading.Event()
        self._writer = -1
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            # Not in the handler: that waits until Python runs again in the main thread, and it may not.
            signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def _ask(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self.name:
            self.name, self._asked = signal.Signals(number).name, now
            if self._writer < 0:  # several processes are asked by a failure of one, too
                later = f"once more, after {self.SAME_REQUEST:.0f} seconds, stops it at once"
                print(f"\n{self.name}: the run stops after this update; {later}", file=sys.stderr)
        elif now - self._asked > self.SAME_REQUEST:
            self._restore()
            os.kill(os.getpid(), number)

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Around an update: while it lasts, another process that is gone may be waited for."""
        self._began = time.monotonic()
        yield
        self._longest = max(self._longest or 0, time.monotonic() - self._began)
        self._began = None

    def patience(self) -> float:
        """Seconds that the update under way may take; the first one compiles and warms up."""
        return 600 if self._longest is None else max(60, 3 * self._longest)

    def _watch(self, reader: int) -> None:
        while (told := os.read(reader, 1)) and told[0] not in self._before:  # a library's signal
            pass
        asked = time.monotonic()
        while not self._over.wait(1):
            began = self._began
            if began is not None and time.monotonic() - max(began, asked) > self.patience():
                report("asked to stop, but the update does not end (another process is gone?); what is saved stays")
                os._exit(2)
        os.close(reader)  # not before: a repeated signal is written into the pipe too

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._writer >= 0:
            signal.set_wakeup_fd(-1)
            os.close(self._writer)
        self._restore()
