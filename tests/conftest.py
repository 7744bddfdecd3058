"""Small fakes that the tests own: a two-block SiT as teacher, and stages run in this process."""

import json
import os
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from train_cc import cold_start
from train_cc.models import SiT
from train_cc.models.classifier import ImageClassifier
from train_cc.rewards.build import Networks
from train_cc.rewards.terms import Reward, classifier_losses, rewards_at_x0
from train_cc.run.session import open_session
from train_cc.run.states import copy_whole
from train_cc.setup.build import build

# On a busy machine a second thread waits at every small product for its turn: OMP_NUM_THREADS=1 is then much faster.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


def pytest_configure(config) -> None:
    """The everyday suite passes on a GPU machine as elsewhere: it sees no GPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the figures of `-m gpu` as a table to paste into an issue."""
    rows = getattr(sys.modules.get("tests.gpu.test_gpu"), "ROWS", [])
    if rows:
        terminalreporter.write_line(
            "\n".join(["", "| what | measured |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])
        )


TINY = {"input_size": 8, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


def random_sit(seed: int = 0, spread: float = 0.1, **config) -> SiT:
    """A SiT none of whose weights is zero, so that every part of it matters."""
    torch.manual_seed(seed)
    model = SiT(**{**TINY, **config})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    random_sit().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory) -> Path:
    """A classifier with random weights, as pretrain/classifier.py writes one."""
    folder = tmp_path_factory.mktemp("reward_classifier")
    torch.manual_seed(0)
    ImageClassifier("test_efficientnet", num_classes=10, in_channels=1, image_size=32).save_pretrained(folder)
    return folder


def flags(teacher: Path, output: Path, *more: object) -> list[str]:
    """A cold start of three updates on the tiny teacher; later flags override."""
    base = {
        "--teacher": teacher,
        "--output-dir": output,
        "--vae": "none",
        "--max-train-steps": 3,
        "--batch-size": 4,
        "--ratio-update": 2,
        "--lora-rank": 4,
        "--lora-init-spread": 0.1,
        "--dynamic-steps": 4,
        "--learning-rate-generator": 1e-3,
        "--learning-rate-estimator": 1e-3,
        "--checkpoint-steps": 1,
        "--sample-steps": 2,
        "--num-previews": 4,
        "--teacher-preview-steps": 2,
        "--mixed-precision": "no",
    }
    return [str(word) for pair in base.items() for word in pair] + [str(word) for word in more]


def run_cold_start(teacher: Path, output: Path, *more: object) -> Path:
    cold_start.main(flags(teacher, output, *more))
    return output


class RandomNetworks(Networks):
    """SiTs of ``config`` without a folder."""

    def __init__(self, session, config: dict):
        super().__init__(session)
        self.config = config

    def teacher(self, folder: Path) -> SiT:
        model = SiT(**self.config).eval()
        model.files = []
        return model

    def hashes(self, files: dict) -> dict[str, str]:
        return {"teacher": ""}


def build_run(teacher: Path, output: Path, *more: object, stage=cold_start):
    """A run as a stage's command line builds it, not yet begun."""
    args = stage.stage_parser().parse_args(flags(teacher, output, *more))
    return build(args, open_session(args.mixed_precision))


@torch.no_grad()
def spread_lora_b(model: nn.Module, spread: float = 0.3) -> None:
    """B starts at zero: real and fake would be one score, and every gradient of matching and of A zero."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            copy_whole(parameter, spread * torch.randn(parameter.shape, generator=generator))


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_close_and_not_zero(actual: torch.Tensor, expected: torch.Tensor, rel: float, name: str = "") -> None:
    """The largest difference against the largest value: nothing compares zero with zero."""
    largest = expected.abs().max().item()
    difference = (actual.double() - expected.double()).abs().max().item()
    assert largest > 0, f"{name}: zero is compared with zero"
    assert difference <= rel * largest, f"{name}: {difference:.3g} apart, of {largest:.3g}"


def logged(run: Path, name: str = "gen") -> list[dict]:
    """The rows of a loss log without the one column that depends on the machine."""
    lines = (run / "loss_logs" / f"loss_{name}_log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """A folder with a random classifier of digits."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    ImageClassifier("test_resnet", num_classes=10, in_channels=1, image_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real(tmp_path_factory, reward_folder) -> Path:
    """Statistics of the real digits in the features of the tests' classifier."""
    file = tmp_path_factory.mktemp("statistics") / "digits.npz"
    from evaluation import statistics

    words = ["--images", "digits", "--space", f"classifier:{reward_folder}", "--output", file]
    statistics.main([str(word) for word in words])
    return file


def words(*arguments) -> list[str]:
    return [str(argument) for argument in arguments]


def tree(folder: Path) -> dict[str, bytes | None]:
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def refused(call, *args, capsys) -> str:
    """The message of a call that must end with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        call(*args)
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


def reward_gradient(classifier, decode, x0, y, micro_batch=0) -> SimpleNamespace:
    """A classifier's reward at x0: its loss, accuracy, and the gradient of the loss."""
    reward = Reward("classifier", 1.0, partial(classifier_losses, classifier))
    (found,) = rewards_at_x0([reward], decode, x0, y, micro_batch)
    return SimpleNamespace(loss=found.losses.mean(), accuracy=found.figures["accuracy"].mean(), gradient=found.gradient)


def ldm_names(state: dict[str, torch.Tensor], stages: int) -> dict[str, torch.Tensor]:
    """A diffusers VAE's tensors in the layout of LDM's files (CompVis/latent-diffusion, AutoencoderKL)."""
    names = [
        (r"encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1.block."),
        (r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
        (r"decoder\.up_blocks\.(\d)\.resnets\.", lambda m: f"decoder.up.{stages - 1 - int(m[1])}.block."),
        (r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{stages - 1 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_(q|k|v)", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    ]
    renamed = {}
    for name, value in state.items():
        for theirs, ours in names:
            name = re.sub(theirs, ours, name)
        convolution = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)  # of 1 x 1, a linear layer in diffusers
        renamed[name] = value[..., None, None].clone() if convolution else value
    return renamed
