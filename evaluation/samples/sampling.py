"""Images of a generator or a teacher: noise and labels, samplers, decoders; what generate and sample run.

Decoding is in half precision on a GPU if the images are the same there: fp16 takes a ninth of fp32's time by roofline.
It is measured on the first images of every set, on the device and with the decoder that make it: no more than one
pixel in a thousand may differ by more than one grey level from fp32 without TF32. Else all of the set is decoded in
fp32. The main process decides for all. An image that overflows in fp16 is decoded in fp32, whatever batch it is in.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

from evaluation.samples.files import provenance_of
from evaluation.samples.parts import (
    in_parts,
    is_whole_part,
    merge_samples,
    read_samples_record,
    samples_record,
    write_part,
    write_pngs,
)
from evaluation.samples.source import Source, names_of_classes, open_source, settings_for
from train_cc.draws import Draws
from train_cc.io.errors import InputError, note
from train_cc.io.products import check_product, library_versions, need_space, write_atomically
from train_cc.io.read import sha256
from train_cc.models.backbone import Network, choose_attention
from train_cc.models.features import without_tf32
from train_cc.models.vae import DECODED_AT_ONCE, VAEDecoder, images_to_uint8, load_decoder, require_decoder, vae_files
from train_cc.run.devices import SHARDS_TIMEOUT, device, open_processes
from train_cc.run.pictures import above, grid, png_bytes
from train_cc.samplers import euler_sample, few_step_sample, guide, heun_sample, sde_sample

IMAGES, RANDOM_LABEL = 11, 12  # first keys of the draws, after the seed
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MULTI_STEP = {"euler": euler_sample, "heun": heun_sample}
FURTHER = 1e-3  # the share of pixels that may differ by more than one grey level in fp16
# Arguments in which two commands of one output may differ.
NOT_COMPARED = ("batch_size", "output", "png_dir", "overwrite", "names", "trust_teacher_code", "weights")

Decode = Callable[[Tensor], Tensor]


# Samples ----------------------------------------------------------------------------------------------------------


def image_noise(seed: int, indices: range, shape: tuple[int, ...], device: torch.device) -> Callable[..., Tensor]:
    """Noise for the images ``indices``, one step after another; each row is a function of (seed, i, step)."""
    draws = [Draws(seed, IMAGES, i) for i in indices]
    return lambda like=None: torch.stack([each.noise(*shape) for each in draws]).to(device)


def labels_of(indices: range, settings: argparse.Namespace, num_classes: int) -> Tensor:
    """Labels of --classes, else of all: balanced, i mod their number; random, uniform. (N,) int64."""
    classes = torch.arange(num_classes) if settings.classes is None else torch.tensor(settings.classes)
    if settings.labels == "balanced":
        return classes[torch.tensor(indices) % len(classes)]
    return classes[torch.cat([Draws(settings.seed, RANDOM_LABEL, i).integers(len(classes), 1) for i in indices])]


@torch.no_grad()
def samples_of(model: Network, indices: range, y: Tensor, settings: argparse.Namespace) -> Tensor:
    """x0 (B, C, h, w): sample i of ``indices``, of the class y[i]."""
    noise, labels = image_noise(settings.seed, indices, model.sample_shape, model.device), y.to(model.device)

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, t, y).float()  # the solver's algebra is fp32 whatever the network's dtype

    interval = tuple(settings.guidance_interval)
    network = guide(network, model.null_class, settings.guidance_scale, interval, settings.guidance_channels)
    if settings.sampler == "few-step":
        return few_step_sample(network, noise(), labels, settings.num_steps, settings.timestep_shift, noise)
    if settings.sampler == "sde":
        return sde_sample(network, noise(), labels, settings.num_steps, noise)
    return MULTI_STEP[settings.sampler](network, noise(), labels, settings.num_steps)


def images_of_labels(model: Network, decode, indices: range, y: Tensor, settings: argparse.Namespace) -> np.ndarray:
    """uint8 (B, H, W, C): image i of ``indices``, of the class y[i]. Raises `InputError` if they are not finite."""
    x0 = samples_of(model, indices, y, settings)
    images = decode(x0)
    of_network = "the weights are damaged, or the guidance scale is too large"
    if settings.dtype != "fp32":
        of_network += f", or --dtype {settings.dtype} is too narrow: fp32 shows which"
    of_decoder = f"they are so in fp32 too, of finite samples: the weights of --vae {settings.vae} are damaged"
    for what, values, why in (("samples", x0, of_network), ("decoded images", images, of_decoder)):
        if not torch.isfinite(values).all():
            span = f"{what} {indices[0]} to {indices[-1]} hold NaN or infinity"
            raise InputError(f"{span}: {why}; no images are made of them")
    return images_to_uint8(images).numpy()


def generate_batch(
    model: Network, decode, indices: range, settings: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (B, H, W, C) and labels (B,)."""
    y = labels_of(indices, settings, model.null_class)
    return images_of_labels(model, decode, indices, y, settings), y.numpy()


# Decoding ---------------------------------------------------------------------------------------------------------


class Decoder:
    """x0 (B, C, h, w) -> images in [0, 1], a part of the batch at a time, products of fp32 weights in fp32.

    An image that is not finite by ``narrow``, if there is one, is decoded by ``wide``; ``again`` counts these.
    """

    def __init__(self, wide: nn.Module, narrow: nn.Module | None = None):
        self.wide, self.narrow, self.again = wide, narrow, 0

    @torch.no_grad()
    def __call__(self, x0: Tensor) -> Tensor:
        with without_tf32():
            return torch.cat([self.decode(part) for part in x0.split(DECODED_AT_ONCE)])

    def decode(self, x0: Tensor) -> Tensor:
        if self.narrow is None:
            return self.wide(x0)
        images = self.narrow(x0)
        overflow = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten()
        if len(overflow):
            images[overflow] = self.wide(x0[overflow])
            self.again += len(overflow)
        return images


def decoder_of(
    vae: str,
    latents: str | None,
    shape: tuple[int, int, int],
    device: torch.device,
    first: Callable[[], Tensor],
    half: bool,
) -> tuple[Decoder, str | None, tuple[int, int, int]]:
    """Return a `Decoder`, its precision ("fp32", "fp16", or None in pixel space), and (H, W, C) of an image.

    ``vae``: what `load_decoder` takes, or "none"; ``latents``: what the model records of its own, or None;
    ``shape``: (C, h, w) of a sample; ``half``: the main process tries fp16 on the samples ``first()``.
    """
    decoder = load_decoder(None if vae == "none" else vae, device, latents=latents)
    channels, height, width = shape
    if not isinstance(decoder, VAEDecoder):
        return Decoder(decoder), None, (height, width, channels)
    factor = 2 ** (len(decoder.vae.config.block_out_channels) - 1)
    size = (factor * height, factor * width, decoder.vae.config.out_channels)
    if not half:
        return Decoder(decoder), "fp32", size
    narrow, main = copy.deepcopy(decoder).half(), PartialState().is_main_process
    if decoder.needs_fp32:
        problem = f"the config of --vae {vae} has force_upcast"
    else:
        words = [what_shows(Decoder(decoder), Decoder(narrow), first()[:DECODED_AT_ONCE]) if main else ""]
        broadcast_object_list(words)
        problem = words[0] and f"in fp16 {words[0]}"
    if problem and main:
        print(f"images are decoded in fp32: {problem}", flush=True)
    return (Decoder(decoder), "fp32", size) if problem else (Decoder(decoder, narrow), "fp16", size)


def what_shows(decode: Decode, narrow: Decode, x0: Tensor) -> str:
    """The difference between the images of ``narrow`` and ``decode`` in words, if it is too large; else ""."""
    wide, half = decode(x0), narrow(x0)
    if not torch.isfinite(half).all():
        return "its activations overflow"
    further = (images_to_uint8(wide).int() - images_to_uint8(half).int()).abs() > 1
    share = further.double().mean().item()
    return f"{share:.2%} of the pixels lie further than one grey level away" if share > FURTHER else ""


def load_sampler(settings: argparse.Namespace, source: Source, device: torch.device):
    """Return the network, and its decoder as `decoder_of` chooses it: decode, its precision, (H, W, C) of an image."""
    model = source.load().to(device, DTYPES[settings.dtype]).eval()
    choose_attention(model, device, DTYPES[settings.dtype])

    def first() -> Tensor:
        indices = range(DECODED_AT_ONCE)
        return samples_of(model, indices, torch.tensor(indices) % source.config["num_classes"], settings)

    half = device.type == "cuda"
    return model, *decoder_of(settings.vae, source.latent_space, model.sample_shape, device, first, half)


# The commands -----------------------------------------------------------------------------------------------------


def open_sampling(args: argparse.Namespace) -> tuple[Source, argparse.Namespace]:
    """The model, and ``args`` completed by `settings_for`. Raises `InputError`."""
    source = open_source(args.generator, args.trust_teacher_code, args.weights)
    require_decoder(source.config["in_channels"], args.vae, args.generator)
    return source, settings_for(args, source)


def provenance_of_run(settings: argparse.Namespace, source: Source) -> dict:
    compared = [(name, value) for name, value in vars(settings).items() if name not in NOT_COMPARED]
    return {
        "made_by": "made by DMDR: samples",
        "arguments": {name: str(value) for name, value in compared if value is not None},
        "generator_sha256": source.sha256,
        "rewards_sha256": source.rewards_sha256,
        "decoder": None,  # its precision, once it is chosen
        "vae_sha256": None if settings.vae == "none" else sha256(vae_files(settings.vae)[1]),
        "versions": library_versions(),
    }


def make_parts(
    folder: Path, settings: argparse.Namespace, provenance: dict, source: Source, processes: PartialState
) -> list[Path]:
    """Return all parts, of which this process made its share if they were missing. The decoder's precision is noted."""
    model, decode, precision, image_shape = load_sampler(settings, source, processes.device)
    provenance["decoder"] = precision
    count, size = settings.num_images, settings.shard_size
    ranges = [range(first, min(first + size, count)) for first in range(0, count, size)]
    suffix = "" if precision is None else f"-{precision}"  # continued on another device, a set is of one precision
    parts = {folder / f"{each.start:08d}{suffix}.npz": each for each in ranges}
    if processes.is_main_process:
        there = sum(path.stat().st_size for path in folder.glob("*.npz"))
        need_space(folder, 2 * count * math.prod(image_shape) - there)
    mine = list(parts)[processes.process_index :: processes.num_processes]
    total = sum(len(parts[path]) for path in mine)
    with tqdm(desc="images", total=total, disable=not processes.is_main_process) as progress:
        for path in mine:
            indices, before = parts[path], decode.again
            if not is_whole_part(path):
                batches = [indices[i : i + settings.batch_size] for i in range(0, len(indices), settings.batch_size)]
                pairs = [generate_batch(model, decode, batch, settings) for batch in batches]
                images, y = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
                write_part(path, arr_0=images, arr_1=y, again=np.array(decode.again - before))
            progress.update(len(indices))
    return list(parts)


def write_samples(args: argparse.Namespace) -> None:
    """`evaluation.generate`, its flags checked. Raises `InputError`."""
    processes = open_processes(SHARDS_TIMEOUT)
    source, settings = open_sampling(args)
    if twice := [k for k in settings.classes or () if settings.classes.count(k) > 1]:
        raise InputError(f"--classes names class {min(twice)} more than once; give each class once")
    provenance = provenance_of_run(settings, source)
    content, output, parts = samples_record(provenance), args.output, [args.output]
    if args.png_dir is not None:
        check_product(args.png_dir, content, args.overwrite, "--png-dir")
    with in_parts(output, content, args.overwrite, read_samples_record, processes) as place:
        if place is not None:
            parts = make_parts(place.parts, settings, provenance, source, processes)
            processes.wait_for_everyone()
        if not processes.is_main_process:
            return
        if place is not None:
            note_decoded_again(merge_samples(parts, place.new, provenance))
        else:
            with np.load(output) as file:
                provenance = provenance_of(file, output)
        if args.png_dir is not None:
            write_pngs(parts, args.png_dir, provenance, args.overwrite)
    if place is not None:
        print(f"{args.num_images} images -> {output}")


def note_decoded_again(count: int) -> None:
    if count:
        note(f"{count} image{'s' * (count > 1)} overflowed in fp16: decoded in fp32")


def draw_classes(args: argparse.Namespace) -> None:
    """`evaluation.sample`, its flags checked: a column per class, its name above. Raises `InputError`."""
    source, settings = open_sampling(args)
    names = names_of_classes(args, source)
    model, decode, *_ = load_sampler(settings, source, device())
    columns = []
    for k in settings.classes:
        # Of a balanced set of samples, those of the class: evaluation.generate makes the same images.
        indices = range(k, source.config["num_classes"] * args.per_class, source.config["num_classes"])
        columns.append(images_of_labels(model, decode, indices, torch.full((args.per_class,), k), settings))
    note_decoded_again(decode.again)
    titles = [str(k) if names is None else names[k].split(",")[0] for k in settings.classes]
    args.grid.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.grid, png_bytes(above(grid(list(np.stack(columns, axis=1))), titles)))
    text = json.dumps(titles, ensure_ascii=False)
    print(f"{len(columns)} classes ({text}), {args.per_class} images each: {args.grid}")
