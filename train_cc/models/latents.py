"""Images into latents, and which latents they are: what samples those of one VAE makes nonsense through another's."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from train_cc.io.errors import InputError
from train_cc.io.products import write_atomically
from train_cc.io.read import parsing, read_json, shown
from train_cc.io.weights import GENERATION_CONFIG

ENCODED_AT_ONCE = 250
KEY = "latent_space_sha256"

Statistic = float | tuple[float, ...]  # one for all channels, or one per channel


@dataclass(frozen=True)
class LatentSpace:
    """The networks' latents x0 of a VAE's latents z: x0 = (z - mean) scale / std, z = x0 std / scale + mean.

    A diffusers config has scaling_factor and shift_factor, or scaling_factor, latents_mean and latents_std. Both
    formulas are those of diffusers' StableDiffusionXLPipeline and its image-to-image sibling. So scaling_factor is 1
    where latents_std is the deviation of z itself: VA-VAE's statistics, REPA-E's batch norm (std^2 = var + eps).
    """

    mean: Statistic
    scale: float
    std: Statistic = 1.0

    @classmethod
    def of(cls, config: Mapping) -> "LatentSpace":
        """``config``: of an `AutoencoderKL`."""
        if config.get("latents_mean") is None:
            return cls(config.get("shift_factor") or 0.0, config["scaling_factor"])
        return cls(tuple(config["latents_mean"]), config["scaling_factor"], tuple(config["latents_std"]))

    def scaled(self, z: Tensor) -> Tensor:
        """(B, C, h, w) of the VAE -> of the networks."""
        return (z - per_channel(self.mean, z.device)) * self.scale / per_channel(self.std, z.device)

    def unscaled(self, x0: Tensor) -> Tensor:
        """(B, C, h, w) of the networks -> of the VAE."""
        return x0 * per_channel(self.std, x0.device) / self.scale + per_channel(self.mean, x0.device)

    def numbers(self) -> list[Statistic]:
        """For a hash. Without statistics per channel the list, and so the hash, is that of earlier versions."""
        return [self.scale, self.mean] if isinstance(self.mean, int | float) else [self.scale, self.mean, self.std]


@cache  # a copy to a GPU at every decoding would make the CPU wait
def per_channel(values: Statistic, device: torch.device) -> float | Tensor:
    """A number as it is, or a tensor (C, 1, 1)."""
    if isinstance(values, int | float):
        return values
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


@torch.no_grad()
def encode_images(vae: nn.Module, images: Tensor) -> Tensor:
    """uint8 images (N, C, H, W) -> the posterior's means as the networks take them (N, c, h, w), on the CPU."""
    parts = []
    for part in images.split(ENCODED_AT_ONCE):
        x = (part.to(vae.device).float() / 127.5 - 1).to(vae.dtype, memory_format=torch.channels_last)
        parts.append(vae.encode(x).latent_dist.mean.float().cpu().contiguous())
    return LatentSpace.of(vae.config).scaled(torch.cat(parts))


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
    digest = hashlib.sha256(json.dumps(LatentSpace.of(vae.config).numbers()).encode())
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
