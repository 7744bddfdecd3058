"""The parts of a run that a checkpoint holds: saving, resuming, the finite check, log and export loop over them."""

import contextlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train_cc.distillation.run import Run, trainable
from train_cc.io.errors import InputError, message_of
from train_cc.io.products import flush, need_space, plain_mode
from train_cc.io.read import sha256
from train_cc.io.remote import model_folder
from train_cc.io.weights import GENERATION_CONFIG, WEIGHTS_NAME
from train_cc.models.backbone import Network
from train_cc.models.generator import assemble_generator, generator_lora_rank, save_generator
from train_cc.run import checkpoint as checkpoints
from train_cc.run import states
from train_cc.run.checkpoint import Checkpoint
from train_cc.run.folder import EXPORT, GENERATOR_FILES, delete_ours, move_files
from train_cc.run.logbook import logger
from train_cc.run.session import Learner, on_main

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
    """All parts of ``run``: networks in training, their moments, the EMA, statistics of rewards, what fp16 counts."""
    return [
        *(part for name, learner in run.learners.items() for part in learner_parts(run, name, learner)),
        *([average_part(run)] if run.ema else []),
        *([memories_part(run)] if run.memories else []),
        *counters(run),
    ]


def learner_parts(run: Run, name: str, learner: Learner) -> list[Part]:
    """The weights and the moments of ``learner``; a further loss's network begins anew if a checkpoint lacks it."""
    network, optimizer = learner.plain, learner.optimizer.optimizer
    folder = f"accelerator_{1 if learner.accelerator is run.session.generator_accelerator else 2}"
    what = getattr(network, "trained", "weights")
    weights = f"{folder}/{name if what == 'weights' else f'{name}_{what.lower()}'}.safetensors"
    moments, anew = f"{folder}/optimizer.pt", None
    if name not in ("generator", "estimator"):
        moments, anew = f"{folder}/{name}_optimizer.pt", lambda checkpoint: None
    trained = trainable(network)
    own = trained | dict(network.named_buffers()) if name == "generator" else trained

    def state() -> dict[str, Tensor]:
        return {key: value for key, value in states.trained_state(network).items() if key in own}

    def load(content: dict, checkpoint: Checkpoint) -> None:
        states.copy_into(own, content, checkpoint.path)

    def moment_tensors() -> list[Tensor]:
        values = [value for state in optimizer.state.values() for value in state.values()]
        return [value.dequantize() if hasattr(value, "codes") else value for value in values]

    def load_moments(content: dict, checkpoint: Checkpoint) -> None:
        states.restore_optimizer(network, optimizer, content, checkpoint.file(moments))

    moment_state = partial(states.optimizer_state, network, optimizer)
    return [
        Part(f"{name}'s {what}", weights, state, load, anew, trained.values, network),
        Part(f"{name}'s moments", moments, moment_state, load_moments, anew, moment_tensors, network, optimizer),
    ]


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


def counters(run: Run) -> list[Part]:
    """Fields of the torch_units file: the EMA's updates, the loss scales of fp16, its overflows in a row, and the
    gradient scales of rewards that overflowed; a reward that is not named begins anew."""
    scalers = [run.session.generator_accelerator.scaler, run.session.estimator_accelerator.scaler]

    def load_updates(updates: int, checkpoint: Checkpoint) -> None:
        if run.ema is not None:
            run.ema.updates = updates

    def begin_updates(checkpoint: Checkpoint) -> None:  # format 1: an average of that time was updated at every step
        load_updates(checkpoint.step if checkpoint.has(AVERAGE) else 0, checkpoint)

    def load_scalers(states_of: list, checkpoint: Checkpoint) -> None:
        for scaler, state in zip(scalers, states_of, strict=True):
            if scaler is not None and state:
                scaler.load_state_dict(state)

    def load_overflows(counts: dict, checkpoint: Checkpoint) -> None:
        run.overflows = dict(counts)

    def reward_scales() -> dict[str, dict]:
        return {r.name: {"backoff": r.backoff, "good_turns": r.good_turns} for r in run.rewards if r.backoff < 1}

    def load_reward_scales(scales: dict, checkpoint: Checkpoint) -> None:
        for reward in run.rewards:
            state = scales.get(reward.name, {"backoff": 1.0, "good_turns": 0})
            reward.backoff, reward.good_turns = state["backoff"], state["good_turns"]

    return [
        Part("EMA's updates", "ema_updates", lambda: run.ema.updates if run.ema else 0, load_updates, begin_updates),
        Part("loss scales", "scalers", lambda: [each and each.state_dict() for each in scalers], load_scalers),
        Part(
            "counts of overflows",
            "overflows",
            lambda: {name: count for name, count in run.overflows.items() if count},
            load_overflows,
            partial(load_overflows, {}),
        ),
        Part("rewards' scales", "reward_scales", reward_scales, load_reward_scales, partial(load_reward_scales, {})),
    ]


# Saving, resuming and exporting --------------------------------------------------------------------------------------


def averaged(run: Run) -> contextlib.AbstractContextManager:
    """The generator with its EMA weights, where there is an EMA."""
    return run.ema.in_place_of(trainable(run.plain_generator)) if run.ema is not None else contextlib.nullcontext()


def require_finite_run(run: Run, moments: bool = True) -> None:
    """No weight, average or moment holds NaN or infinity. Collective; raises `InputError` that names the step."""
    groups = {part.name: list(part.tensors()) for part in run.parts if moments or part.optimizer is None}
    if bad := states.not_finite_groups(run.session, groups):
        message = f"step {run.step}: NaN or infinity in the {', the '.join(bad)}. Stopped, nothing of it was written; "
        message += f"{checkpoints.newest_words(run.output.checkpoints)}. Lower the learning rates?"
        logger.debug(message)  # into log.txt; the terminal gets it as the error that it is
        raise InputError(message)


def save(run: Run, rotate: bool = True) -> Path:
    """Write a complete checkpoint of this step. -> its torch_units file. Raises `InputError` for what is not finite.

    ``rotate``: delete older ones, as --keep-checkpoints has it.
    """
    require_finite_run(run)
    content = {part.file: part.state() for part in run.parts}
    parts = {name: value for name, value in content.items() if "/" in name}
    units = {
        "samples_seen": run.samples_seen,
        "effective_batch": run.optimisation.effective_batch(run.session.world_size),
        "model_config": run.model_config,
        "teacher_sha256": run.hashes["teacher"],
        "rewards_sha256": sorted(run.rewards_sha256),
        "latent_space_sha256": run.latent_space,
        "arguments": run.arguments,
        **{name: value for name, value in content.items() if "/" not in name and value != {}},
    }
    root = run.output.checkpoints

    def write() -> None:
        needed, free = checkpoints.nbytes(parts), shutil.disk_usage(run.output.output_dir).free
        if free < needed:
            raise InputError(
                f"{root} has {free / 1e9:.2f} GB free, the checkpoint of step {run.step} needs {needed / 1e9:.2f} GB; "
                f"stopped, {checkpoints.newest_words(root)} (--keep-checkpoints N deletes older ones)"
            )
        try:
            checkpoints.write_checkpoint(root, run.step, parts, units)
        except Exception as error:
            if (message := message_of(error)) is None:
                raise
            checkpoints.delete_leftovers(root)
            path = checkpoints.units_path(root, run.step)
            raise InputError(f"{path} is not written, {checkpoints.newest_words(root)}: {message}") from error
        if rotate:
            checkpoints.rotate_checkpoints(root, run.output.keep_checkpoints, run.output.resume_ckpt)
        logger.info("checkpoint %s", checkpoints.units_path(root, run.step))

    on_main(run.session, write)
    return checkpoints.units_path(root, run.step)


def restore(run: Run, checkpoint: checkpoints.Checkpoint) -> None:
    """Weights, moments, EMA, scaler and step. The draws need no state, and the learning rate is the command line's."""
    source = checkpoint.path
    theirs = checkpoint.units
    if theirs["model_config"] != run.model_config:
        raise InputError(f"{source} does not fit this run's model: {theirs['model_config']}, not {run.model_config}")
    if theirs["teacher_sha256"] != run.hashes["teacher"]:
        raise InputError(
            f"{source} was trained from other teacher weights: {theirs['arguments']['teacher']}, SHA-256 "
            f"{theirs['teacher_sha256'][:12]}..., but --teacher {run.teacher} has {run.hashes['teacher'][:12]}...; "
            "give the weights of that time, or begin anew in another --output-dir"
        )
    for part in run.parts:
        if checkpoint.has(part.file):
            part.load(checkpoint.read(part.file), checkpoint)
        elif part.anew is not None:
            part.anew(checkpoint)
        else:
            raise InputError(f"{source} lacks {part.file}, the {part.name}: was it made by another kind of run?")
    run.rewards_sha256 |= set(theirs.get("rewards_sha256", []))
    run.step, run.samples_seen = checkpoint.step, checkpoint.units["samples_seen"]


def export(run: Run) -> None:
    """generator/: the plain network, with EMA weights where there is an EMA, LoRA merged."""
    require_finite_run(run, moments=False)
    with averaged(run):
        # On a CPU the state shares the parameters' memory: it is used up before the raw weights come back.
        state = states.trained_state(run.plain_generator)
        on_main(run.session, lambda: write_generator(run, state))


def write_generator(run: Run, state: dict[str, Tensor]) -> None:
    """On the main process only. Raises `InputError` where a LoRA's teacher is no longer what it was."""
    folder, rank = run.output.output_dir, run.lora_rank_generator
    if rank is not None and sha256(model_folder(run.teacher) / WEIGHTS_NAME) != run.hashes["teacher"]:
        raise InputError(
            f"{run.teacher} has changed since the run began, so that its LoRA cannot be merged: "
            f"{checkpoints.newest_words(run.output.checkpoints)}; put the teacher back and give the same command again"
        )
    generator = assemble_generator(run.model_config, state, run.teacher, rank)
    target = folder / "generator"
    need_space(folder, sum(p.nbytes for p in generator.state_dict().values()))
    temporary = target / EXPORT if target.is_dir() else target.with_name("generator.tmp")
    for leftover in (target.with_name("generator.tmp"), target / EXPORT):
        delete_ours(leftover, GENERATOR_FILES)
    provenance = {
        "run": str(folder),
        "step": run.step,
        "weights": "raw" if run.ema is None else "ema",
        "teacher_sha256": run.hashes["teacher"],
        "rewards_sha256": sorted(run.rewards_sha256),
        "latent_space_sha256": run.latent_space,
    }
    save_generator(generator, temporary, run.method.num_steps, run.method.timestep_shift, **provenance)
    for path in temporary.iterdir():
        plain_mode(path)
        flush(path)
    move_files(temporary, target, last=GENERATION_CONFIG)
    logger.info("generator after %d updates: %s", run.step, target)


# What a checkpoint holds, without a run ------------------------------------------------------------------------------


def sampling_of(recorded: dict) -> dict:
    """Steps K and shift s that a run with these arguments trains for, by their names in a generator's folder."""
    return {"num_inference_steps": recorded["num_steps"], "timestep_shift": recorded["timestep_shift"]}


def weights_kind(checkpoint: Checkpoint, weights: str) -> str:
    """ "auto" is "ema" where there is one, else "raw". Raises `InputError` for an EMA that is not there."""
    if weights == "ema" and not checkpoint.has(AVERAGE):
        raise InputError(f"{checkpoint.path} has no EMA weights; --weights raw takes the others")
    return ("ema" if checkpoint.has(AVERAGE) else "raw") if weights == "auto" else weights


def generator_state(checkpoint: Checkpoint, weights: str) -> dict[str, Tensor]:
    """Trained weights of the generator; ``weights``: "ema", "raw", or "auto" (EMA if there is one)."""
    state = checkpoint.read("accelerator_1/generator.safetensors")
    if weights_kind(checkpoint, weights) == "ema":
        state |= checkpoint.read(AVERAGE)
    return state


def generator_from(checkpoint: Checkpoint, weights: str, teacher: Path | None = None) -> Network:
    """``weights`` as in `generator_state`. ``teacher`` replaces the recorded folder."""
    recorded, state = checkpoint.units["arguments"], generator_state(checkpoint, weights)
    lora_rank = generator_lora_rank(recorded["use_lora_gen"], recorded["lora_rank"])
    base = Path(teacher or recorded["teacher"])
    if lora_rank is not None:
        weights_file = model_folder(base) / WEIGHTS_NAME
        if not weights_file.is_file() or sha256(weights_file) != checkpoint.units["teacher_sha256"]:
            raise InputError(f"{base} is not the teacher that this LoRA generator was trained on; give it by --teacher")
    return assemble_generator(checkpoint.units["model_config"], state, base, lora_rank)
