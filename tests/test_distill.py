"""The two turns on a tiny run: accumulation, model calls, the logged figures, EMA, the non-finite stop."""

import pytest
import torch

from tests.conftest import flags, logged, refused, run_cold_start
from train_cc import cold_start, distill
from train_cc.draws import Draws
from train_cc.models import SiT
from train_cc.run.session import open_session


def tiny_run(teacher, tmp_path, *more):
    args = cold_start.stage_parser().parse_args(flags(teacher, tmp_path / "run", *more))
    return distill.build(args, open_session("no")), args


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

    def kept(accelerator, model, *rest):
        gradients[key] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return torch.zeros(()), torch.zeros(())

    monkeypatch.setattr(distill, "update", kept)
    for chunks in (1, 2):

        def draws_of(run, args, turn, iteration, chunk):
            rows = slice(chunk * args.batch_size, (chunk + 1) * args.batch_size)
            return Sliced(Draws(args.seed, turn, iteration), rows, 8)

        monkeypatch.setattr(distill, "chunk_draws", draws_of)
        more = ("--batch-size", 8 // chunks, "--gradient-accumulation-steps", chunks, "--num-steps", num_steps)
        run, args = tiny_run(teacher, tmp_path, *more)
        key = ("estimator", chunks)
        distill.estimator_turn(run, args, 1, distill.estimator_batches(run, args, 1)[0])
        key = ("generator", chunks)
        distill.generator_turn(run, args, 1)
    for name in ("estimator", "generator"):
        one, two = gradients[name, 1], gradients[name, 2]
        assert one.keys() == two.keys() and one
        for parameter in one:
            torch.testing.assert_close(one[parameter], two[parameter], rtol=1e-4, atol=1e-7)


def test_estimator_turn_trains_lora_alone_and_generator_turn_the_generator_alone(teacher, tmp_path):
    run, args = tiny_run(teacher, tmp_path)

    def snapshot(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    def changed(model, before):
        return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}

    generator, estimator = snapshot(run.generator), snapshot(run.estimator)
    distill.estimator_turn(run, args, 0, distill.estimator_batches(run, args, 0)[0])
    assert not changed(run.generator, generator)
    moved = changed(run.estimator, estimator)
    assert moved and all("lora_" in name for name in moved)
    estimator = snapshot(run.estimator)
    distill.generator_turn(run, args, 0)
    assert not changed(run.estimator, estimator)
    assert len(changed(run.generator, generator)) > 20


@pytest.mark.parametrize(
    "scale,interval,rows", [(1.0, (0, 1), 8), (1.5, (0, 1), 12), (1.5, (0.0, 1e-6), 8), (0.5, (0, 1), 8)]
)
def test_network_rows_of_the_two_scores(teacher, tmp_path, monkeypatch, scale, interval, rows):
    """A batch of 4: 4 rows for the fake score, 4 for the real one, 4 more where it is guided."""
    run, args = tiny_run(teacher, tmp_path, "--real-guidance-scale", scale, "--real-guidance-interval", *interval)
    counted = []
    forward = run.estimator.forward
    monkeypatch.setattr(run.estimator, "forward", lambda x, *a, **k: counted.append(len(x)) or forward(x, *a, **k))
    draws = Draws(0)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])
    distill.scores(run, args, draws.noise(4, 1, 8, 8), t, t, torch.arange(4), 1.0)
    assert sum(counted) == rows


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


def test_same_seed_same_log(teacher, tmp_path):
    first, second = (run_cold_start(teacher, tmp_path / name) for name in ("a", "b"))
    other = run_cold_start(teacher, tmp_path / "c", "--seed", 31)
    for name in ("gen", "gui"):
        assert logged(first, name) == logged(second, name)
        assert logged(first, name) != logged(other, name)


def test_previews_do_not_disturb_training(teacher, tmp_path):
    plain = run_cold_start(teacher, tmp_path / "a", "--num-previews", 0)
    shown = run_cold_start(teacher, tmp_path / "b", "--sample-steps", 1, "--ema-decay", 0.9)
    assert logged(plain) == logged(shown)
    assert not (plain / "samples").exists()
    assert (shown / "samples" / "step-1" / "grid.png").exists()


def test_export_is_the_ema_where_there_is_one(teacher, tmp_path):
    """With a decay of almost 1 the average stays the teacher; without, the export has moved."""
    kept = SiT.from_pretrained(run_cold_start(teacher, tmp_path / "a", "--ema-decay", 0.999999) / "generator")
    moved = SiT.from_pretrained(run_cold_start(teacher, tmp_path / "b") / "generator")
    start = SiT.from_pretrained(teacher)
    distance = [
        sum((p - q).abs().sum().item() for p, q in zip(model.parameters(), start.parameters(), strict=True))
        for model in (kept, moved)
    ]
    assert distance[0] < 1e-3 * distance[1]


@pytest.mark.parametrize(
    "more",
    [
        ["--num-steps", 2, "--timestep-shift", 2.0],
        ["--use-lora-gen", "--ema-decay", 0.9],
        ["--real-guidance-scale", 1.5, "--real-guidance-interval", 0, 0.4],
        ["--gradient-accumulation-steps", 2, "--gradient-checkpointing"],
        ["--teacher-preview-steps", 0, "--dynamic-steps", 0, "--keep-checkpoints", 1],
        ["--num-classes", 10, "--renoise-alpha", 2, "--renoise-beta", 1, "--lora-scale-fake", 1],
    ],
)
def test_variants_run(teacher, tmp_path, more):
    run = run_cold_start(teacher, tmp_path / "run", *more)
    assert len(logged(run)) == 3
    SiT.from_pretrained(run / "generator")


def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(teacher, tmp_path, capsys, monkeypatch):
    turn = distill.generator_turn

    def poisoned(run, args, step):
        figures = turn(run, args, step)
        return figures | {"loss_dmd": figures["loss_dmd"] * (float("nan") if step == 1 else 1)}

    monkeypatch.setattr(distill, "generator_turn", poisoned)
    message = refused(cold_start.main, flags(teacher, tmp_path / "run"), capsys=capsys)
    assert "step 2" in message and "loss_dmd is nan" in message
    units = tmp_path / "run" / "checkpoints" / "torch_units"
    assert [path.name for path in units.iterdir()] == ["step-1.pt"]


def test_a_diverging_run_stops_by_itself(teacher, tmp_path, capsys):
    more = ["--learning-rate-generator", 1e30, "--learning-rate-estimator", 1e30, "--max-train-steps", 50]
    assert "step" in refused(cold_start.main, flags(teacher, tmp_path / "run", *more), capsys=capsys)
