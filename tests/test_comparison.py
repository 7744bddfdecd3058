"""What is said and drawn of a frontier's rows: evaluation/comparison.py and evaluation/scatter.py."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from evaluation import comparison, scatter
from evaluation.figures.tables import HELD_OUT, named_space


def row(fid, recall, precision, spread=0.01, seeds=3):
    figures = {"FID": fid, "Recall": recall, "Precision": precision}
    return {"figures": figures, "standard_deviations": dict.fromkeys(figures, spread), "seeds": seeds, "images": 8}


def test_a_difference_and_its_standard_error():
    """Spreads of .03 and .04 over four seeds: an error of .05 / 2."""
    value, error = comparison.difference(row(1, 0.5, 0.6, 0.03, 4), row(1, 0.4, 0.6, 0.04, 4), "Recall")
    assert value == pytest.approx(0.1) and error == pytest.approx(0.025)
    text = comparison.against_controls({"a": row(2, 0.5, 0.6), "b": row(1, 0.4, 0.6)}, {"a": "b", "b": "gone"})
    assert "| a | b | +1.00 (122.5 s.e.) | +0.100 (12.2 s.e.) | +0.000 (0.0 s.e.) |" in text and "gone" not in text


def test_who_dominates_whom():
    published = row(1.0, 0.5, 0.6)
    far = 0.01 * (2 / 3) ** 0.5 * 4  # four standard errors
    rows = {
        "better": row(1 - far, 0.5 + far, 0.6),
        "traded": row(1 - far, 0.5 + far, 0.6 - far),
        "worse FID": row(1 + far, 0.5 + far, 0.6 + far),
        "near": row(1 - far / 2, 0.5 + far / 2, 0.6),
        "published": published,
    }
    (line,) = comparison.domination(rows, ["published"])
    assert line == "better dominates published: FID -4.0, recall +4.0, precision +0.0 s.e."
    single = row(0.1, 0.9, 0.9) | {"standard_deviations": {}}
    assert comparison.beyond(single, published) is None
    over_spaces = {"figures": {"FDr": 1.0}, "standard_deviations": {}, "seeds": 1}
    assert comparison.domination({"a": over_spaces, "b": over_spaces}, ["b"]) == []


def test_means_over_seeds():
    rows = {f"a, seed {k}": {"figures": {"FID": float(k)}, "images": 8} for k in (1, 2, 3)}
    found = comparison.means_of(rows | {"held-out real": {"figures": {"FDr": 1.0}, "images": 4}})
    assert found["a"]["figures"]["FID"] == 2 and found["a"]["standard_deviations"]["FID"] == 1
    assert found["held-out real"]["seeds"] == 1 and found["held-out real"]["standard_deviations"] == {}


def test_the_picture_shows_every_row(tmp_path):
    rows = {f"row {k}": row(1, 0.1 * k, 0.5 + 0.01 * k) for k in range(9)} | {"held-out real": row(0, 1, 1)}
    spaces = [{"features": "a", "rows": rows}, {"features": "b", "rows": rows}]
    colours = {name: "tab:blue" for name in rows if name != "held-out real"}
    scatter.picture(spaces, colours, {"row 1": "row 0"}, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_the_legend_names_what_is_shown():
    spaces = [{"rows": {"teacher": {}, "base": {}, "control": {}}}]
    colours = {
        "teacher": scatter.TEACHER,
        "guided": scatter.TEACHER,
        "base": scatter.COLD_START,
        "reward": scatter.REWARD,
    }
    assert scatter.shown(spaces, colours, {"reward": "control"}) == []
    spaces[0]["rows"] |= {"guided": {}, "reward": {}, HELD_OUT: {}}
    labels = [handle.get_label() for handle in scatter.shown(spaces, colours, {"reward": "control"})]
    assert [label.split()[0] for label in labels] == ["real", "the", "from"]


def test_names_with_dollar_signs_are_no_formulas(tmp_path):
    rows = {"$\\frac{": row(1, 0.5, 0.5), "b $ c $": row(1, 0.6, 0.6)}
    spaces = [{"features": "timm:$\\frac{$", "rows": rows}]
    scatter.picture(spaces, dict.fromkeys(rows, "tab:blue"), {}, tmp_path / "p.png")


def test_a_collapsed_row_does_not_press_the_others_together():
    points = {"a": (0.5, 0.8), "b": (0.6, 0.6), "c": (0.7, 0.45)}
    assert scatter.low_of(points) == 0.45
    assert scatter.low_of(points | {"d": (0.7, 0.01)}) == 0.45
    rewarded = {"a": (0.5, 0.78), "b": (0.6, 0.75), "c": (0.7, 0.72), "reward": (0.9, 0.49)}
    assert scatter.low_of(rewarded) == 0.49
    assert scatter.low_of({"a": (0.5, 0.8)}) == 0.8 and scatter.low_of({"a": (0.5, 0.8), "b": (0.5, 0.1)}) == 0.1


def test_what_is_told_of_a_collapsed_row_stays_within_the_axes(tmp_path):
    figure, axes = plt.subplots()
    rows = {"a": row(1, 0.8, 0.5), "b": row(1, 0.75, 0.6), "c": row(1, 0.7, 0.7), "d": row(1, 0.02, 0.98)}
    scatter.panel(axes, rows, dict.fromkeys(rows, "tab:blue"), {})
    (told,) = (text for text in axes.texts if text.get_text() == "recall 0.02")
    figure.canvas.draw()
    assert told.get_window_extent().x1 < axes.get_window_extent().x1
    plt.close(figure)


def test_a_classifiers_space_is_called_by_its_architecture(tmp_path):
    (tmp_path / "judge").mkdir()
    assert named_space(f"classifier:{tmp_path}/judge") == f"classifier:{tmp_path}/judge"
    (tmp_path / "judge" / "config.json").write_text('{"architecture": "test_vit"}')
    assert named_space(f"classifier:{tmp_path}/judge") == "judge (test_vit)"
    assert named_space("pixels") == "pixels" and named_space("the mean over 2 spaces") == "the mean over 2 spaces"


def test_a_bar_in_a_rows_name_stays_in_its_cell():
    row = {"figures": {"FID": 1.0}, "standard_deviations": {"FID": 0.1}, "seeds": 2}
    text = comparison.against_controls({"a|b": row, "c": row}, {"a|b": "c"})
    assert text.splitlines() == ["|  | against | FID |", "|---|---|---|", r"| a\|b | c | +0.00 (0.0 s.e.) |"]


def test_a_number_is_nearest_to_its_own_point():
    drawn = np.random.default_rng(2).uniform(size=(12, 2)).tolist()
    points = {
        str(k): point for k, point in enumerate([*drawn, (0, 0), (3, 3)])
    }  # the last two press the others together
    figure, axes = plt.subplots()
    axes.scatter(*zip(*points.values(), strict=True))
    scatter.number_points(axes, points, {name: k for k, name in enumerate(points)}, dict.fromkeys(points, "tab:red"))
    marks = axes.transData.transform(list(points.values()))
    for k, text in enumerate(axes.texts):
        at = marks[k] + np.array(text.xyann) * figure.dpi / 72
        assert np.linalg.norm(marks - at, axis=1).argmin() == k
    plt.close(figure)
