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
    for i in range(depth):
        for name, rows, columns in [
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ]:
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.weight": (width,), f"blocks.{i}.{norm}.bias": (width,)}
        shapes |= {f"blocks.{i}.ls1.gamma": (width,), f"blocks.{i}.ls2.gamma": (width,)}
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
    """-> (backbone file, head file). ``layers``: 4 or 1, which of the two linear heads."""
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


def sit_shapes(
    depth: int = 28,
    hidden: int = 1152,
    patch: int = 2,
    channels: int = 4,
    input_size: int = 32,
    classes: int = 1000,
    out_channels: int = 4,
) -> dict[str, tuple[int, ...]]:
    """The tensors of a SiT in REPA's and its authors' files, projectors apart."""
    shapes = {
        "pos_embed": (1, (input_size // patch) ** 2, hidden),
        "x_embedder.proj.weight": (hidden, channels, patch, patch),
        "x_embedder.proj.bias": (hidden,),
        "t_embedder.mlp.0.weight": (hidden, 256),
        "t_embedder.mlp.0.bias": (hidden,),
        "t_embedder.mlp.2.weight": (hidden, hidden),
        "t_embedder.mlp.2.bias": (hidden,),
        "y_embedder.embedding_table.weight": (classes + 1, hidden),
    }
    for i in range(depth):
        for name, rows, columns in [
            ("attn.qkv", 3 * hidden, hidden),
            ("attn.proj", hidden, hidden),
            ("mlp.fc1", 4 * hidden, hidden),
            ("mlp.fc2", hidden, 4 * hidden),
            ("adaLN_modulation.1", 6 * hidden, hidden),
        ]:
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
    rows = patch * patch * out_channels
    shapes |= {"final_layer.linear.weight": (rows, hidden), "final_layer.linear.bias": (rows,)}
    modulation = "final_layer.adaLN_modulation.1"
    return shapes | {f"{modulation}.weight": (2 * hidden, hidden), f"{modulation}.bias": (2 * hidden,)}


def repa_projectors(hidden: int, width: int = 2048, out: int = 768) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for i, (rows, columns) in {0: (width, hidden), 2: (width, width), 4: (out, width)}.items():
        shapes |= {f"projectors.0.{i}.weight": (rows, columns), f"projectors.0.{i}.bias": (rows,)}
    return shapes


def repa_state(seed: int = 0, spread: float = 0.05, **sizes: int) -> dict[str, Tensor]:
    """A REPA release (`last.pt`): a bare dict with the projectors still in it."""
    shapes = sit_shapes(**sizes)
    return random_state(shapes | repa_projectors(shapes["pos_embed"][2]), seed, spread)


def authors_state(seed: int = 0, spread: float = 0.05, **sizes: int) -> dict[str, Tensor]:
    """The SiT authors' release: 8 output channels, and time that runs from noise at 0 to data at 1."""
    return random_state(sit_shapes(out_channels=8, **sizes), seed, spread)
