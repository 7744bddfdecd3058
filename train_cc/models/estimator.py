"""The estimator: a frozen teacher plus a small LoRA, read at two scales as fake and real score; its range in fp16."""

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train_cc.draws import Draws
from train_cc.models.backbone import Network
from train_cc.models.lora import add_lora, lora_layers, lora_scale_set, set_lora_scale
from train_cc.samplers import euler_sample

CHECKED_CLASSES, CHECKED_STEPS = 64, 4  # of a teacher in fp16: four calls, half a second for SiT-XL/2 on an A100


class ScoreEstimator(nn.Module):
    """v(x, t, y) of ``teacher`` with its LoRA at ``lora_scale``; scale 0 is the teacher bit for bit.

    ``teacher`` is taken over and frozen. The scale is an argument of `forward` only. Without gradient it computes in
    ``score_dtype``, if there is one: the gap of two readings is small, and fp16 rounds eight times finer than bf16.
    """

    score_dtype: torch.dtype | None = None
    trained: str = "LoRA"  # in messages, and in the name of its file in a checkpoint

    def __init__(self, teacher: Network, lora_rank: int, lora_init_spread: float | None = 1.0, seed: int = 0):
        super().__init__()
        add_lora(teacher, lora_rank, teacher.estimator_targets, lora_init_spread, seed)
        self.network = teacher
        self._layers = lora_layers(teacher)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.network.blocks

    def enable_gradient_checkpointing(self) -> None:
        """Blocks are recomputed in backward, each at the LoRA scale of its own forward, whatever was read since."""

        def contexts():
            return contextlib.nullcontext(), lora_scale_set(self._layers, self._layers[0].scale)

        self.network.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, context_fn=contexts))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, lora_scale: float | Tensor) -> Tensor:
        """x (B, C, H, W), t (B,), y (B,), lora_scale a number or one a sample (B,) -> v (B, C, H, W).

        All tensors on one device: a scale from the CPU would be copied at every call.
        """
        if self.score_dtype is not None and not torch.is_grad_enabled():
            # Without the cache, which would hand out what an autocast around this one has cast to its own dtype.
            with torch.autocast(x.device.type, self.score_dtype, cache_enabled=False):
                return self._read(x, t, y, lora_scale)
        return self._read(x, t, y, lora_scale)

    def _read(self, x: Tensor, t: Tensor, y: Tensor, lora_scale: float | Tensor) -> Tensor:
        if isinstance(lora_scale, Tensor):
            # In the dtype of the layers: an fp32 one would lift what it scales to fp32.
            autocast = torch.is_autocast_enabled(x.device.type)
            dtype = torch.get_autocast_dtype(x.device.type) if autocast else lora_scale.dtype
            scale = lora_scale.to(dtype).view(-1, 1, 1)
        else:
            scale = torch.full((), lora_scale, device=x.device)
        set_lora_scale(self._layers, scale)
        return self.network(x, t, y)

    def adapted(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The velocity of the teacher with the whole LoRA."""
        return self._read(x, t, y, lora_scale=1.0)

    def overflowing_block(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """The first block, or other layer, that ``dtype`` does not bear, with a margin (`overflowing`); else None.

        On noise, and on the samples of a few Euler steps from it. A CPU, slow in half precision, computes in fp32.
        """
        y = self._classes()
        noise = Draws(0, device=device).noise(len(y), *self.network.sample_shape)
        with torch.autocast(device.type, dtype, enabled=device.type != "cpu"):
            return overflowing(self.network, dtype, lambda: euler_sample(self.adapted, noise, y, CHECKED_STEPS))

    def _classes(self) -> Tensor:
        """All classes and the null class if they are few; else some, those of the largest rows among them.

        A class enters the network by its row of a table of embeddings, if it has one.
        """
        null, device = self.network.null_class, next(self.network.parameters()).device
        if null < CHECKED_CLASSES:
            return torch.arange(null + 1, device=device)
        classes = [torch.linspace(0, null, CHECKED_CLASSES // 2, device=device).long()]
        for module in self.network.modules():
            if isinstance(module, nn.Embedding) and module.num_embeddings == null + 1:
                classes.insert(0, module.weight.detach()[:null].norm(dim=1).topk(CHECKED_CLASSES // 2).indices)
        return torch.cat(classes)


class FullEstimator(ScoreEstimator):
    """v(x, t, y) of a trained copy of the teacher in the first rows, the fake score, and of ``teacher`` in the others.

    Both are taken over: ``network`` is trained whole, ``teacher`` is frozen.
    """

    trained = "weights"

    def __init__(self, network: Network, teacher: Network):
        nn.Module.__init__(self)
        self.network, self.teacher = network, teacher.requires_grad_(False)

    @property
    def blocks(self) -> nn.ModuleList:
        """Those of both; the trained ones first."""
        return nn.ModuleList([*self.network.blocks, *self.teacher.blocks])

    def enable_gradient_checkpointing(self) -> None:
        self.network.enable_gradient_checkpointing()

    def _read(self, x: Tensor, t: Tensor, y: Tensor, fakes: int) -> Tensor:
        parts = [(self.network, slice(0, fakes)), (self.teacher, slice(fakes, len(x)))]
        out = [network(x[rows], t[rows], y[rows]) for network, rows in parts if rows.start < rows.stop]
        return out[0] if len(out) == 1 else torch.cat(out)

    def adapted(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The velocity of the copy."""
        return self._read(x, t, y, len(x))


# The range of fp16 ---------------------------------------------------------------------------------------------------


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

    def note(ranges: Seen, where: str, value: Tensor) -> None:
        low, high = value.detach().aminmax()
        ranges.append((where, torch.maximum(low.abs(), high.abs()).float()))

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
    with watched(network) as (ranges, _):
        call()
    beyond = ~(torch.stack([value for _, value in ranges]) * MARGIN < torch.finfo(dtype).max)  # NaN is beyond
    return next((where for (where, _), bad in zip(ranges, beyond.tolist(), strict=True) if bad), None)
