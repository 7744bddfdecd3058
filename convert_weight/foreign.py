"""A checkpoint that other code wrote: read without running code from it; the kind of a network that is none of ours."""

import argparse
import contextlib
import datetime
import pathlib
import re
import types
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from train_cc.io.errors import InputError
from train_cc.io.read import read_safetensors, read_torch, require_file

EXPECTED = "a checkpoint of a SiT, DiT or LightningDiT, or a model folder"

# Kind -> patterns, each of which some name of such a network matches, with a point before it. The first match wins.
NETWORKS = {
    "a network with a LoRA in it, such as the estimator of DMDR's authors": (r"\.lora[._]", r"^(?!.*lora)"),
    "a LoRA without its network": (r"lora",),
    "a latent diffusion checkpoint with a U-Net and a VAE": (r"\.first_stage_model\.",),
    "a Flux transformer": (r"\.single_transformer_blocks\.|\.(double|single)_blocks\.",),
    "an MMDiT (Stable Diffusion 3)": (r"\.joint_blocks\.|\.context_embedder\.",),
    "a diffusers DiT: --input takes its folder, with config.json": (r"^\.([a-z_]+\.)?transformer_blocks\.",),
    "a VAE": (r"\.(quant_conv|post_quant_conv)\.|\.(encoder|decoder)\.conv_in\.",),
    "a U-Net": (r"\.(down_blocks|input_blocks)\.",),
    "a U-Net of EDM": (r"\.(enc|dec)\.\d+x\d+_",),
    "a U-ViT": (r"\.in_blocks\.", r"\.out_blocks\."),
    "a transformer with another gated MLP": (r"\.mlp\.(w1|w2|gate_proj)\.",),
    "a SiT or LightningDiT with qk-norm, which is not supported": (r"\.attn\.(q|k)_norm\.",),
    "a DiT with cross attention, such as PixArt": (r"\.cross_attn\.",),
    "a SiT of REPA-E, whose latents are normalised by its batch norm": (r"^\.bn\.running_mean",),
    "a vision transformer, such as DINOv2": (r"\.cls_token$", r"\.patch_embed\.proj\."),
    "a ResNet": (r"\.layer4\.\d+\.conv",),
}


def network_kind(names: Iterable[str]) -> str | None:
    """The kind of a known network that is none of ours, by the names of its tensors."""
    names = [f".{name}" for name in names]
    for kind, patterns in NETWORKS.items():
        if all(any(re.search(pattern, name) for name in names) for pattern in patterns):
            return kind
    return None


def content_kind(content: Mapping) -> str | None:
    """The kind of a file's content that holds no network of ours."""
    keys = {str(key) for key in content}
    if "param_groups" in keys or "optimizer_state_dict" in keys or "fp32_flat_groups" in keys:
        return "an optimizer's state; its network is in another file (mp_rank_00_model_states.pt, model.safetensors)"
    if {"global_steps", "inner_steps"} >= keys and keys:
        generator = "checkpoints/accelerator_1/step-N/pytorch_model/mp_rank_00_model_states.pt"
        return f"the counters of a run of DMDR's authors; its generator is {generator}"
    if "shadow_params" in keys and not isinstance(content["shadow_params"], dict):
        return "an average of diffusers' EMAModel, whose tensors have no names; save its model's state_dict"
    return None


def is_safetensors(path: Path) -> bool:
    """True if the file begins with the length of a JSON header that fits into it."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") + 8 <= path.stat().st_size


def file_kind(path: Path) -> str | None:
    """The kind of a file that is neither torch's nor safetensors', by its first bytes; None if it may be one."""
    with path.open("rb") as file:
        start = file.read(1024)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "an empty file"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "a web page, not the file itself; download it again"
    if text.startswith(b"{") and not is_safetensors(path):
        sharded = "an index of a network in several files" if path.name.endswith(".index.json") else "a JSON file"
        return f"{sharded}; save its tensors as one file, or name one that holds all of them"
    if zipfile.is_zipfile(path):
        with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names):
                return "a TorchScript program, which is not run; save its state_dict"
    return None


def plain_classes() -> list:
    """The classes of arguments and counters in a training checkpoint: values without behaviour of their own."""
    import numpy as np
    from numpy._core import multiarray

    paths = {"Posix": pathlib.PurePosixPath, "Windows": pathlib.PureWindowsPath, "": pathlib.PurePath}
    allowed = [argparse.Namespace, types.SimpleNamespace, dict, list, tuple, int, float, bool, str]
    allowed += [datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone]
    for name, kind in paths.items():  # as pure paths, on any system; 3.13 moved them
        modules = ("pathlib", "pathlib._local")
        allowed += [kind, *((kind, f"{module}.{pure}{name}Path") for module in modules for pure in ("", "Pure"))]
    for name in ("scalar", "_reconstruct"):
        allowed += [(getattr(multiarray, name), f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")]
    kinds = [np.dtype(code) for code in np.typecodes["All"] if code != "O"]
    return [*allowed, np.ndarray, np.dtype, *{type(kind) for kind in kinds}, *{kind.type for kind in kinds}]


def read_checkpoint(path: Path) -> object:
    """The content of a .pt or .safetensors file, whatever its name; no code from it is run. Raises `InputError`."""
    require_file(path, EXPECTED)
    shard = re.search(r"-\d+-of-0*([1-9]\d*)\.", path.name)
    kind = file_kind(path) or (f"one of the {shard[1]} files of a network" if shard and shard[1] != "1" else None)
    if kind:
        raise InputError(f"{path} is {kind}. {EXPECTED} is expected")
    if is_safetensors(path):
        return read_safetensors(path, EXPECTED)
    return read_torch(path, EXPECTED, allowed=plain_classes())


def require_checkpoint_file(folder: Path) -> None:
    """Raise `InputError` for a folder that is no model folder of ours, with the files in it that may be meant."""
    if (folder / "config.json").is_file() or (folder / "transformer" / "config.json").is_file():
        return
    files = sorted(path for path in [*folder.glob("*"), *folder.glob("*/*")] if path.is_file())
    if any(path.suffix == ".distcp" for path in files):
        how = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch makes one file of it"
        raise InputError(f"{folder} is a distributed checkpoint in parts; {how}")
    weights = [str(path) for path in files if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors")]
    if weights := [path for path in weights if "optim" not in path]:
        expected = f"--input takes one file: {', '.join(weights[:4])}"
        raise InputError(f"{folder} is no model folder (no config.json); {expected}")
