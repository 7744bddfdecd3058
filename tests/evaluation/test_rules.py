"""The rules behind the report's warnings: each finds its failure alone, beyond its threshold, in its part of a run."""

import numpy as np
import pytest

from evaluation.report.run_log import Series
from evaluation.report.verdict import collapsed_recall, warnings_of


def series(**columns):
    length = len(next(iter(columns.values())))
    return Series(np.arange(1, length + 1.0), {name: np.asarray(value, float) for name, value in columns.items()})


def level(value, length=100):
    return np.full(length, float(value))


HEALTHY = {
    "score_gap": np.linspace(0.08, 0.16, 100),
    "loss_fake_t00": level(0.8),
    "update_ratio_generator": level(7e-4),
    "grad_norm_reward_classifier_x0": level(0.005),
    "grad_norm_dmd_x0": level(0.006),
    "grad_cosine_reward_classifier_x0": level(-0.02),
    "preview_accuracy_reward_classifier": level(1.0),
    "preview_accuracy_holdout": level(0.98),
    "preview_loss_reward_classifier": np.linspace(0.01, 0.001, 100),
    "preview_loss_holdout": np.linspace(0.02, 0.01, 100),
    "preview_coverage_holdout": level(1.0),
}
RISING = np.concatenate([level(1.0, 10), level(3.0, 90)])


@pytest.mark.parametrize(
    "changed,told",
    [
        ({}, None),
        ({"score_gap": RISING, "loss_fake_t00": RISING}, "estimator falls behind"),
        ({"score_gap": RISING}, None),
        ({"loss_fake_t00": RISING, "score_gap": level(0.1)}, None),
        ({"update_ratio_generator": level(5e-3)}, "updates are 0.50%"),
        ({"grad_norm_reward_classifier_x0": level(0.4)}, "67 times"),
        ({"grad_cosine_reward_classifier_x0": level(-0.6)}, "against each other"),
        ({"preview_accuracy_holdout": level(0.6)}, "being hacked"),
        ({"preview_loss_holdout": np.linspace(0.02, 0.6, 100)}, "being hacked"),
        ({"preview_coverage_holdout": np.linspace(1, 0.6, 100)}, "class has collapsed"),
    ],
)
def test_each_rule_finds_its_failure_alone(changed, told):
    found = warnings_of(series(**HEALTHY | changed))
    assert len(found) == (told is not None)
    assert told is None or told in found[0]


@pytest.mark.filterwarnings("error")
def test_rules_are_silent_about_what_was_not_logged():
    half = series(score_gap=level(np.nan), loss_fake_t00=level(1.0)), series(score_gap=level(0.1))
    for empty in (Series(), series(score_gap=level(0.1, 1)), series(score_gap=level(np.nan)), *half):
        assert warnings_of(empty) == []
    assert len(Series().steps) == 0


def pieces(*pairs):
    """(value, length), one after another."""
    return np.concatenate([level(value, length) for value, length in pairs])


def losses(*pairs):
    return {"loss_fake_t00": pieces(*pairs), "score_gap": pieces((0.1, 90), (1.0, 10))}


def gaps(*pairs):
    return {"loss_fake_t00": pieces((1.0, 90), (3.0, 10)), "score_gap": pieces(*pairs)}


def hacked(own=((0.1, 50), (0.05, 50)), holdout=((0.1, 50), (0.5, 50))):
    return {"preview_loss_reward_classifier": pieces(*own), "preview_loss_holdout": pieces(*holdout)}


def accuracies(rewarding, holdout):
    return {
        "preview_accuracy_reward_classifier": pieces((0.0, 49), (rewarding, 51)),
        "preview_accuracy_holdout": pieces((1.0, 49), (holdout, 51)),
    }


@pytest.mark.parametrize(
    "changed,told",
    [
        # The estimator: 1.6 times the loss and twice the gap of the first 2 %, in the median of any tenth
        (losses((3.0, 90), (4.75, 10)), False),
        (losses((3.0, 90), (4.85, 10)), True),
        (losses((1.0, 90), (1.6, 10)), False),
        (gaps((0.3, 90), (0.59, 10)), False),
        (gaps((0.3, 90), (0.61, 10)), True),
        (gaps((0.5, 90), (1.0, 10)), False),
        (losses((1.0, 94), (3.0, 6)), True),
        (losses((1.0, 64), (3.0, 6), (1.0, 30)), True),
        (losses((1.0, 68), (3.0, 6), (1.0, 26)), False),
        (gaps((0.1, 94), (0.3, 6)), True),
        (gaps((0.1, 64), (0.3, 6), (0.1, 30)), True),
        (gaps((0.1, 68), (0.3, 6), (0.1, 26)), False),
        (losses((1.0, 1), (5.0, 1), (2.0, 88), (4.0, 10)), False),
        (gaps((0.1, 1), (0.5, 1), (0.2, 88), (0.5, 10)), False),
        (losses((np.nan, 2), (3.0, 8), (10.0, 80), (8.0, 10)), True),
        # The generator: 0.3 % in the median over the run
        ({"update_ratio_generator": level(3e-3)}, False),
        ({"update_ratio_generator": level(3.1e-3)}, True),
        ({"update_ratio_generator": pieces((0.1, 1), (7e-4, 99))}, False),
        # A reward's gradient: five times that of matching, on average; a cosine of -0.3 after the first tenth
        ({"grad_norm_reward_classifier_x0": level(5.0), "grad_norm_dmd_x0": level(1.0)}, False),
        ({"grad_norm_reward_classifier_x0": level(5.1), "grad_norm_dmd_x0": level(1.0)}, True),
        ({"grad_norm_reward_classifier_x0": pieces((51.0, 10), (0.0, 90)), "grad_norm_dmd_x0": level(1.0)}, True),
        ({"grad_cosine_reward_classifier_x0": level(-0.3)}, False),
        ({"grad_cosine_reward_classifier_x0": level(-0.31)}, True),
        ({"grad_cosine_reward_classifier_x0": pieces((-1.0, 10), (-0.31, 46), (0.0, 44))}, True),
        ({"grad_cosine_reward_classifier_x0": pieces((-1.0, 10), (-0.31, 44), (0.0, 46))}, False),
        # The reward's previews: 0.15 of accuracy apart in the last half, or losses that part
        (accuracies(0.15, 0.0), False),
        (accuracies(0.96, 0.8), True),
        (accuracies(0.8, 0.96), False),
        (hacked(), True),
        (hacked(own=((0.1, 100),)), False),
        (hacked(own=((0.05, 50), (0.1, 50))), False),
        (hacked(own=((0.01, 1), (0.1, 34), (0.05, 65))), True),
        (hacked(own=((0.1, 75), (0.05, 25))), True),
        (hacked(own=((0.1, 74), (0.2, 1), (0.05, 14), (0.2, 11))), True),
        (hacked(holdout=((0.5, 50), (1.5, 50))), False),
        (hacked(holdout=((0.5, 50), (1.6, 50))), True),
        (hacked(holdout=((0.001, 50), (0.09, 50))), False),
        (hacked(holdout=((0.001, 50), (0.1, 50))), True),
        (hacked(holdout=((0.9, 1), (0.1, 34), (0.5, 65))), True),
        (hacked(holdout=((0.1, 36), (0.9, 39), (0.1, 25))), False),
        # A class: under 85 % of them seen in the last quarter
        ({"preview_coverage_holdout": level(0.85)}, False),
        ({"preview_coverage_holdout": level(0.84)}, True),
        ({"preview_coverage_holdout": pieces((0.1, 75), (1.0, 25))}, False),
    ],
)
def test_a_rule_speaks_beyond_its_threshold_and_within_its_part_of_the_run(changed, told):
    found = warnings_of(series(**HEALTHY | changed))
    assert len(found) == told


def test_a_warning_says_the_figures_that_it_saw():
    def said(**changed):
        return warnings_of(series(**HEALTHY | changed))

    (told,) = said(preview_coverage_holdout=level(0.6), preview_coverage_reward_classifier=level(0.5))  # once
    assert told.startswith("40% of the previews' classes") and "holdout" in told
    (told,) = said(grad_norm_dmd_x0=level(0.0))
    assert "inf" not in told


def test_a_series_averages_estimator_turns_and_leaves_out_what_is_no_number():
    turns = [{"step": 1, "loss_fake": 1.0}, {"step": 1, "loss_fake": 4.0}, {"step": 1, "loss_fake": None}]
    turns += [{"step": 2, "loss_fake": 7.0, "grad_norm_estimator": 5.0}]
    odd = [1e99, -1e99, 3, 1e100, -1e100, -1e101, 10**400, True, "a", None]
    log = Series.of([{"step": 1, "x": 0.5}, {"step": 2}] + [{"step": 3, "x": value} for value in odd], turns)
    assert log.steps.tolist() == [1, 2] + [3] * len(odd)
    assert log.columns["loss_fake"][:2].tolist() == [2.5, 7.0] and np.isnan(log.columns["loss_fake"][2:]).all()
    assert log.columns["grad_norm_estimator"][1] == 5.0
    assert log.columns["x"][[0, 2, 3, 4]].tolist() == [0.5, 1e99, -1e99, 3.0]
    assert np.isnan(log.columns["x"][5:]).all()


def test_a_part_of_a_short_run_is_its_first_value():
    assert series(a=np.array([1.0, 5.0, 9.0])).part("a", 0, 0.02) == 1.0


def figures(precision, recall):
    return {"Precision": precision, "Recall": recall}


def test_precision_up_and_recall_down_is_a_collapse():
    rows = {"control: 100 more": figures(0.64, 0.77), "DMDR: 100 more": figures(0.9, 0.3)}
    assert "diversity has collapsed" in collapsed_recall(rows)[0]
    for same in (figures(0.78, 0.64), figures(0.64, 0.3), figures(0.5, 0.3), figures(0.9, 0.77 / 2)):
        assert collapsed_recall(rows | {"DMDR: 100 more": same}) == []


def test_a_row_is_compared_with_what_it_started_from_alone():
    good, bad = figures(0.6, 0.8) | {"FID": 1.0}, figures(0.9, 0.1) | {"FID": 2.0}
    for base, name in [("cold start, 1 step", "DMDR"), ("control", "DMDR, weight 1"), ("few steps", "few steps + RL")]:
        (told,) = collapsed_recall({name: bad, base: good})
        assert told.startswith(f"{name}: recall 0.10 is less than half of 0.80 ({base})")
        assert len(collapsed_recall({"control, unmeasured": {"FID": 1.0}, base: good, name: bad})) == 1
    for base, name in [("teacher", "DMDR"), ("control", "others"), ("others", "teacher"), ("teacher", "others")]:
        assert collapsed_recall({name: bad, base: good}) == []


def test_warnings_are_those_of_all_rules():
    told = warnings_of(
        series(**HEALTHY | {"update_ratio_generator": level(5e-3), "preview_coverage_holdout": level(0.6)})
    )
    assert ["updates are" in text for text in told] == [True, False] and "collapsed" in told[1]
