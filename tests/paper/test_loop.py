"""The parts of the loop by themselves: what is fetched, counted, written, told and shown, and an optimizer's update."""

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
