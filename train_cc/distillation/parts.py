"""The parts of a run that a checkpoint holds. Saving, restoring and the finite check are loops over them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train_cc.distillation.run import Run, trainable
from train_cc.run import states
from train_cc.run.checkpoint import Checkpoint

AVERAGE = "accelerator_1/ema.safetensors"
MEMORIES = "accelerator_1/rewards.safetensors"


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint. ``state`` and ``load`` are collective.

    ``state``: whole tensors on the CPU of the main process; other processes get what they need not keep. ``anew``:
    called if a checkpoint lacks the file; without it the part is needed. ``optimizer``: of a part of moments.
    """

    name: str  # in messages
    file: str  # in a checkpoint, such as "accelerator_1/generator.safetensors"
    tensors: Callable[[], Iterable[Tensor]]  # as they are on the device
    state: Callable[[], dict]
    load: Callable[[dict, Checkpoint], None]
    anew: Callable[[], None] | None = None
    network: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None


def parts_of(run: Run) -> list[Part]:
    """All parts of ``run``: both networks with their moments, the EMA, the statistics of rewards."""
    generator, estimator = run.plain_generator, run.plain_estimator
    weights, lora = "accelerator_1/generator.safetensors", "accelerator_2/estimator_lora.safetensors"
    parts = [
        weights_part("the generator's weights", weights, generator, buffers=True),
        moments_part("the generator's moments", "accelerator_1/optimizer.pt", generator, run.generator_optimizer),
        weights_part("the estimator's LoRA", lora, estimator, buffers=False),
        moments_part("the estimator's moments", "accelerator_2/optimizer.pt", estimator, run.estimator_optimizer),
    ]
    return parts + ([average_part(run)] if run.ema else []) + ([memories_part(run)] if run.memories else [])


def weights_part(name: str, file: str, network: nn.Module, buffers: bool) -> Part:
    """The trained weights of ``network``; ``buffers``: the file holds these too."""
    trained = trainable(network)

    def state() -> dict[str, Tensor]:
        return {name: value for name, value in states.trained_state(network).items() if buffers or name in trained}

    def load(content: dict, checkpoint: Checkpoint) -> None:
        states.restore_trained(network, content | ({} if buffers else dict(network.named_buffers())), checkpoint.path)

    return Part(name, file, trained.values, state, load, network=network)


def moments_part(name: str, file: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> Part:
    """``optimizer``: of the trained weights of ``network``, as its accelerator prepared it."""
    plain = optimizer.optimizer

    def tensors() -> list[Tensor]:
        moments = [value for state in plain.state.values() for value in state.values()]
        return [value.dequantize() if hasattr(value, "codes") else value for value in moments]

    def load(content: dict, checkpoint: Checkpoint) -> None:
        states.restore_optimizer(network, plain, content, checkpoint.file(file))

    return Part(name, file, tensors, lambda: states.optimizer_state(network, plain), load, None, network, plain)


def average_part(run: Run) -> Part:
    """The EMA and the number of its updates; without a file it starts at the raw weights, with none."""
    values = run.ema.values

    def load(content: dict, checkpoint: Checkpoint) -> None:
        states.copy_into(values, content, checkpoint.file(AVERAGE))
        # Format 1 did not count: an average of that time was updated at every step.
        run.ema.updates = checkpoint.units.get("ema_updates", checkpoint.step)

    @torch.no_grad()
    def anew() -> None:
        for name, value in trainable(run.plain_generator).items():
            values[name].copy_(value)
        run.ema.updates = 0

    return Part("the EMA", AVERAGE, values.values, lambda: states.whole_on_main(run.session, values), load, anew)


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

    return Part("the rewards' statistics", MEMORIES, list, state, load, anew=lambda: None)
