"""The parts of the loop by themselves: what is fetched, counted, written, told and shown, and an optimizer's update."""

import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import run_cold_start
from train_cc.distillation import loop
from train_cc.run.checkpoint import complete_steps
from train_cc.run.session import Learner
from train_cc.schedules import annealing


def test_all_figures_of_a_cycle_are_fetched_at_once_in_their_shapes():
    asked = []

    def mean(flat):
        asked.append(flat)
        return flat / 2  # of two processes, of which the other has zeros

    session = SimpleNamespace(mean=mean, device=torch.device("cpu"))
    figures = [{"a": torch.tensor(4), "b": torch.arange(8.0).view(2, 4)}, {"c": torch.tensor(2.0, dtype=torch.float64)}]
    halves = [{"a": 2.0, "b": [[0.0, 0.5, 1.0, 1.5], [2.0, 2.5, 3.0, 3.5]]}, {"c": 1.0}]
    assert loop.fetch(session, figures, True) == [*halves, (True,)]
    assert loop.fetch(session, figures, False) == [*halves, (False,)]
    assert [flat.shape for flat in asked] == [(11,), (11,)]


class Log:
    def __init__(self):
        self.rows = []

    def write(self, rows):
        self.rows += list(rows)


def test_rows_are_numbered_over_the_run():
    run = SimpleNamespace(step=3, method=SimpleNamespace(ratio_update=5))
    logs = of_generator, of_estimator = Log(), Log()
    loop.write_rows(run, list(logs), [{"loss_fake": 1.0}, {"loss_fake": 2.0}], {"step": 3, "a": None}, 0.25)
    assert of_generator.rows == [{"step": 3, "a": None, "seconds": 0.25}]
    assert of_estimator.rows == [
        {"step": 3, "iteration": 11, "loss_fake": 1.0, "seconds": 0.25},
        {"step": 3, "iteration": 12, "loss_fake": 2.0, "seconds": 0.25},
    ]
    loop.write_rows(run, [], [], {}, 0.0)  # another process than the main one


@pytest.mark.parametrize("sampled,main", [(True, True), (True, False), (False, True)])
def test_what_is_told_of_a_row(monkeypatch, sampled, main):
    """Trackers get all that there is; the bar and a sample step's one line what tells at a glance how a run does."""
    trackers, bar, pictures, said = [], [], [], []
    accelerator = SimpleNamespace(log=lambda row, step: trackers.append((row, step)))
    run = SimpleNamespace(step=7, session=SimpleNamespace(generator_accelerator=accelerator, is_main=main))
    progress = SimpleNamespace(
        set_postfix_str=lambda text, refresh: bar.append((text, refresh)), update=lambda: bar.append(1)
    )
    monkeypatch.setattr(loop, "picture_path", lambda run, step: f"grid of {step}")
    monkeypatch.setattr(loop, "show_picture", lambda accelerator, path, step: pictures.append((path, step)))
    monkeypatch.setattr(loop.logger, "info", lambda text, *values: said.append(text % values))
    row = {"step": 7, "loss_dmd": 0.123456, "empty": None, "loss_reward_x": -2.0, "score_gap": 0.12345}
    row |= {"loss_reward_c": 1.5, "accuracy_reward_c": 0.75}
    loop.tell(run, progress, row, sampled)
    assert trackers == [({name: value for name, value in row.items() if value is not None}, 7)]
    words = "score gap 0.123, accuracy c 0.75, loss x -2"
    assert bar == [(words, False), 1]
    shown = sampled and main
    assert pictures == [("grid of 7", 7)] * shown
    assert said == [f"step 7: {words}, preview grid of 7"] * shown


def test_an_update_is_counted_with_the_scale_that_its_turns_used():
    """c(k) of the step that was done, k counted from 0; the step from 1; the samples of all processes."""
    method = SimpleNamespace(lora_scale_real=0.75, dynamic_steps=4)
    optimisation = SimpleNamespace(effective_batch=lambda processes: 10 * processes)
    session = SimpleNamespace(world_size=3)
    run = SimpleNamespace(step=1, samples_seen=100, method=method, optimisation=optimisation, session=session)
    expected = 0.75 * annealing(1, 4)
    assert 0 < expected < 0.75 and expected != 0.75 * annealing(2, 4)
    row = loop.count_update(run, 1, {"loss_dmd": 1.0})
    assert row == {"step": 2, "loss_dmd": 1.0, "lora_scale_real": expected, "samples_seen": 130}
    assert (run.step, run.samples_seen) == (2, 130)


def test_where_a_run_is_cut_short_its_previews_are_not_logged(monkeypatch):
    checked, seen = [], []
    monkeypatch.setattr(loop, "require_finite_run", lambda run, moments: checked.append(moments))
    monkeypatch.setattr(loop, "preview", lambda run, read: seen.append(read.keywords["c"]) or {"a": 1.0})
    own = {"method": SimpleNamespace(dynamic_steps=20), "output": SimpleNamespace(sample_steps=5)}
    own["scores"] = SimpleNamespace(both=lambda: None)
    for step, figures in ((10, {"a": 1.0}), (11, {})):
        assert loop.show(SimpleNamespace(step=step, **own), step - 1) == figures
    assert checked == [False, False] and seen == [annealing(9, 20), annealing(10, 20)] and seen[0] != seen[1]


def test_an_update_clips_steps_and_clears():
    """A gradient of norm 5, clipped to 0.5, by plain descent at rate 1: the weights move by 0.5 of their norm of 10."""
    model = torch.nn.Linear(2, 1, bias=False)
    model.blocks = [model]
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[6.0, 8.0]]))
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), 1.0))
    learners = {"model": Learner(accelerator, model, optimizer)}
    run = SimpleNamespace(learners_of=lambda _: learners, optimisation=SimpleNamespace(max_grad_norm=0.5))
    figures = loop.update(run, accelerator)
    assert figures["grad_norm_model"].item() == pytest.approx(5)
    assert figures["update_ratio_model"].item() == pytest.approx(0.05, rel=1e-4)
    assert model.weight.grad is None


@pytest.mark.parametrize("observe,seen", [(0, 3), (1, 1), (2, 2), (3, 3)])
def test_a_cycle_is_its_estimator_turns_and_a_generator_turn(monkeypatch, observe, seen):
    """A Frechet reward observes the first turns' samples (0: all); the bands of all turns are the generator's row's."""
    observed, bands = [], torch.tensor([[1.0, 2, 3, 4], [1, 1, 1, 0]])
    session = SimpleNamespace(estimator_accelerator="estimator", generator_accelerator="generator")
    method = SimpleNamespace(frechet_observe=observe, ratio_update=3)
    run = SimpleNamespace(method=method, session=session, ema=None)
    monkeypatch.setattr(loop, "estimator_batches", lambda run, step: [f"{step}.{i}" for i in range(3)])
    monkeypatch.setattr(loop, "observe_batches", lambda run, batches: observed.append(batches))
    monkeypatch.setattr(
        loop, "estimator_turn", lambda run, step, batches: {"turn": batches, "loss_fake_by_band": bands.clone()}
    )
    monkeypatch.setattr(loop, "generator_turn", lambda run, step: {"loss_dmd": step})
    monkeypatch.setattr(loop, "update", lambda run, accelerator: {"update": accelerator})

    def fetch(_, figures, stopping):
        rows = [{name: getattr(value, "tolist", lambda v=value: v)() for name, value in row.items()} for row in figures]
        return [*rows, (not stopping,)]

    monkeypatch.setattr(loop, "fetch", fetch)
    rows, row, stopping = loop.cycle(run, 7, True)
    assert observed == ["7.0", "7.1", "7.2"][:seen] and stopping is False and loop.cycle(run, 7)[2] is True
    assert rows == [{"turn": f"7.{i}", "update": "estimator"} for i in range(3)]
    means = {"loss_fake_t00": 1.0, "loss_fake_t25": 2.0, "loss_fake_t50": 3.0, "loss_fake_t75": None}
    assert row == {"loss_dmd": 7, "update": "generator"} | means


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


def test_the_bar_is_the_main_processs_and_moves_while_an_update_lasts(teacher, tmp_path, monkeypatch):
    bars, tqdm, cycle = [], loop.tqdm, loop.cycle

    def kept(**options):
        bars.append((options, tqdm(**options)))
        monkeypatch.setattr(bars[0][1], "refresh", lambda **options: moved.append(bars[0][1].n))
        return bars[0][1]

    def long(*args):
        time.sleep(0.3)
        return cycle(*args)

    moved: list[int] = []
    monkeypatch.setattr(loop, "tqdm", kept)
    monkeypatch.setattr(loop, "cycle", long)
    monkeypatch.setattr(loop, "beating", partial(loop.beating, first=0.1, every=10))
    run_cold_start(teacher, tmp_path / "run", "--num-previews", 0, "--max-train-steps", 1)
    ((options, _),) = bars
    assert (options["disable"], options["initial"], options["total"]) == (False, 0, 1)
    assert moved[0] == 0
