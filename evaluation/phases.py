"""A cycle by phase, watched from outside: around the calls that the two turns make, so what is timed is what trains."""

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from train_cc.distillation import loop, turns
from train_cc.distillation.run import Run

Phase = Callable[[str], AbstractContextManager]


class Stopwatch:
    """Seconds by phase, each phase's own: what runs inside another one is not counted twice."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._names, self._since = device, [], 0.0

    def _lap(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._names:
            self.seconds[self._names[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._lap()
        self._names.append(name)
        try:
            yield
        finally:
            self._lap()
            self._names.pop()


def around(call: Callable, phase: Phase, name: str, without_gradient: str | None = None) -> Callable:
    """``call`` as phase ``name``, or as ``without_gradient`` where autograd is off."""

    @functools.wraps(call)
    def watched(*args, **kwargs):
        with phase(name if torch.is_grad_enabled() else without_gradient or name):
            return call(*args, **kwargs)

    return watched


@contextlib.contextmanager
def phases_watched(run: Run, phase: Phase) -> Iterator[None]:
    """Put ``phase`` around what the two turns call; all of it comes off again."""
    of_generator, of_estimator = run.session.generator_accelerator, run.session.estimator_accelerator
    watched = [
        (run.generator, "forward", "generator forward", "sampling"),
        (run.estimator, "forward", "estimator forward", "scoring"),
        (of_generator, "backward", "generator backward", None),
        (of_estimator, "backward", "estimator backward", None),
        (loop, "update", "optimizer", None),
    ]
    if run.rewards:
        watched.append((turns, "reward_terms", "reward backward", None))
        classifiers = [judge for name, judge in run.judges.items() if name.startswith("reward_")]
        watched += [(model, "forward", "classifier", None) for model in classifiers]
        if isinstance(run.decode, nn.Module):
            watched.append((run.decode, "forward", "decoder", None))
    with contextlib.ExitStack() as stack:
        for owner, attribute, *names in watched:
            before = getattr(owner, attribute)
            setattr(owner, attribute, around(before, phase, *names))
            stack.callback(setattr, owner, attribute, before)
        yield
