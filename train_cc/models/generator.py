"""The generator: a copy of the teacher, trained whole or by LoRA, and the plain SiT that it becomes."""

import json
from pathlib import Path

import torch
from torch import Tensor

from train_cc.io.errors import InputError
from train_cc.io.products import write_atomically
from train_cc.io.read import Number, check_numbers, read_json, shown
from train_cc.io.weights import GENERATION_CONFIG, fit, load_weights, require_finite
from train_cc.models.sit import SiT, check_sit_config

# How a generator is sampled, as `GENERATION_CONFIG` says (FORMATS: generator folder).
SAMPLING = {"num_inference_steps": Number(int, 1, 1000), "timestep_shift": Number(float, 1e-3, 1e3)}


def generator_lora_rank(use_lora_gen: bool, lora_rank: int) -> int | None:
    """Twice the estimator's rank; None where the whole generator is trained."""
    return 2 * lora_rank if use_lora_gen else None


def build_generator(teacher: str | Path, lora_rank: int | None, seed: int = 0) -> SiT:
    """The trainable generator: every parameter, or LoRA of ``lora_rank`` with peft's default spread."""
    return trainable_generator(SiT.from_pretrained(teacher), lora_rank, seed)


def trainable_generator(copy_of_teacher: SiT, lora_rank: int | None, seed: int = 0) -> SiT:
    """`build_generator` of a network that was read already; it is taken over."""
    if lora_rank is not None:
        from train_cc.models.lora import GENERATOR_TARGETS, add_lora  # peft takes a second: who samples needs none

        add_lora(copy_of_teacher, lora_rank, GENERATOR_TARGETS, None, seed)
    return copy_of_teacher


def assemble_generator(config: dict, state: dict[str, Tensor], teacher: str | Path, lora_rank: int | None) -> SiT:
    """The plain SiT of what a checkpoint holds: its trained parameters, LoRA merged into ``teacher`` if there is one.

    Raises `InputError` where ``state`` does not fit.
    """
    source = "what the checkpoint holds of the generator"
    config = check_sit_config(config, "the checkpoint's model_config")
    if lora_rank is None:
        with torch.device("meta"):
            generator = SiT(**config)
        load_weights(generator, state, source)
        return generator.requires_grad_(False).eval()
    from train_cc.models.lora import merge_lora

    generator = build_generator(teacher, lora_rank)
    if check_sit_config(generator.config, teacher) != config:
        raise InputError(f"{teacher} is another model than the checkpoint's: {dict(generator.config)}, not {config}")
    buffers = state.keys() & dict(generator.named_buffers()).keys()
    needed = {name for name, p in generator.named_parameters() if p.requires_grad} | buffers
    own = generator.state_dict()
    fit({name: own[name].shape for name in needed}, state, source)
    load_weights(generator, state, source, partly=True)
    merge_lora(generator)
    return generator.requires_grad_(False).eval()


def save_generator(generator: SiT, folder: str | Path, num_steps: int, shift: float, **provenance: object) -> None:
    """A generator folder: architecture and weights, and the steps K and shift s that it was trained for.

    Raises `InputError` for weights that are not finite.
    """
    require_finite(generator.state_dict(), f"what was to be written to {folder}")
    generator.save_pretrained(folder)
    content = {"num_inference_steps": num_steps, "timestep_shift": shift, **provenance}
    write_atomically(Path(folder) / GENERATION_CONFIG, json.dumps(content, indent=2, default=str) + "\n")


def read_rewards(folder: str | Path) -> list[str]:
    """SHA-256 of the networks that rewarded this generator, as `save_generator` wrote them. Raises `InputError`."""
    path = Path(folder) / GENERATION_CONFIG
    found = read_json(path, "what a generator's folder says of it").get("rewards_sha256", []) if path.exists() else []
    if not isinstance(found, list) or not all(isinstance(each, str) and len(each) == 64 for each in found):
        raise InputError(f"{path}: rewards_sha256 is {shown(found)}; a list of SHA-256 is expected")
    return found


def read_sampling(folder: str | Path) -> tuple[int, float] | None:
    """(K, s) as `save_generator` wrote them; None for a folder without, such as a teacher's. Raises `InputError`."""
    path = Path(folder) / GENERATION_CONFIG
    if not path.exists():
        return None
    content = read_json(path, "a generator's sampling steps and shift")
    if content.keys() == {"latent_space_sha256"}:  # a teacher's
        return None
    check_numbers(content, SAMPLING, path)
    if SAMPLING.keys() - content.keys():
        raise InputError(f"{path} lacks {sorted(SAMPLING.keys() - content.keys())}")
    return content["num_inference_steps"], float(content["timestep_shift"])
