"""train_cc/distillation/loop.py: updates, log columns, stops, overflows in fp16. Also the program of two processes."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests import ROOT
from tests.conftest import build_run, flags, logged, refused, run_cold_start, spread_lora_b, trained
from tests.worlds import GOOD, LARGE, half_run, moved, rewarded, scales
from train_cc import cold_start
from train_cc.distillation import loop
from train_cc.distillation.state import restore
from train_cc.io.errors import exits_on_input_error
from train_cc.rewards import terms
from train_cc.run.checkpoint import complete_steps, open_checkpoint
from train_cc.run.diagnostics import gathered
from train_cc.run.session import Learner

QUICK = ("--num-previews", 0, "--ratio-update", 1)


@pytest.fixture(autouse=True)
def accelerate_forgets():
    yield
    AcceleratorState._reset_state(True)


def test_an_update_clips_steps_and_clears():
    """A gradient of norm 5, clipped to 0.5, by plain descent at rate 1: the weights move by 0.5 of their norm of 10."""
    model = torch.nn.Linear(2, 1, bias=False)
    model.blocks = [model]
    model.weight.data.copy_(torch.tensor([[6.0, 8.0]]))
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    accelerator = Accelerator(cpu=True)
    learner = Learner(accelerator, model, accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), 1.0)))
    run = SimpleNamespace(learners_of=lambda _: {"a": learner}, optimisation=SimpleNamespace(max_grad_norm=0.5))
    figures = {name: value.item() for name, value in loop.update(run, accelerator).items()}
    assert figures == pytest.approx({"grad_norm_a": 5, "update_ratio_a": 0.05}, rel=1e-4)
    assert model.weight.grad is None


BANDS = [f"{name}_t{low}" for name in ("score_gap", "loss_fake") for low in ("00", "25", "50", "75")]
COLUMNS = {"step", "loss_dmd", "score_gap", "normaliser", "t_mean", "grad_norm_generator", "update_ratio_generator"}
COLUMNS |= {"lora_scale_real", "samples_seen", *BANDS}


def test_log_columns(teacher, tmp_path):
    """A batch of 64, so that no band is empty: the overall figures lie between the bands' extremes."""
    more = ("--batch-size", 64, "--renoise-alpha", 1, "--renoise-beta", 1)
    run = run_cold_start(teacher, tmp_path / "run", *more)
    rows, turns = logged(run), logged(run, "gui")
    assert [row["step"] for row in rows] == [1, 2, 3] and [row["samples_seen"] for row in rows] == [64, 128, 192]
    assert rows[0]["lora_scale_real"] == 0.75 and rows[2]["lora_scale_real"] == pytest.approx(0.375)
    assert set(rows[0]) == COLUMNS
    assert [row["iteration"] for row in turns] == [1, 2, 3, 4, 5, 6]
    assert set(turns[0]) == {"step", "iteration", "loss_fake", "grad_norm_estimator", "update_ratio_estimator"}
    for row in rows:
        losses = [turn["loss_fake"] for turn in turns if turn["step"] == row["step"]]
        for mean, bands in ((row["score_gap"], BANDS[:4]), (np.mean(losses), BANDS[4:])):
            assert min(row[name] for name in bands) < mean < max(row[name] for name in bands)
        assert row["update_ratio_generator"] > 0
    assert all(turn["update_ratio_estimator"] > 0 for turn in turns)


def test_tensorboard_gets_the_rows_and_the_pictures(teacher, tmp_path):
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    run = run_cold_start(teacher, tmp_path / "run", "--report-to", "tensorboard")
    events = accumulator.EventAccumulator(str(run / "dmdr"))
    events.Reload()
    assert [event.step for event in events.Scalars("score_gap")] == [1, 2, 3]
    assert events.Scalars("score_gap")[2].value == pytest.approx(logged(run)[2]["score_gap"])
    assert [event.step for event in events.Images("previews")] == [2, 3]


@pytest.mark.parametrize("at,done", [(1, [2]), (2, [3])])
def test_a_run_that_is_asked_to_stop_saves_and_exports_nothing_unless_it_has_ended(
    teacher, tmp_path, monkeypatch, at, done
):
    cycle = loop.cycle
    monkeypatch.setattr(loop, "cycle", lambda run, step, stopping: (*cycle(run, step, stopping)[:2], step == at))
    run = run_cold_start(teacher, tmp_path / "run", "--checkpoint-steps", 100, "--num-previews", 0)
    assert complete_steps(run / "checkpoints") == done
    assert (run / "generator").exists() == (at == 2)
    assert ("stopped at step 2 as asked" in (run / "log.txt").read_text()) == (at == 1)


# What is not finite


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(teacher, tmp_path, capsys, monkeypatch):
    turn = loop.generator_turn

    def poisoned(run, step):
        figures = turn(run, step)
        return figures | {"loss_dmd": figures["loss_dmd"] * (float("nan") if step == 1 else 1)}

    monkeypatch.setattr(loop, "generator_turn", poisoned)
    message = refused(cold_start.main, flags(teacher, tmp_path / "run"), capsys=capsys)
    assert "step 2" in message and "loss_dmd is nan" in message
    assert complete_steps(tmp_path / "run/checkpoints") == [1]


def test_a_diverging_run_stops_by_itself(teacher, tmp_path, capsys):
    more = ["--learning-rate-generator", 1000, "--learning-rate-estimator", 1000, "--max-train-steps", 50]
    assert "step" in refused(cold_start.main, flags(teacher, tmp_path / "run", *more), capsys=capsys)


USERS_REWARD = """
calls = []
def f(images, y):
    calls.append(0)
    return images.flatten(1).mean(1) * (float("nan") if len(calls) == 3 else 1)
"""


@pytest.mark.parametrize("half", [True, False])
def test_nan_that_is_no_overflow_stops_at_once_and_good_weights_are_saved(teacher, tmp_path, capsys, half):
    """A user's function is called once before the run begins."""
    (tmp_path / "mine.py").write_text(USERS_REWARD)
    reward = ["--reward", "python", 1, f"{tmp_path / 'mine.py'}:f"]
    more = [tmp_path / "run", *reward, *QUICK, "--checkpoint-steps", 100]
    call, argument = (loop.train, half_run(teacher, *more)) if half else (cold_start.main, flags(teacher, *more))
    message = refused(exits_on_input_error(call), argument, capsys=capsys)
    assert "step 2: " in message and "loss_reward_f is nan" in message and "step 2 is kept" in message
    again = half_run(teacher, tmp_path / "again", *reward)
    restore(again, open_checkpoint(tmp_path / "run/checkpoints/torch_units/step-2.pt"))
    assert all(value.isfinite().all() for value in trained(again.plain_generator).values())


# Half precision


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_computes_what_single_does(teacher, tmp_path, precision):
    """One cycle from the same draws, with B spread: at B = 0 the scores' gap is all rounding."""
    rows = {}
    for name in ("no", precision):
        AcceleratorState._reset_state(True)  # a process has one precision
        if name == "fp16":
            run = half_run(teacher, tmp_path / name)
        else:
            run = build_run(teacher, tmp_path / name, *QUICK, "--mixed-precision", name)
            spread_lora_b(run.plain_estimator)
        (turn,), row, _ = loop.cycle(run, 0)
        assert row["loss_dmd"] > 0 and row["grad_norm_generator"] > 0
        names = ("score_gap", "normaliser", "grad_norm_generator")
        rows[name] = [turn["loss_fake"], row["loss_dmd"] ** 0.5, *(row[name] for name in names)]
    assert rows[precision] != rows["no"] and rows[precision] == pytest.approx(rows["no"], rel=0.02)


@pytest.mark.parametrize("which", ["generator", "estimator"])
def test_an_overflow_is_skipped_by_the_network_that_has_it(teacher, tmp_path, which):
    run = half_run(teacher, tmp_path / "run", **{f"of_{which}": LARGE})
    before = {name: trained(getattr(run, name)) for name in ("generator", "estimator")}
    _, row, _ = loop.cycle(run, 0)
    for name in before:
        assert moved(getattr(run, name), before[name]) == (name != which)
    assert scales(run) == ([LARGE / 2, GOOD] if which == "generator" else [GOOD, LARGE / 2])
    assert math.isfinite(row["grad_norm_generator"]) == (which != "generator")


def test_fifty_overflows_in_a_row_are_an_error(teacher, tmp_path, capsys):
    more = ("--max-train-steps", 60, "--checkpoint-steps", 100)
    run = half_run(teacher, tmp_path / "run", *more, of_generator=LARGE)
    message = refused(exits_on_input_error(loop.train), run, capsys=capsys)
    assert "step 50: grad_norm_generator overflowed in fp16 50 times in a row" in message and "bf16" in message


def test_overflows_that_end_are_none(teacher, tmp_path):
    """The usual start: the scaler finds its scale within some updates."""
    run = half_run(teacher, tmp_path / "run", "--max-train-steps", 40, "--checkpoint-steps", 100, of_generator=2.0**40)
    loop.train(run)
    assert run.step == 40 and max(run.overflows.values()) == 0 and scales(run)[0] < 2.0**40


def test_a_reward_whose_gradient_overflows_is_dropped_and_finds_its_scale(teacher, classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(terms, "GRADIENT_SCALE", 2.0**30)
    more = ["--max-train-steps", 25, "--checkpoint-steps", 25, *rewarded(classifier)]
    run = half_run(teacher, tmp_path / "run", *more)
    before = trained(run.plain_generator)
    _, row, _ = loop.cycle(run, 0)
    assert row["overflow_gradient_reward_classifier"] == 1 and "overflow_generator" not in row
    assert moved(run.plain_generator, before) and run.rewards[0].backoff == 0.5  # matching went on
    loop.train(run)
    rows = logged(tmp_path / "run")
    counted = [row.get("overflow_gradient_reward_classifier", 0) for row in rows]
    lost = [row["grad_norm_reward_classifier_x0"] is None for row in rows]
    assert 5 < sum(counted) < 24 and counted == lost and counted == sorted(counted, reverse=True)
    assert rows[-1]["grad_norm_reward_classifier_x0"] > 0 and run.rewards[0].backoff < 2.0**-5


def overflow_once(module: torch.nn.Module, call: int) -> None:
    """The output of ``module``'s call of this number is infinite."""
    calls = []

    def hook(module, inputs, out):
        calls.append(None)
        return out * float("inf") if len(calls) == call + 1 else out

    module.register_forward_hook(hook)


# A cycle of one estimator turn calls the generator for it and in its own turn, and the estimator twice.
@pytest.mark.parametrize(
    "network,call,column,kept",
    [
        ("plain_generator", 2, "overflow_generator", "plain_estimator"),
        ("plain_generator", 3, "overflow_generator", "plain_generator"),
        ("plain_estimator", 2, "overflow_estimator", "plain_estimator"),
        ("plain_estimator", 3, "overflow_scores", "plain_generator"),
    ],
)
def test_an_overflow_in_a_forward_skips_the_update_and_is_counted(teacher, tmp_path, network, call, column, kept):
    run = half_run(teacher, tmp_path / "run")
    overflow_once(getattr(run, network), call)
    loop.cycle(run, 0)
    before = {name: trained(getattr(run, name)) for name in ("plain_generator", "plain_estimator")}
    rows, row, _ = loop.cycle(run, 1)
    loop.stop_unless_finite(run, [*rows, row])
    for name in before:
        assert moved(getattr(run, name), before[name]) == (name != kept)
    assert {**rows[0], **row}[column] == 1
    rows, row, _ = loop.cycle(run, 2)
    loop.stop_unless_finite(run, [*rows, row])
    assert not [name for name in {**rows[0], **row} if name.startswith("overflow")]
    assert moved(getattr(run, kept), before[kept])


def test_an_overflow_of_the_decoder_drops_the_rewards(teacher, classifier, tmp_path):
    run = half_run(teacher, tmp_path / "run", *rewarded(classifier))
    decode, before = run.decode, trained(run.plain_generator)
    run.decode = lambda x0: decode(x0) * float("inf")
    rows, row, _ = loop.cycle(run, 0)
    loop.stop_unless_finite(run, [*rows, row])
    assert row["overflow_decoder"] == 1 and moved(run.plain_generator, before)
    assert "overflow_reward_classifier" not in row and run.rewards[0].backoff == 1


def test_a_sample_that_overflows_never_enters_the_window_of_a_frechet_reward(teacher, real, tmp_path):
    more = ["--reward", "frechet", 1, real, "--frechet-window", 500, "--max-train-steps", 8]
    run = half_run(teacher, tmp_path / "run", *more)
    overflow_once(run.plain_generator, 1)  # fills the window
    overflow_once(run.plain_generator, 130)
    loop.train(run)
    assert all(memory.sums.m.isfinite().all() for memory in run.memories.values())
    rows = logged(tmp_path / "run")
    assert any("overflow_generator" in row for row in rows) and rows[-1]["grad_norm_reward_frechet_x0"] > 0


def test_a_reward_that_overflows_for_ever_stops_the_run_and_good_weights_are_saved(
    teacher, classifier, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(terms, "GRADIENT_SCALE", 2.0**100)
    monkeypatch.setattr(loop, "MOST_OVERFLOWS", 3)
    more = ["--max-train-steps", 9, "--checkpoint-steps", 100, "--keep-checkpoints", 1, *rewarded(classifier)]
    run = half_run(teacher, tmp_path / "run", *more)
    message = refused(exits_on_input_error(loop.train), run, capsys=capsys)
    assert "step 3" in message and "reward_classifier" in message and "--mixed-precision bf16" in message
    assert "checkpoint of step 3 is kept" in message and len(logged(tmp_path / "run")) == 3
    again = half_run(teacher, tmp_path / "again", *more)
    restore(again, open_checkpoint(tmp_path / "run/checkpoints/torch_units/step-3.pt"))
    assert again.step == 3 and not again.overflows and not moved(again.plain_generator, trained(run.plain_generator))


# Two processes


def worker(folder: Path, teacher: Path) -> None:
    """Two cycles; the first is good, in the second process 1 alone overflows. Notes what each process then has."""
    sharded = os.environ["ACCELERATE_USE_FSDP"] == "true"
    run = half_run(teacher, folder / "run")
    assert run.session.sharded == sharded and run.session.world_size == 2
    loop.cycle(run, 0)
    before, scale = trained(run.generator), scales(run)
    if run.session.rank == 1:
        overflow_here(run, sharded)
    loop.cycle(run, 1)
    after = {name: gathered(value).sum().item() for name, value in trained(run.generator).items()}
    state = {"moved": moved(run.generator, before), "scales": [scale, scales(run)], "sums": after}
    (folder / f"state-{run.session.rank}.json").write_text(json.dumps(state))


def overflow_here(run, sharded: bool) -> None:
    """DDP reduces whole gradients: a loss overflows. FSDP2 leaves each process its part: one part does."""
    backward, accelerator = run.session.generator_accelerator.backward, run.session.generator_accelerator

    def overflowing(loss) -> None:
        backward(loss if sharded else loss * float("inf"))
        if sharded:
            gradient = next(p.grad for p in run.generator.parameters() if p.grad.to_local().numel())
            gradient.to_local().fill_(float("inf"))

    accelerator.backward = overflowing


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_an_overflow_in_one_process_is_skipped_by_both(teacher, tmp_path, sharded):
    environment = os.environ | {"NUM_PROCESSES": "2", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_FSDP"] = str(sharded).lower()
    command = [sys.executable, "-m", "scripts.launch", "tests.paper.test_loop", str(tmp_path), str(teacher)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (json.loads((tmp_path / f"state-{rank}.json").read_text()) for rank in (0, 1))
    assert one == other and not one["moved"] and one["scales"] == [[GOOD, GOOD], [GOOD / 2, GOOD]]


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]))
