"""The figures of a log row against their definitions, the panel of a sample step, and the trackers."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.conftest import flags, logged, refused, run_cold_start
from train_cc import cold_start
from train_cc.run.diagnostics import UpdateSize, by_band, compare_gradients, whole_norm
from train_cc.run.logbook import JsonLines, columns, log_to, logger, read_json_lines


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


def test_gradients_are_compared_by_norm_and_angle():
    """3-4-5 and its mirror image, scaled by two."""
    of_matching, of_reward = torch.tensor([[3.0, 4.0]]), torch.tensor([[8.0, 6.0]])
    found = compare_gradients("x", of_matching, of_reward)
    expected = {"grad_norm_dmd_x0": 5.0, "grad_norm_x_x0": 10.0, "grad_cosine_x_x0": 48 / 50}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)
    assert all(value.shape == () for value in found.values())
    assert whole_norm([of_matching, torch.tensor([12.0])]).item() == pytest.approx(13.0)


# The log


def test_a_log_is_appended_to_and_cut_at_the_step_that_is_resumed_from(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    path = tmp_path / "run" / "loss_logs" / "log.jsonl"
    log = JsonLines(path, 0)
    log.write([{"step": 1, "a": None}, {"step": 2, "a": 0.5}])
    log.write([{"step": 2}, {"step": 3}])
    assert path.read_text().splitlines() == [
        '{"step": 1, "a": null}',
        '{"step": 2, "a": 0.5}',
        '{"step": 2}',
        '{"step": 3}',
    ]
    assert read_json_lines(path) == ([json.loads(line) for line in path.read_text().splitlines()], 0)
    JsonLines(path, 2).write([{"step": 4}])
    assert [row["step"] for row in read_json_lines(path)[0]] == [1, 2, 2, 4] and not caplog.text
    path.write_text('{"step": 1}\n{"step"\n[1]\n{"step": 1.0}\n')
    assert read_json_lines(path) == ([{"step": 1}], 3)
    JsonLines(path, 0)
    assert path.read_text() == "" and "3 line(s) could not be read" in caplog.text


def test_the_log_for_people_has_times_and_the_terminal_no_details(tmp_path, capsys):
    for name in ("first", "second"):  # a process may begin a second run
        logger.propagate = True
        (tmp_path / name).mkdir()
        log_to(tmp_path / name)
        logger.info("said in %s", name)
        logger.debug("detail \udcff")
    try:
        time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
        for name in ("first", "second"):
            text = (tmp_path / name / "log.txt").read_text()
            assert re.fullmatch(rf"{time} said in {name}\n{time} detail \\udcff\n", text)
        assert re.fullmatch(rf"{time} said in first\n{time} said in second\n", capsys.readouterr().err)
        assert not logger.propagate and len(logger.handlers) == 2
    finally:
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()


# A run's figures


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
