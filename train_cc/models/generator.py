"""The generator: a copy of the teacher, trained whole or by LoRA, the plain network that it becomes, and its folder."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from train_cc.io.errors import InputError
from train_cc.io.fields import check, setting
from train_cc.io.products import write_atomically
from train_cc.io.read import read_json
from train_cc.io.weights import GENERATION_CONFIG, fit, load_weights, require_finite
from train_cc.models.backbone import Network, check_config, config_of, load_network, new_network


def generator_lora_rank(use_lora_gen: bool, lora_rank: int) -> int | None:
    """Twice the estimator's rank; None if the whole generator is trained."""
    return 2 * lora_rank if use_lora_gen else None


def build_generator(copy_of_teacher: Network, lora_rank: int | None, seed: int = 0) -> Network:
    """The trainable generator, made of ``copy_of_teacher``: all of it, or a LoRA with peft's default spread."""
    if lora_rank is not None:
        from train_cc.models.lora import add_lora  # peft takes a second, and sampling needs none

        add_lora(copy_of_teacher, lora_rank, copy_of_teacher.generator_targets, None, seed)
    return copy_of_teacher


def assemble_generator(config: dict, state: dict[str, Tensor], teacher: str | Path, lora_rank: int | None) -> Network:
    """The plain network of a checkpoint's trained parameters ``state``, their LoRA, if any, merged into ``teacher``.

    Raises `InputError` if ``state`` does not fit.
    """
    source = "what the checkpoint holds of the generator"
    config = check_config(config, "the checkpoint's model_config")
    if lora_rank is None:
        with torch.device("meta"):
            generator = new_network(config)
        load_weights(generator, state, source)
        return generator.requires_grad_(False).eval()
    from train_cc.models.lora import merge_lora

    generator = build_generator(load_network(teacher), lora_rank)
    if (own := config_of(generator)) != config:
        raise InputError(f"{teacher} is another model than the checkpoint's: {own}, not {config}")
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

    num_inference_steps: int | None = setting(None, high=1000)  # K that a generator was trained for
    timestep_shift: float | None = setting(None, low=1e-3, high=1e3)
    run: str | None = setting(None)
    step: int | None = setting(None, low=0)
    weights: str | None = setting(None)  # raw or ema
    teacher_sha256: str | None = setting(None)
    rewards_sha256: list | None = setting(None)  # of the networks that rewarded it
    latent_space_sha256: str | None = setting(None)  # of the latents that it was trained on, see `LatentSpace`

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
        values = check(cls, content, path, others=True)
        missing = [name for name in ("num_inference_steps", "timestep_shift") if values[name] is None]
        if missing and content.keys() != {"latent_space_sha256"}:
            raise InputError(f"{path} lacks {missing}")
        return cls(**values)

    def write(self, folder: str | Path) -> None:
        """Write the file into a model folder."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        content = {**fields, "latent_space_sha256": self.latent_space_sha256}
        write_atomically(Path(folder) / GENERATION_CONFIG, json.dumps(content, indent=2) + "\n")


def save_generator(generator: Network, folder: str | Path, num_steps: int, shift: float, **more: object) -> None:
    """Write a generator folder: architecture, weights, and its `GenerationConfig`, with the fields ``more``.

    Raises `InputError` for weights that are not finite.
    """
    require_finite(generator.state_dict(), f"what was to be written to {folder}")
    generator.save_pretrained(folder)
    GenerationConfig(num_inference_steps=num_steps, timestep_shift=shift, **more).write(folder)
