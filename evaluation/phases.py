"""A cycle by phase, watched from outside: by hooks of the networks and optimizers, so what is timed is what trains."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from train_cc.distillation.run import Run


class Stopwatch:
    """Seconds by phase. A phase lasts until the next one begins."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._phase, self._since = device, "", 0.0

    def begin(self, phase: str) -> None:
        """``phase`` is "" for what is not timed."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._phase:
            self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.begin("")


@contextlib.contextmanager
def phases_watched(run: Run, stopwatch: Stopwatch) -> Iterator[None]:
    """Time the phases of ``run`` inside.

    A backward begins with the gradient of its network's output and ends with the optimizer's step or the next network:
    reductions and clipping count with it.
    """
    hooks = []

    def watch(network: nn.Module, forward: str, without_gradient: str, backward: str) -> None:
        def enter(network: nn.Module, inputs: tuple) -> None:
            stopwatch.begin(forward if torch.is_grad_enabled() else without_gradient)

        def leave(network: nn.Module, inputs: tuple, out: Tensor) -> None:
            stopwatch.begin("other")
            if out.requires_grad:
                out.register_hook(lambda gradient: stopwatch.begin(backward))

        hooks.extend([network.register_forward_pre_hook(enter), network.register_forward_hook(leave)])

    watch(run.generator, "generator forward", "sampling", "generator backward")
    watch(run.estimator, "estimator forward", "scoring", "estimator backward")
    if run.rewards:
        for name, judge in run.judges.items():
            if name.startswith("reward_"):
                watch(judge, "classifier", "classifier", "reward backward")
        if isinstance(run.decode, nn.Module):
            watch(run.decode, "decoder", "decoder", "reward backward")
    for optimizer in (run.generator_optimizer.optimizer, run.estimator_optimizer.optimizer):
        hooks.append(optimizer.register_step_pre_hook(lambda *arguments: stopwatch.begin("optimizer")))
        hooks.append(optimizer.register_step_post_hook(lambda *arguments: stopwatch.begin("other")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
