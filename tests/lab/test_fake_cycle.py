"""Cycles of real runs on a GPU without hardware: nothing is mixed over devices, and the host waits once, in `fetch`."""

import ast
import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils import backend_registration

from tests.conftest import build_run, random_sit
from tests.lab.fake_gpu import PROJECT, Event, FakeGpu, fake_gpu, on_gpu
from tests.lab.fake_processes import fake_processes
from train_cc.distillation import run as run_room
from train_cc.distillation import turns
from train_cc.distillation.loop import cycle, show
from train_cc.distillation.run import Run
from train_cc.models.dinov2 import DINOv2Classifier
from train_cc.models.features import load_space
from train_cc.models.vae import new_vae
from train_cc.run.meters import tensors_in
from train_cc.samplers import euler_sample, few_step_sample, guide, heun_sample, sde_sample

needed = "_setup_privateuseone_for_python_backend"
pytestmark = pytest.mark.skipif(not hasattr(backend_registration, needed), reason=f"torch has no {needed}")


@pytest.fixture
def gpu():
    with fake_gpu() as device:
        yield device


# The check --------------------------------------------------------------------------------------------------------

FETCH = "train_cc/distillation/loop.py fetch"
FRECHET = ("train_cc/rewards/frechet.py solve", "train_cc/rewards/frechet.py transport")
DRAWN_ON_THE_CPU = {  # what is drawn there and copied without a wait: labels, times, rows
    "train_cc/distillation/turns.py draw_labels",
    "train_cc/distillation/turns.py renoise",
    "train_cc/distillation/run.py both",
    "train_cc/samplers.py few_step_input",
}


@functools.cache
def functions_of(path: str) -> list[ast.FunctionDef]:
    tree = ast.parse((PROJECT / path).read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def function_of(event: Event) -> str:
    """ "file function" of the place of ``event``."""
    path, _, line = event.place.rpartition(":")
    around = [each for each in functions_of(path) if each.lineno <= int(line) <= each.end_lineno]
    return f"{path} {max(around, key=lambda each: each.lineno).name}"


def require_inputs_on_gpu(network: nn.Module, args: tuple, kwargs: dict) -> None:
    """DDP and FSDP2 would copy a tensor on the CPU at each call, and the host would wait."""
    assert all(map(on_gpu, tensors_in(args, kwargs))), f"{type(network).__name__} is given a tensor on the CPU"


def check_cycle(gpu: FakeGpu, run: Run, step: int = 0, waits: tuple[str, ...] = (FETCH,)) -> dict:
    """Run one cycle, return its row of the log. The host waits only at ``waits``; no copy reads freed memory."""
    networks = (run.generator, run.estimator)
    hooks = [each.register_forward_pre_hook(require_inputs_on_gpu, with_kwargs=True) for each in networks]
    gpu.clear()
    try:
        of_estimator, row, _ = cycle(run, step)
    finally:
        for hook in hooks:
            hook.remove()
    assert gpu.lost == [], f"freed before it was copied: {gpu.lost}"
    assert [function_of(event) for event in gpu.waits] == list(waits), gpu.waits
    assert {function_of(event) for event in gpu.copies} <= DRAWN_ON_THE_CPU, gpu.copies
    return of_estimator[-1] | row


# Cycles -----------------------------------------------------------------------------------------------------------

TWO_STEPS = ("--num-steps", 2, "--timestep-shift", 2)
GUIDED = ("--real-guidance-scale", 1.5, "--real-guidance-interval", 0.2, 0.8)
EVERYTHING = (*TWO_STEPS, *GUIDED, "--ema-decay", 0.99, "--gradient-accumulation-steps", 2)
LORA = ("--use-lora-gen", "--gradient-checkpointing")
# Flags; how many processes, and whether they shard (FSDP2) or not (DDP).
CASES = {
    "fp32, guided": (("--mixed-precision", "no", *GUIDED), 1, False),
    "bf16, everything": (("--mixed-precision", "bf16", *EVERYTHING), 1, False),
    "fp16, LoRA": (("--mixed-precision", "fp16", *LORA, "--ema-decay", 0.99), 1, False),
    "DDP": (("--mixed-precision", "bf16", *EVERYTHING), 2, False),
    "DDP, LoRA, fp16": (("--mixed-precision", "fp16", *LORA), 2, False),
    "FSDP2": (("--mixed-precision", "bf16", *EVERYTHING), 8, True),
    "FSDP2, checkpointing, fp16": (("--mixed-precision", "fp16", "--gradient-checkpointing"), 8, True),
    "FSDP2, LoRA, fp32": (("--mixed-precision", "no", *LORA), 8, True),
}


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


@pytest.mark.parametrize("name", CASES)
def test_in_a_cycle_the_host_waits_once(gpu, built, name):
    more, processes, sharded = CASES[name]
    run = built(*more, processes=processes, sharded=sharded)
    row = check_cycle(gpu, run)
    assert {"loss_dmd", "grad_norm_generator", "update_ratio_generator"} <= row.keys()


# Rewards and pictures ---------------------------------------------------------------------------------------------

OF_IMAGES = """
def brightness(images, labels):
    return images.mean(dim=(1, 2, 3))
"""
OF_ARRAYS = """
IMAGES = "uint8"


def ink(images, labels):
    return images.mean(axis=(1, 2, 3))
"""


@pytest.fixture
def sources(tmp_path, reward_folder) -> dict[str, str]:
    """Sources of rewards by their kind."""
    files = {name: tmp_path / name for name in ("images.py", "arrays.py", "real.npz")}
    files["images.py"].write_text(OF_IMAGES)
    files["arrays.py"].write_text(OF_ARRAYS)
    space = load_space(f"classifier:{reward_folder}")
    one, classes = np.eye(space.size), np.zeros((10, space.size))
    arrays = {"mu": classes[0], "sigma": one, "class_mu": classes, "class_count": np.full(10, 9.0), "within": one}
    np.savez(files["real.npz"], space=json.dumps(space.describe()), **arrays)
    return {
        "CLASSIFIER": str(reward_folder),
        "IMAGES": f"{files['images.py']}:brightness",
        "ARRAYS": f"{files['arrays.py']}:ink",
        "REAL": str(files["real.npz"]),
    }


WITH_REWARDS = {
    "classifier": (
        "--reward",
        "classifier",
        0.1,
        "CLASSIFIER",
        "--reward-micro-batch",
        2,
        "--tilt",
        0.1,
        "python",
        "IMAGES",
    ),
    "python": ("--reward", "python", 0.1, "IMAGES", "--tilt", 0.1, "classifier", "CLASSIFIER"),
}


@pytest.mark.parametrize("name", WITH_REWARDS)
def test_rewards_wait_for_nothing(gpu, built, sources, name):
    words = [sources.get(word, word) for word in WITH_REWARDS[name]]
    row = check_cycle(gpu, built("--mixed-precision", "bf16", *words))
    assert any("reward" in column for column in row)


def test_a_frechet_reward_waits_for_its_eigenvalues_alone(gpu, built, sources):
    """Whether features are finite, and eigenvalues were found: one place in a cycle, before the generator's turn.

    In the first three cycles it waits also for the norms that give its scale; they are set here.
    """
    run = built("--mixed-precision", "bf16", "--reward", "frechet", 1, sources["REAL"], "--frechet-window", 200)
    (memory,) = run.memories.values()
    memory.norms, memory.observed = [[1.0, 1.0]] * 3, True
    row = check_cycle(gpu, run, waits=(*FRECHET, FETCH))
    assert {"frechet", "scale_frechet", "loss_reward_frechet"} <= row.keys()


def test_a_function_of_arrays_waits_for_them_alone(gpu, built, sources):
    run = built("--mixed-precision", "bf16", "--tilt", 0.1, "python", sources["ARRAYS"])
    there = ["train_cc/models/vae.py images_to_uint8", "train_cc/rewards/build.py rewards"]
    check_cycle(gpu, run, waits=(*there, there[1], FETCH))


def test_dinov2_through_a_decoder_waits_for_nothing(gpu, built, tmp_path, monkeypatch):
    backbone = VisionTransformer(img_size=224, patch_size=112, embed_dim=64, depth=1, num_heads=1, num_classes=0)
    judge = DINOv2Classifier(backbone, nn.Linear(128, 10))
    judge.files = []
    monkeypatch.setattr(DINOv2Classifier, "from_official", lambda *files: judge)
    new_vae((8, 8, 8, 8), groups=4).save_pretrained(tmp_path / "vae")
    random_sit(in_channels=4).save_pretrained(tmp_path / "latent")
    more = ("--vae", tmp_path / "vae", "--reward", "dinov2", 0.1, "--reward-checkpointing")
    row = check_cycle(gpu, built("--mixed-precision", "bf16", *more, teacher=tmp_path / "latent"))
    assert "loss_reward_dinov2" in row


def test_previews_mix_no_devices(gpu, built, sources):
    """They may wait: pictures are made on the CPU."""
    run = built("--mixed-precision", "bf16", *TWO_STEPS, "--reward", "classifier", 0.1, sources["CLASSIFIER"])
    run.step = run.output.sample_steps
    assert "preview_accuracy_reward_classifier" in show(run, run.step)
    assert (run.output.output_dir / "samples" / f"step-{run.step}" / "grid.png").exists()


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


# Planted faults ---------------------------------------------------------------------------------------------------


def patched(module, name: str, change) -> Callable[[Run, pytest.MonkeyPatch], None]:
    """Plant ``change`` of the result of ``module.name``."""
    real = getattr(module, name)
    return lambda run, monkeypatch: monkeypatch.setattr(module, name, lambda *args: change(run, real(*args)))


def scaled_by(scale: Callable[[Tensor], Tensor]) -> Callable[[Run, pytest.MonkeyPatch], None]:
    """Plant a LoRA scale of the estimator, made from its input."""

    def hook(network, args, kwargs):
        return args, kwargs | {"lora_scale": scale(args[0])}

    return lambda run, monkeypatch: run.estimator.register_forward_pre_hook(hook, with_kwargs=True)


def read(run: Run, losses: Tensor) -> Tensor:
    losses.mean().item()
    return losses


def first_of_a_large_table(run: Run, labels: Tensor) -> Tensor:
    """A source of more than what CUDA takes at the call, freed at once."""
    return torch.zeros(2**16, dtype=torch.long).to(run.session.device, non_blocking=True)[:4]


def copied_at_once(run: Run, labels: Tensor) -> Tensor:
    return torch.zeros(4, dtype=torch.long).to(run.session.device)


def copied(run: Run, x: Tensor) -> Tensor:
    return x + torch.ones(1).to(run.session.device, non_blocking=True)


GIVEN_ON_CPU = (AssertionError, "given a tensor on the CPU")
FAULTS = {  # the plant, what it raises
    "a CPU tensor in scores": (
        patched(run_room, "apply_guidance", lambda run, v: v + torch.zeros(len(v), 1, 1, 1)),
        (RuntimeError, "device"),
    ),
    "an item in a turn": (patched(turns, "velocity_matching_losses", read), (AssertionError, "read by")),
    "a scale on the CPU": (scaled_by(lambda x: torch.full((len(x),), 2.0)), GIVEN_ON_CPU),
    # 0-d: it may join tensors on the device, but is copied where the network is wrapped.
    "a number on the CPU": (scaled_by(lambda x: torch.tensor(2.0)), GIVEN_ON_CPU),
    "a blocking copy": (patched(turns, "draw_labels", copied_at_once), (AssertionError, "blocking copy")),
    "a copy whose source is freed": (
        patched(turns, "draw_labels", first_of_a_large_table),
        (AssertionError, "freed before it was copied"),
    ),
    "a copy without a wait": (patched(turns, "dmd_normaliser", copied), (AssertionError, "test_fake_cycle.py copied")),
}


@pytest.mark.parametrize(
    ("name", "processes"), [*((name, 1) for name in FAULTS), ("a scale on the CPU", 2), ("a scale on the CPU", 8)]
)
def test_a_planted_fault_is_caught(gpu, built, monkeypatch, name, processes):
    run = built("--mixed-precision", "bf16", processes=processes, sharded=processes == 8)
    plant, (error, words) = FAULTS[name]
    plant(run, monkeypatch)
    with pytest.raises(error, match=words):
        check_cycle(gpu, run)
