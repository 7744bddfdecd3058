"""train_cc/distillation/panel.py: the rows of a sample step, and that they disturb nothing."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import build_run, logged, run_cold_start, spread_lora_b, trained
from train_cc.distillation import loop, panel
from train_cc.models import SiT
from train_cc.models.vae import images_to_uint8
from train_cc.run.pictures import CELL, GAP


def tiny_run(teacher, tmp_path, *more):
    run = build_run(teacher, tmp_path / "run", *more)
    spread_lora_b(run.estimator)
    return run


def drawn(picture, images: int) -> np.ndarray:
    """The rows of a grid.png as they were before they were enlarged: (rows, images, 8, 8)."""
    pixels, pitch = np.array(Image.open(picture).convert("L")).astype(int), CELL + GAP
    pixels = pixels[GAP:, pixels.shape[1] - images * pitch :]
    cells = [pixels[top : top + CELL : 8] for top in range(0, len(pixels), pitch)]
    return np.array([[row[:, left : left + CELL : 8] for left in range(0, images * pitch, pitch)] for row in cells])


def as_pixels(x0: torch.Tensor) -> np.ndarray:
    return images_to_uint8(((x0 + 1) / 2).clamp(0, 1)).numpy().astype(int)[..., 0]


def test_the_rows_are_the_teacher_the_generator_and_the_two_scores(teacher, tmp_path):
    """Teacher: Euler on the model of the folder, whatever the LoRA has learned. Scores: x_t - t v at t = 1/2."""
    run = tiny_run(teacher, tmp_path, "--teacher-preview-steps", 3)
    real, fake, seen = torch.full((4, 1, 8, 8), 1.0), torch.full((4, 1, 8, 8), -1.0), []

    def scores(x_t, t_cpu, t, y):
        seen.append(x_t)
        assert (t == 0.5).all() and torch.equal(t_cpu, t)
        return fake, real

    panel.preview(run, scores)
    x, y, _ = panel.preview_inputs(run)
    expected = SiT.from_pretrained(teacher)
    with torch.no_grad():
        one_step = x - run.generator(x, torch.ones(4), y)
        for t in (1, 2 / 3, 1 / 3):
            x = x - expected(x, torch.full((4,), t), y) / 3
    rows = drawn(panel.picture_path(run, 0), 4)
    for row, x0 in zip(rows, (x, one_step, seen[0] - 0.5 * real, seen[0] - 0.5 * fake), strict=True):
        assert as_pixels(x0).std() > 5 and abs(row - as_pixels(x0)).max() <= 1


def test_previews_are_of_the_average_where_there_is_one(teacher, tmp_path):
    """The generator's row is drawn with the weights that are exported; the raw ones come back, bit for bit."""
    run = tiny_run(teacher, tmp_path, "--ema-decay", 0.05, "--learning-rate-generator", 0.1)
    loop.cycle(run, 0)
    raw, average = trained(run.generator), {name: value.clone() for name, value in run.ema.values.items()}
    seen = []
    run.generator.register_forward_pre_hook(lambda network, args: seen.append(trained(network)))
    loop.show(run, 0)
    assert seen and not any(torch.equal(average[name], raw[name]) for name in raw)
    for weights in seen:
        assert all(torch.equal(value, average[name]) for name, value in weights.items())
    assert all(torch.equal(value, raw[name]) for name, value in trained(run.generator).items())
    assert all(torch.equal(value, average[name]) for name, value in run.ema.values.items())


def test_previews_and_checkpoints_come_at_every_multiple_and_at_the_end(teacher, tmp_path):
    more = ("--max-train-steps", 5, "--sample-steps", 2, "--checkpoint-steps", 2, "--teacher-preview-steps", 0)
    run = run_cold_start(teacher, tmp_path / "run", *more)
    for folder in (run / "samples", run / "checkpoints" / "torch_units"):
        assert {path.stem for path in folder.iterdir()} == {"step-2", "step-4", "step-5"}


def test_previews_do_not_disturb_training(teacher, tmp_path, reward_folder):
    plain = run_cold_start(teacher, tmp_path / "a", "--num-previews", 0)
    more = ("--num-previews", 10, "--ema-decay", 0.9, "--holdout-classifier", reward_folder, "--sample-steps", 1)
    rows = logged(run_cold_start(teacher, tmp_path / "b", *more))
    assert all(row["preview_accuracy_holdout"] == pytest.approx(row["preview_coverage_holdout"]) for row in rows)
    assert [{k: v for k, v in row.items() if not k.startswith("preview")} for row in rows] == logged(plain)
    assert not (plain / "samples").exists()
    real, fake = drawn(tmp_path / "b/samples/step-1/grid.png", 10)[2:]
    assert real.std() > 5 and not np.array_equal(real, fake)
