"""SiTs as REPA and the authors release them, with random weights from a seed, at any size."""

from torch import Tensor

from evaluation.standins import random_state


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
