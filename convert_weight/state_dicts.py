"""Pure renames: from the tensors of a published checkpoint to those of our `SiT`. No files, no modules."""

import math
import re

import torch
from torch import Tensor

from train_cc.io.errors import InputError
from train_cc.io.weights import block_count, require_tensors
from train_cc.models.sit import SIT_SIZES, check_sit_config

State = dict[str, Tensor]


def unnest(content: object) -> tuple[State, str]:
    """-> the state dict and where it stood. Training checkpoints nest; their EMA is preferred. Raises `InputError`."""
    expected = 'a state dict, or one nested as "ema" or "model",'
    if isinstance(content, dict):
        for key in ("ema", "model"):
            if isinstance(content.get(key), dict) and content[key]:
                others = ", ".join(str(name)[:40] for name in list(content)[:8])
                return require_tensors(content[key], f'"{key}"', expected), f'"{key}" of a checkpoint with {others}'
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return require_tensors(content, "this file", expected), "a bare state dict"
    kind = f"a {type(content).__name__}"
    if isinstance(content, dict):
        kind = f"keys {sorted(str(name)[:40] for name in content)[:6]}"
    raise InputError(f"no weights found: {expected} is expected; this is {kind}")


def drop_projectors(state: State) -> tuple[State, list[str]]:
    """REPA's alignment heads serve its training alone."""
    dropped = [name for name in state if name.startswith("projectors.")]
    return {name: value for name, value in state.items() if name not in dropped}, dropped


def rename_decoder_blocks(state: State, encoder_depth: int) -> State:
    """Legacy files name block N + encoder_depth ``decoder_blocks.N``."""

    def rename(name: str) -> str:
        return re.sub(r"^decoder_blocks\.(\d{1,4})\.", lambda m: f"blocks.{int(m[1]) + encoder_depth}.", name)

    renamed = {rename(name): value for name, value in state.items()}
    if len(renamed) != len(state):
        raise InputError(f"decoder_blocks overlap with blocks at --encoder-depth {encoder_depth}")
    return renamed


def config_of(state: State, num_heads: int | None) -> dict:
    """The arguments of `SiT` read off the tensors; heads from the size table unless given."""
    needed = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise InputError(f"this is no SiT: missing {', '.join(missing)}; it has {', '.join(sorted(state)[:6])}, ...")
    patches, table, fc1 = (state[name].shape for name in (needed[1], needed[2], needed[3]))
    position = state["pos_embed"].shape
    tokens = position[1] if len(position) == 3 else 0
    side = math.isqrt(tokens)
    square = len(patches) == 4 and patches[2] == patches[3] and side**2 == tokens > 0
    if not square or not patches.numel() or len(table) != 2 or len(fc1) != 2:
        told = ", ".join(f"{name} {tuple(state[name].shape)}" for name in needed)
        raise InputError(f"this is no SiT of square images and patches: {told}")
    hidden, channels, patch, _ = patches
    depth = block_count(state, "this SiT (is --encoder-depth wrong?)")
    size = {"depth": depth, "hidden_size": hidden}
    known = [entry["num_heads"] for entry in SIT_SIZES.values() if size.items() <= entry.items()]
    if num_heads is None and not known:
        raise InputError(f"a SiT of depth {depth} and width {hidden} is in no size table; give --num-heads")
    heads = num_heads or known[0]
    if hidden % heads:
        raise InputError(f"--num-heads {heads} does not divide the width {hidden}")
    ratio = fc1[0] / hidden
    config = size | {
        "num_heads": heads,
        "patch_size": patch,
        "in_channels": channels,
        "input_size": side * patch,
        "num_classes": table[0] - 1,
        # The model rounds down to whole rows.
        "mlp_ratio": ratio if int(hidden * ratio) == fc1[0] else (fc1[0] + 0.5) / hidden,
    }
    check_sit_config(config, "this SiT")
    return config


def has_variance_channels(state: State, config: dict) -> bool:
    """Whether the output has twice the input's channels: the SiT authors' files, whose time runs the other way."""
    weight = state.get("final_layer.linear.weight")
    rows = 2 * config["patch_size"] ** 2 * config["in_channels"]
    return weight is not None and weight.ndim == 2 and weight.shape[0] == rows


def keep_velocity_channels(state: State, config: dict) -> State:
    """The first half of the output channels: rows ``view(p * p, 2 C, D)[:, :C]``, bias likewise."""
    patch, channels = config["patch_size"], config["in_channels"]
    out = dict(state)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        value = state[name]
        out[name] = value.reshape(patch * patch, 2 * channels, *value.shape[1:])[:, :channels].flatten(0, 1).clone()
    return out


def reverse_time(state: State) -> State:
    """v_ours(x, t) = -v_theirs(x, 1 - t), folded exactly into the weights (in float64).

    With the embedding [cos wt, sin wt], that of 1 - t is a linear map of that of t:
    cos w(1 - t) = cos w cos wt + sin w sin wt, sin w(1 - t) = sin w cos wt - cos w sin wt.
    The map goes into the first layer of the time MLP, the sign into the last layer.
    """
    out = dict(state)
    weight = state["t_embedder.mlp.0.weight"].double()
    half = weight.shape[1] // 2
    w = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).double()
    of_cos, of_sin = weight[:, :half], weight[:, half:]
    folded = torch.cat([of_cos * w.cos() + of_sin * w.sin(), of_cos * w.sin() - of_sin * w.cos()], dim=1)
    out["t_embedder.mlp.0.weight"] = folded.to(state["t_embedder.mlp.0.weight"].dtype)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        out[name] = -state[name]
    return out
