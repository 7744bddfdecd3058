"""The model that is sampled, a folder or a checkpoint: the sampling it was trained for, and its classes' names."""

import argparse
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from train_cc.io.class_names import class_names
from train_cc.io.errors import InputError, note
from train_cc.io.fields import replaced
from train_cc.io.products import record_of
from train_cc.io.read import require_file, require_folder, sha256
from train_cc.io.remote import model_folder, pinned
from train_cc.io.weights import WEIGHTS_NAME
from train_cc.models.backbone import Network, load_network, read_config, trust_code
from train_cc.models.generator import GenerationConfig
from train_cc.run.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class Source:
    """A model folder or a checkpoint. ``sampling``: the steps K and the shift that it was trained for, if recorded."""

    path: Path
    checkpoint: Checkpoint | None
    sha256: str  # of its weights
    sampling: tuple[int, float] | None
    rewards_sha256: list[str] = field(default_factory=list)  # networks that rewarded it, as far as it is recorded
    latent_space: str | None = None  # SHA-256, as its teacher recorded it
    weights: str = "auto"  # of a checkpoint, as in `train_cc.distillation.state.generator_state`

    @cached_property
    def config(self) -> dict:
        return self.checkpoint.units["model_config"] if self.checkpoint is not None else read_config(self.path)

    def load(self) -> Network:
        if self.checkpoint is None:
            return load_network(self.path)
        from train_cc.distillation.state import generator_from  # with peft, which takes a second

        return generator_from(self.checkpoint, self.weights)


def open_source(path: Path, trust_teacher_code: bool = False, weights: str = "auto") -> Source:
    """``trust_teacher_code``: the network.py of ``path``, or of a checkpoint's teacher, may be run."""
    if path.suffix == ".pt":
        checkpoint = open_checkpoint(path)
        average = weights != "raw" and checkpoint.has("accelerator_1/ema.safetensors")
        name = "ema" if average else "generator"
        file = require_file(checkpoint.file(f"accelerator_1/{name}.safetensors"), "the checkpoint's weights")
        rewards = checkpoint.units.get("rewards_sha256", [])
        latents = checkpoint.units.get("latent_space_sha256")
        arguments = checkpoint.units["arguments"]
        if trust_teacher_code:
            trust_code(arguments["teacher"])
        sampling = arguments["num_steps"], float(arguments["timestep_shift"])
        return Source(path, checkpoint, sha256(file), sampling, rewards, latents, weights)
    if path.is_file():
        raise InputError(f"{path} is a file; a model folder or a checkpoints/torch_units/step-N.pt is expected")
    path = model_folder(path)
    if trust_teacher_code:
        trust_code(path)
    require_folder(path, f"a model folder, with config.json and {WEIGHTS_NAME},", "config.json", WEIGHTS_NAME)
    own, digest = GenerationConfig.read(path), sha256(path / WEIGHTS_NAME)
    return Source(path, None, digest, own.sampling, own.rewards_sha256 or [], own.latent_space_sha256)


def settings_for(args: argparse.Namespace, source: Source) -> argparse.Namespace:
    """``args`` with the steps and the shift if they were left open, classes as numbers, and the hub's commit.

    Raises `InputError`.
    """
    channels = source.config["in_channels"]
    if args.guidance_channels is not None and args.guidance_channels > channels:
        allowed = f"allowed: 1 to {channels}, the channels of {args.generator}; without it all are guided"
        raise InputError(f"--guidance-channels is {args.guidance_channels}; {allowed}")
    few = args.sampler == "few-step"
    if few and source.sampling is None and args.num_steps is None:
        note(
            f"{args.generator} does not record for how many steps it was distilled: it is sampled in one step. For a "
            "multi-step teacher give --sampler euler, heun or sde; --num-steps 1 asks for one step"
        )
    elif not few and source.sampling is not None:
        recorded = f"{args.generator} is distilled (num_inference_steps {source.sampling[0]})"
        note(f"{recorded}; --sampler {args.sampler} is for a multi-step teacher")
    if args.guidance_scale <= 1 and (args.guidance_channels or args.guidance_interval != [0.0, 1.0]):
        scale = f"--guidance-scale is {args.guidance_scale:g}, and at most 1 is off"
        note(f"--guidance-interval and --guidance-channels change nothing: {scale}")
    steps, shift = source.sampling if source.sampling and few else (1, 1.0)
    classes = args.classes
    if classes is not None:
        names = names_of_classes(args, source)
        classes = [class_of(text, names, source.config["num_classes"]) for text in classes]
    steps = steps if args.num_steps is None else args.num_steps
    shift = shift if args.timestep_shift is None else args.timestep_shift
    return replaced(args, generator=pinned(args.generator), num_steps=steps, timestep_shift=shift, classes=classes)


# Classes ----------------------------------------------------------------------------------------------------------


def class_of(text: str, names: list[str] | None, count: int) -> int:
    """The class that ``text`` names: by its number, its name, or one of its name's parts. Raises `InputError`."""
    if text.isdecimal() and text.isascii() and (names is None or text not in names):
        if len(text) > 9 or int(text) >= count:
            raise InputError(f"--classes {text[:80]}: the generator has the classes 0 to {count - 1}")
        return int(text)
    if names is None:
        raise InputError(
            f"--classes {text[:80]!r}: nobody told the names of this generator's {count} classes; give "
            f"numbers from 0 to {count - 1}, or their names in a file by --names"
        )
    key = text.casefold().strip()
    whole = [k for k, name in enumerate(names) if key == name.casefold()]
    parts = [k for k, name in enumerate(names) if key in [part.strip() for part in name.casefold().split(",")]]
    within = [k for k, name in enumerate(names) if key and key in name.casefold()]
    classes = whole or parts
    if len(classes) == 1:
        return classes[0]
    near = ", ".join(f"{k} ({names[k]})" for k in (classes or within)[:8])
    problem = "several classes have that name" if classes else "no class has that name"
    problem += f", such as {near}" if near else ""
    raise InputError(f"--classes {text[:80]!r}: {problem}; give a number from 0 to {count - 1} or another name")


def data_of(source: Source) -> str | None:
    """The data set that the teacher of ``source.path`` was trained on, as far as records lead there."""
    # A file is a run's checkpoints/torch_units/step-N.pt.
    folder = source.path if source.path.is_dir() else source.path.resolve().parents[2]
    for _ in range(3):  # the generator's folder, its run's, its teacher's
        arguments = record_of(folder).get("arguments", {})
        if isinstance(arguments.get("dataset"), str):
            return arguments["dataset"]
        folder = Path(str(arguments["teacher"])) if arguments.get("teacher") else folder.parent
    return None


def names_of_classes(args: argparse.Namespace, source: Source) -> list[str] | None:
    """The names of all classes, if there are any. Raises `InputError`."""
    names = str(args.names.absolute()) if args.names else "auto"  # a file, though it be named like a data set
    return class_names(names, source.config["num_classes"], data_of(source), "--names")
