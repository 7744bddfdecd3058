"""The parts of a run that a checkpoint holds. Saving, restoring, the finite check and the log are loops over them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train_cc.distillation.run import Run, trainable
from train_cc.run import states
from train_cc.run.checkpoint import Checkpoint

AVERAGE = "accelerator_1/ema.safetensors"
MEMORIES = "accelerator_1/rewards.safetensors"


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint, or one field of its torch_units file. ``state`` and ``load`` are collective.

    ``state``: whole tensors on the CPU of the main process, or the field's value; other processes get what they need
    not keep. ``anew``: called if a checkpoint lacks the part; without it the part is needed. ``optimizer``: of a part
    of moments.
    """

    name: str  # in messages, after "the"
    file: str  # in a checkpoint, such as "accelerator_1/generator.safetensors"; a field has no "/"
    state: Callable[[], Any]
    load: Callable[[Any, Checkpoint], None]
    anew: Callable[[Checkpoint], None] | None = None
    tensors: Callable[[], Iterable[Tensor]] = tuple  # as they are on the device
    network: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None


def parts_of(run: Run) -> list[Part]:
    """All parts of ``run``: both networks with their moments, the EMA, the statistics of rewards, what fp16 counts."""
    generator, estimator = run.plain_generator, run.plain_estimator
    weights, lora = "accelerator_1/generator.safetensors", "accelerator_2/estimator_lora.safetensors"
    parts = [
        weights_part("generator's weights", weights, generator, buffers=True),
        moments_part("generator's moments", "accelerator_1/optimizer.pt", generator, run.generator_optimizer),
        weights_part("estimator's LoRA", lora, estimator, buffers=False),
        moments_part("estimator's moments", "accelerator_2/optimizer.pt", estimator, run.estimator_optimizer),
        *([average_part(run)] if run.ema else []),
        *([memories_part(run)] if run.memories else []),
    ]
    return [*parts, average_updates_part(run), scalers_part(run), overflows_part(run), reward_scales_part(run)]


def weights_part(name: str, file: str, network: nn.Module, buffers: bool) -> Part:
    """The trained weights of ``network``; ``buffers``: the file holds these too."""
    trained = trainable(network)

    def state() -> dict[str, Tensor]:
        return {name: value for name, value in states.trained_state(network).items() if buffers or name in trained}

    def load(content: dict, checkpoint: Checkpoint) -> None:
        states.restore_trained(network, content | ({} if buffers else dict(network.named_buffers())), checkpoint.path)

    return Part(name, file, state, load, None, trained.values, network)


def moments_part(name: str, file: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> Part:
    """``optimizer``: of the trained weights of ``network``, as its accelerator prepared it."""
    plain = optimizer.optimizer

    def tensors() -> list[Tensor]:
        moments = [value for state in plain.state.values() for value in state.values()]
        return [value.dequantize() if hasattr(value, "codes") else value for value in moments]

    def load(content: dict, checkpoint: Checkpoint) -> None:
        states.restore_optimizer(network, plain, content, checkpoint.file(file))

    return Part(name, file, lambda: states.optimizer_state(network, plain), load, None, tensors, network, plain)


def average_part(run: Run) -> Part:
    """The EMA; otherwise it starts at the raw weights."""
    values = run.ema.values

    def load(content: dict, checkpoint: Checkpoint) -> None:
        states.copy_into(values, content, checkpoint.file(AVERAGE))

    @torch.no_grad()
    def anew(checkpoint: Checkpoint) -> None:
        for name, value in trainable(run.plain_generator).items():
            values[name].copy_(value)

    return Part("EMA", AVERAGE, lambda: states.whole_on_main(run.session, values), load, anew, values.values)


def average_updates_part(run: Run) -> Part:
    """The number of the EMA's updates; 0 without one."""

    def load(updates: int, checkpoint: Checkpoint) -> None:
        if run.ema is not None:
            run.ema.updates = updates

    def anew(checkpoint: Checkpoint) -> None:  # format 1: an average of that time was updated at every step
        load(checkpoint.step if checkpoint.has(AVERAGE) else 0, checkpoint)

    return Part("EMA's updates", "ema_updates", lambda: run.ema.updates if run.ema else 0, load, anew)


def memories_part(run: Run) -> Part:
    """The statistics of all rewards that have some; a reward that the file does not name begins anew."""

    def state() -> dict[str, Tensor]:
        whole = {name: memory.state_dict() for name, memory in run.memories.items()}
        return {f"{name}.{key}": value for name, own in whole.items() for key, value in own.items()}

    def load(content: dict, checkpoint: Checkpoint) -> None:
        for name, memory in run.memories.items():
            own = {key.removeprefix(f"{name}."): value for key, value in content.items() if key.startswith(f"{name}.")}
            if own:
                memory.load_state_dict(own, checkpoint.file(MEMORIES))

    return Part("rewards' statistics", MEMORIES, state, load, anew=lambda checkpoint: None)


def scalers_part(run: Run) -> Part:
    """The loss scales of fp16."""
    scalers = [run.session.generator_accelerator.scaler, run.session.estimator_accelerator.scaler]

    def load(states_of: list, checkpoint: Checkpoint) -> None:
        for scaler, state in zip(scalers, states_of, strict=True):
            if scaler is not None and state:
                scaler.load_state_dict(state)

    return Part("loss scales", "scalers", lambda: [scaler and scaler.state_dict() for scaler in scalers], load)


def overflows_part(run: Run) -> Part:
    """The overflows in a row."""

    def load(counts: dict, checkpoint: Checkpoint) -> None:
        run.overflows = dict(counts)

    def state() -> dict[str, int]:
        return {name: count for name, count in run.overflows.items() if count}

    return Part("counts of overflows", "overflows", state, load, anew=lambda checkpoint: load({}, checkpoint))


def reward_scales_part(run: Run) -> Part:
    """The gradient scales of rewards that overflowed; one that is not named begins anew."""

    def load(scales: dict, checkpoint: Checkpoint) -> None:
        for reward in run.rewards:
            state = scales.get(reward.name, {"backoff": 1.0, "good_turns": 0})
            reward.backoff, reward.good_turns = state["backoff"], state["good_turns"]

    def state() -> dict[str, dict]:
        return {r.name: {"backoff": r.backoff, "good_turns": r.good_turns} for r in run.rewards if r.backoff < 1}

    return Part("rewards' scales", "reward_scales", state, load, anew=lambda checkpoint: load({}, checkpoint))
