"""Small fakes that the tests own: a two-block SiT as teacher, and stages run in this process."""

import json
from pathlib import Path

import pytest
import torch

from train_cc import cold_start
from train_cc.models import SiT
from train_cc.models.classifier import ImageClassifier

torch.set_num_threads(2)
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


def logged(run: Path, name: str = "gen") -> list[dict]:
    """The rows of a loss log without the one column that depends on the machine."""
    lines = (run / "loss_logs" / f"loss_{name}_log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def refused(call, *args, capsys) -> str:
    """The message of a call that must end with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        call(*args)
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message
