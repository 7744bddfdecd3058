"""evaluation/benchmark.py: seconds by phase, FLOP and the comparison of two files."""

import json

import pytest
import torch
from torch import nn

from evaluation import benchmark
from tests.conftest import refused, words


def test_benchmark_measures_and_compares(tmp_path, capsys):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, batch in zip(files, (1, 2), strict=True):
        more = ["--size", "SiT-S/8", "--cycles", 1, "--batch-size", batch, "--ratio-update", 2, "--output", file]
        benchmark.main(words(*more))
    small, large = (json.loads(file.read_text())["figures"] for file in files)
    assert large["tflop_per_cycle"] == pytest.approx(2 * small["tflop_per_cycle"], rel=0.05)
    assert small["seconds_by_phase"].keys() >= {"sampling", "scoring", "estimator backward", "optimizer"}
    assert sum(small["seconds_by_phase"].values()) == pytest.approx(small["seconds_per_cycle"])
    assert 0 < small["utilisation"] < 1.5 and small["peak_memory_gib"] > 0
    capsys.readouterr()
    benchmark.main(["--compare", *map(str, files)])
    assert "samples_per_second" in capsys.readouterr().out
    files[1].write_text("{}")
    assert "cannot be read" in refused(benchmark.main, ["--compare", *map(str, files)], capsys=capsys)
    assert "--cycles is 0" in refused(benchmark.main, ["--cycles", "0"], capsys=capsys)


def test_flop_of_a_forward_are_those_counted_by_hand():
    """A linear layer's 2 x rows x in x out, forward, and twice that backward; and both attention kernels'."""
    layer, x = nn.Linear(8, 16), torch.randn(4, 8, requires_grad=True)
    with benchmark.FlopCounter() as counter:
        layer(x).sum().backward()
    assert counter.total == 3 * 2 * 4 * 8 * 16
    q, k, v = (torch.randn(2, 3, 16, 8) for _ in range(3))
    with benchmark.FlopCounter() as counter:
        nn.functional.scaled_dot_product_attention(q, k, v)
    assert counter.total == 2 * 2 * (2 * 3 * 16 * 16 * 8)
