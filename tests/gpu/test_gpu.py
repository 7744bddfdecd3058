"""What the first user with a GPU runs: `bash scripts/test.sh -m gpu`. It ends with a table to paste into an issue.

`DMDR_GPU_TESTS_ON=cpu python -m pytest -m gpu` runs what can be run without one, at small sizes.
"""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch._dynamo.utils import counters

from evaluation import generate
from tests import ROOT
from tests.conftest import (
    RandomNetworks,
    assert_close_and_not_zero,
    build_run,
    flags,
    random_sit,
    reward_gradient,
    run_cold_start,
    spread_lora_b,
    trained,
)
from train_cc import cold_start
from train_cc.distillation import loop
from train_cc.draws import Draws
from train_cc.models.backbone import SIT_SIZES
from train_cc.models.dinov2 import IMAGE_SIZE, PATCH_SIZE, DINOv2Classifier
from train_cc.models.features import without_tf32
from train_cc.models.vae import VAEDecoder, new_vae
from train_cc.planning.memory import GIB, allowance, simulate
from train_cc.run.session import open_session
from train_cc.setup.build import build

CPU = os.environ.get("DMDR_GPU_TESTS_ON") == "cpu"
DEVICE = "cpu" if CPU else "cuda"
ROWS: list[tuple[str, str]] = []  # of the table at the end
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CPU and not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
on_cuda = pytest.mark.skipif(CPU, reason="of CUDA alone")
# Adam divides by the root of the second moment: of a gradient that is zero but for rounding it would make a whole step.
EPSILON = ("--adam-epsilon", 1e-4)
two_gpus = pytest.mark.skipif(CPU or torch.cuda.device_count() < 2, reason="needs two GPUs")
SIZE, BATCHES = ("SiT-S/8", (2,)) if CPU else ("SiT-XL/2", (8, 64))


@pytest.fixture(autouse=True)
def accelerate_forgets():
    yield
    AcceleratorState._reset_state(True)


def fresh_run(teacher: Path, output: Path, *more: object):
    """Of another device or precision than the run before it, not compiled. Both scores differ from its start on."""
    AcceleratorState._reset_state(True)
    run = build_run(teacher, output, "--num-previews", 0, "--no-compile", *more)
    spread_lora_b(run.plain_estimator)
    return run


def wait() -> None:
    if not CPU:
        torch.cuda.synchronize()


def seconds_of(work, times: int = 3) -> float:
    """The best of several, after one that warms up."""
    taken = []
    for _ in range(times + 1):
        wait()
        began = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


# (1) and (2) ------------------------------------------------------------------------------------------------------


def test_the_card_is_seen_and_told(teacher, tmp_path):
    run = run_cold_start(teacher, tmp_path / "run", "--mixed-precision", "auto", "--max-train-steps", 1)
    log = (run / "log.txt").read_text()
    precision = "no" if CPU else "fp16"
    assert f"on 1 x {DEVICE}, precision {precision}" in log
    name = "CPU" if CPU else f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / GIB:.0f} GiB"
    ROWS.append(("machine", f"{name}; torch {torch.__version__}, CUDA {torch.version.cuda}; {precision}"))


WAYS = {
    "one step": (),
    "two steps": ("--num-steps", 2, "--timestep-shift", 2),
    "guided": ("--real-guidance-scale", 1.5, "--real-guidance-interval", 0.2, 0.8),
}


@on_cuda
@pytest.mark.parametrize("way", WAYS)
def test_in_a_cycle_the_host_waits_in_fetch_alone(teacher, tmp_path, monkeypatch, way):
    run = fresh_run(teacher, tmp_path, "--mixed-precision", "auto", "--ema-decay", 0.9, *WAYS[way])
    loop.cycle(run, 0)
    fetch = loop.fetch

    def allowed(*args):
        torch.cuda.set_sync_debug_mode("default")
        return fetch(*args)

    monkeypatch.setattr(loop, "fetch", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.cycle(run, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# (3) and (4) ------------------------------------------------------------------------------------------------------


def noise_of_the_cpu(self: Draws, *shape: int) -> Tensor:
    return torch.randn(shape, generator=self._cpu).to(self._device.device)


def test_a_cycle_is_that_of_the_cpu(teacher, tmp_path, monkeypatch):
    rows, weights = [], []
    monkeypatch.setattr(Draws, "noise", noise_of_the_cpu)  # the same on every device
    with without_tf32():  # which has 10 bits of mantissa
        for hidden in (True, False):
            with monkeypatch.context() as patch:
                if hidden:
                    patch.setattr(torch.cuda, "is_available", lambda: False)
                    patch.setenv("CUDA_VISIBLE_DEVICES", "")
                run = fresh_run(teacher, tmp_path, "--mixed-precision", "no", "--ratio-update", 2, *EPSILON)
                rows.append(loop.cycle(run, 0)[1])
                weights.append({name: value.cpu() for name, value in trained(run.generator).items()})
    for name in ("loss_dmd", "score_gap", "grad_norm_generator"):
        assert rows[0][name] > 0 and rows[1][name] == pytest.approx(rows[0][name], rel=1e-3), name
    for name, value in weights[0].items():
        assert_close_and_not_zero(weights[1][name], value, 1e-3, name)


def test_half_precision_is_near_single_and_attention_is_fused(teacher, tmp_path):
    rows = {}
    for precision in ("no", "bf16"):
        run = fresh_run(teacher, tmp_path, "--mixed-precision", precision, "--batch-size", 64)
        kernels = torch.profiler.ProfilerActivity.CPU if CPU else torch.profiler.ProfilerActivity.CUDA
        with torch.profiler.profile(activities=[kernels]) as profile:
            rows[precision] = loop.cycle(run, 0)[1]
        names = " ".join(event.key.lower() for event in profile.key_averages())
        if not CPU:
            assert any(word in names for word in ("flash", "fmha", "cudnn_generated_fort_native_sdpa")), names[:2000]
    gap = [abs(rows["bf16"][name] / rows["no"][name] - 1) for name in ("loss_dmd", "score_gap")]
    assert 0 < max(gap) < 0.01
    ROWS.append(("bf16 against fp32, loss and gap", f"{max(gap):.2%} apart"))


# (5) to (9) -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
def test_the_peak_is_that_of_the_dry_run(batch):
    """The plan is of a run that is not compiled: a compiler keeps less for the backward pass."""
    precision = "no" if CPU else "bf16"
    words = ["--teacher", SIZE, "--output-dir", "-", "--num-previews", "0", "--ratio-update", "1", "--no-compile"]
    words += ["--batch-size", str(batch), "--mixed-precision", precision]
    args = cold_start.stage_parser().parse_args(words)
    cost = simulate(args, precision, 1)
    told = max(value for name, value in cost.peaks.items() if name.startswith("training"))
    if not CPU and told + allowance(told, 1) > torch.cuda.mem_get_info()[0]:
        pytest.skip(f"{told / GIB:.1f} GiB are more than this card has free")
    session = open_session(precision)
    run = build(args, session, RandomNetworks(session, SIT_SIZES[SIZE]))  # without folders
    loop.cycle(run, 0)
    if not CPU:
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(lambda: loop.cycle(run, 1))
    speed = f"{seconds:.3f} s a cycle of one turn each, {cost.flop / seconds / 1e12:.2f} TFLOP/s"
    if CPU:
        ROWS.append((f"{SIZE}, batch {batch}", speed))
        return
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    peaks = f"dry run {told / GIB:.2f} GiB, allocated {allocated / GIB:.2f}, reserved {reserved / GIB:.2f}"
    ROWS.append((f"{SIZE}, batch {batch}", f"{peaks}; {speed}"))
    assert told == pytest.approx(allocated, rel=0.05)


def test_stopped_and_resumed_is_never_stopped(teacher, tmp_path):
    more = ("--ema-decay", 0.9, "--num-previews", 0, *EPSILON)
    whole = run_cold_start(teacher, tmp_path / "whole", *more, "--max-train-steps", 4)
    for steps in (2, 4):
        run_cold_start(teacher, tmp_path / "parts", *more, "--max-train-steps", steps, "--auto-resume")
    file = "generator/diffusion_pytorch_model.safetensors"
    ours, start = load_file(tmp_path / "parts" / file), load_file(teacher / Path(file).name)
    for name, value in load_file(whole / file).items():
        assert_close_and_not_zero(ours[name], value, 1e-4, name)
    assert any(not torch.equal(ours[name], start[name]) for name in start)


@on_cuda
def test_fp16_for_fifty_cycles(teacher, tmp_path):
    run = fresh_run(teacher, tmp_path / "run", "--mixed-precision", "fp16", "--num-previews", 0)
    skipped = 0
    for step in range(50):
        row = loop.cycle(run, step)[1]
        loop.stop_unless_finite(run, [row])
        skipped += not np.isfinite(row["grad_norm_generator"])
    assert skipped < 25
    scale = run.session.generator_accelerator.scaler.get_scale()
    ROWS.append(("fp16, 50 cycles", f"{skipped} skipped, scale at the end {scale:g}"))


def test_the_reward_at_full_size():
    x0, y = torch.randn(2, 4, 8 if CPU else 32, 8 if CPU else 32, device=DEVICE), torch.arange(2, device=DEVICE)
    widths = ((32, 32, 32, 32), 32) if CPU else ()
    torch.manual_seed(0)
    vae = VAEDecoder(new_vae(*widths)).to(DEVICE)
    width, depth = (384, 12) if CPU else (1024, 24)
    options = {"embed_dim": width, "num_heads": width // 64, "init_values": 1e-5, "num_classes": 0}
    backbone = VisionTransformer(IMAGE_SIZE, PATCH_SIZE, depth=depth, no_embed_class=True, **options)
    judge = DINOv2Classifier(backbone, torch.nn.Linear(5 * width, 1000)).to(DEVICE)
    single = reward_gradient(judge, vae, x0, y).gradient
    half, judge = vae.to(torch.bfloat16), judge.to(torch.bfloat16)
    cosine = torch.cosine_similarity(reward_gradient(judge, half, x0, y).gradient.flatten(), single.flatten(), dim=0)
    told = []
    for layout in (torch.channels_last, torch.contiguous_format):
        half.to(memory_format=layout)
        told.append(f"{seconds_of(partial(reward_gradient, judge, half, x0, y)):.3f} s")
    ROWS.append(("reward, bf16: cosine to fp32; channels-last, contiguous", f"{cosine:.4f}; {', '.join(told)}"))
    assert single.abs().max() > 0 and cosine > 0.98


def test_compiled_is_the_same_and_compiles_no_more_after_three_cycles(teacher, tmp_path):
    rows, seconds = [], []
    for more in ((), ("--compile",)):
        run = fresh_run(teacher, tmp_path, "--mixed-precision", "no" if CPU else "bf16", *more)
        for step in range(3):
            row = loop.cycle(run, step)[1]
        graphs = counters["stats"]["unique_graphs"]
        rows.append(row)
        seconds.append(seconds_of(lambda run=run: loop.cycle(run, 3)))
        assert counters["stats"]["unique_graphs"] == graphs
    assert graphs > 0 and rows[0]["loss_dmd"] == pytest.approx(rows[1]["loss_dmd"], rel=0.02)
    ROWS.append(("--compile, tiny network", f"{seconds[0] / seconds[1]:.2f} times as fast"))


# (10) and several cards -------------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_the_batch(tmp_path):
    random_sit(spread=0.05).save_pretrained(tmp_path / "generator")
    images = []
    for batch in (250, 64):
        words = ["--generator", tmp_path / "generator", "--output", tmp_path / f"{batch}.npz", "--num-images", 1000]
        generate.main([str(word) for word in [*words, "--batch-size", batch]])
        images.append(np.load(tmp_path / f"{batch}.npz")["arr_0"].astype(int))
    assert images[0].std() > 1 and np.abs(images[0] - images[1]).max() <= 1


@two_gpus
@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_cards_train_what_one_does(teacher, tmp_path, sharded):
    more = ["--batch-size", 2, *EPSILON, "--num-previews", 0, "--no-compile"]
    with without_tf32():
        one = run_cold_start(teacher, tmp_path / "one", *more, "--gradient-accumulation-steps", 2)
    environment = os.environ | {"NUM_PROCESSES": "2", "ACCELERATE_USE_FSDP": str(sharded).lower()}
    environment["NVIDIA_TF32_OVERRIDE"] = "0"
    words = flags(teacher, tmp_path / "two", *more)
    jobs = json.dumps([{"stage": "cold_start", "sharded": sharded, "flags": words}])
    command = [sys.executable, "-m", "scripts.launch", "tests.run.test_processes", jobs, str(tmp_path / "report.json")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    file = "generator/diffusion_pytorch_model.safetensors"
    two = load_file(tmp_path / "two" / file)
    for name, value in load_file(one / file).items():
        assert_close_and_not_zero(two[name], value, 1e-4, name)
