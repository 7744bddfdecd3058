"""The benchmark's estimate of a cycle by roofline, and what a small cycle moves, as exact numbers."""

import json
import re
from importlib.util import find_spec

import pytest
import torch
from torch.utils import backend_registration

from evaluation import benchmark
from evaluation.fused import compiled
from evaluation.lowering import absent_card
from tests.conftest import random_sit, refused
from train_cc.models import SiT
from train_cc.models.lora import add_lora, hold_frozen_in, lora_layers, set_lora_scale
from train_cc.run import fake_device
from train_cc.run.fake_gpu import fake_gpu
from train_cc.run.roofline import Roofline, card_of
from train_cc.run.session import INDUCTOR

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


needs_cuda_lowering = pytest.mark.skipif(
    not torch.backends.cuda.is_built() or find_spec("triton") is None,
    reason="torch is not built for CUDA, or no Triton",
)
XL, XL_C = torch.Size((64, 256, 1152)), torch.Size((64, 1152))


def block_of(trained: bool, lora: int = 0) -> torch.nn.Module:
    with fake_gpu() as gpu, torch.device(gpu.device):
        sit = SiT(depth=1)
        if lora:
            add_lora(sit, lora, ["attn.qkv"], None, 0)
            set_lora_scale(lora_layers(sit), torch.full((), 2.0))
        hold_frozen_in(sit.requires_grad_(trained) if not lora else sit, torch.float16)
        sit.blocks[0].mlp.recompute = trained
    return sit.blocks[0]


@needs_cuda_lowering
def test_compiled_blocks_are_estimated_by_what_inductor_fuses(tmp_path):
    """A block's eager small kernels are 44 bytes an element of a half stream: norms 8, modulation 8, gates 12, GELU 16.

    Fused they are 34 at least (read and write of the GELU 16; two norms with what is next to them 4 + 8; the last gate
    6), and Inductor makes four kernels that move just that.
    """
    forward, backward = compiled(block_of(trained=False), XL, XL_C, torch.float16, training=False)
    assert backward.sizes == [] and 34 <= sum(forward.sizes) / XL.numel() < 34.5 and len(forward.sizes) == 4
    forward, backward = compiled(block_of(trained=False), XL, XL_C, torch.float16, training=True)
    assert sum(forward.sizes) / XL.numel() > 34 and 34 < sum(backward.sizes) / XL.numel() < 70
    words = ("--size", "SiT-S/4", "--batch-size", 16, "--ratio-update", 1, "--compile")
    figures = estimated(tmp_path, *words)
    for name in ("seconds", "gigabytes", "kernels"):
        assert 0.4 < figures[f"{name}_per_cycle_compiled"] / figures[f"{name}_per_cycle"] < 1


@needs_cuda_lowering
def test_kernels_that_do_not_wait_for_one_another_become_one(monkeypatch):
    """The casts of a trained block's weights and biases are one kernel of each size; every launch is counted."""
    made = compiled(block_of(trained=True), XL, XL_C, torch.float16, training=True)
    assert [len(each.sizes) for each in made] == [each.code.count(".run(") for each in made]
    monkeypatch.setitem(INDUCTOR, "combo_kernels", False)
    apart = compiled(block_of(trained=True), XL, XL_C, torch.float16, training=True)
    for fewer, more in zip(made, apart, strict=True):
        assert len(fewer.sizes) < len(more.sizes) and sum(fewer.sizes) == pytest.approx(sum(more.sizes), rel=1e-3)


@pytest.mark.slow
@needs_cuda_lowering
@pytest.mark.parametrize("network", ["sampling", "generator", "estimator"])
def test_each_kernel_of_a_compiled_block_is_machine_code_for_an_h100(network, tmp_path, monkeypatch):
    """Triton's and NVIDIA's compilers take what Inductor writes: no GPU is needed for that, only to run it."""
    from torch._inductor.codecache import _load_triton_kernel_from_source

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    block = block_of(trained=network != "estimator", lora=32 if network == "estimator" else 0)
    kernels = 0
    for graph in compiled(block, XL, XL_C, torch.float16, training=network != "sampling"):
        for name, source in re.findall(r"async_compile\.triton\('(\w+)', '\'\'(.*?)\'\'\'", graph.code, re.DOTALL):
            with absent_card():
                kernel = _load_triton_kernel_from_source(name, source)
                kernel.precompile(warm_cache_only=True)
            assert kernel.compile_results
            kernels += 1
    assert kernels >= 5
    assert {path.read_bytes()[:4] for path in tmp_path.rglob("*.cubin")} == {b"\x7fELF"}


def test_a_gpu_that_is_there_is_asked_itself(monkeypatch):
    count = torch.cuda.device_count
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with absent_card():
        assert torch.cuda.device_count is count


def test_a_torch_without_cuda_cannot_be_asked_what_it_compiles(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: False)
    message = refused(estimated, tmp_path, "--size", "SiT-S/4", "--compile", capsys=capsys)
    assert "built for CUDA" in message and "leave --compile away" in message


# Taken with torch 2.14, of a cycle of two estimator turns at batch 8: kernels and bytes by kind. Half precision is
# where a stream that is lifted to fp32, or a kernel more per block, shows. Fewer is better: then write them down here.
CYCLES = {
    "fp16": (
        (),
        {
            "other": (2419, 3_925_459_606),
            "matrix product": (709, 1_596_236_416),
            "attention": (96, 246_843_648),
            "convolution": (6, 4_018_688),
        },
    ),
    "bf16": (
        ("--mixed-precision", "bf16"),
        {
            "other": (2626, 3_910_341_762),
            "matrix product": (709, 1_596_236_416),
            "attention": (96, 246_843_648),
            "convolution": (6, 4_018_688),
        },
    ),
    "fp16, LoRA": (
        ("--use-lora-gen", "--ema-decay", 0.99),
        {
            "other": (2043, 1_908_271_402),
            "matrix product": (1013, 2_003_356_288),
            "attention": (96, 246_843_648),
            "convolution": (5, 3_460_864),
        },
    ),
    "fp32": (
        ("--mixed-precision", "no"),
        {
            "other": (1779, 4_528_606_132),
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


@needs_cuda_lowering
@pytest.mark.skipif(not torch.__version__.startswith("2.14."), reason="the numbers are those of torch 2.14")
def test_a_small_compiled_cycle_moves_exactly_these_bytes(tmp_path):
    figures = estimated(tmp_path, "--size", "SiT-S/4", "--batch-size", 8, "--ratio-update", 2, "--compile")
    assert (figures["kernels_per_cycle_compiled"], figures["gigabytes_per_cycle_compiled"]) == (2210, 5.517520918)
