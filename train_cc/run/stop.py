"""A request to stop: the update under way is finished, saved, and the run ends well."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from train_cc.io.errors import InputError, message_of, report
from train_cc.io.read import first_line


class StopSignal:
    """SIGTERM and SIGINT ask the run to stop after the current update.

    Repeated within 10 seconds it is the same request (Slurm and systemd tell the launcher and its processes alike, and
    the launcher tells them too); later it stops the run at once. A run can wait for ever for a process that is gone:
    another of its own, or a compiler that the same signal ended. If an update does not end after the request, the
    process does.
    """

    SAME_REQUEST = 10.0  # seconds
    FIRST_UPDATE = 45.0  # seconds that the first update has after a request: it compiles, and there is nothing to save

    def __init__(self):
        self.name = ""
        self._asked = 0.0
        self._began: float | None = None  # the update that is being made
        self._longest: float | None = None
        self._alone = os.environ.get("WORLD_SIZE", "1") == "1"

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        self._over = threading.Event()
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
            if self._alone:  # several processes are asked by a failure of one, too
                later = f"once more, after {self.SAME_REQUEST:.0f} seconds, stops it at once"
                print(f"\n{self.name}: the run stops after this update; {later}", file=sys.stderr)
        elif now - self._asked > self.SAME_REQUEST:
            self._restore()
            os.kill(os.getpid(), number)

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Around an update or a preview: while it lasts, the run may wait for a process that is gone."""
        self._began = time.monotonic()
        yield
        self._longest = max(self._longest or 0, time.monotonic() - self._began)
        self._began = None

    def patience(self) -> float:
        """Seconds that the update under way may take after a request."""
        return self.FIRST_UPDATE if self._longest is None else max(60, 3 * self._longest)

    def _watch(self, reader: int) -> None:
        while (number := os.read(reader, 1)) and number[0] not in self._before:  # a library's signal
            pass
        since = time.monotonic()
        while not self._over.wait(1):
            began = self._began
            if began is not None and time.monotonic() - max(began, since) > self.patience():
                report(
                    "asked to stop, but the update does not end (another process or a compiler is gone?): ended "
                    "without a checkpoint of it; what is saved stays, and the same command with --auto-resume continues"
                )
                os._exit(2)
        os.close(reader)  # not before: a repeated signal is written into the pipe too

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._over.set()
        signal.set_wakeup_fd(-1)
        os.close(self._writer)
        self._restore()
        # Of several processes the launcher says which failed first.
        if self.name and self._alone and isinstance(error, Exception) and message_of(error) is None:
            raise InputError(
                f"{self.name}: the run was asked to stop, and its update failed, as when the signal ends a compiler or "
                f"another process too ({first_line(error)}); what is saved stays, and the same command with "
                "--auto-resume continues"
            ) from error
