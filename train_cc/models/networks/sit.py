"""SiT (arXiv 2401.08740): the velocity network. Knows nothing of distillation.

Parameter names and conventions are those of the REPA release: t = 1 is noise, v = noise - data, raw t in [0, 1].
This file needs torch, timm and diffusers only: a pipeline that is shared holds a copy of it.
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
logging.getLogger("diffusers.models.modeling_utils").addFilter(lambda message: "kept in float32: []" not in message.msg)


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


def sinusoidal_embedding(t: Tensor, dim: int = 256, shift: int = 0) -> Tensor:
    """cat[cos, sin] of t times exp(-ln(10000) i / (dim / 2 - shift)). (B,) -> (B, dim), fp32."""
    half = dim // 2
    count = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * count / (half - shift))
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
    shift = 0  # of the frequencies' exponent: 1 in diffusers' DiT

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoidal_embedding(t, shift=self.shift).to(self.mlp[0].weight.dtype))


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
    block, last = SiTBlock, FinalLayer
    # What the project reads off a network: the layers of the two LoRAs, its config's ranges (ends included), and the
    # names that a config.json may leave out.
    estimator_targets = ("attn.qkv",)
    generator_targets = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    limits = {  # noqa: RUF012
        "input_size": (1, 4096),
        "in_channels": (1, 1024),
        "patch_size": (1, 256),
        "hidden_size": (4, 2**16),
        "depth": (1, 1024),
        "num_heads": (1, 1024),
        "num_classes": (1, 10**6),
        "mlp_ratio": (1 / 64, 64),
    }
    optional = ("patch_size", "mlp_ratio")

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
        self.blocks = nn.ModuleList(self.block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = self.last(hidden_size, patch_size, in_channels)
        self.gradient_checkpointing = False
        self.initialize_weights()

    @staticmethod
    def check_sizes(config: dict) -> None:
        """Raises `ValueError` for numbers that are in range, each, and do not fit together."""
        for name, divisor in (("hidden_size", "num_heads"), ("input_size", "patch_size")):
            if config[name] % config[divisor]:
                raise ValueError(f"{divisor} {config[divisor]} does not divide {name} {config[name]}")
        if config["hidden_size"] % 4:
            raise ValueError(f"hidden_size is {config['hidden_size']}; allowed: multiples of 4")

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

    def block_inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Further inputs of every block, beside x and c."""
        return ()

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
        more = self.block_inputs(x)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, c, *more)
            else:
                x = block(x, c, *more)
        return self.unpatchify(self.final_layer(x, c))


# LightningDiT (arXiv 2501.01423): RMSNorm, SwiGLU and rotary positions in the blocks of SiT --------------------------


def modulated_rms_norm(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """RMSNorm(x) weight (1 + scale) + shift, in the dtype of x: x (B, N, D), shift and scale (B, D)."""
    with torch.autocast(x.device.type, enabled=False):
        factor = weight.to(x.dtype) * (1 + scale)
        return torch.addcmul(shift.unsqueeze(1), F.rms_norm(x, x.shape[-1:], eps=1e-6), factor.unsqueeze(1))


def rotary_table(side: int, head_dim: int, like: Tensor) -> Tensor:
    """[cos, sin] (2, side^2, 3, 1, head_dim) for packed q, k, v, each pair of columns one angle; v is not turned.

    Rows (h) in the first half of a head, columns (w) in the second, EVA-02's.
    """
    frequencies = 10000 ** (-torch.arange(0, head_dim // 2, 2, device=like.device).double() / (head_dim // 2))
    angles = (torch.arange(side, device=like.device)[:, None] * frequencies).repeat_interleave(2, dim=1)
    rows, columns = angles.repeat_interleave(side, dim=0), angles.repeat(side, 1)
    turned = torch.cat([rows, columns], dim=1)[:, None].expand(-1, 2, -1)
    turned = torch.cat([turned, torch.zeros_like(turned[:, :1])], dim=1).unsqueeze(2)
    return torch.stack([turned.cos(), turned.sin()]).to(like.dtype)


class RotaryAttention(PackedAttention):
    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        packed = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        with torch.autocast(x.device.type, enabled=False):
            even, odd = packed.unflatten(-1, (-1, 2)).unbind(-1)
            quarter = torch.stack([-odd, even], dim=-1).flatten(-2)
            cos, sin = rotary.to(packed.dtype)
            packed = torch.addcmul(packed * cos, quarter, sin)  # of all three at once: nothing else is kept
        q, k, v = (each.transpose(1, 2) for each in packed.unbind(2))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SiluGate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class SwiGLU(LeanMlp):
    """fc2(silu(a) b) of [a, b] = fc1(x)."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__(hidden_size, width, act_layer=SiluGate)
        self.fc1 = nn.Linear(hidden_size, 2 * width)


class LightningBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(hidden_size), nn.RMSNorm(hidden_size)
        self.attn = RotaryAttention(hidden_size, num_heads, qkv_bias=True)
        self.mlp = SwiGLU(hidden_size, int(2 / 3 * int(hidden_size * mlp_ratio)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, rotary: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation[1](c).chunk(6, dim=1)
        x = gated(x, gate_msa, self.attn(modulated_rms_norm(x, self.norm1.weight, shift_msa, scale_msa), rotary))
        return gated(x, gate_mlp, self.mlp(modulated_rms_norm(x, self.norm2.weight, shift_mlp, scale_mlp)))


class LightningFinalLayer(FinalLayer):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__(hidden_size, patch_size, out_channels)
        self.norm_final = nn.RMSNorm(hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation[1](c).chunk(2, dim=1)
        return self.linear(modulated_rms_norm(x, self.norm_final.weight, shift, scale))


class LightningDiT(SiT):
    """Velocity network v(x, t, y); `input_size` 16, `in_channels` 32 and `patch_size` 1 make LightningDiT-XL/1."""

    block, last = LightningBlock, LightningFinalLayer

    def block_inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        return (rotary_table(math.isqrt(x.shape[1]), self.config.hidden_size // self.config.num_heads, x),)


# DiT (arXiv 2212.09748): SiT's network, trained on DDPM's path ------------------------------------------------------


class DiT(SiT):
    """v(x, t, y) of a network that predicts eps or v of DDPM at integer steps (``betas`` linear), read on our path.

    x_t over its norm is a x0 + s noise at the step where s / a = t / (1 - t). Beyond ``last_step`` x is read as of that
    step: so one step from t = 1 takes its x0, and multiplies what the network rounds by s / a, 157 at step 999.
    """

    limits = SiT.limits | {
        "beta_start": (1e-8, 1),
        "beta_end": (1e-8, 1),
        "last_step": (1, 999),
        "embedding_shift": (0, 1),
    }
    optional = (*SiT.optional, "prediction", "beta_start", "beta_end", "last_step", "embedding_shift")

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
        prediction: str = "eps",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        last_step: int = 999,
        embedding_shift: int = 0,
    ):
        super().__init__(input_size, in_channels, patch_size, hidden_size, depth, num_heads, num_classes, mlp_ratio)
        self.t_embedder.shift = embedding_shift
        self.needs = "its prediction is of noise, and one step multiplies the rounding" if prediction == "eps" else ""

    @staticmethod
    def check_sizes(config: dict) -> None:
        SiT.check_sizes(config)
        if config["prediction"] not in ("eps", "v"):
            raise ValueError(f"prediction is {config['prediction']}; allowed: eps, v")

    def angles(self) -> Tensor:
        """arctan(s / a) of each step 0 to ``last_step``, in float64 on the CPU."""
        betas = torch.linspace(self.config.beta_start, self.config.beta_end, 1000, dtype=torch.float64, device="cpu")
        clean = betas.neg().log1p().cumsum(0)[: self.config.last_step + 1]  # log a^2
        return torch.atan2(clean.expm1().neg().sqrt(), (clean / 2).exp())

    def on_ddpm(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """At the times t (B,): the step, a and s of it, and whether t is beyond ``last_step``."""
        angles = self.angles().to(t.device, torch.float32, non_blocking=True)
        angle = torch.atan2(t.float(), 1 - t.float())
        beyond = angle > angles[-1]
        above = torch.searchsorted(angles, angle).clamp(1, len(angles) - 1)
        low, high = angles[above - 1], angles[above]
        step = (above - 1 + (angle - low) / (high - low)).clamp(0, len(angles) - 1)
        angle = torch.minimum(angle, angles[-1])
        return step, angle.cos(), angle.sin(), beyond

    def loss_weight(self, t: Tensor) -> Tensor:
        """The prediction's own mean square over the velocity's: (1 - t)^2 for eps, up to ``last_step``."""
        _, a, s, beyond = self.on_ddpm(t)
        per_x0, per_noise = (s / a, torch.ones_like(s)) if self.config.prediction == "eps" else (s, a)
        return torch.where(beyond, per_x0 / t.float().clamp(min=1e-6), per_x0 + per_noise) ** -2

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,) in [0, 1], y (B,) int64 -> v (B, C, H, W), fp32."""
        step, a, s, beyond = self.on_ddpm(t)
        with torch.autocast(x.device.type, enabled=False):
            t, a, s, beyond = (each.view(-1, 1, 1, 1) for each in (t.float(), a, s, beyond))
            x = x.float()
            on_path = x / (t**2 + (1 - t) ** 2).sqrt()
        out = super().forward(on_path, step, y)
        with torch.autocast(x.device.type, enabled=False):
            out = out.float()
            noise, x0 = (out, (on_path - s * out) / a)
            if self.config.prediction == "v":
                noise, x0 = s * on_path + a * out, a * on_path - s * out
            return torch.where(beyond, (x - x0) / t.clamp(min=1e-6), noise - x0)
