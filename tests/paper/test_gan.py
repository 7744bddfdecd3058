"""`--gan-weight`: a head on the fake score's features, its two terms, and its place in a run."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from convert_weight import export_generator
from tests.conftest import build_run, flags, refused, run_cold_start, words
from tests.run.test_processes import PARITY, job, largest_difference, processes
from tests.run.test_resume import assert_same_run
from train_cc import cold_start
from train_cc.distillation.gan import HEAD_WEIGHT, middle
from train_cc.distillation.turns import chunk_draws, renoise

GAN = ("--gan-weight", 0.01, "--gan-data", "digits")


@pytest.fixture
def run(teacher, tmp_path):
    return build_run(teacher, tmp_path / "run", *GAN)


def batch(run) -> tuple:
    draws = chunk_draws(run, 7, 0, 0)
    return draws, draws.noise(4, *run.sample_shape), torch.tensor([0, 3, 5, 9])


def test_the_head_learns_real_data_from_samples(run):
    """Its loss by the formula on the same draws; its gradient reaches the head and the fake score."""
    gan = run.estimator_terms[-1].__self__
    draws, x0, y = batch(run)
    term = gan.tell_apart(run, draws, x0, y, 0.0, None)
    draws, x0, y = batch(run)
    index = draws.integers(len(gan.real), len(x0))
    real, of_real = gan.real[index], gan.labels[index]
    assert real.min() >= -1 and real.max() == 1 and real.shape == x0.shape
    x_t, _, _, t = renoise(run, draws, torch.cat([real, x0]), 0.0)
    logits = run.learners["gan"].plain(middle(run.scores, run, x_t, t, torch.cat([of_real, y])))
    loss = -F.logsigmoid(logits[:4]).mean() - F.logsigmoid(-logits[4:]).mean()
    torch.testing.assert_close(term.loss, HEAD_WEIGHT * loss)
    term.loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in run.learners["gan"].plain.named_parameters() if "k." not in name)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in run.plain_estimator.parameters())


def test_the_generators_term_is_the_gradient_of_its_loss(run):
    """Against a difference quotient along that gradient; no weight gets a gradient."""
    gan = run.estimator_terms[-1].__self__
    draws, x0, y = batch(run)
    (term,) = gan.fool(run, draws, x0, y, 0.0, [])
    assert term.name == "gan" and all(p.grad is None for p in run.plain_estimator.parameters())
    step = 1e-2 * term.gradient / term.gradient.norm()
    losses = []
    for x in (x0 + step, x0 - step):
        draws = batch(run)[0]
        losses.append(gan.fool(run, draws, x, y, 0.0, [])[0].loss)
    quotient = (losses[0] - losses[1]) / (2 * step.norm())
    torch.testing.assert_close(gan.weight * quotient, term.gradient.norm(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("fake", ["lora", "full"])
def test_it_resumes_to_the_bit_and_begins_anew_from_a_run_without(teacher, tmp_path, fake):
    more = (*GAN, "--fake-score", fake)
    straight = run_cold_start(teacher, tmp_path / "a", *more)
    run_cold_start(teacher, tmp_path / "b", *more, "--max-train-steps", 2)
    run_cold_start(teacher, tmp_path / "b", *more, "--auto-resume")
    assert_same_run(straight, tmp_path / "b", 3)
    row = json.loads((straight / "loss_logs/loss_gui_log.jsonl").read_text().splitlines()[-1])
    assert {"loss_gan_head", "accuracy_gan_head", "grad_norm_gan", "update_ratio_gan"} <= row.keys()
    plain = run_cold_start(teacher, tmp_path / "c", "--fake-score", fake, "--max-train-steps", 1)
    units = plain / "checkpoints/torch_units/step-1.pt"
    run_cold_start(teacher, tmp_path / "d", *more, "--max-train-steps", 2, "--resume-ckpt", units)


def test_two_processes_train_what_one_does_with_two_batches(teacher, tmp_path):
    more = [*PARITY, *GAN, "--max-train-steps", 2]
    run_cold_start(teacher, tmp_path / "one", *more, "--gradient-accumulation-steps", 2)
    processes(tmp_path, *(job(teacher, tmp_path / str(sharded), *more, sharded=sharded) for sharded in (False, True)))
    for sharded in (False, True):
        assert largest_difference(tmp_path / "one", tmp_path / str(sharded), 2) < 1e-6


def test_a_card_says_that_real_data_trained_it(teacher, tmp_path):
    run = run_cold_start(teacher, tmp_path / "run", *GAN, "--max-train-steps", 1)
    export_generator.main(
        words("--checkpoint", run / "checkpoints/torch_units/step-1.pt", "--pipeline", tmp_path / "p")
    )
    assert "trained on real data too, by a GAN: `digits`" in (tmp_path / "p/README.md").read_text()


BAD = {
    "no data": (("--gan-weight", 1), "are given together"),
    "no weight": (("--gan-data", "digits"), "are given together"),
    "no file": (("--gan-weight", 1, "--gan-data", "missing.npz"), "missing.npz does not exist"),
    "no labels": (("--gan-weight", 1, "--gan-data", "plain.npz"), "labels 0 to 9 are expected"),
    "another size": (("--gan-weight", 1, "--gan-data", "large.npz"), "gives (1, 9, 9), the teacher takes (1, 8, 8)"),
}


@pytest.mark.parametrize("case", BAD)
def test_data_that_does_not_fit_is_refused(case, teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("plain.npz", arr_0=np.full((4, 8, 8, 1), 9, np.uint8))
    np.savez("large.npz", arr_0=np.full((4, 9, 9, 1), 9, np.uint8), arr_1=np.arange(4))
    more, expected = BAD[case]
    assert expected in refused(cold_start.main, flags(teacher, tmp_path / "run", *more), capsys=capsys)
    assert not (tmp_path / "run").exists()
