"""What one process does for all: the others get its result, or end with its error."""

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import broadcast_object_list

from train_cc.io.errors import InputError, message_of
from train_cc.run.session import Session

T = TypeVar("T")


def on_main(session: Session, work: Callable[[], T]) -> T:
    """``work()`` on the main process; its result comes back on all. Its error is raised on all: none waits for ever."""
    outcome = [None, "the main process failed; its error says why"]
    try:
        if session.is_main:
            try:
                outcome = [work(), None]
            except Exception as error:
                outcome[1] = message_of(error) or outcome[1]
                raise
    finally:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise InputError(outcome[1])
    return outcome[0]
