"""Conversion of the content of a published checkpoint to a network of ours, by renames and exact folds. No files."""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from convert_weight.foreign import content_kind, network_kind
from train_cc.io.errors import InputError
from train_cc.io.weights import block_count, fit, load_weights, require_tensors
from train_cc.models.backbone import SIT_SIZES, USUAL, Network, check_config, new_network, shapes_of
from train_cc.models.networks.sit import position_embedding

State = dict[str, Tensor]
GUESS = "guessed: "
UNSAID = f"{GUESS}it predicts a velocity, as SiT's files do; a DiT's eps has the same names"
FOLDED = "folded v(x, t) = -v_theirs(x, 1 - t) in"

# Keys under which training code nests a network's weights, the preferred ones first. No other key is followed.
NESTS = ["generator", "gen", "gen_model", "model", "module", "state_dict", "model_state_dict", "model_state", "net"]
NESTS += ["network", "weights", "model_weights", "params", "student", "sit", "dit", "transformer"]
NESTS += ["shadow", "shadow_params"]
# Before names or inside them: DDP, torch.compile, FSDP, activation checkpointing.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
ANCHOR = "x_embedder.proj.weight"
LAST_LAYER = ("final_layer.linear.weight", "final_layer.linear.bias")


def is_average(key: str) -> bool:
    return bool({"ema", "averaged", "average"} & set(re.split(r"[^a-z]+", key.lower())))


def networks_in(content: object, place: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], State]]:
    """Every SiT or DiT at a known place of ``content``, with its keys, the last of them a prefix of its names."""
    if not isinstance(content, Mapping) or len(place) > 6:
        return []
    networks = []
    raw = [name for name in content if name != "n_averaged"]  # torch's AveragedModel counts in there
    names = {WRAPPERS.sub("", str(name)): name for name in raw}
    prefixes = [name.removesuffix(ANCHOR) for name in names if f".{name}".endswith(f".{ANCHOR}")]
    if prefixes and len(names) < len(raw):
        raise InputError("two tensors have the same name without the prefixes of DDP, FSDP and torch.compile")
    for prefix in prefixes:
        others = tuple(other for other in prefixes if len(other) > len(prefix))
        own = [name for name in names if name.startswith(prefix) and not name.startswith(others)]
        keys = tuple(prefix.rstrip(".").split(".")) if prefix else ()
        networks.append(((*place, *keys), {name.removeprefix(prefix): content[names[name]] for name in own}))
    for key, value in content.items():
        if isinstance(key, str) and (key.lower() in NESTS or is_average(key)):
            networks += networks_in(value, (*place, key))
    return networks


def preference(place: tuple[str, ...]) -> tuple[bool, int]:
    """An average first, then by the order of `NESTS`."""
    orders = [NESTS.index(key.lower()) for key in place if key.lower() in NESTS]
    return not any(is_average(key) for key in place), min(orders, default=-1)


def unnest(content: object) -> tuple[State, str]:
    """Return the state dict and its place. Checkpoints nest and prefix; an EMA is preferred. Raises `InputError`."""
    expected = 'a state dict, or one nested as "ema" or "model",'
    networks = networks_in(content)
    if not networks:
        raise InputError(nothing_found(content, expected))
    place, state = min(networks, key=lambda network: preference(network[0]))
    if not any(value.numel() for value in state.values()):
        how = "zero_to_fp32.py, which DeepSpeed writes beside the checkpoint, makes one file of all"
        raise InputError(f"this is a part of a DeepSpeed ZeRO-3 checkpoint, whose tensors are empty here; {how}")
    source = f'"{".".join(place)}"' if place else "this file"
    others = sorted({str(name)[:40].split(".")[0] for name in content} - {*place[:1]})[:8]
    beside = f" of a checkpoint with {', '.join(others)}" if others else ""
    return require_tensors(state, source, expected), f"{source}{beside}" if place else "a bare state dict"


def nothing_found(content: object, expected: str) -> str:
    """The words for a file without a network of ours, with its kind if that is known."""
    words = f"no weights found: {expected} is expected; this is"
    if not isinstance(content, Mapping):
        return f"{words} a {type(content).__name__}"
    state, where = content, content
    while isinstance(where, Mapping):  # down to the first dict of tensors
        state = where
        where = next((value for key, value in where.items() if str(key).lower() in NESTS or is_average(str(key))), None)
    if kind := content_kind(content) or network_kind(state):
        return f"this is {kind}; a SiT is expected"
    if state and all(isinstance(value, Tensor) for value in state.values()):
        return f"this is no SiT: missing {ANCHOR}; it has {', '.join(sorted(map(str, state))[:6])}, ..."
    return f"{words} keys {sorted(str(name)[:40] for name in content)[:6]}"


def rename_decoder_blocks(state: State, encoder_depth: int) -> State:
    """Legacy files name block N + encoder_depth ``decoder_blocks.N``."""
    block = re.compile(r"^decoder_blocks\.(\d{1,4})\.")
    names = {name: block.sub(lambda m: f"blocks.{int(m[1]) + encoder_depth}.", name) for name in state}
    renamed = {names[name]: value for name, value in state.items()}
    if len(renamed) != len(state):
        raise InputError(f"decoder_blocks overlap with blocks at --encoder-depth {encoder_depth}")
    return renamed


def classes_of(rows: int, num_classes: int | None) -> tuple[int, str | None]:
    """Return the classes of a label table, whose last row is the null class, and the words for a guess."""
    if num_classes is None:
        if rows == 1000:
            words = "ImageNet's 1000 classes without a null row? Training needs one (label dropout)"
            raise InputError(f"the label table has 1000 rows: {words}. --num-classes 999: 999 classes and a null row")
        guess = None if rows == 1001 else f"{GUESS}{rows - 1} classes and a null row; --num-classes decides"
        return rows - 1, guess
    if rows == num_classes:
        words = "a null row is missing: the network was trained without label dropout, and cannot be a teacher here"
        raise InputError(f"the label table has {rows} rows for --num-classes {num_classes}: {words}")
    if rows != num_classes + 1:
        raise InputError(f"the label table has {rows} rows; --num-classes {num_classes} needs {num_classes + 1}")
    return num_classes, None


def direction_of(variance: bool, repa: bool, chosen: str | None) -> tuple[str, str | None]:
    """Return data-at-0 or data-at-1, and the words for a guess. REPA's own files are known by their projectors."""
    if chosen is not None or (repa and not variance):
        return chosen or "data-at-0", None
    guess = "data-at-1" if variance and not repa else "data-at-0"
    why = f"{'two sets' if variance else 'one set'} of output channels{', projectors' if repa else ''}"
    return guess, f"{GUESS}time has {guess}, from {why}; --time-direction decides"


def config_of(state: State, num_heads: int | None, gated: bool = False) -> dict:
    """The arguments of a network read off the tensors; heads from the size table unless given."""
    needed = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise InputError(f"this is no SiT: missing {', '.join(missing)}; it has {', '.join(sorted(state)[:6])}, ...")
    position, patches, table, fc1 = (state[name].shape for name in needed)
    tokens = position[1] if len(position) == 3 else 0
    side = math.isqrt(tokens)
    square = len(patches) == 4 and patches[2] == patches[3] and side**2 == tokens > 0
    if not square or not patches.numel() or len(table) != 2 or len(fc1) != 2:
        words = ", ".join(f"{name} {tuple(state[name].shape)}" for name in needed)
        raise InputError(f"this is no SiT of square images and patches: {words}")
    hidden, channels, patch, _ = patches
    depth = block_count(state, "this SiT (is --encoder-depth wrong?)")
    size = {"depth": depth, "hidden_size": hidden}
    heads = num_heads or next((row["num_heads"] for row in SIT_SIZES.values() if size.items() <= row.items()), None)
    if heads is None:
        raise InputError(f"a SiT of depth {depth} and width {hidden} is in no size table; give --num-heads")
    rows = fc1[0] * 3 // 4 if gated else fc1[0]  # of two products, each of 2/3 of the rows
    ratio = rows / hidden
    config = size | {
        "num_heads": heads,
        "patch_size": patch,
        "in_channels": channels,
        "input_size": side * patch,
        "num_classes": table[0] - 1,
        # The model rounds down to whole rows.
        "mlp_ratio": ratio if gated or int(hidden * ratio) == rows else (rows + 0.5) / hidden,
    }
    check_config(config, "this SiT")
    return config


def velocity_channels(state: State, config: dict) -> State:
    """The last layer for the first half of the output channels, if there are twice the input's; {} if not.

    The SiT authors' files have them, and their time runs the other way. Rows: ``view(p * p, 2 C, D)[:, :C]``.
    """
    patches, channels = config["patch_size"] ** 2, config["in_channels"]
    if not all(name in state and state[name].shape[:1] == (2 * patches * channels,) for name in LAST_LAYER):
        return {}
    return {name: state[name].unflatten(0, (patches, -1))[:, :channels].flatten(0, 1).clone() for name in LAST_LAYER}


def reverse_time(state: State) -> State:
    """v_ours(x, t) = -v_theirs(x, 1 - t), folded exactly into the weights (in float64).

    With the embedding [cos wt, sin wt], that of 1 - t is a linear map of that of t:
    cos w(1 - t) = cos w cos wt + sin w sin wt, sin w(1 - t) = sin w cos wt - cos w sin wt.
    The map goes into the first layer of the time MLP, the sign into the last layer.
    """
    weight = state["t_embedder.mlp.0.weight"].double()
    half = weight.shape[1] // 2
    w = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).double()
    of_cos, of_sin = weight[:, :half], weight[:, half:]
    folded = torch.cat([of_cos * w.cos() + of_sin * w.sin(), of_cos * w.sin() - of_sin * w.cos()], dim=1)
    changed = {name: -state[name] for name in LAST_LAYER}
    return state | changed | {"t_embedder.mlp.0.weight": folded.to(state["t_embedder.mlp.0.weight"].dtype)}


def size_name(config: dict) -> str | None:
    """The name of a size in the table, such as SiT-XL/2; a patch of 1 is LightningDiT's."""
    sizes = SIT_SIZES | {f"{name[:-1]}1": size | {"patch_size": 1} for name, size in SIT_SIZES.items()}
    name = next((name for name, size in sizes.items() if size.items() <= config.items()), None)
    return name and name.replace("SiT", config.get("_class_name", USUAL))


# LightningDiT's names of its gated MLP; its table of rotary positions is computed.
GATED = {"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}
# diffusers' names of a DiT; each of its blocks holds the embedders once more, and q, k, v apart.
OF_DIFFUSERS = {
    "pos_embed.proj": "x_embedder.proj",
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}


def from_diffusers(state: State, sample_size: int) -> State:
    """A `DiTTransformer2DModel`'s tensors under the names of DiT's authors. Raises `InputError`.

    Its blocks' copies of the embedders are one, as its authors' files make them.
    """
    renamed: State = {}
    for name, value in state.items():
        block, own = re.fullmatch(r"(?:transformer_blocks\.(\d+)\.)?(.*)", name).groups()
        module, _, kind = own.rpartition(".")
        if module.startswith("attn1.to_") and module != "attn1.to_out.0":
            continue
        new = OF_DIFFUSERS.get(module, module)
        place = f"{new}.{kind}" if block is None or "embedder" in new else f"blocks.{block}.{new}.{kind}"
        if not torch.equal(renamed.setdefault(place, value), value):
            raise InputError(f"{name} differs from another block's: it was trained apart, and a DiT here has one")
    for block in sorted({name.split(".")[1] for name in state if name.startswith("transformer_blocks.")}):
        for kind in ("weight", "bias"):
            parts = [state.get(f"transformer_blocks.{block}.attn1.to_{each}.{kind}") for each in "qkv"]
            if None not in parts:
                renamed[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    renamed.pop("pos_embed.pos_embed", None)
    hidden, _, patch, _ = renamed["x_embedder.proj.weight"].shape
    return renamed | {"pos_embed": position_embedding(hidden, sample_size // patch)}


def convert(
    content: object,
    num_heads: int | None = None,
    encoder_depth: int = 8,
    time_direction: str | None = None,
    num_classes: int | None = None,
    network: str | None = None,
    **more: int,
) -> tuple[Network, list[str]]:
    """Return the model, and lines about what was recognised, guessed and dropped. Raises `InputError`.

    ``network``: DiT for a file that predicts eps, which it does not say; a LightningDiT is known by its names.
    ``more``: further arguments of the network.
    """
    state, place = unnest(content)
    notes = [f"weights: {place}"]
    if kind := network_kind(state):
        raise InputError(f"this is {kind}; a SiT is expected")
    projectors = [name for name in state if re.match(r"projectors?\.", name)]  # they serve REPA's training only
    state = {name: value for name, value in state.items() if name not in projectors}
    if projectors:
        notes.append(f"dropped: {len(projectors)} tensors of REPA's projectors")
    if any(name.startswith("decoder_blocks.") for name in state):
        state = rename_decoder_blocks(state, encoder_depth)
        notes.append(f"legacy names: decoder_blocks.N became blocks.N + {encoder_depth}")
    gated = any(".mlp.w12." in name for name in state)
    if gated:
        renames = re.compile("|".join(map(re.escape, GATED)))
        state = {renames.sub(lambda match: GATED[match[0]], name): value for name, value in state.items()}
        state = {name: value for name, value in state.items() if not name.startswith("feat_rope.")}
        network = "LightningDiT"
    config = config_of(state, num_heads, gated)
    config["num_classes"], null_row = classes_of(config["num_classes"] + 1, num_classes)
    velocity = velocity_channels(state, config)
    if network == "DiT":
        direction, time, unsaid = "data-at-0", None, "it predicts eps on DDPM's path (--network DiT)"
    elif network == "LightningDiT":
        direction, time, unsaid = time_direction or "data-at-1", None, None
    else:
        direction, time = direction_of(bool(velocity), bool(projectors), time_direction)
        unsaid = None if projectors else UNSAID
    notes += [guess for guess in (null_row, time, unsaid) if guess]
    config |= {} if network in (None, USUAL) else {"_class_name": network} | more
    config = check_config(config, "this network")
    if velocity:
        state |= velocity
        notes.append(f"kept {config['in_channels']} of {2 * config['in_channels']} output channels")
    fit(shapes_of(config), state, "this SiT")
    if direction == "data-at-1":
        state = reverse_time(state)
        notes.append(f"data at time 1, as in the SiT authors' files: {FOLDED}")
    with torch.device("meta"):
        model = new_network(config)
    load_weights(model, state, "this SiT")
    size = size_name(config) or f"a {network or USUAL} outside the size table"
    count = sum(map(torch.numel, state.values()))
    notes.append(f"recognised: {size}, {config}, {count} elements")
    return model.eval(), notes
