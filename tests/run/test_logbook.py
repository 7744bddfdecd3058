"""train_cc/run/logbook.py and diagnostics.py: a log's rows, damaged lines, and figures against their definitions."""

import json
import re

import pytest
import torch
from torch import nn

from train_cc.run.diagnostics import UpdateSize, by_band, compare_gradients, whole_norm
from train_cc.run.logbook import JsonLines, columns, log_to, logger, read_json_lines


@pytest.fixture(autouse=True)
def propagating():
    logger.propagate = True
    yield
    logger.propagate = True
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()


def test_a_log_is_appended_to_and_cut_at_the_step_that_is_resumed_from(tmp_path, caplog):
    path = tmp_path / "run" / "loss_logs" / "log.jsonl"
    log = JsonLines(path, 0)
    log.write([{"step": 1, "a": float("nan"), "b": 1}, {"step": 2, "a": 0.5}])
    log.write([{"step": 2}, {"step": 3}])
    lines = ['{"step": 1, "a": null, "b": 1}', '{"step": 2, "a": 0.5}', '{"step": 2}', '{"step": 3}']
    assert path.read_text().splitlines() == lines
    assert read_json_lines(path) == ([json.loads(line) for line in lines], 0)
    JsonLines(path, 2).write([{"step": 4}])
    assert [row["step"] for row in read_json_lines(path)[0]] == [1, 2, 2, 4] and not caplog.text


DAMAGED = ["null", "[1]", '{"no": "step"}', '{"step": "1"}', '{"step": true}', '{"step": 1', "\0\xff", "[" * 10**5, ""]
DAMAGED += ['{"step": 1e99}', '{"step": ' + "9" * 5000 + "}", '{"step": NaN}', '{"step": 1.0}']


def test_damaged_lines_of_a_log_are_dropped_and_told(tmp_path, caplog):
    path = tmp_path / "loss_gen_log.jsonl"
    good = ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": 0.25}', '{"step": 3}']
    path.write_text("\n".join([good[0], *DAMAGED, *good[1:]]) + "\n", encoding="latin-1")
    assert read_json_lines(path) == ([json.loads(line) for line in good], len(DAMAGED))
    JsonLines(path, 2)
    assert path.read_text().splitlines() == good[:2]
    assert f"{path}: {len(DAMAGED)} line(s) could not be read" in caplog.text


def test_the_log_for_people_has_times_and_the_terminal_no_details(tmp_path, capsys):
    for name in ("first", "second"):  # a process may begin a second run
        (tmp_path / name).mkdir()
        log_to(tmp_path / name)
        logger.info("said in %s", name)
        logger.debug("detail \udcff")
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    for name in ("first", "second"):
        text = (tmp_path / name / "log.txt").read_text()
        assert re.fullmatch(rf"{time} said in {name}\n{time} detail \\udcff\n", text)
    assert re.fullmatch(rf"{time} said in first\n{time} said in second\n", capsys.readouterr().err)


def test_bands_add_up_to_the_whole():
    t, values = torch.tensor([0.0, 0.1, 0.25, 0.6, 0.74, 1.0]), torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0, 11.0])
    row = columns({"gap_by_band": by_band(values, t).tolist(), "all": 6.0})
    assert row == {"all": 6.0, "gap_t00": 2, "gap_t25": 5, "gap_t50": 8, "gap_t75": 11}
    empty = columns({"gap_by_band": by_band(values[:1], t[:1]).tolist()})
    assert empty == {"gap_t00": 1, "gap_t25": None, "gap_t50": None, "gap_t75": None}


def test_update_size_is_that_of_the_middle_block():
    blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(5))
    size = UpdateSize(blocks)
    blocks[0].weight.data.mul_(3)
    blocks[2].weight.data.mul_(1.25)
    torch.testing.assert_close(size.ratio(), torch.tensor(0.25))


def test_gradients_are_compared_by_norm_and_angle():
    """3-4-5 and its mirror image, scaled by two."""
    of_matching, of_reward = torch.tensor([[3.0, 4.0]]), torch.tensor([[8.0, 6.0]])
    figures = {name: value.item() for name, value in compare_gradients("x", of_matching, of_reward).items()}
    expected = {"grad_norm_dmd_x0": 5.0, "grad_norm_x_x0": 10.0, "grad_cosine_x_x0": 48 / 50}
    assert figures == pytest.approx(expected)
    assert whole_norm([of_matching, torch.tensor([12.0])]).item() == pytest.approx(13.0)
