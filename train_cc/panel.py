"""The pictures of a sample step: the same noise and labels through the teacher, the generator, and both scores."""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train_cc.draws import Draws
from train_cc.flow import interpolate, x0_from_velocity
from train_cc.models.latents import images_to_uint8
from train_cc.models.reward import classifier_loss
from train_cc.parts import Run, averaged_weights
from train_cc.run.previews import save_grid
from train_cc.samplers import euler_sample, few_step_sample

# x_t, t on the CPU, t, y -> v_fake, v_real
Scores = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# First key of the previews' draws, after the seed; the turns have others.
PREVIEW = 3
ESTIMATE_TIME = 0.5  # t at which the two scores look at the generator's samples


def preview_inputs(run: Run, args: argparse.Namespace) -> tuple[Tensor, Tensor, Draws]:
    """Noise and labels that are the same at every step of every run with this seed."""
    draws = Draws(args.seed, PREVIEW, device=run.session.device)
    y = torch.arange(args.num_previews, device=run.session.device) * max(1, run.num_classes // args.num_previews)
    return draws.noise(args.num_previews, *run.sample_shape), y % run.num_classes, draws


@torch.no_grad()
def preview(run: Run, args: argparse.Namespace, scores: Scores) -> dict[str, float]:
    """samples/step-N/grid.png: rows teacher, generator, real x0, fake x0. -> what the judges say of the generator's.

    The last two are x_t - t v at t = 0.5 of the generator's samples, by the real and by the fake score: where they
    differ, the generator is pulled.
    """
    noise, y, draws = preview_inputs(run, args)
    rows, names = [], []
    if args.teacher_preview_steps:
        rows.append(teacher_row(run, args, noise, y))
        names.append(f"teacher, {args.teacher_preview_steps} steps")
    with averaged_weights(run), run.session.generator.autocast():
        x0 = few_step_sample(run.generator, noise, y, args.num_steps, args.timestep_shift, draws.noise_like)
        images = decode_all(run, x0)
    figures = {}
    for name, judge in run.judges.items():
        losses, hits = classifier_loss(judge, images, y)
        figures |= {f"preview_loss_{name}": losses.mean().item(), f"preview_accuracy_{name}": hits.mean().item()}
        figures[f"preview_coverage_{name}"] = len(y[hits > 0].unique()) / len(y.unique())
    t = torch.full((len(y),), ESTIMATE_TIME)
    x_t, on_device = interpolate(x0, draws.noise_like(x0), t.to(x0.device)), t.to(x0.device)
    v_fake, v_real = scores(x_t, t, on_device, y)
    if run.session.is_main:
        estimates = [decode_all(run, x0_from_velocity(x_t, v, on_device)) for v in (v_real, v_fake)]
        rows += [images_to_uint8(each).numpy() for each in (images, *estimates)]
        names += ["generator", "real x0", "fake x0"]
        save_grid(rows, picture_path(args, run.step), names)
    return figures


def picture_path(args: argparse.Namespace, step: int) -> Path:
    return args.output_dir / "samples" / f"step-{step}" / "grid.png"


def decode_all(run: Run, x0: Tensor) -> Tensor:
    """Images in [0, 1], fp32, a few at a time: at 256 pixels the decoder's activations are large."""
    return torch.cat([run.decode(part.float()).float() for part in x0.split(4)])


def teacher_row(run: Run, args: argparse.Namespace, noise: Tensor, y: Tensor) -> np.ndarray | None:
    """The multi-step teacher on the previews' noise and labels: drawn once a run, kept in samples/.

    The main process alone reads and writes it (-> None on others); all processes draw it, or none.
    """
    name = f"teacher-{args.teacher_preview_steps}-steps-seed-{args.seed}.npy"
    session, kept = run.session, args.output_dir / "samples" / name
    fits = session.is_main and kept.exists() and len(np.load(kept)) == args.num_previews
    if session.mean(torch.tensor(float(fits), device=session.device)).item() == 0:
        x0 = euler_sample(partial(run.estimator, lora_scale=0.0), noise, y, args.teacher_preview_steps)
        if session.is_main:
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_name("teacher.tmp.npy")
            np.save(temporary, images_to_uint8(decode_all(run, x0)).numpy())
            os.replace(temporary, kept)
    return np.load(kept) if session.is_main else None
