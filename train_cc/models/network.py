"""SiT (arXiv 2401.08740): the velocity network. Knows nothing of distillation.

Parameter names and conventions are those of the REPA release: t = 1 is noise, v = noise - data, raw t in [0, 1].
This file needs torch, timm and diffusers alone: a pipeline that is shared holds a copy of it.
"""

import logging
import math
from functools import partial

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from timm.layers import Attention, Mlp, PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# diffusers says at every cast to another dtype that no module should be kept in fp32.
logging.getLogger("diffusers.models.modeling_utils").addFilter(lambda told: "kept in float32: []" not in told.msg)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, in the dtype of x: x (B, N, D), shift and scale (B, D).

    Outside autocast, which would lift it to fp32 and move twice the bytes; the norm's statistics are in fp32 anyway.
    """
    with torch.autocast(x.device.type, enabled=False):
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return torch.addcmul(shift.unsqueeze(1), normed, 1 + scale.unsqueeze(1))


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate branch, in the dtype of x: x and branch (B, N, D), gate (B, D)."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.addcmul(x, gate.unsqueeze(1), branch)


def sinusoidal_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """cat[cos, sin] of t times exp(-ln(10000) i / (dim / 2)). (B,) -> (B, dim), fp32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_embedding(hidden_size: int, grid_size: int) -> Tensor:
    """Fixed 2-D sine-cosine table, columns (w) in the first half of the width. (1, grid_size^2, hidden_size)."""
    quarter = hidden_size // 4
    frequencies = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid_size, hidden_size / 2)
    columns = axis.repeat(grid_size, 1)
    rows = axis.repeat_interleave(grid_size, dim=0)
    return torch.cat([columns, rows], dim=1).float().unsqueeze(0)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoidal_embedding(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """One row a class and, last, one for the null class. Labels are never dropped here, whatever the mode."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PackedAttention(Attention):
    """timm's, but q, k and v lie beside each other in the projection's order: their gradient needs no second copy."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused_attn:
            return super().forward(x)
        packed = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = (each.transpose(1, 2) for each in packed.unbind(2))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LeanMlp(Mlp):
    """timm's. With ``recompute`` what its second layer is given is not kept for that layer's gradient, but made again.

    It is four times as wide as the residual stream: a fifth of all that a block keeps.
    """

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if not (self.recompute and torch.is_grad_enabled()):
            return self.fc2(self.act(hidden))
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        if torch.compiler.is_compiling():  # keeps what comes out of it, and would make the second product again
            return self.fc2(again(self.act, hidden))
        return again(lambda hidden: self.fc2(self.act(hidden)), hidden)  # stops before the second product


class SiTBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.attn = PackedAttention(hidden_size, num_heads, qkv_bias=True)
        self.mlp = LeanMlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation[1](c).chunk(6, dim=1)
        x = gated(x, gate_msa, self.attn(modulated_norm(x, shift_msa, scale_msa)))
        return gated(x, gate_mlp, self.mlp(modulated_norm(x, shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation[1](c).chunk(2, dim=1)
        return self.linear(modulated_norm(x, shift, scale))


class SiT(ModelMixin, ConfigMixin):
    """Velocity network v(x, t, y). The defaults are SiT-XL/2, at latents of 32 x 32; null class = ``num_classes``."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        input_size: int = 32,
        in_channels: int = 4,
        patch_size: int = 2,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        # A buffer: part of every file (REPA's went through its EMA), never trained.
        self.register_buffer("pos_embed", position_embedding(hidden_size, input_size // patch_size))
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.gradient_checkpointing = False
        self.initialize_weights()

    @property
    def null_class(self) -> int:
        return self.config.num_classes

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one input."""
        return (self.config.in_channels, self.config.input_size, self.config.input_size)

    def initialize_weights(self) -> None:
        """adaLN-Zero: every block starts as the identity and the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
        nn.init.zeros_(patch.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for layer in [block.adaLN_modulation[1] for block in self.blocks] + [
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ]:
            nn.init.zeros_(layer.weight)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, N, p * p * C) with channels fastest -> (B, C, H, W)."""
        p, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        x = tokens.view(len(tokens), side, side, p, p, self.config.in_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), self.config.in_channels, side * p, side * p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,) in [0, 1], y (B,) int64 -> v (B, C, H, W)."""
        x = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype))
        x = x + self.pos_embed.to(x.dtype)  # the residual stream is in the compute dtype
        c = F.silu(self.t_embedder(t) + self.y_embedder(y)).to(x.dtype)  # as every adaLN_modulation begins
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, c)
            else:
                x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))
