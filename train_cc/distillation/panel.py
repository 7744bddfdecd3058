"""The pictures of a sample step: the same noise and labels through the teacher, the generator, and both scores."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train_cc.distillation.run import Run
from train_cc.distillation.state import averaged
from train_cc.draws import Draws
from train_cc.flow import interpolate, x0_from_velocity
from train_cc.models.vae import images_to_uint8
from train_cc.rewards.classifier import classifier_losses
from train_cc.run.pictures import save_grid
from train_cc.samplers import euler_sample, few_step_sample

# x_t, t on the CPU, t, y -> v_fake, v_real
Scores = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# First key of the previews' draws, after the seed; the turns have others.
PREVIEW = 3
ESTIMATE_TIME = 0.5  # t at which the two scores look at the generator's samples


def preview_inputs(run: Run) -> tuple[Tensor, Tensor, Draws]:
    """Noise and labels that are the same at every step of every run with this seed."""
    draws = Draws(run.optimisation.seed, PREVIEW, device=run.session.device)
    y = torch.arange(run.output.num_previews, device=run.session.device) * max(
        1, run.num_classes // run.output.num_previews
    )
    return draws.noise(run.output.num_previews, *run.sample_shape), y % run.num_classes, draws


@torch.no_grad()
def preview(run: Run, scores: Scores) -> dict[str, float]:
    """samples/step-N/grid.png: rows teacher, generator, real x0, fake x0. -> what the judges say of the generator's.

    The last two are x_t - t v at t = 0.5 of the generator's samples, by the real and by the fake score: where they
    differ, the generator is pulled.
    """
    noise, y, draws = preview_inputs(run)
    with averaged(run), run.session.generator_accelerator.autocast():
        x0 = few_step_sample(run.generator, noise, y, run.method.num_steps, run.method.timestep_shift, draws.noise_like)
        images = decode_all(run, x0)
    rows, names = [images_to_uint8(images).numpy()], ["generator", "real x0", "fake x0"]
    if run.output.teacher_preview_steps:
        rows.insert(0, teacher_row(run, noise, y))
        names.insert(0, f"teacher, {run.output.teacher_preview_steps} steps")
    figures = {}
    for name, judge in run.judges.items():
        losses, of_image = classifier_losses(judge, images, y)
        hits = of_image["accuracy"]
        figures |= {f"preview_loss_{name}": losses.mean().item(), f"preview_accuracy_{name}": hits.mean().item()}
        figures[f"preview_coverage_{name}"] = len(y[hits > 0].unique()) / len(y.unique())
    t = torch.full((len(y),), ESTIMATE_TIME)
    x_t, on_device = interpolate(x0, draws.noise_like(x0), t.to(x0.device)), t.to(x0.device)
    v_fake, v_real = scores(x_t, t, on_device, y)
    if run.session.is_main:
        estimates = [decode_all(run, x0_from_velocity(x_t, v, on_device)) for v in (v_real, v_fake)]
        rows += [images_to_uint8(each).numpy() for each in estimates]
        save_grid(rows, picture_path(run, run.step), names)
    return figures


def picture_path(run: Run, step: int) -> Path:
    return run.output.output_dir / "samples" / f"step-{step}" / "grid.png"


def decode_all(run: Run, x0: Tensor) -> Tensor:
    """Images in [0, 1], fp32, a few at a time: at 256 pixels the decoder's activations are large."""
    return torch.cat([run.decode(part.float()).float() for part in x0.split(4)])


def teacher_row(run: Run, noise: Tensor, y: Tensor) -> np.ndarray:
    """The multi-step teacher on the previews' noise and labels, uint8 (N, H, W, C): drawn once a process."""
    if run.teacher_row is None:
        x0 = euler_sample(run.scores.teacher, noise, y, run.output.teacher_preview_steps)
        run.teacher_row = images_to_uint8(decode_all(run, x0)).numpy()
    return run.teacher_row
