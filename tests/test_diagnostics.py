"""The figures of a log row against their definitions, the panel of a sample step, and the trackers."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.conftest import flags, logged, refused, run_cold_start
from train_cc import cold_start
from train_cc.run.diagnostics import UpdateSize, by_band
from train_cc.run.logbook import columns


def test_bands_add_up_to_the_whole():
    t, values = torch.tensor([0.0, 0.1, 0.25, 0.6, 0.74, 1.0]), torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0, 11.0])
    assert columns({"gap_by_band": by_band(values, t).tolist(), "all": 6.0}) == {
        "all": 6.0,
        **{"gap_t00": 2, "gap_t25": 5, "gap_t50": 8, "gap_t75": 11},
    }
    empty = columns({"gap_by_band": by_band(values[:1], t[:1]).tolist()})
    assert empty == {"gap_t00": 1, "gap_t25": None, "gap_t50": None, "gap_t75": None}


def test_update_size_is_that_of_the_middle_block():
    blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(5))
    size = UpdateSize(blocks)
    with torch.no_grad():
        blocks[0].weight.mul_(3)
        blocks[2].weight.mul_(1.25)
    torch.testing.assert_close(size.ratio(), torch.tensor(0.25))


def test_the_bands_of_a_row_are_of_one_piece_with_its_means(teacher, tmp_path):
    """A batch of 64, so that no band is empty: the overall figures lie between the bands' extremes."""
    run = run_cold_start(teacher, tmp_path / "run", "--batch-size", 64, "--dynamic-steps", 0)
    turns = logged(run, "gui")
    for row in logged(run):
        gaps, losses = ([row[f"{name}_t{low:02}"] for low in (0, 25, 50, 75)] for name in ("score_gap", "loss_fake"))
        of_turns = [turn["loss_fake"] for turn in turns if turn["step"] == row["step"]]
        assert min(gaps) < row["score_gap"] < max(gaps)
        assert min(losses) < np.mean(of_turns) < max(losses)
        assert 0.4 < row["t_mean"] < 0.6 and row["update_ratio_generator"] > 0
    assert all(turn["update_ratio_estimator"] > 0 for turn in turns)


def test_a_sample_step_draws_four_rows_and_counts_classes(teacher, tmp_path, reward_folder):
    run = run_cold_start(teacher, tmp_path / "run", "--holdout-classifier", reward_folder, "--num-previews", 10)
    row = logged(run)[1]
    assert row["preview_accuracy_holdout"] == pytest.approx(row["preview_coverage_holdout"])  # ten of ten classes
    picture = np.array(Image.open(run / "samples" / "step-2" / "grid.png"))
    assert picture.shape[0] == 4 * 68 + 4
    real, fake = (picture[top : top + 64, -68 * 10 :] for top in (4 + 2 * 68, 4 + 3 * 68))
    assert real.std() > 5 and not np.array_equal(real, fake)


def test_tensorboard_gets_the_rows_and_the_pictures(teacher, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_cold_start(teacher, tmp_path / "run", "--report-to", "tensorboard")
    events = EventAccumulator(str(run / "dmdr"))
    events.Reload()
    assert [event.step for event in events.Scalars("score_gap")] == [1, 2, 3]
    assert events.Scalars("score_gap")[2].value == pytest.approx(logged(run)[2]["score_gap"])
    assert [event.step for event in events.Images("previews")] == [2, 3]


def test_a_tracker_that_is_not_installed_is_refused(teacher, tmp_path, capsys, monkeypatch):
    (tmp_path / "here" / "wandb").mkdir(parents=True)  # as wandb leaves it where a run was started: no library
    monkeypatch.syspath_prepend(tmp_path / "here")
    monkeypatch.setattr("sys.path", [path for path in sys.path if not (Path(path) / "wandb" / "__init__.py").exists()])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert importlib.util.find_spec("wandb") is not None
    message = refused(cold_start.main, flags(teacher, tmp_path / "run", "--report-to", "wandb"), capsys=capsys)
    assert "pip install wandb" in message and not (tmp_path / "run").exists()
