"""From what the networks sample to images: pixels as they are, or latents through a frozen VAE decoder."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from train_cc.errors import InputError

# Its config.json names no scaling factor, so that the class default, 0.18215, applies.


def pixels_to_images(x0: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> images in [0, 1]."""
    return ((x0 + 1) / 2).clamp(0, 1)


class VAEDecoder(nn.Module):
    """Latents (B, 4, h, w) -> images in [0, 1] (B, 3, 8 h, 8 w). Frozen; the gradient flows through."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae
        self.vae.encoder = None  # never used here: a third of the parameters
        self.requires_grad_(False).eval()

    def enable_gradient_checkpointing(self) -> None:
        self.vae.enable_gradient_checkpointing()

    def forward(self, x0: Tensor) -> Tensor:
        return pixels_to_images(self.vae.decode(x0 / self.vae.config.scaling_factor).sample)


def load_decoder(vae: str | None, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """``vae``: None for pixel-space models, else a folder or a Hugging Face name of a diffusers `AutoencoderKL`."""
    if vae is None:
        return pixels_to_images
    from diffusers import AutoencoderKL

    looks_local = vae.startswith((".", "/", "~")) or Path(vae).exists()
    if looks_local and not (Path(vae) / "config.json").is_file():
        raise InputError(
            f"the VAE folder {vae} has no config.json; give a diffusers AutoencoderKL folder or a hub name"
        )
    try:
        model = AutoencoderKL.from_pretrained(vae)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load the VAE {vae!r}: {error}") from error
    return VAEDecoder(model).to(device)


def images_to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] (B, C, H, W) -> uint8 (B, H, W, C) on the CPU, rounded to nearest."""
    return (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
