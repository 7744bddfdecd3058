"""The loop over both turns: cycle, record, show, save. One line of either log is one turn."""

import time
from collections.abc import Callable
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from train_cc.distillation.panel import picture_path, preview
from train_cc.distillation.scores import scores
from train_cc.distillation.settings import Run, trainable
from train_cc.distillation.state import export, require_finite_run, save
from train_cc.distillation.turns import (
    Figures,
    estimator_batches,
    estimator_turn,
    fill_memories,
    generator_turn,
    observe_batches,
)
from train_cc.io.errors import InputError
from train_cc.io.saying import beating, saying
from train_cc.run.checkpoint import kept
from train_cc.run.diagnostics import UpdateSize, gathered
from train_cc.run.logbook import BY_BAND, JsonLines, columns, logger, not_finite
from train_cc.run.session import Session
from train_cc.run.stop import StopSignal
from train_cc.run.trackers import show_picture, tracking
from train_cc.schedules import annealing, dynamic_guidance_scale

Row = dict[str, float | None]
BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed} gone, {remaining} left{postfix}"
MOST_OVERFLOWS = 50  # in a row: a scaler that starts at 2^16 has been halved to 2^-34


def train(run: Run) -> None:
    """From ``run.step`` to ``max_train_steps`` generator turns; writes logs, previews, checkpoints and the export."""
    session, output = run.session, run.output
    logs = open_logs(run) if session.is_main else []
    fill_memories(run)
    progress = tqdm(
        desc="generator updates",
        total=output.max_train_steps,
        initial=run.step,
        disable=not session.is_main,
        mininterval=2,
        bar_format=BAR,
    )
    moving = beating(lambda _: progress.refresh())  # where an update takes long, the time goes on
    with tracking(session.generator_accelerator, run.arguments), progress, moving, StopSignal() as stop:
        for step in range(run.step, output.max_train_steps):
            began = time.monotonic()
            with stop.update():
                estimator_rows, row, stopping = cycle(run, step, bool(stop.name))
            seconds = round(time.monotonic() - began, 4)
            row = count_update(run, step, row)
            stop_unless_finite(run, [*estimator_rows, row])
            last = run.step == output.max_train_steps
            sampled = bool(output.num_previews) and (last or run.step % output.sample_steps == 0)
            if sampled:
                with stop.update():
                    row |= show(run, step)
            write_rows(run, logs, estimator_rows, row, seconds)
            tell(run, progress, row, sampled)
            if last or stopping or run.step % output.checkpoint_steps == 0:
                path = save(run)
            if stopping and not last:
                logger.info(
                    "stopped at step %d as asked; the same command with --auto-resume, or --resume-ckpt %s, continues",
                    run.step,
                    path,
                )
                return
    with saying(f"writing {output.output_dir / 'generator'}"):
        export(run)


# A cycle ----------------------------------------------------------------------------------------------------------


def cycle(run: Run, step: int, stopping: bool = False) -> tuple[list[Row], Row, bool]:
    """``ratio_update`` estimator turns and a generator turn, each with its update. -> log rows, whether to stop."""
    estimator_figures = []
    observed = run.method.frechet_observe or run.method.ratio_update
    for number, batches in enumerate(estimator_batches(run, step)):
        if number < observed:
            observe_batches(run, batches)
        estimator_figures.append(estimator_turn(run, step, batches) | update_estimator(run))
    figures = generator_turn(run, step) | update_generator(run)
    of_band = f"loss_fake{BY_BAND}"  # the bands of all estimator turns together are one line's
    figures[of_band] = sum(each.pop(of_band) for each in estimator_figures)
    *estimator_rows, row, (stopping,) = fetch(run.session, [*estimator_figures, figures], stopping)
    return [columns(each) for each in estimator_rows], columns(row), stopping


def update_estimator(run: Run) -> Figures:
    blocks = run.plain_estimator.network.blocks
    accelerator, optimizer = run.session.estimator_accelerator, run.estimator_optimizer
    norm, ratio = update(accelerator, run.estimator, blocks, optimizer, run.optimisation.max_grad_norm)
    return {"grad_norm_estimator": norm, "update_ratio_estimator": ratio}


def update_generator(run: Run) -> Figures:
    """With its average, where there is one."""
    blocks = run.plain_generator.blocks
    accelerator, optimizer = run.session.generator_accelerator, run.generator_optimizer
    norm, ratio = update(accelerator, run.generator, blocks, optimizer, run.optimisation.max_grad_norm)
    if run.ema is not None:
        run.ema.update(trainable(run.plain_generator))
    return {"grad_norm_generator": norm, "update_ratio_generator": ratio}


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


def fetch(session: Session, figures: list[Figures], stopping: bool) -> list[dict | tuple[bool]]:
    """``figures`` as numbers, averaged over processes: the one time in a cycle that the device is asked.

    ``stopping``: whether this process was asked to stop; comes back, last, as whether any was.
    """
    tensors = [value.float() for each in figures for value in each.values()]
    tensors.append(torch.full((), float(stopping), device=session.device))
    flat = session.mean(torch.cat([value.flatten() for value in tensors])).cpu()
    parts = flat.split([value.numel() for value in tensors])
    values = iter(part.view(value.shape).tolist() for part, value in zip(parts, tensors, strict=True))
    return [{name: next(values) for name in each} for each in figures] + [(next(values) > 0,)]


# Record and show --------------------------------------------------------------------------------------------------


def open_logs(run: Run) -> list[JsonLines]:
    """The generator's and the estimator's log; rows after the step that is resumed from are dropped."""
    folder = run.output.output_dir / "loss_logs"
    return [JsonLines(folder / f"loss_{name}_log.jsonl", run.step) for name in ("gen", "gui")]


def count_update(run: Run, step: int, row: Row) -> Row:
    """The generator update of ``step`` is done. -> its row with the counters and the schedule's scale."""
    run.step = step + 1
    run.samples_seen += run.optimisation.effective_batch(run.session.world_size)
    scale = dynamic_guidance_scale(run.method.lora_scale_real, annealing(step, run.method.dynamic_steps))
    return {"step": run.step} | row | {"lora_scale_real": scale, "samples_seen": run.samples_seen}


def show(run: Run, step: int) -> Row:
    """The previews of now, and what the judges say of them. Where a run was cut short must not show in its log."""
    require_finite_run(run, moments=False)
    read: Callable = partial(scores, run, c=annealing(step, run.method.dynamic_steps))
    figures = preview(run, read)
    return figures if run.step % run.output.sample_steps == 0 else {}


def write_rows(run: Run, logs: list[JsonLines], estimator_rows: list[Row], row: Row, seconds: float) -> None:
    if not logs:
        return
    of_generator, of_estimator = logs
    first = (run.step - 1) * run.method.ratio_update + 1
    of_generator.write([row | {"seconds": seconds}])
    of_estimator.write(
        {"step": run.step, "iteration": first + i} | figures | {"seconds": seconds}
        for i, figures in enumerate(estimator_rows)
    )


def tell(run: Run, progress: tqdm, row: Row, sampled: bool) -> None:
    """A row for people: one line in the log where there are pictures, to the trackers, and at the bar."""
    accelerator = run.session.generator_accelerator
    there = {name: value for name, value in row.items() if value is not None}
    progress.set_postfix_str(in_words(there), refresh=False)
    if sampled and run.session.is_main:
        picture = picture_path(run, run.step)
        show_picture(accelerator, picture, run.step)
        logger.info("step %d: %s, preview %s", run.step, in_words(there), picture)
    accelerator.log(there, step=run.step)
    progress.update()


def in_words(row: Row) -> str:
    """The figures that tell at a glance how a run does: the score gap, and how well each reward is met."""
    words = [f"score gap {row['score_gap']:.3g}"]
    for name in sorted(row):
        what, _, reward = name.partition("_reward_")
        if what == "accuracy" or (what == "loss" and reward and f"accuracy_reward_{reward}" not in row):
            words.append(f"{what} {reward} {row[name]:.3g}")
    return ", ".join(words)


def stop_unless_finite(run: Run, rows: list[Row]) -> None:
    """Under fp16 an overflowing gradient is the scaler's to skip, but not for ever; a loss never may be."""
    scaled = run.session.generator_accelerator.scaler is not None
    for row in rows:
        bad = not_finite(row)
        skipped = [name for name in bad if scaled and name.startswith("grad_norm")]
        if other := [name for name in bad if name not in skipped]:
            told = ", ".join(f"{name} is {row[name]}" for name in other)
            stop_with(run, f"{told}. Stopped; {kept(run.output.checkpoints)}. Lower the learning rates?")
        for name in row:
            run.overflows[name] = run.overflows.get(name, 0) + 1 if name in skipped else 0
            if run.overflows[name] == MOST_OVERFLOWS:
                told = f"{name} overflowed in fp16 {MOST_OVERFLOWS} times in a row, and nothing was learned"
                stop_with(run, f"{told}. Stopped; {kept(run.output.checkpoints)}. Take --mixed-precision bf16 or no")


def stop_with(run: Run, told: str) -> None:
    message = f"step {run.step}: {told}"
    logger.debug(message)  # into log.txt; the terminal gets it as the error that it is
    raise InputError(message)
