"""The verdict: right for healthy, failed, short and killed runs, and from figures of their own generators alone."""

import numpy as np
import pytest

from evaluation.report.run_log import FigureTable, RunLog
from evaluation.report.verdict import verdict
from tests.evaluation.test_rules import HEALTHY, level, series

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
    rows = FIGURES | changed
    made_by = {
        name: {
            "generator_sha256": name,
            "arguments": {"guidance_scale": "1.0", "sampler": "euler" if name == TEACHER else "None"},
        }
        for name in rows
    }
    return FigureTable("results.json", rows, made_by, 1800, space="a classifier")


@pytest.fixture
def runs(tmp_path):
    stage_2 = {"resume_ckpt": "a/cold/checkpoints/torch_units/step-100.pt", "max_train_steps": 200}
    return [
        run(tmp_path, "cold", COLD),
        run(tmp_path, "control", CONTROL, encoder_type="none", **stage_2),
        run(tmp_path, "dmdr", DMDR, encoder_type="classifier", **stage_2),
    ]


def said(runs, *tables):
    found = verdict(runs, list(tables))
    return found, " ".join(sentence for each in found.runs for sentence in each.sentences)


def test_healthy_runs_are_told_from_their_figures(runs):
    found, text = said(runs, table())
    assert found.title == "It worked" and [each.state for each in found.runs] == ["good"] * 3
    assert "One step keeps 88% of the teacher's recall (0.757 of 0.860)" in text
    assert "FID is 0.81 against 0.55 (1,800 images, a classifier)" in text
    assert "The reward buys 0.14 of precision for 0.13 of recall, against the control" in text


def test_without_a_control_the_run_that_it_started_from_is_the_base(runs):
    assert "The reward buys 0.13 of precision for 0.12 of recall, against the run that" in said(runs[::2], table())[1]
    found, text = said(runs[2:], table())
    assert "the reward's effect is not known" in text and "One step keeps 74% of the teacher's recall" in text
    assert found.state == "partly"
    alone = table()
    del alone.made_by[TEACHER]
    found, text = said(runs[2:], alone)
    assert found.state == "unmeasured" and "the reward's effect is not known" in text and "Recall 0.64" in text
    assert said(runs[:1], alone)[0].state == "unmeasured"


def test_a_control_has_the_same_settings_and_no_tilt(runs):
    for changed in ({"tilt": ["python 1 f.py:f"]}, {"seed": 31}, {"real_guidance_scale": 1.5}):
        other = [runs[0], run(runs[0].folder, "control", CONTROL, **runs[1].arguments | changed), runs[2]]
        assert "against the run that it started from" in said(other, table())[1], changed


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
    found, text = said(runs, table(**{DMDR: {"FID": 0.7} | figures}))
    assert found.runs[2].state == found.state == state and words in text


@pytest.mark.parametrize(
    "recall,precision,guidance,state",
    [
        (0.70, 0.64, 1.0, "good"),
        (0.60, 0.64, 1.0, "partly"),
        (0.40, 0.64, 1.0, "bad"),
        (0.86, 0.30, 1.0, "bad"),
        (0.40, 0.80, 4.0, "partly"),
    ],
)
def test_how_much_of_the_teacher_is_kept(tmp_path, recall, precision, guidance, state):
    cold = run(tmp_path, "cold", COLD, real_guidance_scale=guidance)
    found, text = said([cold], table(**{COLD: {"FID": 1.0, "Recall": recall, "Precision": precision}}))
    assert found.state == state
    assert ("quality is lost" in text) == (precision < 0.4) and ("guidance asks for" in text) == (guidance > 1)


@pytest.mark.parametrize(
    "changed,words",
    [
        ({"update_ratio_generator": level(5.2e-3)}, "The generator's updates are 0.52%"),
        ({"loss_fake_t00": np.linspace(0.8, 3.2, 100), "score_gap": np.linspace(0.01, 0.4, 100)}, "falls behind"),
        ({"grad_norm_reward_classifier_x0": level(0.43)}, "72 times"),
    ],
)
def test_a_failed_run_is_bad_whatever_lies_beside_it(runs, tmp_path, changed, words):
    failed = run(tmp_path, "failed", "another generator's", changed)
    found, text = said([failed], table())
    assert found.title == "Something went wrong" and words in text and "keeps" not in text
    assert said([*runs, failed], table())[0].state == "bad"


def test_a_run_of_two_updates_is_too_short_to_judge(runs, tmp_path):
    two = run(tmp_path, "two", COLD, {"update_ratio_generator": level(5e-3)}, updates=2)
    found, text = said([two], table())
    assert found.title == "Too short to judge" and "keeps" not in text and "updates are" not in text
    assert said([*runs, two], table())[0].state == "short"
    assert said([run(tmp_path, "a", "", updates=49)])[0].state == "short"
    assert said([run(tmp_path, "a", "", updates=50)])[0].state == "unfinished"


def test_a_killed_run_is_not_finished_and_a_stopped_one_says_why(tmp_path):
    killed = run(tmp_path, "killed", "", updates=70)
    found, text = said([killed], table())
    assert found.title == "Not finished" and "70 updates, of 100" in text and "No rule found" in text
    killed.lines = [(None, "step 12: loss_dmd is nan. Stopped; nothing is kept. Lower the learning rates?")]
    found, text = said([killed], table())
    assert found.state == "bad" and "loss_dmd is nan" in text


def test_figures_of_other_weights_are_nobodys(runs):
    other = table()
    other.made_by = {name: each | {"generator_sha256": "other"} for name, each in other.made_by.items()}
    found, text = said(runs, other)
    assert found.title == "No warning, but no figure to judge by" and "keeps" not in text and "buys" not in text
    guided = table()
    guided.made_by[TEACHER]["arguments"]["guidance_scale"] = "1.5"
    assert "The teacher was not measured" in said(runs, guided)[1]
    assert said([*runs[:1], run(runs[0].folder, "x", "x")], table())[0].title == "It worked"
