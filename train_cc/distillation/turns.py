"""The two turns of the method (docs/method.md: one iteration). They leave gradients behind; the loop updates.

A cycle is ``ratio_update`` estimator turns and one generator turn; ``step`` counts the generator turns.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from train_cc.distillation.run import Run
from train_cc.draws import Draws, JoinedDraws
from train_cc.flow import interpolate, x0_from_velocity
from train_cc.objectives import dmd_direction, dmd_loss, dmd_normaliser, velocity_matching_losses
from train_cc.rewards.terms import Term, effective_samples, reward_terms, tilt_weights
from train_cc.run.diagnostics import by_band, compare_gradients, finite, first_overflow
from train_cc.run.logbook import BY_BAND, OVERFLOW
from train_cc.run.session import synchronised
from train_cc.samplers import few_step_input
from train_cc.schedules import annealing, beta_times, renoise_density

# First key of the draws, after the seed: no two uses share random numbers; the previews' is in panel.py.
ESTIMATOR_TURN, GENERATOR_TURN, FILL = 1, 2, 4
SAMPLES_AT_ONCE = 320  # of the generator, without gradient: fewer leave a GPU idle, more take memory
FILL_SAMPLES = 4000  # of the generator, that a Frechet reward observes before its first update

Figures = dict[str, Tensor]  # 0-d, or (2, 4) where a figure comes by band of t


# What both turns draw -----------------------------------------------------------------------------------------------


def chunk_draws(run: Run, turn: int, iteration: int, chunk: int) -> Draws:
    """The draws of this process's ``chunk``-th device batch of a global batch, numbered over all processes."""
    number = chunk * run.session.world_size + run.session.rank
    return Draws(run.optimisation.seed, turn, iteration, number, device=run.session.device)


def draw_labels(run: Run, draws: Draws) -> Tensor:
    return draws.integers(run.num_classes, run.optimisation.batch_size).to(run.session.device, non_blocking=True)


def generate(run: Run, draws: Draws, y: Tensor) -> Tensor:
    """x0 of the generator at a uniformly drawn one of its steps (backward simulation), with gradient if enabled."""
    steps, shift = run.method.num_steps, run.method.timestep_shift
    noise = draws.noise(len(y), *run.sample_shape)
    index = draws.integers(steps, len(y))
    x_t, t = few_step_input(run.generator, noise, y, index, steps, shift, draws.noise_like)
    return x0_from_velocity(x_t, run.generator(x_t, t, y), t)


def renoise(run: Run, draws: Draws, x0: Tensor, c: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DynaRS: t ~ p_k(t), fresh noise. -> (x_t, noise, t on the CPU and on the device)."""
    alpha, beta = renoise_density(run.method.renoise_alpha, run.method.renoise_beta, c)
    t = beta_times(draws.uniform(len(x0)), alpha, beta)
    noise = draws.noise_like(x0)
    t_device = t.to(x0.device, non_blocking=True)
    return interpolate(x0, noise, t_device), noise, t, t_device


def add(totals: Figures, figures: Figures, chunks: int) -> None:
    """The mean over the chunks of an accumulated batch, added up."""
    for name, value in figures.items():
        totals[name] = totals.get(name, 0) + value / chunks


@torch.no_grad()
def estimator_batches(run: Run, step: int) -> list[list[tuple[Draws, Tensor, Tensor]]]:
    """(draws, y, x0) of each estimator turn of a cycle, chunk by chunk.

    The generator does not change between its updates: the samples of several turns go through it at once, so that its
    weights are read, cast and, where they are sharded, gathered once and not at every turn.
    """
    turns, size = run.method.ratio_update, run.optimisation.batch_size
    at_once = max(1, SAMPLES_AT_ONCE // size)
    batches: list[list] = [[] for _ in range(turns)]
    with run.session.generator_accelerator.autocast():
        for chunk in range(run.optimisation.gradient_accumulation_steps):
            for first in range(0, turns, at_once):
                joined = range(first, min(first + at_once, turns))
                draws = [chunk_draws(run, ESTIMATOR_TURN, step * turns + turn, chunk) for turn in joined]
                labels = [draw_labels(run, each) for each in draws]
                x0 = generate(run, JoinedDraws(draws), torch.cat(labels)).split(size)
                for turn, *batch in zip(joined, draws, labels, x0, strict=True):
                    batches[turn].append(tuple(batch))
    return batches


# Estimator turn -----------------------------------------------------------------------------------------------------


def estimator_turn(run: Run, step: int, batches: list[tuple[Draws, Tensor, Tensor]]) -> Figures:
    """Gradients of loss_fake = mean (v_fake(x_t, t, y) - (noise - x0))^2: the fake score follows the generator."""
    accelerator, chunks = run.session.estimator_accelerator, run.optimisation.gradient_accumulation_steps
    c = annealing(step, run.method.dynamic_steps)
    totals: Figures = {}
    weights, figures = tilt_batches(run, batches)
    for chunk in synchronised(run.learners_of(accelerator).values(), chunks):
        draws, y, x0 = batches[chunk]
        terms = [term(run, draws, x0, y, c, weights and weights[chunk]) for term in run.estimator_terms]
        accelerator.backward(sum_of(term.loss for term in terms) / chunks)
        for term in terms:
            add(totals, term.figures, chunks)
    return totals | figures


def velocity_matching(run: Run, draws: Draws, x0: Tensor, y: Tensor, c: float, weights: Tensor | None) -> Term:
    """The fake score's loss; ``weights`` (B,): of the samples, where they are tilted."""
    x_t, noise, _, t = renoise(run, draws, x0, c)
    v_fake = run.scores.fake(x_t, t, y)
    losses = velocity_matching_losses(v_fake, x0, noise)
    if (weight := run.plain_estimator.network.loss_weight(t)) is not None:
        losses = losses * weight
    loss = (losses if weights is None else losses * weights).mean()
    losses = losses.detach()
    figures = {"loss_fake": losses.mean(), f"loss_fake{BY_BAND}": by_band(losses, t)}
    if run.scaled:
        figures |= first_overflow(generator=finite(x0), estimator=finite(v_fake))
    return Term(loss, None, figures)


def sum_of(values: Iterable[Tensor]) -> Tensor:
    """The sum in order; of one value that value itself, bit for bit."""
    return functools.reduce(torch.add, values)


@torch.no_grad()
def tilt_batches(run: Run, batches: list[tuple[Draws, Tensor, Tensor]]) -> tuple[list[Tensor] | None, Figures]:
    """The weights of an estimator turn's samples, chunk by chunk, over the batch of all processes; None without tilts.

    Several tilts multiply. (docs/method.md: tilted fake score.)
    """
    if not run.tilts:
        return None, {}
    images = [
        torch.cat([run.decode(part) for part in x0.split(run.reward_micro_batch or len(x0))]) for _, _, x0 in batches
    ]
    weights, figures, good = 1.0, {}, [finite(torch.cat([x0 for _, _, x0 in batches]))]
    good.append(finite(torch.cat(images)))
    for tilt in run.tilts:
        own = torch.cat([tilt.rewards(each, y) for each, (_, y, _) in zip(images, batches, strict=True)])
        everyone = run.session.gather(own)
        of_all = tilt_weights(everyone, tilt.beta)
        rank, size = run.session.rank, len(own)
        weights = weights * of_all[rank * size : (rank + 1) * size]
        figures |= {
            f"tilt_reward_{tilt.name}": everyone.mean(),
            f"tilt_largest_weight_{tilt.name}": of_all.max(),
            f"tilt_effective_samples_{tilt.name}": effective_samples(of_all),
        }
        if run.scaled:
            own_good = torch.ones_like(good[0]) if tilt.users else finite(own)
            stages = {"generator": good[0], "decoder": good[1], f"tilt_{tilt.name}": own_good}
            figures |= first_overflow(**stages)
    return list(weights.split(run.optimisation.batch_size)), figures


@torch.no_grad()
def observe_batches(run: Run, batches: list[tuple[Draws, Tensor, Tensor]]) -> None:
    """The samples of an estimator turn enter the statistics of the rewards that have some: a forward only."""
    memories = run.memories.values()
    for _, y, x0 in batches if memories else ():
        size = run.reward_micro_batch or len(x0)
        for part, labels in zip(x0.split(size), y.split(size), strict=True):
            images = run.decode(part)
            for memory in memories:
                memory.observe(memory.features_of(images), labels)
    for memory in memories:
        memory.commit()


@torch.no_grad()
def fill_memories(run: Run) -> None:
    """Before the first update the window of a Frechet reward is filled, as far as `FILL_SAMPLES` goes."""
    if all(memory.samples for memory in run.memories.values()):
        return
    batch = run.optimisation.effective_batch(run.session.world_size)
    window = max(memory.window for memory in run.memories.values())
    for number in range(-(-min(FILL_SAMPLES, window) // batch)):
        batches = []
        with run.session.generator_accelerator.autocast():
            for chunk in range(run.optimisation.gradient_accumulation_steps):
                draws = chunk_draws(run, FILL, number, chunk)
                y = draw_labels(run, draws)
                batches.append((draws, y, generate(run, draws, y)))
        observe_batches(run, batches)


# Generator turn -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def matching(run: Run, draws: Draws, x0: Tensor, y: Tensor, c: float, before: list[Term]) -> list[Term]:
    """Distribution matching as a term at x0: gradient = direction / numel (docs/method.md: terms at x0)."""
    x_t, noise, t_cpu, t = renoise(run, draws, x0, c)
    v_fake, v_real = run.scores.both(x_t, t_cpu, t, y, c)
    direction = dmd_direction(v_real, v_fake, x0, noise)
    loss = dmd_loss(x0, direction)
    gap = (v_real.float() - v_fake.float()).abs().mean(dim=(1, 2, 3))
    figures = {
        "loss_dmd": loss,
        "score_gap": gap.mean(),
        "normaliser": dmd_normaliser(v_real, x0, noise).mean(),
        "t_mean": t.float().mean(),
        f"score_gap{BY_BAND}": by_band(gap, t),
    }
    if run.scaled or run.plain_estimator.score_dtype == torch.float16:
        overflows = first_overflow(generator=finite(x0), scores=finite(gap))
        if not run.scaled:  # the generator computes in bf16, whose NaN is no overflow
            del overflows[f"{OVERFLOW}generator"]
        figures |= overflows
    return [Term(loss, direction / direction.numel(), figures)]


def rewards(run: Run, draws: Draws, x0: Tensor, y: Tensor, c: float, before: list[Term]) -> list[Term]:
    """A term for each reward; matching's comes ``before``."""
    return reward_terms(run.rewards, run.decode, x0, y, run.reward_micro_batch, before[0].gradient, half=run.scaled)


def generator_turn(run: Run, step: int) -> Figures:
    """Gradients of the sum of all terms at the generator's own samples: matching, and every reward."""
    accelerator, chunks = run.session.generator_accelerator, run.optimisation.gradient_accumulation_steps
    c = annealing(step, run.method.dynamic_steps)
    totals: Figures = {}
    for memory in run.memories.values():
        memory.solve()
    for chunk in synchronised(run.learners_of(accelerator).values(), chunks):
        draws = chunk_draws(run, GENERATOR_TURN, step, chunk)
        y = draw_labels(run, draws)
        x0 = generate(run, draws, y)
        terms: list[Term] = []
        for entry in run.generator_terms:
            terms += entry(run, draws, x0.detach(), y, c, terms)
        # Every term's gradient at x0 is known: one backward passes their sum on to the generator.
        gradient = sum_of(term.pull for term in terms)
        accelerator.backward((x0.float() * gradient).sum() / chunks)
        figures = dict(terms[0].figures)
        for term in terms[1:]:
            figures |= term.figures | compare_gradients(term.name, terms[0].gradient, term.gradient)
        add(totals, figures, chunks)
    for memory in run.memories.values():
        memory.end_turn()
    return totals
