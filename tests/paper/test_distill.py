"""The two turns on a tiny run: accumulation, model calls, the logged figures, EMA, the non-finite stop."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import (
    assert_close_and_not_zero,
    build_run,
    flags,
    logged,
    refused,
    run_cold_start,
    spread_lora_b,
    trained,
)
from train_cc import cold_start
from train_cc.distillation import loop, panel, turns
from train_cc.distillation.panel import preview_inputs
from train_cc.draws import Draws
from train_cc.io.errors import InputError
from train_cc.models import SiT
from train_cc.models.vae import images_to_uint8

# All that these tests know of the product's insides: a run, its turns, and what they hand to the optimizers


def tiny_run(teacher, tmp_path, *more):
    """A run whose real and fake score differ, as they do from the first update on."""
    run = build_run(teacher, tmp_path / "run", *more)
    spread_lora_b(run.estimator)
    return run


def show_previews(run) -> None:
    panel.preview(run, lambda x_t, t_cpu, t, y: run.scores.both(x_t, t_cpu, t, y, 1.0))


def gradients_of(turn, run, step) -> dict[str, torch.Tensor]:
    """What a turn, "estimator" or "generator", accumulates, by parameter."""
    if turn == "estimator":
        turns.estimator_turn(run, step, turns.estimator_batches(run, step)[0])
    else:
        turns.generator_turn(run, step)
    model = getattr(run, turn)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Sliced:
    """The draws of one large batch, cut to the rows of one chunk of it."""

    def __init__(self, draws, rows, total):
        self.draws, self.rows, self.total = draws, rows, total

    def noise(self, _, *shape):
        return self.draws.noise(self.total, *shape)[self.rows]

    def noise_like(self, x):
        return self.noise(*x.shape)

    def integers(self, high, _):
        return self.draws.integers(high, self.total)[self.rows]

    def uniform(self, _):
        return self.draws.uniform(self.total)[self.rows]


@pytest.mark.parametrize("num_steps", [1, 2])
def test_accumulating_two_batches_gives_the_gradients_of_one(teacher, tmp_path, monkeypatch, num_steps):
    gradients = {}
    for chunks in (1, 2):

        def draws_of(run, turn, iteration, chunk):
            size = run.optimisation.batch_size
            return Sliced(Draws(run.optimisation.seed, turn, iteration), slice(chunk * size, (chunk + 1) * size), 8)

        monkeypatch.setattr(turns, "chunk_draws", draws_of)
        more = ("--batch-size", 8 // chunks, "--gradient-accumulation-steps", chunks, "--num-steps", num_steps)
        run = tiny_run(teacher, tmp_path, *more)
        for turn in ("estimator", "generator"):
            gradients[turn, chunks] = gradients_of(turn, run, 1)
    for turn, least in (("estimator", 4), ("generator", 20)):
        one, two = gradients[turn, 1], gradients[turn, 2]
        assert one.keys() == two.keys() and len(one) >= least
        for parameter in one:
            assert_close_and_not_zero(two[parameter], one[parameter], 1e-4, parameter)


def test_estimator_turn_trains_lora_alone_and_generator_turn_the_generator_alone(teacher, tmp_path):
    run = tiny_run(teacher, tmp_path)

    def snapshot(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    def changed(model, before):
        return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}

    generator, estimator = snapshot(run.generator), snapshot(run.estimator)
    turns.estimator_turn(run, 0, turns.estimator_batches(run, 0)[0])
    loop.update(run, run.session.estimator_accelerator)
    assert not changed(run.generator, generator)
    moved = changed(run.estimator, estimator)
    assert moved and all("lora_" in name for name in moved)
    estimator = snapshot(run.estimator)
    turns.generator_turn(run, 0)
    loop.update(run, run.session.generator_accelerator)
    assert not changed(run.estimator, estimator)
    assert len(changed(run.generator, generator)) > 20


@pytest.mark.parametrize(
    "scale,interval,rows", [(1.0, (0, 1), 8), (1.5, (0, 1), 12), (1.5, (0.0, 1e-6), 8), (0.5, (0, 1), 8)]
)
def test_network_rows_of_the_two_scores(teacher, tmp_path, monkeypatch, scale, interval, rows):
    """A batch of 4: 4 rows for the fake score, 4 for the real one, 4 more where it is guided."""
    run = tiny_run(teacher, tmp_path, "--real-guidance-scale", scale, "--real-guidance-interval", *interval)
    counted = []
    forward = run.estimator.forward
    monkeypatch.setattr(run.estimator, "forward", lambda x, *a, **k: counted.append(len(x)) or forward(x, *a, **k))
    draws = Draws(0)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])
    v_fake, v_real = run.scores.both(draws.noise(4, 1, 8, 8), t, t, torch.arange(4), 1.0)
    assert sum(counted) == rows
    assert v_fake.shape == v_real.shape == (4, 1, 8, 8) and not torch.allclose(v_fake, v_real, atol=1e-2)


def test_log_columns(teacher, tmp_path):
    run = run_cold_start(teacher, tmp_path / "run")
    rows = logged(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["samples_seen"] for row in rows] == [4, 8, 12]
    assert rows[0]["lora_scale_real"] == 0.75 and rows[2]["lora_scale_real"] == pytest.approx(0.375)
    assert set(rows[0]) == {
        "step",
        "loss_dmd",
        "score_gap",
        "normaliser",
        "t_mean",
        "grad_norm_generator",
        "update_ratio_generator",
        "lora_scale_real",
        "samples_seen",
        *(f"{name}_t{low}" for name in ("score_gap", "loss_fake") for low in ("00", "25", "50", "75")),
    }
    estimator_rows = logged(run, "gui")
    assert [row["iteration"] for row in estimator_rows] == [1, 2, 3, 4, 5, 6]
    assert set(estimator_rows[0]) == {
        "step",
        "iteration",
        "loss_fake",
        "grad_norm_estimator",
        "update_ratio_estimator",
    }


def test_previews_and_checkpoints_come_at_every_multiple_and_at_the_end(teacher, tmp_path):
    more = ("--max-train-steps", 5, "--sample-steps", 2, "--checkpoint-steps", 2, "--teacher-preview-steps", 0)
    run = run_cold_start(teacher, tmp_path / "run", *more)
    assert {path.name for path in (run / "samples").iterdir()} == {"step-2", "step-4", "step-5"}
    units = {path.stem for path in (run / "checkpoints" / "torch_units").iterdir()}
    assert units == {"step-2", "step-4", "step-5"}


def test_previews_do_not_disturb_training(teacher, tmp_path):
    plain = run_cold_start(teacher, tmp_path / "a", "--num-previews", 0)
    shown = run_cold_start(teacher, tmp_path / "b", "--sample-steps", 1, "--ema-decay", 0.9)
    assert logged(plain) == logged(shown)
    assert not (plain / "samples").exists()
    assert (shown / "samples" / "step-1" / "grid.png").exists()


def rows_of_previews(run, monkeypatch, scores) -> dict[str, np.ndarray]:
    drawn = {}
    with monkeypatch.context() as patch:
        patch.setattr(panel, "save_grid", lambda rows, path, names: drawn.update(zip(names, rows, strict=True)))
        panel.preview(run, scores)
    return drawn


def as_pixels(x0: torch.Tensor) -> np.ndarray:
    return images_to_uint8(((x0 + 1) / 2).clamp(0, 1)).numpy().astype(int)


def test_the_teachers_row_is_the_teacher(teacher, tmp_path, monkeypatch):
    """Whatever the LoRA has learned: Euler on the model of the folder, from the previews' own noise and labels."""
    run = tiny_run(teacher, tmp_path, "--teacher-preview-steps", 3)
    x, y, _ = preview_inputs(run)
    with torch.no_grad():
        for t in (1, 2 / 3, 1 / 3):
            x = x - SiT.from_pretrained(teacher)(x, torch.full((len(y),), t), y) / 3
    row = rows_of_previews(run, monkeypatch, lambda x_t, *_: (x_t, x_t))["teacher, 3 steps"]
    assert as_pixels(x).std() > 5 and abs(row.astype(int) - as_pixels(x)).max() <= 1


def test_the_two_scores_of_the_previews_are_named_as_they_are(teacher, tmp_path, monkeypatch):
    """Rows: generator, real x0, fake x0, each x_t - t v at t = 1/2 of the generator's samples."""
    run = tiny_run(teacher, tmp_path, "--teacher-preview-steps", 0)
    real, fake, seen = torch.full((4, 1, 8, 8), 1.0), torch.full((4, 1, 8, 8), -1.0), []

    def scores(x_t, t_cpu, t, y):
        seen.append(x_t)
        assert (t == 0.5).all() and torch.equal(t_cpu, t)
        return fake, real

    drawn = rows_of_previews(run, monkeypatch, scores)
    assert list(drawn) == ["generator", "real x0", "fake x0"]
    for name, v in (("real x0", real), ("fake x0", fake)):
        assert abs(drawn[name].astype(int) - as_pixels(seen[0] - 0.5 * v)).max() <= 1


def test_previews_are_of_the_average_where_there_is_one(teacher, tmp_path, monkeypatch):
    """The generator's row is drawn with the weights that are exported; the raw ones come back, bit for bit."""
    run = tiny_run(teacher, tmp_path, "--ema-decay", 0.05, "--learning-rate-generator", 0.1)
    loop.cycle(run, 0)
    raw, average = trained(run.generator), {name: value.clone() for name, value in run.ema.values.items()}
    seen, forward = [], run.generator.forward
    monkeypatch.setattr(run.generator, "forward", lambda *a: seen.append(trained(run.generator)) or forward(*a))
    show_previews(run)
    assert seen and not any(torch.equal(average[name], raw[name]) for name in raw)
    for weights in seen:
        assert all(torch.equal(value, average[name]) for name, value in weights.items())
    assert all(torch.equal(value, raw[name]) for name, value in trained(run.generator).items())
    assert all(torch.equal(value, average[name]) for name, value in run.ema.values.items())


def test_export_is_the_ema_where_there_is_one(teacher, tmp_path):
    run = run_cold_start(teacher, tmp_path / "run", "--ema-decay", 0.9)
    exported = SiT.from_pretrained(run / "generator").state_dict()
    average, raw = (
        load_file(run / f"checkpoints/accelerator_1/step-3/{name}.safetensors") for name in ("ema", "generator")
    )
    assert len(average) > 10 and all(torch.equal(exported[name], average[name]) for name in average)
    assert max((average[name] - raw[name]).abs().max().item() for name in average) > 1e-5


def outcome(teacher, tmp_path, *more) -> dict[str, torch.Tensor]:
    """The weights after two cycles in the middle of the dynamic phase."""
    run = tiny_run(teacher, tmp_path, "--batch-size", 8, "--adam-epsilon", 1e-4, "--max-grad-norm", 0.05, *more)
    for step in (1, 2):
        loop.cycle(run, step)
    average = run.ema.values if run.ema is not None else {}
    return trained(run.generator) | trained(run.estimator) | {f"ema {n}": p for n, p in average.items()}


# A flag's other value, and what else is switched on in both runs for it to matter
CHANGES = {
    "--seed": (31, []),
    "--num-steps": (2, []),
    "--timestep-shift": (2.0, ["--num-steps", 2]),
    "--ratio-update": (3, []),
    "--lora-init-spread": (0.2, []),
    "--lora-scale-fake": (1.0, []),
    "--lora-scale-real": (0.5, []),
    "--dynamic-steps": (5, []),
    "--renoise-alpha": (2.0, []),
    "--renoise-beta": (1.0, []),
    "--real-guidance-scale": (1.5, []),
    "--real-guidance-interval": ("0.0 0.4", ["--real-guidance-scale", 1.5]),
    "--gradient-accumulation-steps": (2, []),
    "--learning-rate-generator": (2e-3, []),
    "--learning-rate-estimator": (2e-3, []),
    "--weight-decay-generator": (0.5, []),
    "--weight-decay-estimator": (0.5, []),
    "--adam-beta1": (0.5, []),
    "--adam-beta1-generator": (0.0, []),
    "--adam-beta1-estimator": (0.0, []),
    "--adam-beta2": (0.9, []),
    "--adam-epsilon": (1e-3, []),
    "--max-grad-norm": (0.02, []),
    "--ema-decay": (0.05, ["--ema-decay", 0.09]),
    "--reward-weight": (5.0, ["REWARD"]),
    "--encoder-type": ("none", ["REWARD"]),
}


@pytest.mark.parametrize("flag", CHANGES)
def test_every_flag_of_the_method_changes_the_weights(teacher, tmp_path, reward_folder, flag):
    value, others = CHANGES[flag]
    reward = ["--encoder-type", "classifier", "--reward-classifier", reward_folder, "--reward-weight", 1.0]
    others = [word for item in others for word in (reward if item == "REWARD" else [item])]
    plain = outcome(teacher, tmp_path, *others)
    changed = outcome(teacher, tmp_path, *others, flag, *str(value).split())
    assert plain.keys() == changed.keys()
    assert any((plain[name] - changed[name]).abs().max() > 1e-7 for name in plain)


def test_each_network_has_the_first_moment_it_is_given(teacher, tmp_path):
    run = tiny_run(teacher, tmp_path, "--adam-beta1", 0.5, "--adam-beta1-estimator", 0)
    assert [learner.optimizer.param_groups[0]["betas"][0] for learner in run.learners.values()] == [0.5, 0]


def test_activation_checkpointing_changes_nothing(teacher, tmp_path):
    more = ["--num-steps", 2, "--real-guidance-scale", 1.5, "--gradient-accumulation-steps", 2]
    plain, recomputed = outcome(teacher, tmp_path, *more), outcome(teacher, tmp_path, *more, "--gradient-checkpointing")
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_a_lora_generator_trains_a_lora_of_twice_the_rank(teacher, tmp_path):
    run = tiny_run(teacher, tmp_path, "--use-lora-gen", "--lora-rank", 3)
    ranks = {name: p.shape[0] for name, p in run.generator.named_parameters() if "lora_A" in name}
    assert len(ranks) == 2 * 4 and set(ranks.values()) == {6}
    before = trained(run.generator)
    loop.cycle(run, 0)
    assert all("lora_" in name for name in before)
    assert all(not torch.equal(p, before[name]) for name, p in trained(run.generator).items())


def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(teacher, tmp_path, capsys, monkeypatch):
    turn = turns.generator_turn

    def poisoned(run, step):
        figures = turn(run, step)
        return figures | {"loss_dmd": figures["loss_dmd"] * (float("nan") if step == 1 else 1)}

    monkeypatch.setattr(loop, "generator_turn", poisoned)
    message = refused(cold_start.main, flags(teacher, tmp_path / "run"), capsys=capsys)
    assert "step 2" in message and "loss_dmd is nan" in message
    units = tmp_path / "run" / "checkpoints" / "torch_units"
    assert [path.name for path in units.iterdir()] == ["step-1.pt"]


def test_a_scaler_may_skip_an_overflowing_gradient_but_no_loss():
    """fp16 alone has a scaler: its first steps overflow, and are skipped."""

    def stopped(scaler, **row) -> bool:
        output = SimpleNamespace(checkpoints=Path("nowhere"))
        run = SimpleNamespace(step=3, scaled=scaler is not None, output=output, overflows={})
        try:
            loop.stop_unless_finite(run, [{"loss_dmd": 1.0, "grad_norm_generator": 1.0} | row])
        except InputError as error:
            assert "step 3" in str(error)
            return True
        return False

    infinite = float("inf")
    assert not stopped(None) and not stopped("scaler")
    assert stopped(None, grad_norm_generator=infinite) and not stopped("scaler", grad_norm_generator=infinite)
    assert stopped(None, loss_dmd=infinite) and stopped("scaler", loss_dmd=infinite)


def test_a_diverging_run_stops_by_itself(teacher, tmp_path, capsys):
    more = ["--learning-rate-generator", 1000, "--learning-rate-estimator", 1000, "--max-train-steps", 50]
    assert "step" in refused(cold_start.main, flags(teacher, tmp_path / "run", *more), capsys=capsys)
