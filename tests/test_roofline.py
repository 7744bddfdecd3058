"""The benchmark's estimate of a cycle by roofline, and what a small cycle moves, as exact numbers."""

import json

import pytest
import torch
from torch.utils import backend_registration

from evaluation import benchmark
from evaluation.fused import fused_kernels
from tests.conftest import random_sit, refused
from train_cc.models import SiT
from train_cc.models.lora import add_lora, hold_frozen_in, lora_layers, set_lora_scale
from train_cc.run import fake_device
from train_cc.run.fake_gpu import fake_gpu
from train_cc.run.roofline import Roofline, card_of

REWARD = ("decoder", "classifier", "reward backward")
needed = "_setup_privateuseone_for_python_backend"
if not hasattr(backend_registration, needed):
    pytest.skip(f"torch has no {needed}", allow_module_level=True)


def estimated(tmp_path, *words: object) -> dict:
    output = tmp_path / "roofline.json"
    benchmark.main([str(word) for word in ("--roofline", "h100", "--output", output, *words)])
    return json.loads(output.read_text())["estimated"]


def test_the_estimate_adds_up_and_says_what_it_assumes(tmp_path, capsys):
    figures = estimated(tmp_path, "--size", "SiT-S/4", "--batch-size", 4, "--ratio-update", 2)
    told = capsys.readouterr().out
    assert "estimate" in told and "989 TFLOP/s" in told and "4 us" in told
    for way in ("by_phase", "by_kind", "by_kernel"):
        for column in ("seconds", "kernels", "bytes", "flop"):
            total = sum(row[column] for row in figures[way].values())
            whole = {"seconds": 1, "kernels": 1, "bytes": 1e9, "flop": 1e12}[column]
            name = {"bytes": "gigabytes", "flop": "tflop"}.get(column, column)
            assert total / whole == pytest.approx(figures[f"{name}_per_cycle"], rel=1e-9) and total > 0
    assert figures["by_phase"].keys() >= {"sampling", "scoring", "estimator backward", "optimizer"}
    assert figures["seconds_per_cycle"] >= 4e-6 * figures["kernels_per_cycle"]
    twice = estimated(tmp_path, "--size", "SiT-S/4", "--batch-size", 8, "--ratio-update", 2)
    assert twice["tflop_per_cycle"] == pytest.approx(2 * figures["tflop_per_cycle"], rel=0.02)
    assert twice["peak_memory_gib"] > figures["peak_memory_gib"]


def test_the_full_size_needs_no_weights_and_its_reward_has_phases(tmp_path):
    """A cycle of one estimator turn at SiT-XL/2: 8 forwards' FLOP for matching, and decoder and classifier on top."""
    words = ("--ratio-update", 1, "--batch-size", 2, "--encoder-type", "dinov2")
    figures = estimated(tmp_path, *words)
    assert set(REWARD) <= figures["by_phase"].keys()
    forward = figures["by_phase"]["generator forward"]["flop"]
    matching = sum(row["flop"] for name, row in figures["by_phase"].items() if name not in REWARD)
    assert matching == pytest.approx(8 * forward, rel=0.03)
    assert 7 < figures["peak_memory_gib"] < 16


def test_a_teacher_that_is_given_is_read(tmp_path):
    random_sit().save_pretrained(tmp_path / "small")
    words = ("--vae", "none", "--batch-size", 4)
    small = estimated(tmp_path, "--teacher", tmp_path / "small", *words)
    assert small["tflop_per_cycle"] < 0.01


def test_bad_input_is_one_message(tmp_path, capsys, monkeypatch):
    for card in ("v100", "989", "989,-1", "989,nan"):
        assert "is no card" in refused(benchmark.main, ["--roofline", card], capsys=capsys)
    monkeypatch.setattr("train_cc.run.fake_gpu.install", fake_device.install.__wrapped__)
    monkeypatch.delattr(backend_registration, needed)
    words = ["--roofline", "a100", "--size", "SiT-S/8"]
    assert "cannot make a fake GPU" in refused(benchmark.main, words, capsys=capsys)


def bytes_of_a_block(tokens: int, rank: int) -> int:
    """Forward of a frozen block in bf16, as under autocast, without gradient: batch 8, width 64, LoRA per sample."""
    with fake_gpu() as gpu, torch.device(gpu.device):
        network = SiT(input_size=8, hidden_size=64, depth=1, num_heads=1, num_classes=10).to(torch.bfloat16)
        if rank:
            add_lora(network, rank, ["attn.qkv"], None, 0)
            hold_frozen_in(network.to(gpu.device), torch.bfloat16)
            set_lora_scale(lora_layers(network), torch.ones(8, 1, 1, dtype=torch.bfloat16))
        x, c = torch.zeros(8, tokens, 64, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16)
        costs = Roofline(card_of("h100"), gpu.device.type)
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


def test_compiled_blocks_are_estimated_by_what_inductor_fuses(tmp_path):
    """A block's eager small kernels are 44 bytes an element of a half stream: norms 8, modulation 8, gates 12, GELU 16.

    Fused they are 34 at least (read and write of the GELU 16; two norms with what is next to them 4 + 8; the last gate
    6), and Inductor keeps within a tenth of that.
    """
    with fake_gpu() as gpu, torch.device(gpu.device):
        block = SiT(depth=1).to(torch.bfloat16).requires_grad_(False).blocks[0]
    x, c = torch.Size((64, 256, 1152)), torch.Size((64, 1152))
    forward, backward = fused_kernels(block, x, c, torch.bfloat16, training=False)
    assert backward == [] and 34 <= sum(forward) / x.numel() < 37.4 and len(forward) < 10
    forward, backward = fused_kernels(block, x, c, torch.bfloat16, training=True)
    assert sum(forward) / x.numel() > 34 and 34 < sum(backward) / x.numel() < 70
    words = ("--size", "SiT-S/4", "--batch-size", 16, "--ratio-update", 1, "--compile")
    figures = estimated(tmp_path, *words)
    for name in ("seconds", "gigabytes", "kernels"):
        assert 0.4 < figures[f"{name}_per_cycle_compiled"] / figures[f"{name}_per_cycle"] < 1


# Taken with torch 2.14, of a cycle of two estimator turns at batch 8: kernels and bytes by kind. Half precision is
# where a stream that is lifted to fp32, or a kernel more per block, shows. Fewer is better: then write them down here.
CYCLES = {
    "fp16": (
        (),
        {
            "other": (2345, 3_921_854_144),
            "matrix product": (709, 1_596_236_416),
            "attention": (96, 246_843_648),
            "convolution": (6, 4_018_688),
        },
    ),
    "bf16": (
        ("--mixed-precision", "bf16"),
        {
            "other": (2573, 3_909_618_588),
            "matrix product": (709, 1_596_236_416),
            "attention": (96, 246_843_648),
            "convolution": (6, 4_018_688),
        },
    ),
    "fp16, LoRA": (
        ("--use-lora-gen", "--ema-decay", 0.99),
        {
            "other": (1969, 1_904_665_940),
            "matrix product": (1013, 2_003_356_288),
            "attention": (96, 246_843_648),
            "convolution": (5, 3_460_864),
        },
    ),
    "fp32": (
        ("--mixed-precision", "no"),
        {
            "other": (1744, 4_528_604_092),
            "matrix product": (709, 3_192_472_832),
            "attention": (96, 491_619_840),
            "convolution": (6, 8_037_376),
        },
    ),
}


@pytest.mark.skipif(not torch.__version__.startswith("2.14."), reason="the numbers are those of torch 2.14")
@pytest.mark.parametrize("name", CYCLES)
def test_a_small_cycle_moves_exactly_these_bytes(tmp_path, name):
    more, expected = CYCLES[name]
    figures = estimated(tmp_path, "--size", "SiT-S/4", "--batch-size", 8, "--ratio-update", 2, *more)
    found = {kind: (row["kernels"], row["bytes"]) for kind, row in figures["by_kind"].items()}
    assert found == expected
