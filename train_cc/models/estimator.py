"""The estimator: the frozen teacher plus a small LoRA, read at two scales as the fake and the real score."""

import contextlib
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train_cc.models.lora import ESTIMATOR_TARGETS, add_lora, lora_layers, lora_scale_set, set_lora_scale
from train_cc.models.sit import SiT


class ScoreEstimator(nn.Module):
    """v(x, t, y) of ``teacher`` with its LoRA at ``lora_scale``; scale 0 is the teacher bit for bit.

    ``teacher`` is taken over and frozen. The scale is an argument of `forward` alone.
    """

    def __init__(self, teacher: SiT, lora_rank: int, lora_init_spread: float | None = 1.0, seed: int = 0):
        super().__init__()
        add_lora(teacher, lora_rank, ESTIMATOR_TARGETS, lora_init_spread, seed)
        self.network = teacher
        self._layers = lora_layers(teacher)

    def enable_gradient_checkpointing(self) -> None:
        """Blocks are recomputed in backward, each at the LoRA scale of its own forward, whatever was read since."""

        def contexts():
            return contextlib.nullcontext(), lora_scale_set(self._layers, self._layers[0].scale)

        self.network.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, context_fn=contexts))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, lora_scale: float | Tensor) -> Tensor:
        """x (B, C, H, W), t (B,), y (B,), lora_scale a number or one a sample (B,) -> v (B, C, H, W).

        All tensors on one device: a scale from the CPU would be copied at every call.
        """
        if isinstance(lora_scale, Tensor):
            # In the dtype of the layers: an fp32 one would lift what it scales to fp32.
            autocast = torch.is_autocast_enabled(x.device.type)
            dtype = torch.get_autocast_dtype(x.device.type) if autocast else lora_scale.dtype
            scale = lora_scale.to(dtype).view(-1, 1, 1)
        else:
            scale = torch.full((), lora_scale, device=x.device)
        set_lora_scale(self._layers, scale)
        return self.network(x, t, y)
