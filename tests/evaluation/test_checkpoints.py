"""`evaluation.checkpoints`: which checkpoint of a run was best, by spaces that did not train it."""

import json

import numpy as np
import pytest

from evaluation import checkpoints
from tests.conftest import flags, refused, run_cold_start, words
from train_cc import dmdr_refl
from train_cc.images import load_dataset
from train_cc.io.figures import read_figures

VERDICTS = {
    "still improving": ([3.0, 2.0, 1.0], "still improving: step 3, the last, is the best"),
    "worse": ([3.0, 1.0, 2.0], "best at step 2; worse since, by 7.1 standard errors at step 3"),
    "level": ([3.0, 1.1, 1.0], "the last, step 3, is the best; within 2 standard errors of it since step 2"),
    "one": ([3.0], "one checkpoint, of step 1: there is nothing"),
    "no longer better": ([3.0, 1.0, 1.1], "best at step 2; level since step 2"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_a_difference_counts_from_two_standard_errors_on(case):
    values, expected = VERDICTS[case]
    assert checkpoints.verdict([1, 2, 3][: len(values)], [(value, 0.1) for value in values]).startswith(expected)


@pytest.fixture
def reference(tmp_path):
    images, labels = load_dataset("digits")
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=images[:400].permute(0, 2, 3, 1).numpy(), arr_1=labels[:400].numpy())
    return path


def test_all_checkpoints_are_judged_and_later_ones_join(teacher, tmp_path, reference, reward_folder, capsys):
    more = ("--checkpoint-steps", 1, "--ema-decay", 0.9)
    run = run_cold_start(teacher, tmp_path / "run", *more, "--max-train-steps", 2)
    judge = ("--space", f"classifier:{reward_folder}", "pixels", "--held-out", "halves", "--num-images", 100)
    judge += ("--bootstrap", 3, "--raw")
    checkpoints.main(words(run, "--reference", reference, *judge))
    folder = tmp_path / "run_checkpoints"
    first = folder / "samples/step-1.npz"
    made, rows = first.stat().st_mtime_ns, read_figures(folder / "checkpoints.json")["over_spaces"]
    assert {"step 1", "step 2"} < rows.keys() and "step" in capsys.readouterr().out.splitlines()[-1]
    best = folder / "best.json"
    assert json.loads(best.read_text())["step"] in (1, 2)
    best.write_text('{"step": 1}')
    run_cold_start(teacher, run, *more, "--auto-resume", "--keep-checkpoints", 1)
    left = sorted(path.name for path in (run / "checkpoints/torch_units").iterdir())
    assert left == ["step-1.pt", "step-3.pt"]  # the newest, and what was found best
    checkpoints.main(words(run, "--reference", reference, *judge))
    again = read_figures(folder / "checkpoints.json")["over_spaces"]
    assert first.stat().st_mtime_ns == made and "step 3" in again
    assert again["step 1"]["figures"] == rows["step 1"]["figures"]
    table = (folder / "checkpoints.md").read_text()
    assert table.count("+-") == 6 and f"{again['step 3']['figures']['FDr']:.3f} +- " in table
    raw = read_figures(folder / "checkpoints-raw.json")["over_spaces"]
    assert raw.keys() == again.keys() and raw["step 2"]["figures"] != again["step 2"]["figures"]
    assert (folder / "checkpoints.png").stat().st_size > 5000


def test_what_cannot_judge_is_refused(teacher, tmp_path, reference, reward_folder, capsys):
    cold = run_cold_start(teacher, tmp_path / "cold", "--max-train-steps", 1)
    reward = ("--encoder-type", "classifier", "--reward-classifier", reward_folder, "--max-train-steps", 2)
    units = cold / "checkpoints/torch_units/step-1.pt"
    dmdr_refl.main(flags(teacher, tmp_path / "run", *reward, "--resume-ckpt", units))
    judge = ("--reference", reference, "--space", f"classifier:{reward_folder}", "--num-images", 100, "--bootstrap", 2)
    message = refused(checkpoints.main, words(tmp_path / "run", *judge), capsys=capsys)
    assert f"classifier:{reward_folder} rewarded" in message and "leave it out of --space" in message
    assert "a run's checkpoints" in refused(checkpoints.main, words(teacher, *judge), capsys=capsys)
    other = ("--output-dir", tmp_path / "cold")
    assert "holds a cold_start" in refused(checkpoints.main, words(tmp_path / "cold", *judge, *other), capsys=capsys)
