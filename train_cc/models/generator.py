"""The generator: a copy of the teacher, trained whole or by LoRA, and the plain SiT that it becomes."""

from pathlib import Path

from torch import Tensor

from train_cc.io.errors import InputError
from train_cc.models.lora import GENERATOR_TARGETS, add_lora, merge_lora
from train_cc.models.sit import SiT


def generator_lora_rank(use_lora_gen: bool, lora_rank: int) -> int | None:
    """Twice the estimator's rank; None where the whole generator is trained."""
    return 2 * lora_rank if use_lora_gen else None


def build_generator(teacher: str | Path, lora_rank: int | None, seed: int = 0) -> SiT:
    """The trainable generator: every parameter, or LoRA of ``lora_rank`` with peft's default spread."""
    generator = SiT.from_pretrained(teacher)
    if lora_rank is not None:
        add_lora(generator, lora_rank, GENERATOR_TARGETS, None, seed)
    return generator


def assemble_generator(config: dict, state: dict[str, Tensor], teacher: str | Path, lora_rank: int | None) -> SiT:
    """The plain SiT of what a checkpoint holds: its trained parameters, LoRA merged into ``teacher`` if there is one.

    Raises `InputError` where ``state`` does not fit.
    """
    generator = SiT(**config) if lora_rank is None else build_generator(teacher, lora_rank)
    missing, unexpected = generator.load_state_dict(state, strict=False)
    missing = [name for name in missing if lora_rank is None or "lora_" in name]
    if missing or unexpected:
        raise InputError(f"the generator's weights do not fit: missing {missing[:8]}, unexpected {unexpected[:8]}")
    if lora_rank is not None:
        merge_lora(generator)
    return generator.requires_grad_(False).eval()
