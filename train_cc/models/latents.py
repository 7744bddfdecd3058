"""Images into latents, and which latents they are: what samples those of one VAE makes nonsense through another's."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from train_cc.io.errors import InputError
from train_cc.io.read import parsing, read_json, shown
from train_cc.io.weights import GENERATION_CONFIG
from train_cc.io.write import write_atomically

ENCODED_AT_ONCE = 250
KEY = "latent_space_sha256"


@torch.no_grad()
def encode_images(vae: nn.Module, images: Tensor) -> Tensor:
    """uint8 images (N, C, H, W) -> the posterior's means as the networks take them (N, 4, h, w), on the CPU.

    (mean - shift_factor) * scaling_factor, the inverse of `train_cc.models.vae.unscaled`.
    """
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    parts = []
    for part in images.split(ENCODED_AT_ONCE):
        x = (part.to(vae.device).float() / 127.5 - 1).to(vae.dtype, memory_format=torch.channels_last)
        parts.append(vae.encode(x).latent_dist.mean.float().cpu().contiguous())
    return (torch.cat(parts) - shift) * scale


def cached_latents(file: Path, vae: nn.Module, images: Tensor, anew: bool = False) -> Tensor:
    """`encode_images`, read from ``file`` where it holds them, else written there.

    Raises `InputError` for a file of other images or of another VAE: a training that goes on would change its data.
    """
    key = {"latent_space": latent_space_sha256(vae), "images": hashlib.sha256(images.contiguous().numpy()).hexdigest()}
    if file.exists() and not anew:
        with parsing(file, "the latents of a teacher's training images"), safe_open(file, "pt") as content:
            if content.metadata() == key:
                return content.get_tensor("latents")
        raise InputError(f"{file} is of other images or of another VAE than given now; --overwrite starts anew")
    latents = encode_images(vae, images)
    write_atomically(file, save({"latents": latents}, key))
    return latents


def latent_space_sha256(vae: nn.Module) -> str:
    """Of the encoder and of the scaling: a decoder that was trained further, as sd-vae-ft-ema's, changes no latents."""
    digest = hashlib.sha256(json.dumps([vae.config.scaling_factor, vae.config.shift_factor or 0.0]).encode())
    for name, value in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_latent_space(folder: Path) -> str | None:
    """What a teacher's or generator's folder records of its latents; None where it records nothing. -> SHA-256."""
    path = folder / GENERATION_CONFIG
    found = read_json(path, "what a model's folder says of it").get(KEY) if path.exists() else None
    if found is not None and not (isinstance(found, str) and len(found) == 64):
        raise InputError(f"{path}: {KEY} is {shown(found)}; a SHA-256 is expected")
    return found


def write_latent_space(folder: Path, sha256: str) -> None:
    """Into a teacher's folder, where a generator's says how it is sampled."""
    write_atomically(folder / GENERATION_CONFIG, json.dumps({KEY: sha256}, indent=2) + "\n")


def require_latent_space(expected: str | None, vae: nn.Module, name: str) -> None:
    """Raises `InputError` where ``vae``, that was read from ``name``, has other latents than a teacher recorded."""
    if expected is not None and (found := latent_space_sha256(vae)) != expected:
        raise InputError(
            f"--vae {name} has other latents ({found[:12]}) than those that the teacher was trained on "
            f"({expected[:12]}): give the VAE that the teacher was trained with"
        )
