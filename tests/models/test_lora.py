"""LoRA: how it starts, from which seed, and what of a network is trained."""

import pytest
import torch

from tests.conftest import random_sit
from train_cc.models import ScoreEstimator
from train_cc.models.lora import ADAPTER, lora_layers


def first_a(**options) -> torch.Tensor:
    estimator = ScoreEstimator(random_sit(), 32, **options)
    return torch.cat([layer.lora_A[ADAPTER].weight.flatten() for layer in lora_layers(estimator)])


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_a_is_normal_around_zero_with_its_spread(spread):
    a = first_a(lora_init_spread=spread)
    assert len(a) == 2 * 32 * 32
    assert abs(a.mean().item()) < 0.1 * spread and a.std().item() == pytest.approx(spread, rel=0.05)
    assert (a.abs() > 2 * spread).float().mean().item() == pytest.approx(0.0455, abs=0.02)  # normal, not uniform


def test_b_starts_at_zero_and_the_product_has_no_factor():
    """v at scale s is the network's with W + s B A: alpha is the rank."""
    estimator = ScoreEstimator(random_sit(), 4, 0.3)
    assert all((layer.lora_B[ADAPTER].weight == 0).all() for layer in lora_layers(estimator))
    generator = torch.Generator().manual_seed(0)
    merged = random_sit()
    for layer, block in zip(lora_layers(estimator), merged.blocks, strict=True):
        with torch.no_grad():
            b = layer.lora_B[ADAPTER].weight
            b.copy_(0.3 * torch.randn(b.shape, generator=generator))
            block.attn.qkv.weight += 1.7 * b @ layer.lora_A[ADAPTER].weight
    x, t, y = torch.randn(4, 1, 8, 8, generator=generator), torch.rand(4, generator=generator), torch.arange(4)
    expected = merged(x, t, y)
    assert (expected - random_sit()(x, t, y)).abs().max() > 0.1
    torch.testing.assert_close(estimator(x, t, y, 1.7), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(estimator(x, t, y, torch.full((4,), 1.7)), expected, rtol=1e-4, atol=1e-5)


def test_the_seed_is_the_argument():
    assert torch.equal(first_a(), first_a(lora_init_spread=1.0, seed=0))
    assert torch.equal(first_a(seed=3), first_a(seed=3)) and not torch.equal(first_a(seed=3), first_a(seed=4))
    default = first_a(lora_init_spread=None, seed=3)
    assert default.std().item() == pytest.approx(1 / (3 * 32) ** 0.5, rel=0.1)  # peft's own
    assert torch.equal(default, first_a(lora_init_spread=None, seed=3))
    assert not torch.equal(default, first_a(lora_init_spread=None, seed=4))


def test_making_a_lora_leaves_the_global_draws_alone():
    torch.manual_seed(5)
    expected = torch.rand(4)
    network = random_sit()
    torch.manual_seed(5)
    ScoreEstimator(network, 4, 0.3, seed=9)
    assert torch.equal(torch.rand(4), expected)
