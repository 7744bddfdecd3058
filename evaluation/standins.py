"""External files in their official layouts, with random weights from a seed, at any size: for benchmarks and tests."""

from pathlib import Path

import torch
from torch import Tensor

from train_cc.models.vae import new_vae


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0, spread: float = 0.05) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * spread for name, shape in shapes.items()}


def dinov2_shapes(width: int, depth: int, registers: int = 0) -> dict[str, tuple[int, ...]]:
    """The tensors of dinov2_vit*_pretrain.pth: 5 + 14 a block + 2, one more with registers."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1370, width), "mask_token": (1, width)}
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    shapes |= {"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)}
    linear = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for block in (f"blocks.{i}." for i in range(depth)):
        for name, (rows, columns) in linear.items():
            shapes |= {f"{block}{name}.weight": (rows * width, columns * width), f"{block}{name}.bias": (rows * width,)}
        vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")
        shapes |= {block + name: (width,) for name in vectors}
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def write_dinov2(
    folder: Path,
    width: int = 128,
    depth: int = 5,
    registers: int = 0,
    layers: int = 4,
    classes: int = 1000,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Return (backbone file, head file). ``layers``: 4 or 1, for one of the two linear heads."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone, head = folder / "pretrain.pth", folder / f"linear{layers}_head.pth"
    torch.save(random_state(dinov2_shapes(width, depth, registers), seed, spread=0.2), backbone)
    torch.save(random_state({"weight": (classes, (layers + 1) * width), "bias": (classes,)}, seed + 1), head)
    return backbone, head


def write_vae(folder: Path, channels: tuple[int, ...] = (8, 8, 8, 8), groups: int = 4, seed: int = 0) -> Path:
    """A diffusers folder of stabilityai/sd-vae-ft-ema's layout: f = 8, 4 latent channels, no scaling factor named."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        new_vae(channels, groups).save_pretrained(folder)
    return folder
