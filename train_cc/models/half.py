"""The range of fp16, and how much of it the activations and gradients of a network use."""

import contextlib
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

MARGIN = 4.0  # the largest activation seen, times this, must fit: other samples, and trained weights, have larger ones
Seen = list[tuple[str, Tensor]]  # a place in a network, and the largest magnitude of a tensor there, 0-d


def place(name: str) -> str:
    """The block of the module ``name``, or the module if it is in none."""
    block = re.search(r"(?:^|\.)blocks\.(\d+)(?:\.|$)", name)
    return f"block {block[1]}" if block else name or "the output"


@contextlib.contextmanager
def watched(network: nn.Module) -> Iterator[tuple[Seen, Seen]]:
    """Yield what the modules of ``network`` take and return inside, and the gradients of the latter, as computed."""
    activations, gradients = [], []

    def note(seen: Seen, where: str, value: Tensor) -> None:
        low, high = value.detach().aminmax()
        seen.append((where, torch.maximum(low.abs(), high.abs()).float()))

    def hook_of(where: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, out: object) -> None:
            tensors = [x for x in (*inputs, out) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
            for value in tensors:
                note(activations, where, value)
            if isinstance(out, Tensor) and out.requires_grad:
                out.register_hook(lambda gradient: note(gradients, where, gradient))

        return hook

    hooks = [module.register_forward_hook(hook_of(place(name))) for name, module in network.named_modules()]
    try:
        yield activations, gradients
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def overflowing(network: nn.Module, dtype: torch.dtype, call: Callable[[], object]) -> str | None:
    """The first place of ``network`` whose values in ``call``, times `MARGIN`, leave ``dtype``'s range, or None."""
    with watched(network) as (seen, _):
        call()
    beyond = ~(torch.stack([value for _, value in seen]) * MARGIN < torch.finfo(dtype).max)  # NaN is beyond
    return next((where for (where, _), bad in zip(seen, beyond.tolist(), strict=True) if bad), None)
