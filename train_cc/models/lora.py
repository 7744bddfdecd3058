"""LoRA on a network by peft, in the operations that training needs: add, scale, merge.

peft injects, merges and stores; the forward is ours, since the estimator is read at a scale per call or per sample.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from safetensors.torch import save_file
from torch import Tensor, nn

from train_cc.draws import rng_of
from train_cc.io.errors import InputError
from train_cc.io.products import plain_mode

ADAPTER = "default"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class ScaledLora(PeftLinear):
    """base(x) + scale B A x: scaled where it is cheap, at the low rank, and added by one kernel.

    ``scale``: None for alpha / rank, else a tensor that broadcasts over A x (B, N, rank), such as 0-d or (B, 1, 1).
    """

    scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        if self.merged:
            return out
        low, alpha = self.lora_A[ADAPTER](x), self.scaling[ADAPTER]
        if self.scale is not None:
            low, alpha = low * self.scale, 1
        low, up = low.flatten(0, -2).to(out.dtype), self.lora_B[ADAPTER].weight.to(out.dtype)
        return torch.addmm(out.flatten(0, -2), low, up.t(), alpha=alpha).view_as(out)


def add_lora(model: nn.Module, rank: int, targets: Sequence[str], spread: float | None, seed: int) -> None:
    """Freeze ``model`` and put LoRA (alpha = rank, B = 0) on ``targets``; only LoRA is trainable after.

    ``spread`` is the standard deviation of A's first values: with Adam, spread times learning rate says how fast the
    adapted weight moves. None: peft's own, 1 / sqrt(3 fan_in).
    """
    if rank < 1:
        raise InputError(f"the LoRA rank is {rank}; it must be at least 1: without LoRA real and fake are one network")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), lora_dropout=0.0)
        config._register_custom_module({nn.Linear: ScaledLora})  # peft's way for layers of one's own
        inject_adapter_in_model(config, model, ADAPTER)
    rng = rng_of(seed)
    for layer in lora_layers(model):
        a = layer.lora_A[ADAPTER].weight
        if spread is not None:
            with torch.no_grad():
                a.copy_(torch.randn(a.shape, generator=rng) * spread)
        layer.lora_A[ADAPTER].requires_grad_(True)
        layer.lora_B[ADAPTER].requires_grad_(True)


def lora_layers(model: nn.Module) -> list[ScaledLora]:
    return [module for module in model.modules() if isinstance(module, ScaledLora)]


def set_lora_scale(layers: Sequence[ScaledLora], scale: Tensor | None) -> None:
    """A tensor and not a number: a number would be a constant of the compiled graph, and another one a new graph."""
    for layer in layers:
        layer.scale = scale


@contextlib.contextmanager
def lora_scale_set(layers: Sequence[ScaledLora], scale: Tensor | None) -> Iterator[None]:
    """``scale`` inside, and outside what it was: for the forward that activation checkpointing recomputes."""
    before = layers[0].scale
    set_lora_scale(layers, scale)
    try:
        yield
    finally:
        set_lora_scale(layers, before)


def hold_frozen_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast, once, the frozen weights that autocast would cast at every call: those of linear layers and convolutions.

    What autocast leaves in fp32 stays so, and the results are the same bits. Autocast caches its casts of trained
    weights within a call, but never those of frozen ones.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def save_adapter(state: Mapping[str, Tensor], rank: int, targets: Sequence[str], base: str, folder: Path) -> None:
    """Write the LoRA of ``state`` as a folder that `peft.PeftModel.from_pretrained` puts on the model of ``base``."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), lora_dropout=0.0, inference_mode=True)
    config.base_model_name_or_path = base
    config.save_pretrained(folder)
    names = {name: f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}" for name in state if ".lora_" in name}
    save_file({new: state[name].contiguous() for name, new in names.items()}, folder / ADAPTER_FILES[1])
    plain_mode(folder / ADAPTER_FILES[1])


def merge_lora(model: nn.Module) -> None:
    """Add every LoRA product into its base weight, in place, and take the LoRA modules out."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ScaledLora):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
