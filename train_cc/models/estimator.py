"""The estimator: the frozen teacher plus a small LoRA, read at two scales as the fake and the real score."""

import contextlib
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train_cc.draws import Draws
from train_cc.models.half import overflowing
from train_cc.models.lora import ESTIMATOR_TARGETS, add_lora, lora_layers, lora_scale_set, set_lora_scale
from train_cc.models.sit import SiT
from train_cc.samplers import euler_sample

CHECKED_CLASSES, CHECKED_STEPS = 64, 4  # of a teacher in fp16: four calls, half a second for SiT-XL/2 on an A100


class ScoreEstimator(nn.Module):
    """v(x, t, y) of ``teacher`` with its LoRA at ``lora_scale``; scale 0 is the teacher bit for bit.

    ``teacher`` is taken over and frozen. The scale is an argument of `forward` alone. Without gradient it computes in
    ``score_dtype``, if there is one: the gap of two readings is small, and fp16 rounds eight times finer than bf16.
    """

    score_dtype: torch.dtype | None = None

    def __init__(self, teacher: SiT, lora_rank: int, lora_init_spread: float | None = 1.0, seed: int = 0):
        super().__init__()
        add_lora(teacher, lora_rank, ESTIMATOR_TARGETS, lora_init_spread, seed)
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

        A class enters the network by its row alone.
        """
        null, rows = self.network.null_class, self.network.y_embedder.embedding_table.weight.detach()
        if null < CHECKED_CLASSES:
            return torch.arange(null + 1, device=rows.device)
        largest = rows[:null].norm(dim=1).topk(CHECKED_CLASSES // 2).indices
        return torch.cat([largest, torch.linspace(0, null, CHECKED_CLASSES // 2, device=rows.device).long()])
