"""What makes a cycle fast or small keeps its mathematics: each measure against the plain form that it replaces."""

import contextlib
import json
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState
from functorch.compile import make_boxed_func
from timm.layers import Attention
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from evaluation import benchmark
from evaluation.standins import write_dinov2, write_vae
from tests.conftest import (
    assert_close_and_not_zero,
    build_run,
    flags,
    logged,
    random_sit,
    refused,
    reward_gradient,
    run_cold_start,
    spread_lora_b,
)
from train_cc import cold_start
from train_cc.distillation import loop, turns
from train_cc.io.errors import InputError
from train_cc.models.backbone import choose_attention
from train_cc.models.estimator import ScoreEstimator
from train_cc.models.lora import ADAPTER, hold_frozen_in, lora_layers, set_lora_scale
from train_cc.models.vae import load_decoder
from train_cc.run.session import COMPUTE_DTYPES
from train_cc.settings import Optimisation
from train_cc.setup.arguments import build_parser, validate
from train_cc.setup.build import build_optimizer, compiler_works, prepare_scores


def tiny_run(teacher, tmp_path, *more):
    return build_run(teacher, tmp_path / "run", *more)


def kept_bytes(model: nn.Module, forward) -> int:
    """Bytes that autograd keeps between ``forward`` and its backward, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = forward()  # noqa: F841  (kept alive until all addresses have been seen)
    return sum(kept.values())


def estimator_of(seed: int = 0) -> ScoreEstimator:
    """With a LoRA whose B is not zero, so that both its factors have gradients."""
    model = ScoreEstimator(random_sit(), 4, 0.3, seed)
    spread_lora_b(model)
    return model


def inputs(batch: int = 4):
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(batch, 1, 8, 8, generator=generator), torch.rand(batch, generator=generator)
    return x, t, torch.arange(batch)


def test_frozen_weights_held_in_half_precision_give_the_bits_of_autocast():
    results = []
    for held in (False, True):
        model = estimator_of()
        if held:
            hold_frozen_in(model, torch.bfloat16)
            assert model.network.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            v = model(*inputs(), lora_scale=2.0)
        v.float().square().mean().backward()
        results.append([v] + [p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(plain, fast) for plain, fast in zip(*results, strict=True))
    assert all(gradient.dtype == torch.float32 and gradient.abs().sum() > 0 for gradient in results[1][1:])


def test_half_precision_is_within_its_rounding_of_fp32(teacher, tmp_path):
    """One cycle in bf16 against fp32, from the same draws: to a percent (loss_dmd is the square of a direction)."""
    rows = {}
    for precision in ("bf16", "no"):
        AcceleratorState._reset_state(True)  # a process has one precision
        run = tiny_run(teacher, tmp_path, "--mixed-precision", precision)
        spread_lora_b(run.estimator)  # at B = 0 real and fake are one, and their gap all rounding
        estimator_rows, row, _ = loop.cycle(run, 0)
        rows[precision] = [row["loss_fake"] for row in estimator_rows] + [row["loss_dmd"] ** 0.5, row["normaliser"]]
    assert rows["no"] != rows["bf16"]
    assert rows["bf16"] == pytest.approx(rows["no"], rel=0.01)


def plain_block(block: nn.Module, x: torch.Tensor, c: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As SiT writes it, with timm's attention and LoRA added at the full width."""

    def norm(x, shift, scale):
        return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def adapted(layer, x):
        low = nn.functional.linear(x, layer.lora_A[ADAPTER].weight)
        return layer.base_layer(x) + scale * nn.functional.linear(low, layer.lora_B[ADAPTER].weight)

    attention = Attention(x.shape[-1], block.attn.num_heads, qkv_bias=True).to(x.dtype)
    attention.qkv, attention.proj = nn.Identity(), nn.Identity()
    with patch.object(attention.qkv, "forward", lambda x: adapted(block.attn.qkv, x)):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation[1](c).chunk(6, dim=1)
        x = x + gate_msa[:, None] * block.attn.proj(attention(norm(x, shift_msa, scale_msa)))
    return x + gate_mlp[:, None] * block.mlp(norm(x, shift_mlp, scale_mlp))


@pytest.mark.parametrize("fused", [True, False])
def test_a_block_and_its_lora_are_the_plain_ones(fused):
    """To the rounding of fp64, values and gradients, at a scale per sample."""
    network = estimator_of().network.double()
    block = network.blocks[0]
    block.attn.fused_attn = fused
    generator = torch.Generator().manual_seed(3)
    x, c = torch.randn(4, 16, 32, generator=generator), torch.randn(4, 32, generator=generator)
    scale = torch.tensor([0.0, 0.5, 1.0, 2.0]).double().view(-1, 1, 1)
    weights = {name: p for name, p in block.named_parameters()}
    for parameter in weights.values():
        parameter.requires_grad_(True)
    found = []
    for forward in (lambda x, c: block(x, c), lambda x, c: plain_block(block, x, c, scale)):
        given = [each.double().requires_grad_() for each in (x, c)]
        set_lora_scale(lora_layers(network), scale)
        out = forward(*given)
        gradients = torch.autograd.grad(out.pow(2).sum(), [*given, *weights.values()])
        found.append([out, *gradients])
    for name, ours, plain in zip(["out", "x", "c", *weights], *found, strict=True):
        assert_close_and_not_zero(ours, plain, 1e-12, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_residual_stream_is_in_the_compute_dtype(dtype):
    """An fp32 stream would move twice the bytes; scales per sample are fp32 numbers, and lift nothing either."""
    network = estimator_of()
    hold_frozen_in(network, dtype)
    seen = []
    for block in network.network.blocks:
        block.register_forward_hook(lambda block, given, out: seen.append((given[0].dtype, given[1].dtype, out.dtype)))
        block.attn.qkv.register_forward_hook(lambda layer, given, out: seen.append((given[0].dtype, out.dtype)))
    for scale in (2.0, torch.rand(4)):
        with torch.autocast("cpu", dtype):
            v = network(*inputs(), scale)
        v.float().pow(2).mean().backward()
    assert len(seen) == 8 and {each for dtypes in seen for each in dtypes} == {dtype}
    assert all(p.grad.dtype == torch.float32 for p in network.parameters() if p.requires_grad)


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
            gap = network(x, t, y % 10, 0.0).float() - network(x, t, y % 10, 0.1).float()
        exact = gap if dtype is None else exact
        errors.append(((gap - exact).norm() / exact.norm()).item())
    assert errors[1] > 1e-3 and 0 < errors[2] < errors[1] / 3
    network.network.blocks[0].register_forward_hook(lambda block, given, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        network(x, t, y % 10, 1.0).float().mean().backward()
        with torch.no_grad():
            network(x, t, y % 10, 1.0)
    assert seen == [torch.bfloat16, torch.float16]


def test_a_block_that_overflows_in_fp16_is_named(monkeypatch):
    """Fine in bf16; asked for fp16, it is an error, and else a line in the log."""
    cpu, real = torch.device("cpu"), ScoreEstimator.overflowing_block
    assert estimator_of().overflowing_block(torch.float16, cpu) is None
    for name, message in (("bf16", ""), ("fp16", "fp16 overflows in block 1 of the/teacher")):
        network = estimator_of()
        network.network.blocks[1].mlp.fc2.bias.data += 1e5
        network.network.blocks[1].adaLN_modulation[1].bias.data += 1
        assert network.overflowing_block(torch.bfloat16, cpu) is None
        session = SimpleNamespace(device=cpu, sharded=False, notes=[])
        dtype = COMPUTE_DTYPES[name]
        prepare_scores(network, Path("the/teacher"), session, dtype)
        assert network.score_dtype is None and not session.notes  # a CPU has no fast fp16
        session.device = SimpleNamespace(type="cuda")
        monkeypatch.setattr(ScoreEstimator, "to", lambda self, device: self)
        monkeypatch.setattr(ScoreEstimator, "overflowing_block", lambda self, dtype, device: real(self, dtype, cpu))
        with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
            prepare_scores(network, Path("the/teacher"), session, dtype)
        assert network.score_dtype is None and len(session.notes) == (not message)
        monkeypatch.undo()


def test_plain_attention_is_the_fused_one():
    model = estimator_of()
    fused = model(*inputs(), lora_scale=2.0)
    choose_attention(model, torch.device("cpu"), torch.bfloat16)
    assert not model.network.blocks[0].attn.fused_attn
    torch.testing.assert_close(model(*inputs(), lora_scale=2.0), fused, rtol=1e-4, atol=1e-5)
    choose_attention(model, torch.device("cuda"), torch.bfloat16)
    assert model.network.blocks[0].attn.fused_attn


@pytest.mark.parametrize("scale,interval", [(1.0, (0, 1)), (2.0, (0, 0.5))])
def test_fake_and_real_in_one_call_are_those_of_two(teacher, tmp_path, scale, interval):
    run = tiny_run(teacher, tmp_path, "--real-guidance-scale", scale, "--real-guidance-interval", *interval)
    spread_lora_b(run.estimator)
    (x, t, y), c = inputs(), 0.6
    v_fake, v_real = run.scores.both(x, t, t, y, c)
    assert not v_fake.requires_grad and not v_real.requires_grad
    real = 0.75 * c
    with torch.no_grad():
        torch.testing.assert_close(v_fake, run.estimator(x, t, y, 2.0), rtol=1e-4, atol=1e-5)
        v = run.estimator(x, t, y, real)
        if scale > 1:
            v_null = run.estimator(x, t, torch.full_like(y, 10), real)
            v = torch.where((t <= 0.5)[:, None, None, None], v_null + scale * (v - v_null), v)
            assert (t <= 0.5).any() and (t > 0.5).any()
        torch.testing.assert_close(v_real, v, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(v_fake, v_real, atol=1e-2)


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("at_once,calls", [(11, [8, 4]), (320, [12])])
def test_the_samples_of_several_estimator_turns_at_once_are_those_of_each_alone(
    teacher, tmp_path, monkeypatch, num_steps, at_once, calls
):
    monkeypatch.setattr(turns, "SAMPLES_AT_ONCE", at_once)
    more = ["--num-steps", num_steps, "--gradient-accumulation-steps", 2, "--ratio-update", 3]
    run = tiny_run(teacher, tmp_path, *more)
    of_calls: list[int] = []
    hook = run.generator.register_forward_pre_hook(lambda network, given: of_calls.append(len(given[0])))
    of_turns = turns.estimator_batches(run, 3)
    hook.remove()
    assert of_calls == 2 * calls if num_steps == 1 else of_calls[1::2] == 2 * calls
    assert len(of_turns) == 3 and all(len(batches) == 2 for batches in of_turns)
    for turn, batches in enumerate(of_turns):
        for chunk, (left, y, x0) in enumerate(batches):
            draws = turns.chunk_draws(run, turns.ESTIMATOR_TURN, 3 * 3 + turn, chunk)
            assert torch.equal(y, turns.draw_labels(run, draws))
            with torch.no_grad():
                expected = turns.generate(run, draws, y)
            torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(left.noise(2), draws.noise(2)) and torch.equal(left.uniform(2), draws.uniform(2))


def test_fused_adamw_is_the_loop():
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(64, 64)
        optimizer = build_optimizer(model, 1e-3, 0.1, Optimisation())
        assert optimizer.defaults["fused"]
        if not fused:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=False, fused=False)
        for _ in range(10):
            model(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.weight.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


class Judge(nn.Module):
    """A linear classifier of the mean colour: smooth, so that gradients of two precisions can be compared."""

    def forward(self, images):
        return torch.stack([images.mean(dim=(1, 2, 3)), images[:, 0].mean(dim=(1, 2))], dim=1) * 10


def test_decoder_in_half_precision_and_checkpointed(tmp_path):
    """Checkpointing changes no bit of the gradient and keeps less; bf16 keeps its direction."""
    vae = str(write_vae(tmp_path / "vae", channels=(16, 16, 16, 16)))
    x0, y = torch.randn(2, 4, 8, 8), torch.tensor([0, 1])
    plain, recomputing = load_decoder(vae), load_decoder(vae)
    recomputing.enable_gradient_checkpointing()
    gradient, recomputed = (reward_gradient(Judge(), decode, x0, y).gradient for decode in (plain, recomputing))
    assert torch.equal(gradient, recomputed) and gradient.abs().sum() > 0
    kept = [kept_bytes(decode, lambda d=decode: d(x0.clone().requires_grad_())) for decode in (plain, recomputing)]
    assert 0 < kept[1] < 0.5 * kept[0]
    half = reward_gradient(Judge(), load_decoder(vae, dtype=torch.bfloat16), x0, y).gradient
    assert half.dtype == torch.float32
    assert torch.cosine_similarity(half.flatten(), gradient.flatten(), dim=0) > 0.99


def test_both_networks_recompute_their_blocks(teacher, tmp_path):
    """--gradient-checkpointing: of a block its input is kept, where without it some twenty tensors are."""
    x, t, y = inputs(8)
    kept = []
    for more in ([], ["--gradient-checkpointing"]):
        run = tiny_run(teacher, tmp_path, *more)
        generator, estimator = run.generator, run.estimator
        kept.append(kept_bytes(generator, lambda g=generator: g(x, t, y)))
        kept.append(kept_bytes(estimator, lambda e=estimator: e(x, t, y, lora_scale=2.0)))
    assert 0 < kept[2] < 0.4 * kept[0] and 0 < kept[3] < 0.4 * kept[1]


def test_the_mlp_of_the_generator_makes_its_middle_again(teacher, tmp_path):
    """The same bits, less is kept, the GELU is computed twice, and the product behind it once."""
    run = tiny_run(teacher, tmp_path)
    mlp = run.generator.blocks[0].mlp
    x = torch.randn(2, 16, mlp.fc1.in_features)
    gradients, kept, calls = [], [], []
    assert mlp.recompute
    for mlp.recompute in (True, False):
        counter = CallCounter()
        mlp.zero_grad()
        with counter:
            mlp(x).square().sum().backward()
        gradients.append([p.grad for p in mlp.parameters()])
        calls.append((counter.calls["aten.gelu"], counter.calls["aten.addmm"]))
        kept.append(kept_bytes(mlp, lambda: mlp(x)))
    assert calls == [(2, 2), (1, 2)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert kept[1] - kept[0] == 4 * 2 * 16 * mlp.fc1.out_features


def test_decoder_and_classifier_of_the_reward_recompute(tmp_path):
    random_sit(in_channels=4).save_pretrained(tmp_path / "sit")
    backbone, head = write_dinov2(tmp_path / "dinov2", width=64, depth=4, classes=10)
    words = ["--vae", write_vae(tmp_path / "vae", channels=(16, 16, 16, 16)), "--encoder-type", "dinov2"]
    words += ["--dinov2-backbone", backbone, "--dinov2-head", head]
    x0, images = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 64, 64)
    kept = []
    for more in ([], ["--reward-checkpointing"]):
        run = tiny_run(tmp_path / "sit", tmp_path, *words, *more)
        decode, judge = run.decode, run.judges["reward_dinov2"]
        kept.append(kept_bytes(decode, lambda d=decode: d(x0.clone().requires_grad_())))
        kept.append(kept_bytes(judge, lambda j=judge: j(images.clone().requires_grad_())))
    assert 0 < kept[2] < 0.5 * kept[0] and 0 < kept[3] < 0.5 * kept[1]


class CallCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.slow
def test_compiled_blocks_train_the_same(teacher, tmp_path):
    plain = logged(run_cold_start(teacher, tmp_path / "a"))
    torch._dynamo.utils.counters.clear()
    compiled = logged(run_cold_start(teacher, tmp_path / "b", "--compile"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for one, other in zip(plain, compiled, strict=True):
        figures = [{name: value for name, value in row.items() if value is not None} for row in (one, other)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-3, abs=1e-5)


def test_compile_without_a_compiler_is_refused(teacher, tmp_path, capsys, monkeypatch):
    def broken(call):
        raise RuntimeError("no g++")

    monkeypatch.setattr(torch, "compile", broken)
    message = refused(cold_start.main, flags(teacher, tmp_path / "run", "--compile"), capsys=capsys)
    assert "--compile" in message and "no g++" in message
    assert not (tmp_path / "run").exists()


def test_a_compiler_that_fails_in_the_backward_is_found_first(teacher, tmp_path, monkeypatch, capsys):
    """Inductor may be well for the forward alone: asked for, it is an error, and else a line in the log."""

    def broken(graph, inputs):
        raise RuntimeError("no kernel for the backward")

    good = lambda graph, inputs: make_boxed_func(graph)  # noqa: E731
    backend = aot_autograd(fw_compiler=good, bw_compiler=broken)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    message = refused(cold_start.main, flags(teacher, tmp_path / "run", "--compile"), capsys=capsys)
    assert "--compile" in message and "no kernel for the backward" in message and not (tmp_path / "run").exists()
    session = SimpleNamespace(device=torch.device("cuda"), notes=[])
    with torch._dynamo.config.patch(suppress_errors=True, recompile_limit=8, optimize_ddp=True):
        assert not compiler_works("auto", session)
    (note,) = session.notes
    assert note.startswith("WARNING") and "no kernel for the backward" in note


def test_an_optimizer_without_its_library_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    args = build_parser("").parse_args(["--teacher", "-", "--output-dir", "-", "--optimizer", "adamw8bit"])
    with pytest.raises(InputError, match="pip install torchao"):
        validate(args)


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=str)
def test_moments_in_8_bits_are_not_sharded(teacher, tmp_path, capsys, monkeypatch, more):
    """They cannot be saved: refused before anything is loaded, by a plan too. DDP and one process take them."""
    words = [*flags(teacher, tmp_path / "run", "--optimizer", "adamw8bit"), *more]
    monkeypatch.setattr("train_cc.setup.arguments.installed", lambda name: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    validate(build_parser("").parse_args(words))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    message = refused(cold_start.main, words, capsys=capsys)
    assert "--optimizer adamw8bit under FSDP2" in message and "allowed: adamw" in message
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    validate(build_parser("").parse_args(words))


def test_moments_of_another_optimizer_are_refused(teacher, tmp_path, capsys, monkeypatch):
    units = run_cold_start(teacher, tmp_path / "a") / "checkpoints" / "torch_units" / "step-3.pt"
    monkeypatch.setattr("train_cc.setup.arguments.installed", lambda name: True)
    more = ["--resume-ckpt", units, "--optimizer", "adamw8bit", "--max-train-steps", 4]
    message = refused(cold_start.main, flags(teacher, tmp_path / "b", *more), capsys=capsys)
    assert "adamw8bit" in message and "was made with --optimizer adamw:" in message


@pytest.mark.slow
def test_eight_bit_moments_train_and_resume(teacher, tmp_path):
    """torchao compiles its step, on a CPU too; moments of small tensors stay fp32, hence the wider teacher."""
    pytest.importorskip("torchao")
    random_sit(hidden_size=64).save_pretrained(tmp_path / "sit")
    more = ["--optimizer", "adamw8bit", "--lora-rank", 64, "--max-train-steps"]
    whole = run_cold_start(tmp_path / "sit", tmp_path / "a", *more, 3)
    run_cold_start(tmp_path / "sit", tmp_path / "b", *more, 2)
    resumed = run_cold_start(tmp_path / "sit", tmp_path / "b", *more, 3, "--auto-resume")
    assert logged(whole) == logged(resumed)
    plain = run_cold_start(tmp_path / "sit", tmp_path / "c", "--lora-rank", 64)
    for row, other in zip(logged(whole), logged(plain), strict=True):  # near to AdamW with whole moments, not the same
        assert row["loss_dmd"] == pytest.approx(other["loss_dmd"], rel=0.02)
        assert row["loss_dmd"] != other["loss_dmd"]


def test_benchmark_measures_and_compares(tmp_path, capsys):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, batch in zip(files, (1, 2), strict=True):
        words = ["--size", "SiT-S/8", "--cycles", "1", "--batch-size", batch, "--ratio-update", 2, "--output", file]
        benchmark.main([str(word) for word in words])
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
