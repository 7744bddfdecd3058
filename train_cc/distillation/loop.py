"""The loop over both turns: cycle, record, show, save. One line of either log is one turn."""

import time
from collections.abc import Iterable
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from train_cc.distillation.panel import picture_path, preview
from train_cc.distillation.run import Run, trainable
from train_cc.distillation.state import export, require_finite_run, save
from train_cc.distillation.turns import (
    Figures,
    estimator_batches,
    estimator_turn,
    fill_memories,
    generator_turn,
    observe_batches,
)
from train_cc.io.errors import InputError, beating, saying
from train_cc.run.checkpoint import newest_words
from train_cc.run.diagnostics import UpdateSize, finite, gathered
from train_cc.run.logbook import BY_BAND, OVERFLOW, JsonLines, columns, logger, not_finite
from train_cc.run.session import Session, show_picture, tracking
from train_cc.run.stop import StopSignal
from train_cc.schedules import annealing, dynamic_guidance_scale

Row = dict[str, float | None]
BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed} gone, {remaining} left{postfix}"
MOST_OVERFLOWS = 50  # in a row: a scaler that starts at 2^16 has been halved to 2^-34


def train(run: Run) -> None:
    """From ``run.step`` to ``max_train_steps`` generator turns; writes logs, previews, checkpoints and the export."""
    session, output = run.session, run.output
    folder = output.output_dir / "loss_logs"  # rows after the step that is resumed from are dropped
    files = [folder / f"loss_{name}_log.jsonl" for name in ("gen", "gui")] if session.is_main else []
    logs = [JsonLines(path, run.step) for path in files]
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
            rows = [*estimator_rows, row]
            if places := [name for each in rows for name in overflows(each)]:
                logger.debug("step %d: overflow in fp16, skipped: %s", run.step, ", ".join(places))
                if not any(run.overflows.values()):
                    require_finite_run(run)  # NaN in weights looks like an overflow that does not end
            try:
                stop_unless_finite(run, rows)
            except InputError as error:
                write_rows(run, logs, estimator_rows, row, seconds)
                stop_with(run, error, rows)
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
                again = f"the same command with --auto-resume, or --resume-ckpt {path}, continues"
                logger.info("stopped at step %d as asked; %s", run.step, again)
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
        estimator_figures.append(estimator_turn(run, step, batches) | update(run, run.session.estimator_accelerator))
    figures = generator_turn(run, step) | update(run, run.session.generator_accelerator)
    if run.ema is not None:
        run.ema.update(trainable(run.plain_generator))
    of_band = f"loss_fake{BY_BAND}"  # the bands of all estimator turns together are one line's
    bands = [each.pop(of_band) for each in estimator_figures]
    figures[of_band] = sum(torch.where(finite(each), each, 0.0) for each in bands)  # a turn that overflowed is left out
    *estimator_rows, row, (stopping,) = fetch(run.session, [*estimator_figures, figures], stopping)
    *estimator_rows, row = (with_overflows(columns(each)) for each in [*estimator_rows, row])
    if f"{OVERFLOW}generator" in figures:
        for reward in run.rewards:
            reward.adapt_scale(reward.gradient_overflow in row)
    return estimator_rows, row, stopping


def overflows(row: Row) -> list[str]:
    """The columns of ``row`` that count overflows."""
    return [name for name in row if name.startswith(OVERFLOW)]


def with_overflows(row: Row) -> Row:
    """``row`` without the counts that are 0; an update that was skipped counts as its network's overflow."""
    scaled, bad = f"{OVERFLOW}generator" in row, set(not_finite(row))
    row = {name: value for name, value in row.items() if value != 0 or not name.startswith(OVERFLOW)}
    if overflows(row) or (scaled and bad == norms(bad)):
        row |= {norm.replace("grad_norm_", OVERFLOW): 1.0 for norm in norms(bad)}
    return row


def norms(columns: Iterable[str]) -> set[str]:
    """The gradient norms of networks among ``columns``: where one is not finite, the network's update was skipped."""
    return {name for name in columns if name.startswith("grad_norm_") and not name.endswith("_x0")}


def update(run: Run, accelerator: Accelerator) -> Figures:
    """Clip, step, clear every network of ``accelerator``: norms of gradients before clipping, sizes of the updates.

    Gradients that are not finite change neither weights nor moments.
    """
    figures: Figures = {}
    accelerator.unscale_gradients()  # once, those of all its networks
    for name, learner in run.learners_of(accelerator).items():
        weights, optimizer = trainable(learner.network).values(), learner.optimizer.optimizer
        norm = gathered(nn.utils.clip_grad_norm_(weights, run.optimisation.max_grad_norm))
        size = UpdateSize(learner.plain.blocks)
        if accelerator.scaler is not None:
            accelerator.scaler.step(optimizer)  # skips by itself
        elif getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = (~norm.isfinite()).float()  # skips on the device: the host waits for no answer
            optimizer.step()
            del optimizer.found_inf
        elif norm.isfinite():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        figures |= {f"grad_norm_{name}": norm, f"update_ratio_{name}": size.ratio()}
    if accelerator.scaler is not None:
        accelerator.scaler.update()
    return figures


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


def count_update(run: Run, step: int, row: Row) -> Row:
    """The generator update of ``step`` is done. -> its row with the counters and the schedule's scale."""
    run.step = step + 1
    run.samples_seen += run.optimisation.effective_batch(run.session.world_size)
    scale = dynamic_guidance_scale(run.method.lora_scale_real, annealing(step, run.method.dynamic_steps))
    return {"step": run.step} | row | {"lora_scale_real": scale, "samples_seen": run.samples_seen}


def show(run: Run, step: int) -> Row:
    """The previews of now, and what the judges say of them. Where a run was cut short must not show in its log."""
    require_finite_run(run, moments=False)
    figures = preview(run, partial(run.scores.both, c=annealing(step, run.method.dynamic_steps)))
    return figures if run.step % run.output.sample_steps == 0 else {}


def write_rows(run: Run, logs: list[JsonLines], estimator_rows: list[Row], row: Row, seconds: float) -> None:
    if not logs:
        return
    of_generator, of_estimator = logs
    of_generator.write([row | {"seconds": seconds}])
    of_estimator.write(
        {"step": run.step, "iteration": iteration} | figures | {"seconds": seconds}
        for iteration, figures in enumerate(estimator_rows, (run.step - 1) * run.method.ratio_update + 1)
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
    """Raise `InputError` for NaN or infinity that is no overflow in fp16, and for overflows that do not end."""
    for row in rows:
        bad = not_finite(row)
        skipped = norms(bad) if run.scaled or overflows(row) else set()
        if not overflows(row) and (other := [name for name in bad if name not in skipped]):
            message = ", ".join(f"{name} is {row[name]}" for name in other)
            of_rewards = all("_reward_" in name for name in other if name not in norms(other))
            advice = "Is the reward finite for every image?" if of_rewards else "Lower the learning rates?"
            raise InputError(f"step {run.step}: {message}. {advice}")
        count_in_a_row(run, row, skipped)


def count_in_a_row(run: Run, row: Row, skipped: set[str]) -> None:
    """Count overflows that follow one another, of ``row``'s turn. Raises `InputError` at the last that is allowed."""
    own, now = norms(row), skipped
    if "grad_norm_generator" in row:  # here one drops the term of a reward
        own |= run.overflows.keys() - norms(run.overflows)
        now = skipped | set(overflows(row)) - {f"{OVERFLOW}generator"}
    for name in sorted(own | now, reverse=True):
        run.overflows[name] = run.overflows.get(name, 0) + 1 if name in now else 0
        if run.overflows[name] == MOST_OVERFLOWS:
            places = ", ".join(place.removeprefix(OVERFLOW) for place in overflows(row)) or name
            wider = "bf16 or no" if run.scaled else "no"
            raise InputError(
                f"step {run.step}: {name} overflowed in fp16 {MOST_OVERFLOWS} times in a row, and nothing was learned "
                f"(where: {places}). Take --mixed-precision {wider}"
            )


def stop_with(run: Run, error: InputError, rows: list[Row]) -> None:
    """Save what is good, and raise ``error`` with what is kept."""
    run.overflows = {}  # a run that continues may try as often again
    saved = ""
    if all(map(trusted, rows)):
        try:
            save(run, rotate=False)
        except InputError as reason:
            saved = f"; it could not be saved ({reason})"
    words, _, advice = str(error).rpartition(". ")
    message = f"{words}. Stopped; {newest_words(run.output.checkpoints)}{saved}. {advice}"
    logger.debug(message)  # into log.txt; the terminal gets it as the error that it is
    raise InputError(message) from error


def trusted(row: Row) -> bool:
    """False if a loss was not finite, and its gradient was: the update was made."""
    bad = set(not_finite(row))
    return not bad or bool(norms(bad)) or bool(overflows(row))
