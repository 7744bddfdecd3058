"""What a block moves, as counted by hand."""

import pytest
import torch
from torch.utils import backend_registration

from tests.lab.fake_gpu import fake_gpu
from tests.lab.roofline import CARDS, Roofline
from train_cc.models import SiT
from train_cc.models.lora import add_lora, hold_frozen_in, lora_layers, set_lora_scale

needed = "_setup_privateuseone_for_python_backend"
pytestmark = pytest.mark.skipif(not hasattr(backend_registration, needed), reason=f"torch has no {needed}")


def bytes_of_a_block(tokens: int, rank: int) -> int:
    """Forward of a frozen block in bf16, as under autocast, without gradient: batch 8, width 64, LoRA per sample."""
    with fake_gpu() as gpu, torch.device(gpu.device):
        network = SiT(input_size=8, hidden_size=64, depth=1, num_heads=1, num_classes=10).to(torch.bfloat16)
        if rank:
            add_lora(network, rank, ["attn.qkv"], None, 0)
            hold_frozen_in(network.to(gpu.device), torch.bfloat16)
            set_lora_scale(lora_layers(network), torch.ones(8, 1, 1, dtype=torch.bfloat16))
        x, c = torch.zeros(8, tokens, 64, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16)
        costs = Roofline(CARDS["h100"], gpu.device.type)
        with torch.no_grad(), torch.autocast(gpu.device.type, torch.bfloat16), costs:
            network.blocks[0](x, c)
    return costs.total().bytes


@pytest.mark.parametrize("rank", [0, 4])
def test_a_block_moves_what_is_counted_by_hand(rank):
    """Bytes of each further element of the residual stream, every input and output of a kernel once, two bytes each.

    Twice norm (1 in, 1 out), modulation (1, 1), gate (2, 1); qkv (1, 3), attention (3, 1), proj (1, 1), fc1 (1, 4),
    GELU (4, 4), fc2 (4, 1). LoRA: A reads 1, addmm reads and writes 3; its low rank is written, scaled (1, 1), read.
    A token has fp32 figures on top: each norm's mean and deviation, the attention's log-sum-exp.
    """
    by_hand = 2 * (2 * (2 + 2 + 3) + 4 + 4 + 2 + 5 + 8 + 5)
    if rank:
        by_hand += 2 * (1 + 6 + 4 * rank / 64)
    more = bytes_of_a_block(32, rank) - bytes_of_a_block(16, rank)
    assert more == 8 * 16 * (64 * by_hand + 4 * (2 * 2 + 1))
