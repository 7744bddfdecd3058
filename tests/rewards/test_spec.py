"""Rewards on the command line: what is refused, names in the log, and what `none` drops."""

import pytest

from tests.conftest import flags, refused
from train_cc import cold_start, dmdr_refl
from train_cc.rewards.spec import RewardSpec, named_apart

REFUSED = [  # flags, words
    (["--reward", "novel", 1], "the kind is 'novel'"),
    (["--reward", "frechet", -1, "x.npz"], "the number is -1"),
    (["--reward", "frechet", "nan", "x.npz"], "finite"),
    (["--reward", "frechet", 1], "expected are frechet NUMBER SOURCE"),
    (["--reward", "dinov2", 1, "x"], "expected are dinov2 NUMBER"),
    (["--reward", "python", 1, "file.py"], "FILE.py:FUNCTION"),
    (["--reward", "python", 1, "nowhere.py:f"], "is not there"),
    (["--reward", "frechet", 1, "nowhere.npz"], "nowhere.npz does not exist"),
    (["--tilt", 0, "python", "x.py:f"], "the number is 0"),
    (["--tilt", 1, "frechet", "x.npz"], "the kind is 'frechet'"),
    (["--reward", "python", 1, "x.py:f", "--tilt", 1, "python", "x.py:f"], "given twice"),
    (["--reward-weight", -1], "--reward-weight is -1"),
    (["--reward-micro-batch", -1], "--reward-micro-batch is -1"),
    (["--encoder-type", "clip"], "clip"),
]


@pytest.mark.parametrize(("more", "words"), REFUSED)
def test_what_cannot_be_a_reward_is_refused(teacher, tmp_path, capsys, more, words):
    assert words in refused(cold_start.main, flags(teacher, tmp_path / "run", *more), capsys=capsys)
    assert not (tmp_path / "run").exists()


def test_stage_two_needs_a_checkpoint(teacher, tmp_path, capsys):
    assert "--resume-ckpt is missing" in refused(dmdr_refl.main, flags(teacher, tmp_path / "run"), capsys=capsys)


def test_names_are_apart_and_none_drops_what_came_before():
    specs = [RewardSpec("classifier", 1, "a"), RewardSpec("classifier", 1, "b"), RewardSpec("python", 1, "f.py:sharp")]
    assert named_apart(specs) == ["classifier", "classifier_2", "sharp"]
    functions = [RewardSpec("python", 1, f"f.py:{name}") for name in ("sharp_2", "sharp", "sharp", "sharp_2_b")]
    assert named_apart(functions) == ["sharp_2", "sharp", "sharp_3", "sharp_2_b"]
    base = ["--teacher", "t", "--output-dir", "o", "--reward", "frechet", "1", "x.npz", "--encoder-type", "none"]
    assert cold_start.stage_parser().parse_args(base).reward == []
    assert len(cold_start.stage_parser().parse_args([*base, "--reward", "dinov2", "1"]).reward) == 1
