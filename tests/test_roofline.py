"""The benchmark's estimate of a cycle by roofline, and what a block moves, as counted by hand."""

import json

import pytest
import torch
from torch.utils import backend_registration

from evaluation import benchmark
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
