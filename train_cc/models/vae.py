"""Latents and images: diffusers' `AutoencoderKL`, filled by us, the latent space that it gives, and its decoder.

diffusers' own loader goes from one kind of file to the next until one opens.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train_cc.io.errors import InputError
from train_cc.io.fields import check, check_numbers, number, setting
from train_cc.io.products import write_atomically
from train_cc.io.read import (
    kind_of,
    parsing,
    read_json,
    read_safetensors,
    read_torch,
    safetensors_shapes,
    value_text,
)
from train_cc.io.remote import cached_hub_file, hub_file, models_inside
from train_cc.io.weights import load_weights, require_tensors

# A hub name stands for one state of its files.
PINNED_REVISIONS = {"stabilityai/sd-vae-ft-ema": "f04b2c4b98319346dad8c65879f680b1997b204a"}
# stabilityai/sd-vae-ft-ema: its config.json names no scaling factor, so that the class default, 0.18215, applies.

AUTOENCODER = "a diffusers AutoencoderKL"
ENCODED_AT_ONCE = 250
DECODED_AT_ONCE = 32  # when sampling: 250 images of 256 x 256 would need 47 GiB in fp32
WEIGHTS_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
)
CHANNEL_STATISTICS = {"latents_mean": number(-1e6, 1e6), "latents_std": number(1e-6, 1e6)}  # one per channel
# diffusers' names of old: stabilityai's own files have them.
ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# Latent spaces -----------------------------------------------------------------------------------------------------

Statistic = float | tuple[float, ...]  # one for all channels, or one per channel


@dataclass(frozen=True)
class LatentSpace:
    """The networks' latents x0 of a VAE's latents z: x0 = (z - mean) scale / std, z = x0 std / scale + mean.

    A diffusers config has scaling_factor and shift_factor, or scaling_factor, latents_mean and latents_std. Both
    formulas are those of diffusers' StableDiffusionXLPipeline and its image-to-image sibling. So scaling_factor is 1
    if latents_std is the deviation of z itself: VA-VAE's statistics, REPA-E's batch norm (std^2 = var + eps).
    """

    mean: Statistic
    scale: float
    std: Statistic = 1.0

    @classmethod
    def of(cls, config: Mapping) -> "LatentSpace":
        """The latent space of an `AutoencoderKL` with ``config``."""
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
    """`encode_images`, read from ``file`` if it holds them, else written there.

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
    """Hash of encoder and scaling: a decoder that was trained further, as sd-vae-ft-ema's, changes no latents."""
    digest = hashlib.sha256(json.dumps(LatentSpace.of(vae.config).numbers()).encode())
    for name, value in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def require_latent_space(expected: str | None, vae: nn.Module, name: str) -> None:
    """Raises `InputError` if ``vae``, read from ``name``, has other latents than a teacher recorded."""
    if expected is not None and (own := latent_space_sha256(vae)) != expected:
        raise InputError(
            f"--vae {name} has other latents ({own[:12]}) than those that the teacher was trained on "
            f"({expected[:12]}): give the VAE that the teacher was trained with"
        )


# Files of a VAE ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VAEConfig:
    """The numbers of an `AutoencoderKL` that diffusers takes as they are, with its defaults."""

    in_channels: int = setting(3, high=3)
    out_channels: int = setting(3, high=3)
    latent_channels: int = setting(4, high=64)
    layers_per_block: int = setting(1, high=16)
    norm_num_groups: int = setting(32, high=1024)
    scaling_factor: float = setting(0.18215, low=1e-6, high=1e6)
    shift_factor: float | None = setting(None, low=-1e6, high=1e6)
    latents_mean: list | None = setting(None)
    latents_std: list | None = setting(None)


def check_vae_config(config: Mapping, source: Path | str) -> dict:
    """The arguments of `AutoencoderKL` in ``config``, as far as diffusers does not check them. Raises `InputError`."""
    if (kind := kind_of(config, "AutoencoderKL")) != "AutoencoderKL":
        raise InputError(f"{source} is of a {kind}; {AUTOENCODER} is expected")
    values = check(VAEConfig, config, source, others=True)
    names = [name for name in CHANNEL_STATISTICS if values[name] is not None]
    if len(names) == 1:
        expected = " and ".join(CHANNEL_STATISTICS)
        raise InputError(f"{source}: {names[0]} is there without the other; {expected} are expected, or neither")
    for name in names:
        channels = values["latent_channels"]
        if len(values[name]) != channels:
            raise InputError(
                f"{source}: {name} is {value_text(values[name])}; a list of {channels} numbers is expected"
            )
        for value in values[name]:
            check_numbers({name: value}, {name: CHANNEL_STATISTICS[name]}, source)
    if names and values["shift_factor"]:
        raise InputError(f"{source}: shift_factor is {values['shift_factor']} beside latents_mean; one is expected")
    if names and "scaling_factor" not in config:  # diffusers' default would be multiplied in without a word
        raise InputError(
            f"{source}: scaling_factor is missing beside latents_std; x0 = (z - mean) scaling_factor / std, so write "
            "1.0 if latents_std is the deviation of the VAE's own latents"
        )
    return {name: value for name, value in config.items() if name[:1] != "_"}


def vae_files(vae: str, download: bool = True) -> tuple[Path, Path] | None:
    """(config, weights) of a folder or a hub name; None if ``download`` is off and the hub's cache lacks a file.

    Raises `InputError`.
    """
    folder = Path(vae)
    if folder.is_file():
        raise InputError(f"the VAE {single_file(folder)}")
    if vae.startswith((".", "/", "~")) or folder.exists():
        weights = [folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()]
        if not weights or not (folder / "config.json").is_file():
            needed = f"must hold config.json and {WEIGHTS_NAMES[0]}{models_inside(folder)}"
            raise InputError(f"the VAE folder {vae} {needed}; {AUTOENCODER} folder or a hub name is expected")
        return folder / "config.json", weights[0]
    revision, files = PINNED_REVISIONS.get(vae), []
    for names in (("config.json",), WEIGHTS_NAMES):
        if download:
            there = (hub_file(vae, name, f"the VAE {vae!r}", revision) for name in names)
        else:
            there = (cached_hub_file(vae, name, revision) for name in names)
        files.append(next(filter(None, there), None))
    if None not in files:
        return files[0], files[1]
    if download:
        raise InputError(f"the VAE {vae!r} lacks a file on the hub: config.json or {' or '.join(WEIGHTS_NAMES)}")
    return None


def single_file(file: Path) -> str:
    """The words for a file that is given as a VAE: its kind, and the command that makes a folder of it."""
    if file.name in WEIGHTS_NAMES and (file.parent / "config.json").is_file():
        return f"{file} is the weights' file of a folder: give the folder, {file.parent}"
    if file.suffix == ".safetensors":
        names: Iterable = safetensors_shapes(file, AUTOENCODER)
    else:
        state = read_torch(file, AUTOENCODER)
        state = state.get("state_dict", state) if isinstance(state, Mapping) else ()
        names = map(str, state if isinstance(state, Mapping) else ())
    kind, expected = layout(names), f"{AUTOENCODER} folder is expected"
    if not kind:
        return f"{file} is a file without a VAE's tensors; {expected}"
    return f"{file} is one file, a VAE with {kind}; {expected}{conversion(file)}"


def layout(names: Iterable[str]) -> str:
    """LDM's names: encoder.down.0.block.0, behind "first_stage_model." in a whole model; "" for no VAE's names."""
    kinds = {match[1] for name in names if (match := re.search(r"(?:^|\.)encoder\.(down|down_blocks)\.\d", name))}
    return "LDM's names" if "down" in kinds else "diffusers' names and no config.json" if kinds else ""


def conversion(file: Path, config: str = next(iter(PINNED_REVISIONS))) -> str:
    """The words for diffusers' own conversion of ``file``."""
    call = f"AutoencoderKL.from_single_file({str(file)!r}, config={config!r})"
    return (
        ". This makes one (config: a folder or hub name of the same architecture): "
        f'python -c "from diffusers import AutoencoderKL; {call}.save_pretrained({str(file.with_suffix(""))!r})"'
    )


def load_vae(vae: str) -> nn.Module:
    """A diffusers `AutoencoderKL` from a folder or a hub name; its ``files`` were read. Raises `InputError`.

    ``force_upcast`` is true only if the file says so. diffusers' default is true, also for sd-vae-ft-ema, whose file
    does not name it and which is safe in fp16.
    """
    from diffusers import AutoencoderKL

    config_file, weights = vae_files(vae)
    expected = f"the config of {AUTOENCODER}"
    config = {"force_upcast": False, **check_vae_config(read_json(config_file, expected), config_file)}
    with parsing(config_file, expected, "is of no network that diffusers can build"), torch.device("meta"):
        model = AutoencoderKL(**config)
    read = read_safetensors if weights.suffix == ".safetensors" else read_torch
    state = require_tensors(read(weights, AUTOENCODER), weights, f"the weights of {AUTOENCODER}")
    if (kind := layout(state)).startswith("LDM"):
        command = conversion(weights, str(weights.parent))
        raise InputError(f"{weights} has {kind}; {AUTOENCODER} folder is expected{command}")
    load_weights(model, {of_today(name): value for name, value in state.items()}, weights)
    model.files = [weights]
    return model.eval()


def of_today(name: str) -> str:
    """A tensor's name, with an attention's names of old renamed."""
    pattern = rf"(attentions\.\d+)\.({'|'.join(ATTENTION_NAMES)})\."
    return re.sub(pattern, lambda match: f"{match[1]}.{ATTENTION_NAMES[match[2]]}.", name)


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
        force_upcast=False,
    )


def channels_of(vae: str) -> tuple[int, int]:
    """(channels of a latent, channels of an image) of the VAE that ``vae`` names. Raises `InputError`."""
    if vae in PINNED_REVISIONS:
        return 4, 3
    config_file, _ = vae_files(vae)
    config = check_vae_config(read_json(config_file, f"the config of {AUTOENCODER}"), config_file)
    return config.get("latent_channels", 4), config.get("out_channels", 3)


def require_decoder(channels: int, vae: str, source: str | Path) -> int:
    """The channels of an image that ``vae`` decodes from the ``channels`` of a sample of ``source``, or of pixels.

    Pixels have 1 or 3 channels and need no VAE ("none"). Raises `InputError`.
    """
    if vae == "none":
        if channels not in (1, 3):
            raise InputError(f"--vae is none, but {source} has {channels} channels, that is latents: a VAE is needed")
        return channels
    if channels == 1:  # grey pixels: no latents have one channel, and no hub needs to be asked
        raise InputError(f"--vae is {vae}, but {source} has 1 channel, that is pixels: --vae none is needed")
    latent, of_image = channels_of(vae)
    if latent != channels:
        hint = ", that is pixels: --vae none is needed" if channels == 3 else ""
        raise InputError(f"--vae is {vae}, of latents of {latent} channels, but {source} has {channels} channels{hint}")
    return of_image


# From the networks' samples to images: pixels as they are, or latents through a frozen decoder --------------------


def pixels_to_images(x0: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> images in [0, 1]."""
    return ((x0 + 1) / 2).clamp(0, 1)


class VAEDecoder(nn.Module):
    """Latents (B, C, h, w) -> images in [0, 1] (B, 3, f h, f w). Frozen; the gradient flows through.

    ``needs_fp32``: its activations overflow fp16 by the VAE's own config (force_upcast, as SDXL's).
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae
        self.files: list[Path] = getattr(vae, "files", [])  # that it was read from
        self.needs_fp32: bool = vae.config.force_upcast
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
        latents = LatentSpace.of(self.vae.config).unscaled(x0)
        latents = latents.to(self.vae.dtype, memory_format=torch.channels_last)
        # Under autocast the products of fp32 weights would be in half precision too.
        whole = self.vae.dtype == torch.float32
        with torch.autocast(x0.device.type, enabled=False) if whole else contextlib.nullcontext():
            return pixels_to_images(self.vae.decode(latents).sample.float())


def load_decoder(
    vae: str | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    latents: str | None = None,
) -> Callable[[Tensor], Tensor]:
    """The decoder of ``vae``, as `load_vae` takes it, in ``dtype`` or, if it needs that, fp32; None: of pixels.

    ``latents``: SHA-256 of the latent space that a model records. Raises `InputError` for a VAE of another one.
    """
    if vae is None:
        return pixels_to_images
    whole = load_vae(vae)
    require_latent_space(latents, whole, vae)
    decoder = VAEDecoder(whole)
    return decoder.to(device, torch.float32 if decoder.needs_fp32 and dtype == torch.float16 else dtype)


def images_to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] (B, C, H, W) -> uint8 (B, H, W, C) on the CPU, rounded to nearest."""
    return (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
