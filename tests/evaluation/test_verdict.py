"""evaluation/report/verdict.py: each rule beyond its threshold only; runs judged by their own generators' figures."""

import numpy as np
import pytest

from evaluation.report.run_log import FigureTable, RunLog, Series
from evaluation.report.verdict import collapsed_recall, verdict, warnings_of


def pieces(*pairs):
    """(value, length), one after another."""
    return np.concatenate([np.full(length, float(value)) for value, length in pairs])


def level(value):
    return pieces((value, 100))


def series(**columns):
    return Series(np.arange(1, len(next(iter(columns.values()))) + 1.0), columns)


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

# Rules ------------------------------------------------------------------------------------------------------------


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


def gradients(*reward, matching=1.0):
    return {"grad_norm_reward_classifier_x0": pieces(*reward), "grad_norm_dmd_x0": level(matching)}


def cosine(*pairs):
    return {"grad_cosine_reward_classifier_x0": pieces(*pairs)}


BEHIND, HACKED, COLLAPSED = "estimator falls behind", "being hacked", "class has collapsed"


@pytest.mark.parametrize(
    "changed,words",
    [
        ({}, None),
        # The estimator: 1.6 times the loss and twice the gap of the first 2 %, in the median of any tenth
        (losses((0.8, 100)), None),
        (losses((3.0, 90), (4.75, 10)), None),
        (losses((3.0, 90), (4.85, 10)), BEHIND),
        (losses((1.0, 64), (3.0, 6), (1.0, 30)), BEHIND),
        (losses((1.0, 68), (3.0, 6), (1.0, 26)), None),
        (losses((1.0, 1), (5.0, 1), (2.0, 88), (4.0, 10)), None),
        (losses((np.nan, 2), (3.0, 8), (10.0, 80), (8.0, 10)), BEHIND),
        (gaps((0.3, 90), (0.59, 10)), None),
        (gaps((0.3, 90), (0.61, 10)), BEHIND),
        (gaps((0.1, 1), (0.5, 1), (0.2, 88), (0.5, 10)), None),
        # The generator: 0.3 % in the median over the run
        ({"update_ratio_generator": level(3e-3)}, None),
        ({"update_ratio_generator": level(3.1e-3)}, "updates are 0.31%"),
        ({"update_ratio_generator": pieces((0.1, 1), (7e-4, 99))}, None),
        # A reward's gradient: five times that of matching, on average; a cosine of -0.3 after the first tenth
        (gradients((5.0, 100)), None),
        (gradients((51.0, 10), (0.0, 90)), "5 times"),
        (gradients((1.0, 100), matching=0.0), "lower its weight"),
        (cosine((-0.3, 100)), None),
        (cosine((-1.0, 10), (-0.31, 46), (0.0, 44)), "against each other"),
        (cosine((-1.0, 10), (-0.31, 44), (0.0, 46)), None),
        # The reward's previews: 0.15 of accuracy apart in the last half, or losses that part
        (accuracies(0.15, 0.0), None),
        (accuracies(0.96, 0.8), HACKED),
        (hacked(own=((0.1, 100),)), None),
        (hacked(own=((0.01, 1), (0.1, 34), (0.05, 65))), HACKED),
        (hacked(own=((0.1, 74), (0.2, 1), (0.05, 14), (0.2, 11))), HACKED),
        (hacked(holdout=((0.5, 50), (1.5, 50))), None),
        (hacked(holdout=((0.5, 50), (1.6, 50))), HACKED),
        (hacked(holdout=((0.001, 50), (0.09, 50))), None),
        (hacked(holdout=((0.001, 50), (0.1, 50))), HACKED),
        # A class: under 85 % of them seen in the last quarter
        ({"preview_coverage_holdout": level(0.85)}, None),
        ({"preview_coverage_holdout": level(0.84)}, COLLAPSED),
        ({"preview_coverage_holdout": pieces((0.1, 75), (1.0, 25))}, None),
        ({f"preview_coverage_{name}": level(0.6) for name in ("holdout", "reward_a")}, "40% of the previews'"),  # once
    ],
)
def test_a_rule_speaks_beyond_its_threshold_and_within_its_part_of_the_run(changed, words):
    warnings = warnings_of(series(**HEALTHY | changed))
    assert len(warnings) == (words is not None) and (words or "") in "".join(warnings)
    assert "inf" not in "".join(warnings)


@pytest.mark.filterwarnings("error")
def test_rules_are_silent_about_what_was_not_logged():
    half = series(score_gap=level(np.nan), loss_fake_t00=level(1.0)), series(score_gap=level(0.1))
    for empty in (Series(), series(score_gap=np.ones(1)), series(score_gap=level(np.nan)), *half):
        assert warnings_of(empty) == []


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
    assert series(a=np.array([1.0, 5.0, 9.0])).part("a", 0, 0.02) == 1.0  # of a short run its first value


def test_a_row_whose_recall_collapsed_is_told_against_what_it_started_from():
    def figures(precision, recall):
        return {"Precision": precision, "Recall": recall}

    good, bad = figures(0.6, 0.8) | {"FID": 1.0}, figures(0.9, 0.1) | {"FID": 2.0}
    for base, name in [("cold start, 1 step", "DMDR"), ("control", "DMDR, weight 1"), ("few steps", "few steps + RL")]:
        (text,) = collapsed_recall({"control, unmeasured": {"FID": 1.0}, name: bad, base: good})
        assert text.startswith(f"{name}: recall 0.10 is less than half of 0.80 ({base})")
    for base, name in [("teacher", "DMDR"), ("control", "others"), ("others", "teacher"), ("teacher", "others")]:
        assert collapsed_recall({name: bad, base: good}) == []
    for fine in (figures(0.78, 0.64), figures(0.6, 0.1), figures(0.5, 0.1), figures(0.9, 0.4)):
        assert collapsed_recall({"control": good, "DMDR": fine}) == []


# The verdict ------------------------------------------------------------------------------------------------------

TEACHER, COLD, CONTROL, DMDR = "teacher's", "cold start's", "control's", "DMDR's"
FIGURES = {
    TEACHER: {"FID": 0.55, "Recall": 0.86, "Precision": 0.64},
    COLD: {"FID": 0.81, "Recall": 0.757, "Precision": 0.65},
    CONTROL: {"FID": 0.79, "Recall": 0.77, "Precision": 0.64},
    DMDR: {"FID": 0.69, "Recall": 0.64, "Precision": 0.78},
}


def run(folder, name, digest, changed=None, updates=100, **arguments):
    """A run's log: healthy but for ``changed``; ``digest`` "": it has no generator/."""
    columns = {column: values[:updates] for column, values in (HEALTHY | (changed or {})).items()}
    record = {"sha256": {"teacher": TEACHER}, "arguments": {"num_steps": 1, "max_train_steps": 100} | arguments}
    return RunLog(name, folder / name, record, series(**columns), generator_sha256=digest)


def table(**changed):
    """Rows of those figures, each of the generator of its name; the teacher's by a solver."""
    samplers = {name: "euler" if name == TEACHER else "None" for name in FIGURES}
    made_by = {
        name: {"generator_sha256": name, "arguments": {"guidance_scale": "1.0", "sampler": sampler}}
        for name, sampler in samplers.items()
    }
    return FigureTable("results.json", FIGURES | changed, made_by, 1800, space="a classifier")


@pytest.fixture
def runs(tmp_path):
    stage_2 = {"resume_ckpt": "a/cold/checkpoints/torch_units/step-100.pt", "max_train_steps": 200}
    return [
        run(tmp_path, "cold", COLD),
        run(tmp_path, "control", CONTROL, encoder_type="none", **stage_2),
        run(tmp_path, "dmdr", DMDR, encoder_type="classifier", **stage_2),
    ]


def said(runs, *tables):
    outcome = verdict(runs, list(tables))
    return outcome, " ".join(sentence for each in outcome.runs for sentence in each.sentences)


def test_healthy_runs_are_judged_by_their_figures(runs):
    outcome, text = said(runs, table())
    assert outcome.title == "It worked" and [each.state for each in outcome.runs] == ["good"] * 3
    assert "One step keeps 88% of the teacher's recall (0.757 of 0.860)" in text
    assert "FID is 0.81 against 0.55 (1,800 images, a classifier)" in text
    assert "The reward buys 0.14 of precision for 0.13 of recall, against the control" in text


def test_without_a_control_the_run_that_it_started_from_is_the_base(runs):
    assert "The reward buys 0.13 of precision for 0.12 of recall, against the run that" in said(runs[::2], table())[1]
    outcome, text = said(runs[2:], table())
    assert "the reward's effect is not known" in text and "One step keeps 74% of the teacher's recall" in text
    assert outcome.state == "partly"
    alone = table()
    del alone.made_by[TEACHER]
    outcome, text = said(runs[2:], alone)
    assert outcome.state == "unmeasured" and "the reward's effect is not known" in text and "Recall 0.64" in text
    outcome, text = said(runs[:1], alone)
    assert outcome.state == "unmeasured" and "Recall 0.757" in text and "The teacher was not measured" in text


@pytest.mark.parametrize("changed", [{"tilt": ["python 1 f.py:f"]}, {"seed": 31}, {"real_guidance_scale": 1.5}])
def test_a_control_has_the_same_settings_and_no_tilt(runs, changed):
    other = [runs[0], run(runs[0].folder, "control", CONTROL, **runs[1].arguments | changed), runs[2]]
    assert "against the run that it started from" in said(other, table())[1]


def test_a_finished_run_that_goes_on_is_not_finished(runs):
    runs[0].exported = 100
    assert said(runs[:1], table())[0].state == "good"
    runs[0].arguments["max_train_steps"] = 200
    assert "Not finished" in said(runs[:1], table())[1]


@pytest.mark.parametrize(
    "figures,state,words",
    [
        ({"Precision": 0.66, "Recall": 0.75}, "good", "neither precision nor recall"),
        ({"Precision": 0.70, "Recall": 0.76}, "good", "raises precision by 0.06; recall moved by -0.01"),
        ({"Precision": 0.65, "Recall": 0.60}, "partly", "cost 0.17 of recall"),
        ({"Precision": 0.63, "Recall": 0.85}, "good", "moved precision by -0.01 and recall by +0.08"),
        ({"Precision": 0.90, "Recall": 0.30}, "bad", "diversity has collapsed"),
        ({"Precision": 0.54, "Recall": 0.80}, "partly", "cost 0.10 of precision, and recall moved by +0.03"),
        ({"Precision": 0.30, "Recall": 0.80}, "bad", "quality has collapsed"),
    ],
)
def test_what_the_reward_did(runs, figures, state, words):
    outcome, text = said(runs, table(**{DMDR: {"FID": 0.7} | figures}))
    assert outcome.runs[2].state == outcome.state == state and words in text


@pytest.mark.parametrize(
    "recall,precision,guidance,state",
    [(0.70, 0.64, 1, "good"), (0.60, 0.64, 1, "partly"), (0.40, 0.64, 1, "bad"), (0.86, 0.30, 1, "bad"),
     (0.40, 0.80, 4, "partly")],
)  # fmt: skip
def test_how_much_of_the_teacher_is_kept(tmp_path, recall, precision, guidance, state):
    cold = run(tmp_path, "cold", COLD, real_guidance_scale=guidance)
    outcome, text = said([cold], table(**{COLD: {"FID": 1.0, "Recall": recall, "Precision": precision}}))
    assert outcome.state == state
    assert ("quality is lost" in text) == (precision < 0.4) and ("guidance asks for" in text) == (guidance > 1)


def test_a_failed_run_is_bad_whatever_is_beside_it(runs, tmp_path):
    failed = run(tmp_path, "failed", "another generator's", {"update_ratio_generator": level(5.2e-3)})
    outcome, text = said([failed], table())
    assert outcome.title == "Something went wrong" and "keeps" not in text
    assert "The generator's updates are 0.52%" in text
    assert said([*runs, failed], table())[0].state == "bad"


def test_a_short_run_is_not_judged(runs, tmp_path):
    two = run(tmp_path, "two", COLD, {"update_ratio_generator": level(5e-3)}, updates=2)
    outcome, text = said([two], table())
    assert outcome.title == "Too short to judge" and "keeps" not in text and "updates are" not in text
    assert said([*runs, two], table())[0].state == "short"
    assert said([run(tmp_path, "a", "", updates=49)])[0].state == "short"
    assert said([run(tmp_path, "a", "", updates=50)])[0].state == "unfinished"


def test_a_killed_run_is_not_finished_and_a_stopped_one_says_why(tmp_path):
    killed = run(tmp_path, "killed", "", updates=70)
    outcome, text = said([killed], table())
    assert outcome.title == "Not finished" and "70 updates, of 100" in text and "No rule found" in text
    killed.lines = [(None, "step 12: loss_dmd is nan. Stopped; nothing is kept. Lower the learning rates?")]
    outcome, text = said([killed], table())
    assert outcome.state == "bad" and "loss_dmd is nan" in text


def test_figures_of_other_weights_are_nobodys(runs):
    other = table()
    other.made_by = {name: each | {"generator_sha256": "other"} for name, each in other.made_by.items()}
    outcome, text = said(runs, other)
    assert outcome.title == "No warning, but no figure to judge by" and "keeps" not in text and "buys" not in text
    guided = table()
    guided.made_by[TEACHER]["arguments"]["guidance_scale"] = "1.5"
    assert "The teacher was not measured" in said(runs, guided)[1]
    assert said([*runs[:1], run(runs[0].folder, "x", "x")], table())[0].title == "It worked"
