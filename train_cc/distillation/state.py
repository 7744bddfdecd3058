"""Saving, resuming and exporting a run: which tensors go where; and the generator that a checkpoint holds."""

import contextlib
import shutil
from pathlib import Path

from torch import Tensor

from train_cc.distillation.parts import AVERAGE
from train_cc.distillation.run import Run, trainable
from train_cc.io.errors import InputError, message_of
from train_cc.io.products import flush, need_space, plain_mode
from train_cc.io.read import sha256
from train_cc.io.remote import model_folder
from train_cc.io.weights import GENERATION_CONFIG, WEIGHTS_NAME
from train_cc.models.generator import assemble_generator, generator_lora_rank, save_generator
from train_cc.models.sit import SiT
from train_cc.run import checkpoint as checkpoints
from train_cc.run import states
from train_cc.run.checkpoint import Checkpoint
from train_cc.run.folder import EXPORT, GENERATOR_FILES, delete_ours, move_files
from train_cc.run.logbook import logger
from train_cc.run.session import on_main


def averaged(run: Run) -> contextlib.AbstractContextManager:
    """The generator with its EMA weights, where there is an EMA."""
    return run.ema.in_place_of(trainable(run.plain_generator)) if run.ema is not None else contextlib.nullcontext()


def require_finite_run(run: Run, moments: bool = True) -> None:
    """No weight, average or moment holds NaN or infinity. Collective; raises `InputError` that names the step."""
    groups = {part.name: list(part.tensors()) for part in run.parts if moments or part.optimizer is None}
    if bad := states.not_finite_groups(run.session, groups):
        message = f"step {run.step}: NaN or infinity in the {', the '.join(bad)}. Stopped, nothing of it was written; "
        message += f"{checkpoints.kept(run.output.checkpoints)}. Lower the learning rates?"
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
                f"stopped, {checkpoints.kept(root)} (--keep-checkpoints N deletes older ones)"
            )
        try:
            checkpoints.write_checkpoint(root, run.step, parts, units)
        except Exception as error:
            if (message := message_of(error)) is None:
                raise
            checkpoints.delete_leftovers(root)
            path = checkpoints.units_path(root, run.step)
            raise InputError(f"{path} is not written, {checkpoints.kept(root)}: {message}") from error
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
    """generator/: the plain SiT, with EMA weights where there is an EMA, LoRA merged."""
    require_finite_run(run, moments=False)
    with averaged(run):
        # On a CPU the state shares the parameters' memory: it is used up before the raw weights come back.
        state = states.trained_state(run.plain_generator)
        on_main(run.session, lambda: write_generator(run, state))


def write_generator(run: Run, state: dict[str, Tensor]) -> None:
    """On the main process alone. Raises `InputError` where a LoRA's teacher is no longer what it was."""
    folder, rank = run.output.output_dir, run.lora_rank_generator
    if rank is not None and sha256(model_folder(run.teacher) / WEIGHTS_NAME) != run.hashes["teacher"]:
        raise InputError(
            f"{run.teacher} has changed since the run began, so that its LoRA cannot be merged: "
            f"{checkpoints.kept(run.output.checkpoints)}; put the teacher back and give the same command again"
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
        raise InputError(f"{checkpoint.path} has no EMA weights; --weights raw exports the others")
    return ("ema" if checkpoint.has(AVERAGE) else "raw") if weights == "auto" else weights


def generator_state(checkpoint: Checkpoint, weights: str) -> dict[str, Tensor]:
    """Trained weights of the generator; ``weights``: "ema", "raw", or "auto" (EMA if there is one)."""
    state = checkpoint.read("accelerator_1/generator.safetensors")
    if weights_kind(checkpoint, weights) == "ema":
        average = checkpoint.read(AVERAGE)
        state |= average
    return state


def generator_from(checkpoint: Checkpoint, weights: str, teacher: Path | None = None) -> SiT:
    """``weights`` as in `generator_state`. ``teacher`` replaces the recorded folder."""
    recorded, state = checkpoint.units["arguments"], generator_state(checkpoint, weights)
    lora_rank = generator_lora_rank(recorded["use_lora_gen"], recorded["lora_rank"])
    base = Path(teacher or recorded["teacher"])
    if lora_rank is not None:
        weights_file = model_folder(base) / WEIGHTS_NAME
        if not weights_file.is_file() or sha256(weights_file) != checkpoint.units["teacher_sha256"]:
            raise InputError(f"{base} is not the teacher that this LoRA generator was trained on; give it by --teacher")
    return assemble_generator(checkpoint.units["model_config"], state, base, lora_rank)
