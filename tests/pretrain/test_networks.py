"""train_cc/pretrain/networks.py: the networks of stage 0, their draws, and flags that cannot work."""

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import refused, words
from train_cc.draws import Draws
from train_cc.models import SiT
from train_cc.models.classifier import ImageClassifier
from train_cc.pretrain import classifier, networks, teacher

TEACHER = ("--hidden-size", 8, "--num-heads", 1, "--depth", 1, "--batch-size", 4, "--max-train-steps", 1)
CLASSIFIER = ("--image-size", 16, "--batch-size", 4, "--max-train-steps", 1)


def test_networks_are_read_by_the_rest_and_share_no_random_numbers(tmp_path, monkeypatch):
    """Neither draws nor initialisation: teacher, reward and evaluation classifier, of other or one architecture."""
    draws, starts = [], {}
    for name, main, *more in (
        ("teacher", teacher.main, *TEACHER),
        ("reward", classifier.main, *CLASSIFIER),
        ("evaluation", classifier.main, *CLASSIFIER, "--purpose", "evaluation"),
        ("other", classifier.main, *CLASSIFIER, "--architecture", "test_efficientnet"),
    ):
        keys = []
        with monkeypatch.context() as patch:
            patch.setattr(networks, "Draws", lambda *key, keys=keys, **kw: keys.append(key) or Draws(*key, **kw))
            main(words("--output-dir", tmp_path / name, *more))
        draws.append(torch.stack([Draws(*key).uniform(64) for key in keys]))
        (file,) = (tmp_path / name).glob("*.safetensors")
        starts[name] = load_file(file)
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    reward, evaluation = starts["reward"], starts["evaluation"]
    moved = [key for key, value in reward.items() if value.ndim > 1 and (value - evaluation[key]).abs().max() > 0.05]
    assert len(moved) > 5  # more than one step of 0.002 moves anything
    assert SiT.from_pretrained(tmp_path / "teacher").config.num_classes == 10
    assert ImageClassifier.from_pretrained(tmp_path / "other").num_classes == 10


@pytest.mark.parametrize("command,flags", [
    (teacher, "--ema-decay=1"),
    (teacher, "--label-dropout=1"),
    (teacher, "--num-heads=3"),
    (teacher, "--patch-size=3"),
    (teacher, "--data-dir=somewhere"),
    (teacher, "--depth=128 --hidden-size=8192"),  # 3 TB of memory
    (teacher, "--output-dir=/proc/version/x"),
    (teacher, "--learning-rate=0"),
    (teacher, "--checkpoint-steps=1.5"),
    (classifier, "--noise-augmentation=nan"),
    (classifier, "--architecture=no_such"),
    (classifier, "--architecture=vit_tiny_patch16_224 --image-size=8"),  # below its patches
    (classifier, "--purpose=both"),
])  # fmt: skip
def test_bad_values_are_refused_before_anything_is_written(tmp_path, capsys, monkeypatch, command, flags):
    monkeypatch.chdir(tmp_path)
    message = refused(command.main, [*words("--output-dir", tmp_path / "run"), *flags.split()], capsys=capsys)
    flag, _, value = flags.split()[0].partition("=")
    assert flag in message or value[:20] in message, message
    assert not list(tmp_path.iterdir())
