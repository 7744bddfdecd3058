"""The method: the estimator turn, the generator turn, and the loop over both.

Each cycle is ``ratio_update`` estimator turns and one generator turn; ``step`` counts the generator turns.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from train_cc.diagnostics import UpdateSize, band_means, by_band, compare_gradients, gathered
from train_cc.draws import Draws
from train_cc.dry_run import plan
from train_cc.flow import interpolate, x0_from_velocity
from train_cc.io.errors import InputError
from train_cc.io.write import library_versions, locked, write_atomically
from train_cc.objectives import dmd_direction, dmd_loss, dmd_normaliser, velocity_matching_losses
from train_cc.panel import picture_path, preview
from train_cc.parts import Run, build, effective_batch, trainable
from train_cc.run.checkpoint import Checkpoint, open_checkpoint
from train_cc.run.logbook import JsonLines, clear_output_dir, log_to, logger, not_finite
from train_cc.run.session import Session, StopSignal, open_session, synchronised
from train_cc.run.trackers import show_picture, tracking
from train_cc.samplers import apply_guidance, few_step_input, guided_rows
from train_cc.saving import drop_later_checkpoints, export, find_checkpoint, restore, save
from train_cc.schedules import annealing, beta_times, dynamic_guidance_scale, renoise_density

# First key of the draws, after the seed: no two uses share random numbers; the previews' is in panel.py.
ESTIMATOR_TURN, GENERATOR_TURN = 1, 2


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


def renoise(draws: Draws, x0: Tensor, c: float, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DynaRS: t ~ p_k(t), fresh noise. -> (x_t, noise, t on the CPU and on the device)."""
    t = beta_times(draws.uniform(len(x0)), *renoise_density(args.renoise_alpha, args.renoise_beta, c))
    noise = draws.noise_like(x0)
    t_device = t.to(x0.device, non_blocking=True)
    return interpolate(x0, noise, t_device), noise, t, t_device


def labels_of(run: Run, args: argparse.Namespace, draws: Draws) -> Tensor:
    return draws.integers(run.num_classes, args.batch_size).to(run.session.device, non_blocking=True)


@torch.no_grad()
def estimator_batches(run: Run, args: argparse.Namespace, step: int) -> list[list[tuple[Draws, Tensor, Tensor]]]:
    """(draws, y, x0) of each estimator turn of a cycle, chunk by chunk.

    The generator does not change between its updates: all samples are drawn under one autocast, which casts its fp32
    weights once and not at every call.
    """
    batches = []
    with run.session.generator.autocast():
        for turn in range(args.ratio_update):
            iteration = step * args.ratio_update + turn
            chunks = range(args.gradient_accumulation_steps)
            draws = [chunk_draws(run, args, ESTIMATOR_TURN, iteration, chunk) for chunk in chunks]
            labels = [labels_of(run, args, each) for each in draws]
            x0 = [generate(run, args, *each) for each in zip(draws, labels, strict=True)]
            batches.append(list(zip(draws, labels, x0, strict=True)))
    return batches


def estimator_turn(run: Run, args: argparse.Namespace, step: int, batches: list) -> dict[str, Tensor]:
    """One update of the fake score on what the generator makes now. -> figures as 0-d tensors on the device."""
    accelerator, chunks = run.session.estimator, args.gradient_accumulation_steps
    c = annealing(step, args.dynamic_steps)
    totals: dict[str, Tensor] = {}
    for chunk in synchronised(accelerator, run.estimator, chunks):
        draws, y, x0 = batches[chunk]
        x_t, noise, _, t = renoise(draws, x0, c, args)
        v_fake = run.estimator(x_t, t, y, lora_scale=args.lora_scale_fake)
        losses = velocity_matching_losses(v_fake, x0, noise)
        accelerator.backward(losses.mean() / chunks)
        add(totals, {"loss_fake": losses.detach().mean()} | by_band("loss_fake", losses.detach(), t), chunks)
    blocks = run.plain_estimator.network.blocks
    norm, ratio = update(accelerator, run.estimator, blocks, run.estimator_optimizer, args.max_grad_norm)
    return totals | {"grad_norm_estimator": norm, "update_ratio_estimator": ratio}


def add(totals: dict[str, Tensor], figures: dict[str, Tensor], chunks: int) -> None:
    """The mean over the chunks of an accumulated batch, added up."""
    for name, value in figures.items():
        totals[name] = totals.get(name, 0) + value / chunks


@torch.no_grad()
def scores(
    run: Run, args: argparse.Namespace, x_t: Tensor, t_cpu: Tensor, t: Tensor, y: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    """(v_fake, v_real) at x_t by one network call, each row at its own LoRA scale.

    Guidance applies to the real score alone, and finds its rows in ``t_cpu``.
    """
    weight, batch = args.real_guidance_scale, len(x_t)
    rows = guided_rows(t_cpu, weight, args.real_guidance_interval)
    scale_real = dynamic_guidance_scale(args.lora_scale_real, c)
    lora_scale = torch.tensor([args.lora_scale_fake] * batch + [scale_real] * (batch + len(rows)))
    rows = rows.to(x_t.device, non_blocking=True)
    null = torch.full_like(rows, run.num_classes)
    x_t, t = (torch.cat([each, each, each[rows]]) for each in (x_t, t))
    v = run.estimator(x_t, t, torch.cat([y, y, null]), lora_scale=lora_scale)
    v_fake, v_real, v_null = v.split([batch, batch, len(rows)])
    return v_fake, apply_guidance(v_real, v_null, rows, weight)


def generator_turn(run: Run, args: argparse.Namespace, step: int) -> dict[str, Tensor]:
    """One update of the generator along the DMD direction. -> figures as 0-d tensors on the device."""
    accelerator, chunks = run.session.generator, args.gradient_accumulation_steps
    c = annealing(step, args.dynamic_steps)
    totals: dict[str, Tensor] = {}
    for chunk in synchronised(accelerator, run.generator, chunks):
        draws = chunk_draws(run, args, GENERATOR_TURN, step, chunk)
        y = labels_of(run, args, draws)
        x0 = generate(run, args, draws, y)
        x_t, noise, t_cpu, t = renoise(draws, x0.detach(), c, args)
        v_fake, v_real = scores(run, args, x_t, t_cpu, t, y, c)
        direction = dmd_direction(v_real, v_fake, x0, noise)
        loss_dmd = dmd_loss(x0, direction)
        loss, reward_figures = loss_dmd, {}
        if run.reward is not None:
            reward = run.reward(x0, y)
            # The same gradient as loss_dmd + reward_weight * loss_reward on one graph: the reward's is known at x0.
            of_reward = args.reward_weight * reward.gradient
            loss = loss_dmd + (x0.float() * of_reward).sum()
            reward_figures = {"loss_reward": reward.loss, "accuracy_reward": reward.accuracy}
            reward_figures |= compare_gradients(direction, of_reward)
        accelerator.backward(loss / chunks)
        gap = (v_real.float() - v_fake.float()).abs().mean(dim=(1, 2, 3))
        figures = {
            "loss_dmd": loss_dmd.detach(),
            "score_gap": gap.mean(),
            "normaliser": dmd_normaliser(v_real, x0.detach(), noise).mean(),
            "t_mean": t.float().mean(),
        }
        add(totals, figures | by_band("score_gap", gap, t) | reward_figures, chunks)
    blocks = run.plain_generator.blocks
    norm, ratio = update(accelerator, run.generator, blocks, run.generator_optimizer, args.max_grad_norm)
    if run.ema is not None:
        average = get_ema_multi_avg_fn(args.ema_decay)
        average(list(run.ema.values()), [p.detach() for p in trainable(run.plain_generator).values()], None)
    return totals | {"grad_norm_generator": norm, "update_ratio_generator": ratio}


def update(
    accelerator: Accelerator,
    model: nn.Module,
    blocks: nn.ModuleList,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
) -> tuple[Tensor, Tensor]:
    """Clip, step, clear. -> the gradients' norm before clipping, and the update's size in the middle of ``blocks``."""
    norm = gathered(accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_grad_norm))
    size = UpdateSize(blocks)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, size.ratio()


# The loop --------------------------------------------------------------------------------------------------------


def train(run: Run, args: argparse.Namespace) -> None:
    """From ``run.step`` to ``max_train_steps`` generator turns; writes logs, previews, checkpoints and the export."""
    session = run.session
    batch = effective_batch(args, session.world_size)
    logs = open_logs(run, args) if session.is_main else None
    progress = tqdm(
        desc="generator updates",
        total=args.max_train_steps,
        initial=run.step,
        disable=not session.is_main,
        mininterval=2,
    )
    with tracking(session.generator, vars(args)), progress, StopSignal() as stop:
        for step in range(run.step, args.max_train_steps):
            began = time.monotonic()
            estimator_rows, row, stopping = cycle(run, args, step, bool(stop.name))
            run.step, run.samples_seen = step + 1, run.samples_seen + batch
            seconds = round(time.monotonic() - began, 4)
            scale = dynamic_guidance_scale(args.lora_scale_real, annealing(step, args.dynamic_steps))
            row = {"step": run.step} | row | {"lora_scale_real": scale, "samples_seen": run.samples_seen}
            stop_unless_finite(run, [*estimator_rows, row])
            last = run.step == args.max_train_steps
            due = run.step % args.sample_steps == 0
            sampled = args.num_previews and (last or due)
            if sampled:
                figures = preview(run, args, partial(scores, run, args, c=annealing(step, args.dynamic_steps)))
                row |= figures if due else {}  # where a run was cut short must not show in its log
            if logs:
                first = step * args.ratio_update + 1
                logs[0].write([row | {"seconds": seconds}])
                logs[1].write(
                    {"step": run.step, "iteration": first + i} | figures | {"seconds": seconds}
                    for i, figures in enumerate(estimator_rows)
                )
            if sampled and session.is_main:
                show_picture(session.generator, picture_path(args, run.step), run.step)
                logger.info(", ".join(f"{name} {value:.5g}" for name, value in row.items() if value is not None))
            session.generator.log({name: value for name, value in row.items() if value is not None}, step=run.step)
            losses = row | estimator_rows[-1]
            shown = [name for name in ("loss_dmd", "loss_reward", "loss_fake") if name in losses]
            progress.set_postfix({name: f"{losses[name]:.4f}" for name in shown}, refresh=False)
            progress.update()

            if last or stopping or run.step % args.checkpoint_steps == 0:
                path = save(run, args)
            if stopping and not last:
                logger.info(
                    "stopped at step %d as asked; the same command with --auto-resume, or --resume-ckpt %s, continues",
                    run.step,
                    path,
                )
                return
    export(run, args)


def cycle(run: Run, args: argparse.Namespace, step: int, stopping: bool = False) -> tuple[list[dict], dict, bool]:
    """``ratio_update`` estimator turns and a generator turn. -> their log rows, and whether to stop."""
    estimator_figures = [estimator_turn(run, args, step, batches) for batches in estimator_batches(run, args, step)]
    generator_figures = generator_turn(run, args, step)
    for figures in estimator_figures:  # the bands of all turns together are one line's
        for name in [name for name in figures if name.startswith("loss_fake_")]:
            generator_figures[name] = generator_figures.get(name, 0) + figures.pop(name)
    estimator_rows, row, stopping = fetch(run.session, estimator_figures, generator_figures, stopping)
    return estimator_rows, band_means(row), stopping


def open_logs(run: Run, args: argparse.Namespace) -> list[JsonLines]:
    """The generator's and the estimator's log; rows after the step that is resumed from are dropped."""
    return [JsonLines(args.output_dir / "loss_logs" / f"loss_{name}_log.jsonl", run.step) for name in ("gen", "gui")]


def fetch(session: Session, estimator: list[dict], generator: dict, stopping: bool) -> tuple[list[dict], dict, bool]:
    """All figures of a cycle as numbers, averaged over processes: the one time in it that the device is asked.

    ``stopping``: whether this process was asked to stop; comes back as whether any was.
    """
    flat = [value.float() for figures in [*estimator, generator] for value in figures.values()]
    flat.append(torch.tensor(float(stopping), device=session.device))
    values = iter(session.mean(torch.stack(flat)).tolist())
    estimator = [{name: next(values) for name in figures} for figures in estimator]
    return estimator, {name: next(values) for name in generator}, next(values) > 0


def stop_unless_finite(run: Run, rows: list[dict]) -> None:
    """Under fp16 an overflowing gradient is the scaler's to skip; a loss never may be."""
    scaled = run.session.generator.scaler is not None
    for row in rows:
        bad = [name for name in not_finite(row) if not (scaled and name.startswith("grad_norm"))]
        if bad:
            told = ", ".join(f"{name} is {row[name]}" for name in bad)
            message = f"step {run.step}: {told}. Stopped; the last checkpoint is kept. Lower the learning rates?"
            logger.debug(message)  # into log.txt; the terminal gets it as the error that it is
            raise InputError(message)


def run_stage(name: str, args: argparse.Namespace, notes: list[str]) -> None:
    """One stage from a validated command line: nothing is written before every input has been read."""
    if args.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            print("\n".join([plan(name, args, int(os.environ.get("WORLD_SIZE", 1))), *notes]))
        return
    source, continues = find_checkpoint(args)
    if source is None and name == "dmdr_refl":
        raise InputError("--resume-ckpt is missing: this stage starts from a cold start's torch_units/step-N.pt")
    checkpoint = open_checkpoint(source) if source is not None else None
    if checkpoint is not None:
        moments = checkpoint.units["arguments"].get("optimizer", "adamw")
        if moments != args.optimizer:
            raise InputError(f"--optimizer is {args.optimizer}, but {source} holds the moments of {moments}")
    session = open_session(args.mixed_precision, args.report_to, args.output_dir)
    run = build(args, session)
    if checkpoint is not None:
        restore(run, checkpoint)
    if not session.agree(run.step):
        raise InputError(f"the processes found different checkpoints ({source} here): is --output-dir shared by all?")
    with locked(args.output_dir) if session.is_main else contextlib.nullcontext():
        begin(name, args, run, checkpoint, continues, notes)
        train(run, args)


def begin(
    name: str, args: argparse.Namespace, run: Run, checkpoint: Checkpoint | None, continues: bool, notes: list[str]
) -> None:
    """The first writing of a run: its folder, arguments and log."""
    session = run.session
    if session.is_main:
        if not continues:
            clear_output_dir(args.output_dir)
        record = {"stage": name, "command": sys.argv, "arguments": vars(args), "versions": library_versions()}
        record["sha256"] = run.hashes
        write_atomically(args.output_dir / "args.json", json.dumps(record, indent=2, default=str) + "\n")
        log_to(args.output_dir)
        describe(run, args, name, checkpoint, continues)
        for note in notes:
            logger.info(note)
        if continues:
            drop_later_checkpoints(args, run.step)
        if run.step >= args.max_train_steps:
            logger.info("step %d of --max-train-steps %d: nothing is left to train", run.step, args.max_train_steps)
    session.barrier()


def describe(run: Run, args: argparse.Namespace, name: str, checkpoint: Checkpoint | None, continues: bool) -> None:
    session, source = run.session, checkpoint and checkpoint.path
    batch = effective_batch(args, session.world_size)
    for role, model in (("generator", run.plain_generator), ("estimator", run.plain_estimator)):
        trained = sum(p.numel() for p in trainable(model).values())
        logger.info("%s: %d parameters trained of %d", role, trained, sum(p.numel() for p in model.parameters()))
    logger.info(
        "%s on %d x %s%s, precision %s; effective batch %d = %d a process x %d accumulated x %d process(es)",
        name,
        session.world_size,
        session.device.type,
        ", sharded (FSDP2)" if session.sharded else "",
        session.generator.mixed_precision,
        batch,
        args.batch_size,
        args.gradient_accumulation_steps,
        session.world_size,
    )
    for flag, digest in run.hashes.items():
        logger.info("%s %s: SHA-256 %s", flag, getattr(args, flag), digest)
    before = checkpoint.units.get("effective_batch", batch) if checkpoint is not None else batch
    if before != batch:
        logger.warning("WARNING: the effective batch was %d in %s, and is %d here", before, source, batch)
    if source is not None:
        logger.info(
            "%s from %s at step %d: weights, optimizer moments%s and the step carry over; "
            "the learning rates are this command's: generator %g, estimator %g",
            "continues" if continues else "starts",
            source,
            run.step,
            ", EMA" if run.ema is not None else "",
            args.learning_rate_generator,
            args.learning_rate_estimator,
        )
