"""SiT's model folder: its config, checked, and its weights, read and written strictly. The network is `network.SiT`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.layers import Attention
from torch import nn

from train_cc.io.errors import InputError
from train_cc.io.fields import check, setting
from train_cc.io.products import plain_mode
from train_cc.io.read import kind_of, read_json, read_safetensors, safetensors_shapes
from train_cc.io.remote import model_folder
from train_cc.io.weights import WEIGHTS_NAME, block_count, fit_shapes, load_weights
from train_cc.models import network

# name -> the arguments of `SiT` that it stands for; inputs are 4 x 32 x 32 latents, 1000 classes, by default.
SIT_SIZES = {
    f"SiT-{size}/{patch}": {"depth": depth, "hidden_size": hidden, "num_heads": heads, "patch_size": patch}
    for size, depth, hidden, heads in [("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16), ("XL", 28, 1152, 16)]
    for patch in (2, 4, 8)
}


@dataclass(frozen=True)
class SiTConfig:
    """The arguments of `network.SiT`. Those with a default may be missing: the shapes of the weights show them."""

    input_size: int = setting(high=4096)
    in_channels: int = setting(high=1024)
    patch_size: int = setting(2, high=256)
    hidden_size: int = setting(low=4, high=2**16)
    depth: int = setting(high=1024)
    num_heads: int = setting(high=1024)
    num_classes: int = setting(high=10**6)
    mlp_ratio: float = setting(4.0, low=1 / 64, high=64)


EXPECTED = "a SiT's model folder"
DIFFUSERS_OPTIONS = {"device_map", "variant", "quantization_config", "subfolder", "revision"}


def check_sit_config(config: Mapping, source: Path | str) -> dict:
    """The arguments of `SiT` in ``config``, each of them, without private keys. Raises `InputError`."""
    if (kind := kind_of(config, "SiT")) != "SiT":
        raise InputError(f"{source} is of a {kind}; {EXPECTED} is expected")
    values = check(SiTConfig, config, source)
    for name, divisor in (("hidden_size", "num_heads"), ("input_size", "patch_size")):
        if values[name] % values[divisor]:
            raise InputError(f"{source}: {divisor} {values[divisor]} does not divide {name} {values[name]}")
    if values["hidden_size"] % 4:
        raise InputError(f"{source}: hidden_size is {values['hidden_size']}; allowed: multiples of 4")
    return values


def sit_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Of every tensor of `SiT(**config)`; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in SiT(**config).state_dict().items()}


def read_sit_config(folder: Path) -> dict:
    """Of a model folder, a path or a name on the hub. Raises `InputError`.

    Its weights, where there are any yet, have the shapes that it names. Shapes are read off the header, before anything
    is allocated.
    """
    if folder.is_file() and folder.parent.name == "torch_units":
        raise InputError(
            f"{folder} is a run's checkpoint; a model folder is expected. --resume-ckpt {folder} continues from it; to "
            f"make a folder of its generator: python convert_weight/export_generator.py --checkpoint {folder}"
        )
    if folder.is_file():
        raise InputError(
            f"{folder} is a file; a model folder with config.json and {WEIGHTS_NAME} is expected. "
            f"To make one of a checkpoint: python convert_weight/sit_convert.py --input {folder}"
        )
    folder = model_folder(folder)
    path, weights = folder / "config.json", folder / WEIGHTS_NAME
    config = check_sit_config(read_json(path, f"{EXPECTED}, with config.json and {WEIGHTS_NAME},"), path)
    if weights.exists():
        shapes = safetensors_shapes(weights, "weights of a SiT")
        blocks = block_count(shapes, weights)
        if blocks not in (0, config["depth"]):  # before a module is made for each
            raise InputError(f"{weights} does not fit its config.json: it has {blocks} blocks, not {config['depth']}")
        fit_shapes(sit_shapes(config), shapes, weights, "by its config.json")
    return config


class SiT(network.SiT):
    """The network, read and written strictly. `SiT(**SIT_SIZES["SiT-XL/2"])` is the full size."""

    def save_pretrained(self, folder: str | Path, **options) -> None:
        """`config.json` and one safetensors file, with the same mode."""
        super().save_pretrained(folder, **options | {"max_shard_size": "1000TB", "safe_serialization": True})
        if (Path(folder) / WEIGHTS_NAME).exists():
            plain_mode(Path(folder) / WEIGHTS_NAME)

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype | None = None, **options) -> "SiT":
        """Read a folder of `config.json` and one safetensors file, strictly, in fp32 unless ``torch_dtype`` is given.

        ``folder``: a path, or org/name[@revision] on the hub.
        ``files`` of the result are the weights files that were read. ``options`` of diffusers that are set are refused.
        Raises `InputError` where the folder or a file is missing, truncated, or holds other keys, shapes or kinds.
        """
        folder = Path(folder)
        if given := sorted(name for name in DIFFUSERS_OPTIONS & options.keys() if options[name] is not None):
            raise InputError(f"a SiT is not loaded with {', '.join(given)}: move it or cast it afterwards")
        config = read_sit_config(folder)
        weights = model_folder(folder) / WEIGHTS_NAME
        state = read_safetensors(weights, EXPECTED)
        with torch.device("meta"):
            model = cls(**config)
        load_weights(model, state, weights)
        model.files = [weights]
        return (model if torch_dtype is None else model.to(torch_dtype)).eval()


def choose_attention(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """In half precision on a CPU plain attention is about 2.5 times faster than the fused kernel, its backward 3."""
    fused = not (device.type == "cpu" and dtype != torch.float32)
    for module in network.modules():
        if isinstance(module, Attention):
            module.fused_attn = fused
