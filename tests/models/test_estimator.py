"""train_cc/models/estimator.py: both scores in half precision, and a block with LoRA against one written out."""

import pytest
import torch
from timm.layers import Attention
from torch import nn

from tests.conftest import assert_close_and_not_zero, random_sit, spread_lora_b
from tests.worlds import inputs
from train_cc.models.backbone import choose_attention
from train_cc.models.estimator import ScoreEstimator
from train_cc.models.lora import ADAPTER, hold_frozen_in, lora_layers, set_lora_scale


def estimator_of(seed: int = 0) -> ScoreEstimator:
    """With a LoRA whose B is not zero, so that both its factors have gradients."""
    model = ScoreEstimator(random_sit(), 4, 0.3, seed)
    spread_lora_b(model)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [2.0, torch.rand(4)], ids=["one scale", "a scale per sample"])
def test_frozen_weights_held_in_half_precision_give_the_bits_of_autocast(dtype, scale):
    """The residual stream is in the compute dtype too: in fp32 it would move twice the bytes."""
    results, seen = [], []
    for held in (False, True):
        model = estimator_of()
        if held:
            hold_frozen_in(model, dtype)
            for block in model.network.blocks:
                block.register_forward_hook(lambda block, args, out: seen.extend([args[0], args[1], out]))
                block.attn.qkv.register_forward_hook(lambda layer, args, out: seen.extend([args[0], out]))
        with torch.autocast("cpu", dtype):
            v = model(*inputs(), lora_scale=scale)
        v.float().square().mean().backward()
        results.append([v] + [p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(plain, fast) for plain, fast in zip(*results, strict=True))
    assert all(gradient.dtype == torch.float32 and gradient.abs().sum() > 0 for gradient in results[1][1:])
    assert len(seen) == 10 and {tensor.dtype for tensor in seen} == {dtype}


def plain_block(block: nn.Module, x: torch.Tensor, c: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As SiT writes it, with timm's attention and LoRA added at the full width."""

    def norm(x, shift, scale):
        return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    class Adapted(nn.Module):
        def forward(self, x):
            layer = block.attn.qkv
            low = nn.functional.linear(x, layer.lora_A[ADAPTER].weight)
            return layer.base_layer(x) + scale * nn.functional.linear(low, layer.lora_B[ADAPTER].weight)

    attention = Attention(x.shape[-1], block.attn.num_heads, qkv_bias=True).to(x.dtype)
    attention.qkv, attention.proj = Adapted(), nn.Identity()
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation[1](c).chunk(6, dim=1)
    x = x + gate_msa[:, None] * block.attn.proj(attention(norm(x, shift_msa, scale_msa)))
    return x + gate_mlp[:, None] * block.mlp(norm(x, shift_mlp, scale_mlp))


@pytest.mark.parametrize("fused", [True, False])
def test_a_block_and_its_lora_are_the_plain_ones(fused):
    """To the rounding of fp64, values and gradients, at a scale per sample."""
    network = estimator_of().network.double()
    block = network.blocks[0]
    choose_attention(network, torch.device("cuda" if fused else "cpu"), torch.bfloat16)
    assert block.attn.fused_attn == fused
    generator = torch.Generator().manual_seed(3)
    x, c = torch.randn(4, 16, 32, generator=generator), torch.randn(4, 32, generator=generator)
    scale = torch.tensor([0.0, 0.5, 1.0, 2.0]).double().view(-1, 1, 1)
    weights = {name: p.requires_grad_() for name, p in block.named_parameters()}
    results = []
    for forward in (block, lambda x, c: plain_block(block, x, c, scale)):
        arguments = [each.double().requires_grad_() for each in (x, c)]
        set_lora_scale(lora_layers(network), scale)
        out = forward(*arguments)
        results.append([out, *torch.autograd.grad(out.pow(2).sum(), [*arguments, *weights.values()])])
    for name, ours, plain in zip(["out", "x", "c", *weights], *results, strict=True):
        assert_close_and_not_zero(ours, plain, 1e-12, name)


def test_scores_in_fp16_have_a_gap_several_times_nearer_to_fp32():
    """Frozen weights held in fp16, training in bf16 autocast, and without gradient fp16 whatever is around."""
    x, t, y = inputs(64)
    exact, errors, seen = None, [], []
    for dtype in (None, torch.bfloat16, torch.float16):
        network = estimator_of()
        if dtype is not None:
            hold_frozen_in(network, dtype)
        network.score_dtype = dtype if dtype == torch.float16 else None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            gap = network(x, t, y, 0.0).float() - network(x, t, y, 0.1).float()
        exact = gap if dtype is None else exact
        errors.append(((gap - exact).norm() / exact.norm()).item())
    assert errors[1] > 1e-3 and 0 < errors[2] < errors[1] / 3
    network.network.blocks[0].register_forward_hook(lambda block, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        network(x, t, y, 1.0).float().mean().backward()
        with torch.no_grad():
            network(x, t, y, 1.0)
    assert seen == [torch.bfloat16, torch.float16]
