"""What is said and drawn of a frontier's rows: evaluation/study/comparison.py."""

import pytest

from evaluation.figures.tables import HELD_OUT, means_of, named_space
from evaluation.study import comparison
from evaluation.study.rows import Row


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
    found = means_of(rows | {"held-out real": {"figures": {"FDr": 1.0}, "images": 4}})
    assert found["a"]["figures"]["FID"] == 2 and found["a"]["standard_deviations"]["FID"] == 1
    assert found["held-out real"]["seeds"] == 1 and found["held-out real"]["standard_deviations"] == {}


def test_the_picture_shows_every_row_by_a_mark_of_its_own(tmp_path):
    """Also of names with dollar signs, which are no formulas."""
    names = ["$\\frac{", "b $ c $", *(f"row {k}" for k in range(9))]
    rows = [Row("teacher", [], "teacher"), *(Row(name, []) for name in names)]
    rows += [Row("row 1 + control", [], "dmdr", "row 1"), Row("row 1 + reward", [], "dmdr", "row 1", "row 1 + control")]
    means = {each.name: row(1, 0.02 * k, 0.5 + 0.01 * k) for k, each in enumerate(rows)} | {HELD_OUT: row(0, 1, 1)}
    spaces = [{"features": "timm:$\\frac{$", "rows": means}, {"features": "b", "rows": means}]
    comparison.picture(spaces, rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
    marks = comparison.marks_of(rows)
    assert len({tuple(mark.values()) for mark in marks.values()}) == len(rows)
    assert [marks[f"row 1 + {name}"]["color"] for name in ("control", "reward")] == ["tab:gray", "tab:red"]


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
