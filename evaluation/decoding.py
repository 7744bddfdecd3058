"""From samples to images of figures: in half precision on a GPU, where that does not show.

fp16 takes a ninth of fp32's time by roofline. Whether it shows is measured on the first images of every set, on the
device and with the decoder that make it: no more than one pixel in a thousand may lie further than one grey level from
what fp32, without TF32, makes of the same samples. Else all of the set is decoded in fp32. The main process decides for
all. An image that overflows in fp16 is decoded in fp32, whatever batch it is in.
"""

import copy
from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from train_cc.models.features import without_tf32
from train_cc.models.vae import DECODED_AT_ONCE, VAEDecoder, images_to_uint8, load_decoder

FURTHER = 1e-3  # the share of pixels that may lie further than one grey level away

Decode = Callable[[Tensor], Tensor]


def in_parts(network: nn.Module) -> Decode:
    """x0 (B, 4, h, w) -> images in [0, 1], a part of the batch at a time, products of fp32 weights in fp32."""

    @torch.no_grad()
    def decode(x0: Tensor) -> Tensor:
        with without_tf32():
            return torch.cat([network(part) for part in x0.split(DECODED_AT_ONCE)])

    return decode


class Decoder:
    """x0 -> images in [0, 1] by ``narrow``; an image that is not finite there by ``wide``. ``again`` counts these."""

    def __init__(self, wide: Decode, narrow: Decode | None = None):
        self._wide, self._narrow, self.again = wide, narrow, 0

    def __call__(self, x0: Tensor) -> Tensor:
        if self._narrow is None:
            return self._wide(x0)
        images = self._narrow(x0)
        overflow = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten()
        if len(overflow):
            images[overflow] = self._wide(x0[overflow])
            self.again += len(overflow)
        return images


def decoder_of(
    vae: str,
    latents: str | None,
    shape: tuple[int, int, int],
    device: torch.device,
    first: Callable[[], Tensor],
    half: bool,
):
    """-> a `Decoder`, its precision ("fp32", "fp16", or None in pixel space), and (H, W, C) of an image.

    ``vae``: what `load_decoder` takes, or "none"; ``latents``: what the model records of its own, or None;
    ``shape``: (C, h, w) of a sample; ``half``: whether fp16 is tried, by the main process, on the samples ``first()``.
    """
    decoder = load_decoder(None if vae == "none" else vae, device, latents=latents)
    channels, height, width = shape
    if not isinstance(decoder, VAEDecoder):
        return Decoder(decoder), None, (height, width, channels)
    factor = 2 ** (len(decoder.vae.config.block_out_channels) - 1)
    wide, main = in_parts(decoder), PartialState().is_main_process
    decode, precision = Decoder(wide), "fp32"
    if half and decoder.needs_fp32:
        if main:
            print(f"images are decoded in fp32: the config of --vae {vae} has force_upcast", flush=True)
    elif half:
        narrow = in_parts(copy.deepcopy(decoder).half())
        words = [what_shows(wide, narrow, first()[:DECODED_AT_ONCE]) if main else ""]
        broadcast_object_list(words)
        if words[0] and main:
            print(f"images are decoded in fp32: in fp16 {words[0]}", flush=True)
        elif not words[0]:
            decode, precision = Decoder(wide, narrow), "fp16"
    return decode, precision, (factor * height, factor * width, decoder.vae.config.out_channels)


def what_shows(decode: Decode, narrow: Decode, x0: Tensor) -> str:
    """How the images of ``narrow`` differ from those of ``decode`` more than they may, in words, or ""."""
    wide, half = decode(x0), narrow(x0)
    if not torch.isfinite(half).all():
        return "its activations overflow"
    further = (images_to_uint8(wide).int() - images_to_uint8(half).int()).abs() > 1
    share = further.double().mean().item()
    return f"{share:.2%} of the pixels lie further than one grey level away" if share > FURTHER else ""
