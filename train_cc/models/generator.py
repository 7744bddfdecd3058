"""The generator: a copy of the teacher, trained whole or by LoRA, the plain SiT that it becomes, and its folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from train_cc.io.errors import InputError
from train_cc.io.products import write_atomically
from train_cc.io.read import Number, check_numbers, read_json, shown
from train_cc.io.weights import GENERATION_CONFIG, fit, load_weights, require_finite
from train_cc.models.sit import SiT, check_sit_config

SAMPLING = {"num_inference_steps": Number(int, 1, 1000), "timestep_shift": Number(float, 1e-3, 1e3)}


def generator_lora_rank(use_lora_gen: bool, lora_rank: int) -> int | None:
    """Twice the estimator's rank; None if the whole generator is trained."""
    return 2 * lora_rank if use_lora_gen else None


def build_generator(copy_of_teacher: SiT, lora_rank: int | None, seed: int = 0) -> SiT:
    """The trainable generator, made of ``copy_of_teacher``: all of it, or a LoRA with peft's default spread."""
    if lora_rank is not None:
        from train_cc.models.lora import GENERATOR_TARGETS, add_lora  # peft takes a second, and sampling needs none

        add_lora(copy_of_teacher, lora_rank, GENERATOR_TARGETS, None, seed)
    return copy_of_teacher


def assemble_generator(config: dict, state: dict[str, Tensor], teacher: str | Path, lora_rank: int | None) -> SiT:
    """The plain SiT of a checkpoint's trained parameters ``state``, their LoRA, if any, merged into ``teacher``.

    Raises `InputError` if ``state`` does not fit.
    """
    source = "what the checkpoint holds of the generator"
    config = check_sit_config(config, "the checkpoint's model_config")
    if lora_rank is None:
        with torch.device("meta"):
            generator = SiT(**config)
        load_weights(generator, state, source)
        return generator.requires_grad_(False).eval()
    from train_cc.models.lora import merge_lora

    generator = build_generator(SiT.from_pretrained(teacher), lora_rank)
    if check_sit_config(generator.config, teacher) != config:
        raise InputError(f"{teacher} is another model than the checkpoint's: {dict(generator.config)}, not {config}")
    buffers = state.keys() & dict(generator.named_buffers()).keys()
    needed = {name for name, p in generator.named_parameters() if p.requires_grad} | buffers
    own = generator.state_dict()
    fit({name: own[name].shape for name in needed}, state, source)
    load_weights(generator, state, source, partly=True)
    merge_lora(generator)
    return generator.requires_grad_(False).eval()


@dataclass(frozen=True)
class GenerationConfig:
    """`generation_config.json` of a model folder. A teacher's has its latent space only; a folder may have none."""

    num_inference_steps: int | None = None  # K that a generator was trained for; None: it is no generator
    timestep_shift: float | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)  # run, step, weights, teacher: for people to read
    rewards_sha256: Sequence[str] = ()  # of the networks that rewarded it
    latent_space_sha256: str | None = None  # of the latents that it was trained on, see `LatentSpace`

    @property
    def sampling(self) -> tuple[int, float] | None:
        """(K, s) of a generator, None of a teacher."""
        return None if self.num_inference_steps is None else (self.num_inference_steps, float(self.timestep_shift))

    @classmethod
    def read(cls, folder: str | Path) -> "GenerationConfig":
        """Read the file of a model folder; without a file nothing is recorded. Raises `InputError`."""
        path = Path(folder) / GENERATION_CONFIG
        if not path.exists():
            return cls()
        content = read_json(path, "a model's sampling and latents")
        check_numbers(content, SAMPLING, path)
        if (missing := sorted(SAMPLING.keys() - content.keys())) and content.keys() != {"latent_space_sha256"}:
            raise InputError(f"{path} lacks {missing}")
        rewards, latents = content.get("rewards_sha256", []), content.get("latent_space_sha256")
        if not isinstance(rewards, list) or not all(isinstance(each, str) and len(each) == 64 for each in rewards):
            raise InputError(f"{path}: rewards_sha256 is {shown(rewards)}; a list of SHA-256 is expected")
        if latents is not None and not (isinstance(latents, str) and len(latents) == 64):
            raise InputError(f"{path}: latent_space_sha256 is {shown(latents)}; a SHA-256 is expected")
        return cls.of(content)

    @classmethod
    def of(cls, content: Mapping) -> "GenerationConfig":
        """Its fields from the file's ``content``; other names are provenance."""
        names = (*SAMPLING, "rewards_sha256", "latent_space_sha256")
        own = {name: content[name] for name in names if name in content}
        return cls(provenance={name: value for name, value in content.items() if name not in own}, **own)

    def write(self, folder: str | Path) -> None:
        """Write the file into a model folder."""
        content: dict[str, object] = {"latent_space_sha256": self.latent_space_sha256}
        if self.sampling is not None:
            sampling = {name: getattr(self, name) for name in SAMPLING}
            content = {**sampling, **self.provenance, "rewards_sha256": list(self.rewards_sha256), **content}
        write_atomically(Path(folder) / GENERATION_CONFIG, json.dumps(content, indent=2) + "\n")


def save_generator(generator: SiT, folder: str | Path, num_steps: int, shift: float, **more: object) -> None:
    """Write a generator folder: architecture, weights, and its `GenerationConfig`, with the fields ``more``.

    Raises `InputError` for weights that are not finite.
    """
    require_finite(generator.state_dict(), f"what was to be written to {folder}")
    generator.save_pretrained(folder)
    GenerationConfig.of({"num_inference_steps": num_steps, "timestep_shift": shift, **more}).write(folder)
