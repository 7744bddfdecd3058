"""diffusers' `AutoencoderKL`: built of a checked config, and filled by us. diffusers' own loader goes from one kind of
file to the next until one opens."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train_cc.io.errors import InputError
from train_cc.io.hub import cached_hub_file, hub_file
from train_cc.io.read import (
    Number,
    check_numbers,
    read_json,
    read_safetensors,
    read_torch,
    require_keys,
    safetensors_shapes,
)
from train_cc.io.weights import fit_shapes, load_weights, require_tensors
from train_cc.models.latents import require_latent_space

# A hub name stands for one state of its files.
PINNED_REVISIONS = {"stabilityai/sd-vae-ft-ema": "f04b2c4b98319346dad8c65879f680b1997b204a"}
# stabilityai/sd-vae-ft-ema: its config.json names no scaling factor, so that the class default, 0.18215, applies.

EXPECTED = "a diffusers AutoencoderKL"
DECODED_AT_ONCE = 32  # when sampling: 250 images of 256 x 256 would need 47 GiB in fp32
WEIGHTS_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
NUMBERS = {
    "in_channels": Number(int, 1, 3),
    "out_channels": Number(int, 1, 3),
    "latent_channels": Number(int, 1, 64),
    "layers_per_block": Number(int, 1, 16),
    "norm_num_groups": Number(int, 1, 1024),
    "sample_size": Number(int, 1, 2**16),
    "scaling_factor": Number(float, 1e-6, 1e6),
}
SHIFT_FACTOR = Number(float, -1e6, 1e6)
WIDTH = Number(int, 1, 8192)
# Values of which there is one a stage, and values of which there is one; None: what decoding here does not do.
STAGES = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
CHOICES = {
    "act_fn": ("silu", "swish", "mish", "gelu", "relu"),
    "force_upcast": (True, False),
    "use_quant_conv": (True, False),
    "use_post_quant_conv": (True, False),
    "mid_block_add_attention": (True, False),
    "latents_mean": (None,),
    "latents_std": (None,),
}
# diffusers' names of old: stabilityai's own files have them.
ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def check_vae_config(config: Mapping, source: Path | str) -> dict:
    """The arguments of `AutoencoderKL` in ``config``. Raises `InputError`, also for what decoding here would ignore."""
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise InputError(f"{source} is of a {str(config['_class_name'])[:80]}; {EXPECTED} is expected")
    require_keys(config, ["block_out_channels", *STAGES], [*NUMBERS, *CHOICES, "shift_factor"], source)
    check_numbers(config, NUMBERS, source)
    if config.get("shift_factor") is not None:
        check_numbers(config, {"shift_factor": SHIFT_FACTOR}, source)
    widths, groups = config["block_out_channels"], config.get("norm_num_groups", 32)
    if not isinstance(widths, list | tuple) or not 1 <= len(widths) <= 8:
        raise InputError(f"{source}: block_out_channels is {str(widths)[:80]}; allowed: 1 to 8 widths")
    for width in widths:
        check_numbers({"block_out_channels": width}, {"block_out_channels": WIDTH}, source)
        if width % groups:
            raise InputError(f"{source}: norm_num_groups {groups} does not divide the width {width}")
    for name, kinds in STAGES.items():
        values = config[name]
        if (
            not isinstance(values, list | tuple)
            or len(values) != len(widths)
            or not all(_is_of(v, kinds) for v in values)
        ):
            told = f"{len(widths)} of {', '.join(kinds)}"
            raise InputError(f"{source}: {name} is {str(values)[:120]}; allowed: {told}")
    for name, kinds in CHOICES.items():
        if name in config and not _is_of(config[name], kinds):
            raise InputError(f"{source}: {name} is {str(config[name])[:80]}; allowed: {', '.join(map(str, kinds))}")
    return {name: value for name, value in config.items() if name[:1] != "_"}


def _is_of(value: object, kinds: tuple) -> bool:
    return any(type(value) is type(kind) and value == kind for kind in kinds)


def vae_files(vae: str, download: bool = True) -> tuple[Path, Path] | None:
    """(config, weights) of a folder or a hub name. Raises `InputError`.

    ``download``: whether what the hub's cache lacks is fetched; without, None.
    """
    folder = Path(vae)
    if vae.startswith((".", "/", "~")) or folder.exists():
        weights = [folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()]
        if not weights or not (folder / "config.json").is_file():
            told = f"{EXPECTED} folder or a hub name is expected"
            raise InputError(f"the VAE folder {vae} must hold config.json and {WEIGHTS_NAMES[0]}; {told}")
        return folder / "config.json", weights[0]
    revision, found = PINNED_REVISIONS.get(vae), []
    for names in (("config.json",), WEIGHTS_NAMES):
        if download:
            files = (hub_file(vae, name, f"the VAE {vae!r}", revision) for name in names)
        else:
            files = (cached_hub_file(vae, name, revision) for name in names)
        found.append(next(filter(None, files), None))
    if None not in found:
        return found[0], found[1]
    if download:
        raise InputError(f"the VAE {vae!r} lacks a file on the hub: config.json or {' or '.join(WEIGHTS_NAMES)}")
    return None


def load_vae(vae: str) -> nn.Module:
    """A diffusers `AutoencoderKL` from a folder or a hub name; its ``files`` were read. Raises `InputError`."""
    from diffusers import AutoencoderKL

    config_file, weights = vae_files(vae)
    config = check_vae_config(read_json(config_file, f"the config of {EXPECTED}"), config_file)
    with torch.device("meta"):
        model = AutoencoderKL(**config)
    if weights.suffix == ".safetensors":
        shapes = {of_today(name): shape for name, shape in safetensors_shapes(weights, EXPECTED).items()}
        fit_shapes({name: value.shape for name, value in model.state_dict().items()}, shapes, weights)
        state = read_safetensors(weights, EXPECTED)
    else:
        state = require_tensors(read_torch(weights, EXPECTED), weights, f"the weights of {EXPECTED}")
    load_weights(model, {of_today(name): value for name, value in state.items()}, weights)
    model.files = [weights]
    return model.eval()


def of_today(name: str) -> str:
    """A tensor's name, with an attention's names of old renamed."""
    pattern = rf"(attentions\.\d+)\.({'|'.join(ATTENTION_NAMES)})\."
    return re.sub(pattern, lambda match: f"{match[1]}.{ATTENTION_NAMES[match[2]]}.", name)


def unscaled(x0: Tensor, config: Mapping) -> Tensor:
    """What the networks sample -> what the decoder takes: x0 / scaling_factor + shift_factor. (B, 4, h, w)."""
    return x0 / config["scaling_factor"] + (config["shift_factor"] or 0.0)


# From what the networks sample to images: pixels as they are, or latents through a frozen VAE decoder --------------


def pixels_to_images(x0: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> images in [0, 1]."""
    return ((x0 + 1) / 2).clamp(0, 1)


class VAEDecoder(nn.Module):
    """Latents (B, 4, h, w) -> images in [0, 1] (B, 3, 8 h, 8 w). Frozen; the gradient flows through."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae
        self.files: list[Path] = getattr(vae, "files", [])  # that it was read from
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
        latents = unscaled(x0, self.vae.config).to(self.vae.dtype, memory_format=torch.channels_last)
        return pixels_to_images(self.vae.decode(latents).sample.float())


def new_vae(
    channels: tuple[int, ...] = (128, 256, 512, 512), groups: int = 32, layers: int = 2, side: int = 256
) -> nn.Module:
    """An untrained `AutoencoderKL` for RGB images of ``side`` pixels, 4 latent channels; by default sd-vae-ft-ema's.

    Each width after the first halves the sides; ``layers``: residual blocks per stage of the encoder.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=groups,
        sample_size=side,
    )


def channels_of(vae: str) -> tuple[int, int]:
    """(channels of a latent, channels of an image) of the VAE that ``vae`` names. Raises `InputError`."""
    if vae in PINNED_REVISIONS:
        return 4, 3
    config_file, _ = vae_files(vae)
    config = check_vae_config(read_json(config_file, f"the config of {EXPECTED}"), config_file)
    return config.get("latent_channels", 4), config.get("out_channels", 3)


def require_decoder(channels: int, vae: str, source: str | Path) -> int:
    """What ``source`` samples, of ``channels``, is what ``vae`` decodes, or pixels. -> channels of an image.

    Pixels have 1 or 3 channels and need no VAE ("none"). Raises `InputError`.
    """
    if vae == "none":
        if channels not in (1, 3):
            raise InputError(f"--vae is none, but {source} has {channels} channels, that is latents: a VAE is needed")
        return channels
    if channels == 1:  # grey pixels: no latents have one channel, and no hub needs to be asked
        raise InputError(f"--vae is {vae}, but {source} has 1 channel, that is pixels: --vae none is needed")
    latent, shown = channels_of(vae)
    if latent != channels:
        told = ", that is pixels: --vae none is needed" if channels == 3 else ""
        raise InputError(f"--vae is {vae}, of latents of {latent} channels, but {source} has {channels} channels{told}")
    return shown


def load_decoder(
    vae: str | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    latents: str | None = None,
) -> Callable[[Tensor], Tensor]:
    """``vae``: None for pixel-space models, else what `load_vae` takes; it computes in ``dtype``.

    ``latents``: what a model records of those that it samples. Raises `InputError` where the VAE has others.
    """
    if vae is None:
        return pixels_to_images
    whole = load_vae(vae)
    require_latent_space(latents, whole, vae)
    return VAEDecoder(whole).to(device, dtype)


def images_to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] (B, C, H, W) -> uint8 (B, H, W, C) on the CPU, rounded to nearest."""
    return (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
