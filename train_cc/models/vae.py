"""diffusers' `AutoencoderKL`: built of a checked config, and filled by us. diffusers' own loader goes from one kind of
file to the next until one opens."""

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train_cc.io.errors import InputError
from train_cc.io.read import (
    Number,
    check_numbers,
    kind_of,
    read_json,
    read_safetensors,
    read_torch,
    require_keys,
    safetensors_shapes,
    shown,
)
from train_cc.io.remote import cached_hub_file, hub_file, models_inside
from train_cc.io.weights import fit_shapes, load_weights, require_tensors
from train_cc.models.latents import LatentSpace, require_latent_space

# A hub name stands for one state of its files.
PINNED_REVISIONS = {"stabilityai/sd-vae-ft-ema": "f04b2c4b98319346dad8c65879f680b1997b204a"}
# stabilityai/sd-vae-ft-ema: its config.json names no scaling factor, so that the class default, 0.18215, applies.

EXPECTED = "a diffusers AutoencoderKL"
DECODED_AT_ONCE = 32  # when sampling: 250 images of 256 x 256 would need 47 GiB in fp32
WEIGHTS_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
)
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
STATISTICS = {"latents_mean": SHIFT_FACTOR, "latents_std": Number(float, 1e-6, 1e6)}  # lists, a number per channel
WIDTH = Number(int, 1, 8192)
# Values of which there is one a stage, and values of which there is one.
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
}
# diffusers' names of old: stabilityai's own files have them.
ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def check_vae_config(config: Mapping, source: Path | str) -> dict:
    """The arguments of `AutoencoderKL` in ``config``. Raises `InputError`, also for what decoding here would ignore."""
    if (kind := kind_of(config, "AutoencoderKL")) != "AutoencoderKL":
        raise InputError(f"{source} is of a {kind}; {EXPECTED} is expected")
    optional = [*NUMBERS, *CHOICES, *STATISTICS, "shift_factor"]
    require_keys(config, ["block_out_channels", *STAGES], optional, source)
    check_numbers(config, NUMBERS, source)
    if config.get("shift_factor") is not None:
        check_numbers(config, {"shift_factor": SHIFT_FACTOR}, source)
    _check_statistics(config, source)
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


def _check_statistics(config: Mapping, source: Path | str) -> None:
    """Both of `STATISTICS`, a number per channel, or neither. Raises `InputError`."""
    names = [name for name in STATISTICS if config.get(name) is not None]
    if not names:
        return
    if len(names) == 1:
        raise InputError(f"{source}: {names[0]} is there alone; {' and '.join(STATISTICS)} are expected, or neither")
    channels = config.get("latent_channels", 4)
    for name, number in STATISTICS.items():
        values = config[name]
        if not isinstance(values, list | tuple) or len(values) != channels:
            raise InputError(f"{source}: {name} is {shown(values)}; a list of {channels} numbers is expected")
        for value in values:
            check_numbers({name: value}, {name: number}, source)
    if config.get("shift_factor"):
        raise InputError(f"{source}: shift_factor is {config['shift_factor']} beside latents_mean; one is expected")
    if "scaling_factor" not in config:  # diffusers' default would be multiplied in without a word
        raise InputError(
            f"{source}: scaling_factor is missing beside latents_std; x0 = (z - mean) scaling_factor / std, so write "
            "1.0 if latents_std is the deviation of the VAE's own latents"
        )


def _is_of(value: object, kinds: tuple) -> bool:
    return any(type(value) is type(kind) and value == kind for kind in kinds)


def vae_files(vae: str, download: bool = True) -> tuple[Path, Path] | None:
    """(config, weights) of a folder or a hub name. Raises `InputError`.

    ``download``: whether what the hub's cache lacks is fetched; without, None.
    """
    folder = Path(vae)
    if folder.is_file():
        raise InputError(f"the VAE {_single_file(folder)}")
    if vae.startswith((".", "/", "~")) or folder.exists():
        weights = [folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()]
        if not weights or not (folder / "config.json").is_file():
            needed = f"must hold config.json and {WEIGHTS_NAMES[0]}{models_inside(folder)}"
            raise InputError(f"the VAE folder {vae} {needed}; {EXPECTED} folder or a hub name is expected")
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


def _single_file(file: Path) -> str:
    """The words for a file that is given as a VAE: its kind, and the command that makes a folder of it."""
    if file.name in WEIGHTS_NAMES and (file.parent / "config.json").is_file():
        return f"{file} is the weights' file of a folder: give the folder, {file.parent}"
    if file.suffix == ".safetensors":
        names: Iterable = safetensors_shapes(file, EXPECTED)
    else:
        state = read_torch(file, EXPECTED)
        state = state.get("state_dict", state) if isinstance(state, Mapping) else ()
        names = map(str, state if isinstance(state, Mapping) else ())
    kind, expected = _layout(names), f"{EXPECTED} folder is expected"
    if not kind:
        return f"{file} is a file without a VAE's tensors; {expected}"
    return f"{file} is one file, a VAE with {kind}; {expected}{_conversion(file)}"


def _layout(names: Iterable[str]) -> str:
    """LDM's names: encoder.down.0.block.0, behind "first_stage_model." in a whole model; "" for no VAE's names."""
    found = {match[1] for name in names if (match := re.search(r"(?:^|\.)encoder\.(down|down_blocks)\.\d", name))}
    return "LDM's names" if "down" in found else "diffusers' names and no config.json" if found else ""


def _conversion(file: Path, config: str = next(iter(PINNED_REVISIONS))) -> str:
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
    config = check_vae_config(read_json(config_file, f"the config of {EXPECTED}"), config_file)
    config = {"force_upcast": False, **config}
    with torch.device("meta"):
        model = AutoencoderKL(**config)
    if weights.suffix == ".safetensors":
        shapes = {of_today(name): shape for name, shape in safetensors_shapes(weights, EXPECTED).items()}
        _refuse_names_of_ldm(weights, shapes)
        fit_shapes({name: value.shape for name, value in model.state_dict().items()}, shapes, weights)
        state = read_safetensors(weights, EXPECTED)
    else:
        state = require_tensors(read_torch(weights, EXPECTED), weights, f"the weights of {EXPECTED}")
        _refuse_names_of_ldm(weights, state)
    load_weights(model, {of_today(name): value for name, value in state.items()}, weights)
    model.files = [weights]
    return model.eval()


def _refuse_names_of_ldm(weights: Path, names: Iterable[str]) -> None:
    if (kind := _layout(names)).startswith("LDM"):
        how = _conversion(weights, str(weights.parent))
        raise InputError(f"{weights} has {kind}; {EXPECTED} folder is expected{how}")


def of_today(name: str) -> str:
    """A tensor's name, with an attention's names of old renamed."""
    pattern = rf"(attentions\.\d+)\.({'|'.join(ATTENTION_NAMES)})\."
    return re.sub(pattern, lambda match: f"{match[1]}.{ATTENTION_NAMES[match[2]]}.", name)


def unscaled(x0: Tensor, config: Mapping) -> Tensor:
    """The networks' samples -> the decoder's input, by the config of its VAE. (B, C, h, w)."""
    return LatentSpace.of(config).unscaled(x0)


# From what the networks sample to images: pixels as they are, or latents through a frozen VAE decoder --------------


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
        latents = unscaled(x0, self.vae.config).to(self.vae.dtype, memory_format=torch.channels_last)
        # Under autocast the products of fp32 weights would be in half precision too.
        whole = self.vae.dtype == torch.float32
        with torch.autocast(x0.device.type, enabled=False) if whole else contextlib.nullcontext():
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
        force_upcast=False,
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
    latent, of_image = channels_of(vae)
    if latent != channels:
        told = ", that is pixels: --vae none is needed" if channels == 3 else ""
        raise InputError(f"--vae is {vae}, of latents of {latent} channels, but {source} has {channels} channels{told}")
    return of_image


def load_decoder(
    vae: str | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    latents: str | None = None,
) -> Callable[[Tensor], Tensor]:
    """``vae``: None for pixel-space models, else what `load_vae` takes; it computes in ``dtype``, or in fp32.

    ``latents``: what a model records of those that it samples. Raises `InputError` where the VAE has others.
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
