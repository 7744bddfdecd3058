"""The method: the parts of a run, the estimator turn, the generator turn, and the loop over both.

Each cycle is ``ratio_update`` estimator turns and one generator turn; ``step`` counts the generator turns.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from train_cc.draws import Draws
from train_cc.errors import InputError
from train_cc.flow import interpolate, x0_from_velocity
from train_cc.models.estimator import ScoreEstimator
from train_cc.models.generator import assemble_generator, build_generator
from train_cc.models.latents import images_to_uint8, load_decoder
from train_cc.models.sit import SiT
from train_cc.objectives import dmd_direction, dmd_loss, dmd_normaliser, velocity_matching_loss
from train_cc.run import checkpoint as checkpoints
from train_cc.run.logbook import (
    JsonLines,
    check_output_dir,
    clear_output_dir,
    library_versions,
    log_to,
    logger,
    not_finite,
    write_atomically,
)
from train_cc.run.previews import save_grid
from train_cc.run.session import Session, open_session, synchronised
from train_cc.samplers import euler_sample, few_step_input, few_step_sample, guide
from train_cc.schedules import annealing, beta_times, dynamic_guidance_scale, renoise_density

# First key of every draw, after the seed: no two uses share random numbers.
ESTIMATOR_TURN, GENERATOR_TURN, PREVIEW = 1, 2, 3


@dataclass
class Run:
    """Everything that the two turns need. ``generator`` and ``estimator`` are prepared by their accelerators."""

    session: Session
    generator: nn.Module
    estimator: nn.Module
    generator_optimizer: torch.optim.Optimizer
    estimator_optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor] | None  # of the generator's trainable parameters, by plain name
    decode: Callable[[Tensor], Tensor]  # x0 -> images in [0, 1]
    model_config: dict
    sample_shape: tuple[int, int, int]
    num_classes: int
    step: int = 0
    samples_seen: int = 0  # by the generator, over all stages

    @property
    def plain_generator(self) -> SiT:
        return self.session.generator.unwrap_model(self.generator)

    @property
    def plain_estimator(self) -> ScoreEstimator:
        return self.session.estimator.unwrap_model(self.estimator)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# Build -----------------------------------------------------------------------------------------------------------


def generator_lora_rank(args: argparse.Namespace) -> int | None:
    return 2 * args.lora_rank if args.use_lora_gen else None


def adamw(model: nn.Module, learning_rate: float, weight_decay: float, args: argparse.Namespace) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        trainable(model).values(),
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=weight_decay,
    )


def build(args: argparse.Namespace, session: Session) -> Run:
    """Load the teacher twice: as the estimator's frozen base, and as the generator's start."""
    teacher = SiT.from_pretrained(args.teacher)
    config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    if args.num_classes not in (None, config["num_classes"]):
        raise InputError(f"--num-classes is {args.num_classes}, but {args.teacher} has {config['num_classes']} classes")
    generator = build_generator(args.teacher, generator_lora_rank(args), args.seed)
    estimator = ScoreEstimator(teacher, args.lora_rank, args.lora_init_spread, args.seed)
    if args.gradient_checkpointing:
        generator.enable_gradient_checkpointing()
        estimator.network.enable_gradient_checkpointing()
    generator.to(session.device)
    estimator.to(session.device)
    decode = load_decoder(None if args.vae == "none" else args.vae, session.device)
    ema = {name: p.detach().clone() for name, p in trainable(generator).items()} if args.ema_decay else None
    generator_optimizer = adamw(generator, args.learning_rate_generator, args.weight_decay_generator, args)
    estimator_optimizer = adamw(estimator, args.learning_rate_estimator, args.weight_decay_estimator, args)
    shape, num_classes = teacher.sample_shape, teacher.null_class
    generator, generator_optimizer = session.generator.prepare(generator, generator_optimizer)
    estimator, estimator_optimizer = session.estimator.prepare(estimator, estimator_optimizer)
    return Run(
        session=session,
        generator=generator,
        estimator=estimator,
        generator_optimizer=generator_optimizer,
        estimator_optimizer=estimator_optimizer,
        ema=ema,
        decode=decode,
        model_config=config,
        sample_shape=shape,
        num_classes=num_classes,
    )


# The two turns ---------------------------------------------------------------------------------------------------


def chunk_draws(run: Run, args: argparse.Namespace, turn: int, iteration: int, chunk: int) -> Draws:
    """The draws of this process's ``chunk``-th device batch of a global batch, numbered over all processes."""
    number = chunk * run.session.world_size + run.session.rank
    return Draws(args.seed, turn, iteration, number, device=run.session.device)


def generate(run: Run, args: argparse.Namespace, draws: Draws, y: Tensor) -> Tensor:
    """x0 of the generator at a uniformly drawn one of its steps (backward simulation), with gradient if enabled."""
    noise = draws.noise(len(y), *run.sample_shape)
    index = draws.integers(args.num_steps, len(y))
    x_t, t = few_step_input(run.generator, noise, y, index, args.num_steps, args.timestep_shift, draws.noise_like)
    return x0_from_velocity(x_t, run.generator(x_t, t, y), t)


def renoise(draws: Draws, x0: Tensor, c: float, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """DynaRS: t ~ p_k(t), fresh noise. -> (x_t, noise, t on the CPU)."""
    t = beta_times(draws.uniform(len(x0)), *renoise_density(args.renoise_alpha, args.renoise_beta, c))
    noise = draws.noise_like(x0)
    return interpolate(x0, noise, t.to(x0.device, non_blocking=True)), noise, t


def labels_of(run: Run, args: argparse.Namespace, draws: Draws) -> Tensor:
    return draws.integers(run.num_classes, args.batch_size).to(run.session.device, non_blocking=True)


def estimator_turn(run: Run, args: argparse.Namespace, step: int, turn: int) -> dict[str, Tensor]:
    """One update of the fake score on what the generator makes now. -> figures as 0-d tensors on the device."""
    accelerator, chunks = run.session.estimator, args.gradient_accumulation_steps
    c = annealing(step, args.dynamic_steps)
    total = torch.zeros((), device=run.session.device)
    for chunk in synchronised(accelerator, run.estimator, chunks):
        draws = chunk_draws(run, args, ESTIMATOR_TURN, step * args.ratio_update + turn, chunk)
        y = labels_of(run, args, draws)
        with torch.no_grad():
            x0 = generate(run, args, draws, y)
        x_t, noise, t = renoise(draws, x0, c, args)
        v_fake = run.estimator(x_t, t.to(x_t.device), y, lora_scale=args.lora_scale_fake)
        loss = velocity_matching_loss(v_fake, x0, noise) / chunks
        accelerator.backward(loss)
        total += loss.detach()
    grad_norm = update(accelerator, run.estimator, run.estimator_optimizer, args.max_grad_norm)
    return {"loss_fake": total, "grad_norm_estimator": grad_norm}


@torch.no_grad()
def scores(run: Run, args: argparse.Namespace, x_t: Tensor, t: Tensor, y: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """(v_fake, v_real) at x_t. Guidance applies to the real score alone. t (B,) on the CPU."""
    v_fake = run.estimator(x_t, t.to(x_t.device), y, lora_scale=args.lora_scale_fake)
    real = partial(run.estimator, lora_scale=dynamic_guidance_scale(args.lora_scale_real, c))
    guided = guide(real, run.num_classes, args.real_guidance_scale, tuple(args.real_guidance_interval))
    v_real = guided(x_t, t if args.real_guidance_scale > 1 else t.to(x_t.device), y)
    return v_fake, v_real


def generator_turn(run: Run, args: argparse.Namespace, step: int) -> dict[str, Tensor]:
    """One update of the generator along the DMD direction. -> figures as 0-d tensors on the device."""
    accelerator, chunks = run.session.generator, args.gradient_accumulation_steps
    c = annealing(step, args.dynamic_steps)
    totals: dict[str, Tensor] = {}
    for chunk in synchronised(accelerator, run.generator, chunks):
        draws = chunk_draws(run, args, GENERATOR_TURN, step, chunk)
        y = labels_of(run, args, draws)
        x0 = generate(run, args, draws, y)
        x_t, noise, t = renoise(draws, x0.detach(), c, args)
        v_fake, v_real = scores(run, args, x_t, t, y, c)
        direction = dmd_direction(v_real, v_fake, x0, noise)
        loss = dmd_loss(x0, direction)
        accelerator.backward(loss / chunks)
        figures = {
            "loss_dmd": loss.detach(),
            "score_gap": (v_real.float() - v_fake.float()).abs().mean(),
            "normaliser": dmd_normaliser(v_real, x0.detach(), noise).mean(),
        }
        totals = {name: totals.get(name, 0) + value / chunks for name, value in figures.items()}
    grad_norm = update(accelerator, run.generator, run.generator_optimizer, args.max_grad_norm)
    if run.ema is not None:
        average = get_ema_multi_avg_fn(args.ema_decay)
        average(list(run.ema.values()), [p.detach() for p in trainable(run.plain_generator).values()], None)
    return totals | {"grad_norm_generator": grad_norm}


def update(accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
    """Clip, step, clear. -> the gradients' norm before clipping."""
    grad_norm = accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


# The loop --------------------------------------------------------------------------------------------------------


def train(run: Run, args: argparse.Namespace) -> None:
    """From ``run.step`` to ``max_train_steps`` generator turns; writes logs, previews, checkpoints and the export."""
    folder, session = args.output_dir, run.session
    batch = args.batch_size * args.gradient_accumulation_steps * session.world_size
    logs = None
    if session.is_main:
        logs = [JsonLines(folder / "loss_logs" / f"loss_{name}_log.jsonl", run.step) for name in ("gen", "gui")]
    progress = tqdm(
        total=args.max_train_steps,
        initial=run.step,
        desc="generator updates",
        disable=not session.is_main,
        mininterval=2,
    )
    began = time.monotonic()
    for step in range(run.step, args.max_train_steps):
        estimator_figures = [estimator_turn(run, args, step, turn) for turn in range(args.ratio_update)]
        generator_figures = generator_turn(run, args, step)
        run.step = step + 1
        run.samples_seen += batch

        estimator_rows, row = fetch(session, estimator_figures, generator_figures)
        now = time.monotonic()
        seconds, began = round(now - began, 4), now
        c = annealing(step, args.dynamic_steps)
        row |= {"lora_scale_real": dynamic_guidance_scale(args.lora_scale_real, c), "samples_seen": run.samples_seen}
        first = step * args.ratio_update + 1
        estimator_rows = [
            {"step": run.step, "iteration": first + i} | figures | {"seconds": seconds}
            for i, figures in enumerate(estimator_rows)
        ]
        row = {"step": run.step} | row | {"seconds": seconds}
        if logs:
            logs[0].write([row])
            logs[1].write(estimator_rows)
        stop_unless_finite(run, [*estimator_rows, row])
        progress.set_postfix(dmd=f"{row['loss_dmd']:.4f}", fake=f"{estimator_rows[-1]['loss_fake']:.4f}", refresh=False)
        progress.update()

        if args.num_previews and (run.step % args.sample_steps == 0 or run.step == args.max_train_steps):
            preview(run, args)
            if session.is_main:
                logger.info("step %d: %s", run.step, ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "step"))
        if run.step % args.checkpoint_steps == 0 or run.step == args.max_train_steps:
            save(run, args)
    progress.close()
    export(run, args)


def fetch(session: Session, estimator: list[dict], generator: dict) -> tuple[list[dict], dict]:
    """All figures of a cycle as numbers, averaged over processes: the one time in it that the device is asked."""
    flat = torch.stack([value.float() for figures in [*estimator, generator] for value in figures.values()])
    values = iter(session.mean(flat).tolist())
    estimator = [{name: next(values) for name in figures} for figures in estimator]
    return estimator, {name: next(values) for name in generator}


def stop_unless_finite(run: Run, rows: list[dict]) -> None:
    """Under fp16 an overflowing gradient is the scaler's to skip; a loss never may be."""
    scaled = run.session.generator.scaler is not None
    for row in rows:
        bad = [name for name in not_finite(row) if not (scaled and name.startswith("grad_norm"))]
        if bad:
            told = ", ".join(f"{name} is {row[name]}" for name in bad)
            message = f"step {run.step}: {told}. Stopped; the last checkpoint is kept. Lower the learning rates?"
            logger.error(message)
            raise InputError(message)


@contextlib.contextmanager
def averaged_weights(run: Run) -> Iterator[None]:
    """The generator with its EMA weights, where there is an EMA; the raw ones come back afterwards, bit for bit."""

    def swap():
        with torch.no_grad():
            for name, p in trainable(run.plain_generator).items():
                held = p.clone()
                p.copy_(run.ema[name])
                run.ema[name].copy_(held)

    if run.ema is not None:
        swap()
    try:
        yield
    finally:
        if run.ema is not None:
            swap()


def preview_inputs(run: Run, args: argparse.Namespace) -> tuple[Tensor, Tensor, Draws]:
    """Noise and labels that are the same at every step of every run with this seed."""
    draws = Draws(args.seed, PREVIEW, device=run.session.device)
    y = torch.arange(args.num_previews, device=run.session.device) * max(1, run.num_classes // args.num_previews)
    return draws.noise(args.num_previews, *run.sample_shape), y % run.num_classes, draws


@torch.no_grad()
def preview(run: Run, args: argparse.Namespace) -> None:
    """samples/step-N/grid.png: the teacher's row (drawn once, kept in samples/teacher.npy) above the generator's."""
    noise, y, draws = preview_inputs(run, args)
    rows, kept = [], args.output_dir / "samples" / "teacher.npy"
    if args.teacher_preview_steps:
        if not kept.exists():
            teacher = partial(run.estimator, lora_scale=0.0)
            images = images_to_uint8(run.decode(euler_sample(teacher, noise, y, args.teacher_preview_steps)))
            run.session.barrier()  # every rank has seen that there was none
            if run.session.is_main:
                kept.parent.mkdir(parents=True, exist_ok=True)
                np.save(kept, images.numpy())
            run.session.barrier()
        rows.append(np.load(kept))
    with averaged_weights(run):
        x0 = few_step_sample(run.generator, noise, y, args.num_steps, args.timestep_shift, draws.noise_like)
    if run.session.is_main:
        rows.append(images_to_uint8(run.decode(x0)).numpy())
        save_grid(rows, args.output_dir / "samples" / f"step-{run.step}" / "grid.png")


# Saving, resuming, exporting ---------------------------------------------------------------------------------------


def save(run: Run, args: argparse.Namespace) -> None:
    generator, estimator = run.plain_generator, run.plain_estimator
    parts = {
        "accelerator_1/generator.safetensors": checkpoints.trained_state(generator),
        "accelerator_1/optimizer.pt": checkpoints.optimizer_state(generator, run.generator_optimizer.optimizer),
        "accelerator_2/estimator_lora.safetensors": lora_state(estimator),
        "accelerator_2/optimizer.pt": checkpoints.optimizer_state(estimator, run.estimator_optimizer.optimizer),
    }
    if run.ema is not None:
        parts["accelerator_1/ema.safetensors"] = {name: value.cpu() for name, value in run.ema.items()}
    units = {
        "samples_seen": run.samples_seen,
        "model_config": run.model_config,
        "arguments": json.loads(json.dumps(vars(args), default=str)),
        "scalers": [a.scaler and a.scaler.state_dict() for a in (run.session.generator, run.session.estimator)],
    }
    if run.session.is_main:
        path = checkpoints.write_checkpoint(args.output_dir / "checkpoints", run.step, parts, units)
        checkpoints.rotate_checkpoints(args.output_dir / "checkpoints", args.keep_checkpoints, args.resume_ckpt)
        logger.info("checkpoint %s", path)
    run.session.barrier()


def lora_state(estimator: ScoreEstimator) -> dict[str, Tensor]:
    return {name: value for name, value in checkpoints.trained_state(estimator).items() if "lora_" in name}


def restore(run: Run, checkpoint: checkpoints.Checkpoint) -> None:
    """Weights, moments, EMA, scaler and step. The draws need no state, and the learning rate is the command line's."""
    generator, estimator, source = run.plain_generator, run.plain_estimator, str(checkpoint.path)
    frozen_buffers = dict(estimator.named_buffers())
    checkpoints.restore_trained(generator, checkpoint.read("accelerator_1/generator.safetensors"), source)
    lora = checkpoint.read("accelerator_2/estimator_lora.safetensors")
    checkpoints.restore_trained(estimator, lora | frozen_buffers, source)
    for model, optimizer, name in (
        (generator, run.generator_optimizer.optimizer, "accelerator_1/optimizer.pt"),
        (estimator, run.estimator_optimizer.optimizer, "accelerator_2/optimizer.pt"),
    ):
        checkpoints.restore_optimizer(model, optimizer, checkpoint.read(name))
    if run.ema is not None:
        name = "accelerator_1/ema.safetensors"
        state = checkpoint.read(name) if checkpoint.has(name) else trainable(generator)
        with torch.no_grad():
            for key, value in run.ema.items():
                value.copy_(state[key])
    for accelerator, state in zip(
        (run.session.generator, run.session.estimator), checkpoint.units["scalers"], strict=True
    ):
        if accelerator.scaler is not None and state:
            accelerator.scaler.load_state_dict(state)
    run.step, run.samples_seen = checkpoint.step, checkpoint.units["samples_seen"]


def export(run: Run, args: argparse.Namespace) -> None:
    """generator/: the plain SiT, with EMA weights where there is an EMA, LoRA merged."""
    with averaged_weights(run):
        # On a CPU the state shares the parameters' memory: it is used up before the raw weights come back.
        state = checkpoints.trained_state(run.plain_generator)
        if run.session.is_main:
            generator = assemble_generator(run.model_config, state, args.teacher, generator_lora_rank(args))
    if run.session.is_main:
        target = args.output_dir / "generator"
        temporary = target.with_name("generator.tmp")
        generator.save_pretrained(temporary)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        logger.info("generator after %d updates: %s", run.step, target)
    run.session.barrier()


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """What the run starts from; refuses an output folder that holds a run which this one would not continue."""
    own = args.output_dir / "checkpoints"
    newest = checkpoints.newest_checkpoint(own) if args.auto_resume else None
    if newest is not None:
        return newest
    resumed_here = args.resume_ckpt is not None and own.resolve() in args.resume_ckpt.resolve().parents
    # A kill before the first checkpoint leaves nothing to resume: the same command starts again.
    started_only = args.auto_resume and (args.output_dir / "args.json").is_file()
    if not (resumed_here or started_only):
        check_output_dir(args.output_dir, args.overwrite)
    return args.resume_ckpt


def run_stage(name: str, args: argparse.Namespace, notes: list[str]) -> None:
    """One stage from a validated command line: nothing is written before every input has been read."""
    source = find_checkpoint(args)
    checkpoint = checkpoints.open_checkpoint(source) if source is not None else None
    session = open_session(args.mixed_precision)
    run = build(args, session)
    if checkpoint is not None:
        restore(run, checkpoint)
    continues = source is not None and args.output_dir.resolve() in source.resolve().parents
    if session.is_main:
        if continues:
            args.output_dir.mkdir(parents=True, exist_ok=True)
        else:
            clear_output_dir(args.output_dir)
        log_to(args.output_dir)
        record = {"stage": name, "command": sys.argv, "arguments": vars(args), "versions": library_versions()}
        write_atomically(args.output_dir / "args.json", json.dumps(record, indent=2, default=str) + "\n")
        describe(run, args, name, source, continues)
        for note in notes:
            logger.info(note)
    session.barrier()
    if run.step >= args.max_train_steps:
        logger.info("step %d of --max-train-steps %d: nothing is left to train", run.step, args.max_train_steps)
    train(run, args)


def describe(run: Run, args: argparse.Namespace, name: str, source: Path | None, continues: bool) -> None:
    session = run.session
    batch = args.batch_size * args.gradient_accumulation_steps * session.world_size
    for role, model in (("generator", run.plain_generator), ("estimator", run.plain_estimator)):
        trained = sum(p.numel() for p in trainable(model).values())
        logger.info("%s: %d parameters trained of %d", role, trained, sum(p.numel() for p in model.parameters()))
    logger.info(
        "%s on %d x %s, precision %s; effective batch %d = %d a process x %d accumulated x %d process(es)",
        name,
        session.world_size,
        session.device.type,
        session.generator.mixed_precision,
        batch,
        args.batch_size,
        args.gradient_accumulation_steps,
        session.world_size,
    )
    if source is not None:
        logger.info(
            "%s from %s at step %d: weights, optimizer moments%s carry over; learning rates are this command's",
            "continues" if continues else "starts",
            source,
            run.step,
            " and EMA" if run.ema is not None else "",
        )
