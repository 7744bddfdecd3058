"""Wrong input is told to the person who gave it: one message, exit code 2, no traceback."""

import functools
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something that was given cannot be used. The message says what was given, what is allowed and what to do."""


def exits_on_input_error(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command's ``main``: an `InputError` becomes its message on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapped
