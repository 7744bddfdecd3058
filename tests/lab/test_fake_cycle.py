"""Cycles of real runs on a GPU without hardware: nothing is mixed over devices, and the host waits once, to fetch."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils import backend_registration

from evaluation.standins import write_vae
from tests.conftest import build_run, random_sit
from tests.lab.fake_device import on_gpu
from tests.lab.fake_gpu import FakeGpu, fake_gpu
from tests.lab.fake_processes import fake_processes
from train_cc.distillation import turns
from train_cc.distillation.loop import cycle, show
from train_cc.distillation.run import Run
from train_cc.models.dinov2 import DINOv2Classifier
from train_cc.models.features import load_space
from train_cc.run.meters import tensors_in
from train_cc.samplers import euler_sample, few_step_sample, guide, heun_sample, sde_sample

needed = "_setup_privateuseone_for_python_backend"
pytestmark = pytest.mark.skipif(not hasattr(backend_registration, needed), reason=f"torch has no {needed}")


@pytest.fixture
def gpu():
    with fake_gpu() as device:
        yield device


@pytest.fixture
def built(gpu, teacher, tmp_path, monkeypatch):
    """Return a function of flags, processes and sharding: the run of `build`, in its processes until the test ends."""
    with contextlib.ExitStack() as stack:

        def make(*more: object, processes: int = 1, sharded: bool = False, teacher: Path = teacher) -> Run:
            monkeypatch.setenv("ACCELERATE_USE_FSDP", str(sharded).lower())
            stack.enter_context(fake_processes(processes))
            run = build_run(teacher, tmp_path / "run", "--ratio-update", 1, *more)
            assert run.session.device == gpu.device and run.session.world_size == processes
            assert run.session.sharded == sharded
            return run

        yield make


def require_inputs_on_gpu(network: nn.Module, args: tuple, kwargs: dict) -> None:
    """DDP and FSDP2 would copy a tensor on the CPU at each call, and the host would wait."""
    assert all(map(on_gpu, tensors_in(args, kwargs))), f"{type(network).__name__} gets a tensor on the CPU"


def check_cycle(gpu: FakeGpu, run: Run, waits: int = 1) -> dict:
    """Run one cycle, return its row of the log. The host waits so many times; no copy reads freed memory."""
    networks = (run.generator, run.estimator)
    hooks = [each.register_forward_pre_hook(require_inputs_on_gpu, with_kwargs=True) for each in networks]
    gpu.clear()
    try:
        of_estimator, row, _ = cycle(run, 0)
    finally:
        for hook in hooks:
            hook.remove()
    assert gpu.lost == [], f"freed before it was copied: {gpu.lost}"
    assert len(gpu.waits) == waits and gpu.waits[-1].place == "train_cc/distillation/loop.py fetch", gpu.waits
    return of_estimator[-1] | row


EVERYTHING = ("--num-steps", 2, "--timestep-shift", 2, "--ema-decay", 0.99, "--gradient-accumulation-steps", 2)
GUIDED = ("--real-guidance-scale", 1.5, "--real-guidance-interval", 0.2, 0.8)
LORA = ("--use-lora-gen", "--gradient-checkpointing")
# Flags; how many processes, and whether they shard (FSDP2) or not (DDP).
CASES = {
    "fp32, guided": (("--mixed-precision", "no", *GUIDED), 1, False),
    "bf16, everything": (("--mixed-precision", "bf16", *GUIDED, *EVERYTHING), 1, False),
    "DDP, LoRA, fp16": (("--mixed-precision", "fp16", *LORA), 2, False),
    "DDP": (("--mixed-precision", "bf16", *GUIDED, *EVERYTHING), 2, False),
    "FSDP2": (("--mixed-precision", "bf16", *GUIDED, *EVERYTHING), 8, True),
    "FSDP2, LoRA, fp16": (("--mixed-precision", "fp16", *LORA), 8, True),
}


@pytest.mark.parametrize("name", CASES)
def test_in_a_cycle_the_host_waits_once(gpu, built, name):
    more, processes, sharded = CASES[name]
    row = check_cycle(gpu, built(*more, processes=processes, sharded=sharded))
    assert {"loss_dmd", "grad_norm_generator", "update_ratio_generator"} <= row.keys()


# Rewards and pictures ---------------------------------------------------------------------------------------------


def test_rewards_wait_for_nothing_and_previews_mix_no_devices(gpu, built, reward_folder, tmp_path):
    """Previews may wait: pictures are made on the CPU."""
    (tmp_path / "r.py").write_text("def brightness(images, labels):\n    return images.mean(dim=(1, 2, 3))\n")
    more = ("--reward", "classifier", 0.1, reward_folder, "--reward-micro-batch", 2)
    run = built("--mixed-precision", "bf16", *more, "--tilt", 0.1, "python", f"{tmp_path}/r.py:brightness")
    assert any("reward" in column for column in check_cycle(gpu, run))
    run.step = run.output.sample_steps
    assert "preview_accuracy_reward_classifier" in show(run, run.step)
    assert (run.output.output_dir / "samples" / f"step-{run.step}" / "grid.png").exists()


def test_a_frechet_reward_waits_for_its_eigenvalues(gpu, built, reward_folder, tmp_path):
    """Twice, before the generator's turn; in the first three cycles also for its scale, which is set here."""
    space = load_space(f"classifier:{reward_folder}")
    one, classes = np.eye(space.size), np.zeros((10, space.size))
    arrays = {"mu": classes[0], "sigma": one, "class_mu": classes, "class_count": np.full(10, 9.0), "within": one}
    np.savez(tmp_path / "real.npz", space=json.dumps(space.describe()), **arrays)
    more = ("--reward", "frechet", 1, tmp_path / "real.npz", "--frechet-window", 200)
    run = built("--mixed-precision", "bf16", *more)
    (memory,) = run.memories.values()
    memory.norms, memory.observed = [[1.0, 1.0]] * 3, True
    assert {"frechet", "scale_frechet", "loss_reward_frechet"} <= check_cycle(gpu, run, waits=3).keys()


def test_a_function_of_arrays_waits_for_them(gpu, built, tmp_path):
    text = 'IMAGES = "uint8"\n\n\ndef ink(images, labels):\n    return images.mean(axis=(1, 2, 3))\n'
    (tmp_path / "r.py").write_text(text)
    check_cycle(gpu, built("--mixed-precision", "bf16", "--tilt", 0.1, "python", f"{tmp_path}/r.py:ink"), waits=4)


def test_dinov2_through_a_decoder_waits_for_nothing(gpu, built, tmp_path, monkeypatch):
    backbone = VisionTransformer(img_size=224, patch_size=112, embed_dim=64, depth=1, num_heads=1, num_classes=0)
    judge = DINOv2Classifier(backbone, nn.Linear(128, 10))
    judge.files = []
    monkeypatch.setattr(DINOv2Classifier, "from_official", lambda *files: judge)  # torch.load reads no values here
    random_sit(in_channels=4).save_pretrained(tmp_path / "latent")
    more = ("--vae", write_vae(tmp_path / "vae"), "--reward", "dinov2", 0.1, "--reward-checkpointing")
    run = built("--mixed-precision", "bf16", *more, teacher=tmp_path / "latent")
    assert "loss_reward_dinov2" in check_cycle(gpu, run)


@pytest.mark.parametrize("sampler", [few_step_sample, euler_sample, heun_sample, sde_sample])
def test_guided_sampling_waits_for_nothing(gpu, sampler):
    model = random_sit().to(gpu.device)
    noise, y = torch.randn(3, 1, 8, 8, device=gpu.device), torch.zeros(3, dtype=torch.long, device=gpu.device)
    called = []
    counted = lambda x, t, y: called.append(len(x)) or model(x, t, y)  # noqa: E731
    gpu.clear()
    with torch.no_grad():
        sampler(guide(counted, 10, 1.5, (0.2, 0.8)), noise, y, 4)
    assert gpu.waits == [] and {3, 6} == set(called)


# The instrument can fail: a change of the result of a function of `turns`, and the error ----------------------------


def read(run: Run, losses: Tensor) -> Tensor:
    losses.mean().item()
    return losses


FAULTS = {
    "read": ("velocity_matching_losses", read, "read by"),
    "other device": ("dmd_normaliser", lambda run, x: x + torch.zeros(len(x), 1, 1, 1), "device"),
    "blocking": ("draw_labels", lambda run, y: torch.zeros(4, dtype=torch.long).to(run.session.device), "blocking"),
    # More than CUDA takes at the call, freed at once.
    "freed": (
        "draw_labels",
        lambda run, y: torch.zeros(2**16, dtype=torch.long).to(run.session.device, non_blocking=True)[:4],
        "freed before",
    ),
    "input": ("draw_labels", lambda run, y: torch.zeros(4, dtype=torch.long), "device|on the CPU"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(gpu, built, monkeypatch, name):
    function, change, words = FAULTS[name]
    run, real = built("--mixed-precision", "bf16"), getattr(turns, function)
    monkeypatch.setattr(turns, function, lambda *args: change(run, real(*args)))
    with pytest.raises((AssertionError, RuntimeError), match=words):
        check_cycle(gpu, run)
