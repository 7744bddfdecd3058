"""The benchmark's estimate of a cycle by roofline, and what a small cycle moves, as exact numbers."""

import json

import pytest
from torch.utils import backend_registration

from evaluation import benchmark
from tests.conftest import random_sit, refused
from train_cc.run import fake_device

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
    fake_device.install.cache_clear()
    monkeypatch.delattr(backend_registration, needed)
    words = ["--roofline", "a100", "--size", "SiT-S/8"]
    assert "cannot make a fake GPU" in refused(benchmark.main, words, capsys=capsys)
