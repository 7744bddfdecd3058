"""From what the networks sample to images: pixels as they are, or latents through a frozen VAE decoder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train_cc.io.errors import InputError

LATENT_CHANNELS = 4
# A hub name stands for one state of its files.
PINNED_REVISIONS = {"stabilityai/sd-vae-ft-ema": "f04b2c4b98319346dad8c65879f680b1997b204a"}
# stabilityai/sd-vae-ft-ema: its config.json names no scaling factor, so that the class default, 0.18215, applies.


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
        self.to(memory_format=torch.channels_last)  # what convolutions in half precision are fast in

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each residual block in backward: its input is all that is kept (diffusers' own: whole stages)."""
        from diffusers.models.attention_processor import Attention
        from diffusers.models.resnet import ResnetBlock2D
        from diffusers.models.upsampling import Upsample2D

        for module in self.vae.decoder.modules():
            if isinstance(module, ResnetBlock2D | Attention | Upsample2D):
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)

    def forward(self, x0: Tensor) -> Tensor:
        latents = (x0 / self.vae.config.scaling_factor).to(self.vae.dtype, memory_format=torch.channels_last)
        return pixels_to_images(self.vae.decode(latents).sample.float())


def new_vae(channels: tuple[int, ...] = (128, 256, 512, 512), groups: int = 32) -> nn.Module:
    """An `AutoencoderKL` of sd-vae-ft-ema's layout, untrained: f = 8, 4 latent channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=groups,
        sample_size=256,
    )


def load_vae(vae: str) -> nn.Module:
    """A diffusers `AutoencoderKL` from a folder or a Hugging Face name. Raises `InputError`."""
    from diffusers import AutoencoderKL

    folder = Path(vae)
    if vae.startswith((".", "/", "~")) or folder.exists():
        weights = [folder / f"diffusion_pytorch_model.{ending}" for ending in ("safetensors", "bin")]
        if not (folder / "config.json").is_file() or not any(path.is_file() for path in weights):
            raise InputError(
                f"the VAE folder {vae} must hold config.json and diffusion_pytorch_model.safetensors; "
                "a diffusers AutoencoderKL folder or a hub name is expected"
            )
    try:
        return AutoencoderKL.from_pretrained(vae, revision=PINNED_REVISIONS.get(vae))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot load the VAE {vae!r}: {error}") from error


def require_decoder_kind(channels: int, vae: str, source: str | Path) -> None:
    """Latents have 4 channels and need a VAE; pixels have 1 or 3 and need none (--vae none). Raises `InputError`."""
    if (channels == LATENT_CHANNELS) == (vae == "none"):
        kind = "latents: a VAE is needed" if channels == LATENT_CHANNELS else "pixels: --vae none is needed"
        raise InputError(f"--vae is {vae}, but {source} has {channels} channels, that is {kind}")


def load_decoder(
    vae: str | None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Tensor]:
    """``vae``: None for pixel-space models, else what `load_vae` takes; it computes in ``dtype``."""
    return pixels_to_images if vae is None else VAEDecoder(load_vae(vae)).to(device, dtype)


def images_to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] (B, C, H, W) -> uint8 (B, H, W, C) on the CPU, rounded to nearest."""
    return (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
