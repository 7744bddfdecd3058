"""Images of a generator or a teacher, in shards: what evaluation/generate.py runs."""

import argparse
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from evaluation.decoding import decoder_of
from evaluation.files import apart
from evaluation.sample import classes_of
from evaluation.shards import (
    check_png_dir,
    check_shards_folder,
    difference,
    finished,
    merge_shards,
    open_shards,
    read_shard,
    shard_path,
    shards_of,
    write_pngs,
    write_shard,
)
from train_cc.draws import Draws
from train_cc.io.errors import InputError
from train_cc.io.hub import model_folder, pinned
from train_cc.io.products import check_output_file, library_versions, need_space, record
from train_cc.io.read import check_numbers, read_npz, require_file, require_folder, sha256
from train_cc.io.saying import note
from train_cc.io.weights import WEIGHTS_NAME
from train_cc.models.generator import SAMPLING, GenerationConfig
from train_cc.models.sit import SiT, choose_attention, read_sit_config
from train_cc.models.vae import DECODED_AT_ONCE, images_to_uint8, require_decoder, vae_files
from train_cc.run.checkpoint import Checkpoint, open_checkpoint
from train_cc.run.devices import SHARDS_TIMEOUT, open_processes
from train_cc.samplers import euler_sample, few_step_sample, guide, heun_sample, sde_sample

IMAGES, RANDOM_LABEL = 11, 12  # first keys of the draws, after the seed
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MULTI_STEP = {"euler": euler_sample, "heun": heun_sample}
# What may differ between the runs that fill the shards of one output.
FREE = ("batch_size", "output", "png_dir", "overwrite", "names")


class ImageNoise:
    """Noise for the images ``indices``, one step after another; each row is a function of (seed, i, step)."""

    def __init__(self, seed: int, indices: range, shape: tuple[int, ...], device: torch.device):
        self._draws = [Draws(seed, IMAGES, i) for i in indices]
        self._shape, self._device = shape, device

    def __call__(self, like: Tensor | None = None) -> Tensor:
        return torch.stack([draws.noise(*self._shape) for draws in self._draws]).to(self._device)


def labels_of(indices: range, args: argparse.Namespace, num_classes: int) -> Tensor:
    """Labels of --classes, else of all: balanced, i mod their number; random, uniform. (N,) int64."""
    classes = torch.arange(num_classes) if args.classes is None else torch.tensor(args.classes)
    if args.labels == "balanced":
        return classes[torch.tensor(indices) % len(classes)]
    return classes[torch.cat([Draws(args.seed, RANDOM_LABEL, i).integers(len(classes), 1) for i in indices])]


@torch.no_grad()
def samples_of(model: SiT, indices: range, y: Tensor, args: argparse.Namespace) -> Tensor:
    """x0 (B, C, h, w): sample i of ``indices``, of the class y[i]."""
    noise, labels = ImageNoise(args.seed, indices, model.sample_shape, model.device), y.to(model.device)

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, t, y).float()  # the solver's algebra is fp32 whatever the network's dtype

    interval = tuple(args.guidance_interval)
    network = guide(network, model.null_class, args.guidance_scale, interval, args.guidance_channels)
    if args.sampler == "few-step":
        return few_step_sample(network, noise(), labels, args.num_steps, args.timestep_shift, noise)
    if args.sampler == "sde":
        return sde_sample(network, noise(), labels, args.num_steps, noise)
    return MULTI_STEP[args.sampler](network, noise(), labels, args.num_steps)


def images_of_labels(model: SiT, decode, indices: range, y: Tensor, args: argparse.Namespace) -> np.ndarray:
    """uint8 (B, H, W, C): image i of ``indices``, of the class y[i]. Raises `InputError` where they are not finite."""
    x0 = samples_of(model, indices, y, args)
    images = decode(x0)
    of_network = "the weights are damaged, or the guidance scale is too large"
    if args.dtype != "fp32":
        of_network += f", or --dtype {args.dtype} is too narrow: fp32 shows which"
    of_decoder = f"they are so in fp32 too, of finite samples: the weights of --vae {args.vae} are damaged"
    for what, values, why in (("samples", x0, of_network), ("decoded images", images, of_decoder)):
        if not torch.isfinite(values).all():
            told = f"{what} {indices[0]} to {indices[-1]} hold NaN or infinity"
            raise InputError(f"{told}: {why}; no images are made of them")
    return images_to_uint8(images).numpy()


def generate_batch(model: SiT, decode, indices: range, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """-> images uint8 (B, H, W, C), labels (B,)."""
    y = labels_of(indices, args, model.null_class)
    return images_of_labels(model, decode, indices, y, args), y.numpy()


# The model, and how it is sampled --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A model folder or a checkpoint. ``sampling``: the steps K and the shift that it was trained for, if recorded."""

    path: Path
    checkpoint: Checkpoint | None
    sha256: str  # of its weights
    sampling: tuple[int, float] | None
    rewards_sha256: list[str] = field(default_factory=list)  # networks that rewarded it, as far as it is recorded
    latent_space: str | None = None  # SHA-256, as its teacher recorded it

    @property
    def config(self) -> dict:
        return self.checkpoint.units["model_config"] if self.checkpoint is not None else read_sit_config(self.path)

    @property
    def in_channels(self) -> int:
        return self.config["in_channels"]

    @property
    def num_classes(self) -> int:
        return self.config["num_classes"]

    def load(self) -> SiT:
        """A checkpoint's EMA weights where there are some."""
        if self.checkpoint is None:
            return SiT.from_pretrained(self.path)
        from train_cc.distillation.state import generator_from  # with peft, which takes a second

        return generator_from(self.checkpoint, "auto")


def open_source(path: Path) -> Source:
    if path.suffix == ".pt":
        checkpoint = open_checkpoint(path)
        name = "ema" if checkpoint.has("accelerator_1/ema.safetensors") else "generator"
        weights = require_file(checkpoint.file(f"accelerator_1/{name}.safetensors"), "the checkpoint's weights")
        rewards = checkpoint.units.get("rewards_sha256", [])
        latents = checkpoint.units.get("latent_space_sha256")
        return Source(path, checkpoint, sha256(weights), recorded_sampling(checkpoint), rewards, latents)
    if path.is_file():
        raise InputError(f"{path} is a file; a model folder or a checkpoints/torch_units/step-N.pt is expected")
    path = model_folder(path)
    require_folder(path, f"a model folder, with config.json and {WEIGHTS_NAME},", "config.json", WEIGHTS_NAME)
    own, digest = GenerationConfig.read(path), sha256(path / WEIGHTS_NAME)
    return Source(path, None, digest, own.sampling, list(own.rewards_sha256), own.latent_space_sha256)


def recorded_sampling(checkpoint: Checkpoint) -> tuple[int, float]:
    """(K, shift) that a checkpoint's run trains for."""
    arguments = checkpoint.units["arguments"]
    if not isinstance(arguments, dict) or not {"num_steps", "timestep_shift"} <= arguments.keys():
        raise InputError(f"{checkpoint.path} does not record --num-steps and --timestep-shift")
    steps, shift = arguments["num_steps"], arguments["timestep_shift"]
    check_numbers({"num_inference_steps": steps, "timestep_shift": shift}, SAMPLING, checkpoint.path)
    return steps, float(shift)


def resolve_sampling(args: argparse.Namespace, source: Source) -> None:
    """Set the steps and the shift that the command line leaves open. Raises `InputError`."""
    channels = source.in_channels
    if args.guidance_channels is not None and args.guidance_channels > channels:
        told = f"allowed: 1 to {channels}, the channels of {args.generator}; without it all are guided"
        raise InputError(f"--guidance-channels is {args.guidance_channels}; {told}")
    few = args.sampler == "few-step"
    if few and source.sampling is None and args.num_steps is None:
        note(
            f"{args.generator} does not record for how many steps it was distilled: it is sampled in one step. For a "
            "multi-step teacher give --sampler euler, heun or sde; --num-steps 1 asks for one step"
        )
    elif not few and source.sampling is not None:
        recorded = f"{args.generator} is distilled (num_inference_steps {source.sampling[0]})"
        note(f"{recorded}; --sampler {args.sampler} is for a multi-step teacher")
    if args.guidance_scale <= 1 and (args.guidance_channels or args.guidance_interval != [0.0, 1.0]):
        told = f"--guidance-scale is {args.guidance_scale:g}, and at most 1 is off"
        note(f"--guidance-interval and --guidance-channels change nothing: {told}")
    steps, shift = source.sampling if source.sampling and few else (1, 1.0)
    args.num_steps = steps if args.num_steps is None else args.num_steps
    args.timestep_shift = shift if args.timestep_shift is None else args.timestep_shift


def resolve_classes(args: argparse.Namespace, source: Source) -> None:
    """Set --classes to numbers, each once. Raises `InputError`."""
    if args.classes is not None:
        args.classes, _ = classes_of(args, source)
        if twice := sorted({k for k in args.classes if args.classes.count(k) > 1}):
            raise InputError(f"--classes names class {twice[0]} more than once; give each class once")


# All of them, in shards ------------------------------------------------------------------------------------------


def check_outputs(args: argparse.Namespace) -> None:
    """What can be refused before anything is read: outputs that cannot be written, or that are not ours."""
    check_output_file(args.output, True)
    check_shards_folder(shards_of(args.output))
    if args.png_dir is not None:
        check_png_dir(args.png_dir, args.overwrite)
    apart(
        (("--output", args.output), ("the folder of its shards", shards_of(args.output)), ("--png-dir", args.png_dir))
    )


def provenance_of_run(args: argparse.Namespace, source: Source) -> dict:
    what = {name: str(value) for name, value in vars(args).items() if name not in FREE and value is not None}
    return {
        "made_by": "made by DMDR: samples",
        "arguments": what,
        "generator_sha256": source.sha256,
        "rewards_sha256": source.rewards_sha256,
        "decoder": None,  # its precision, once it is chosen
        "vae_sha256": None if args.vae == "none" else sha256(vae_files(args.vae)[1]),
        "versions": library_versions(),
    }


def load_sampler(args: argparse.Namespace, source: Source, device: torch.device):
    """-> the network, and its decoder as `decoder_of` chooses it: decode, its precision, (H, W, C) of an image."""
    model = source.load().to(device, DTYPES[args.dtype]).eval()
    choose_attention(model, device, DTYPES[args.dtype])

    def first() -> Tensor:
        indices = range(DECODED_AT_ONCE)
        return samples_of(model, indices, torch.tensor(indices) % source.num_classes, args)

    half = device.type == "cuda"
    return model, *decoder_of(args.vae, source.latent_space, model.sample_shape, device, first, half)


def fill_shards(
    args: argparse.Namespace, folder: Path, provenance: dict, source: Source, accelerator: PartialState
) -> None:
    """Make this process's share of the shards that are missing or damaged. The decoder's precision is noted."""
    model, decode, provenance["decoder"], image_shape = load_sampler(args, source, accelerator.device)
    if accelerator.is_main_process:
        there = sum(path.stat().st_size for path in folder.glob("*.npz"))
        need_space(folder, 2 * args.num_images * math.prod(image_shape) - there)
    starts = range(0, args.num_images, args.shard_size)[accelerator.process_index :: accelerator.num_processes]
    ranges = [range(start, min(start + args.shard_size, args.num_images)) for start in starts]
    main = accelerator.is_main_process
    with tqdm(desc="images", total=sum(map(len, ranges)), disable=not main) as progress:
        for indices in ranges:
            path = shard_path(folder, indices[0])
            labels = labels_of(indices, args, model.null_class).numpy()
            if read_shard(path, labels, image_shape, provenance) is None:
                firsts = range(indices.start, indices.stop, args.batch_size)
                batches = [range(first, min(first + args.batch_size, indices.stop)) for first in firsts]
                before = decode.again
                made = [generate_batch(model, decode, batch, args) for batch in batches]
                images, y = (np.concatenate(parts) for parts in zip(*made, strict=True))
                write_shard(path, images, y, provenance, decode.again - before)
            progress.update(len(indices))


def say_decoded_again(count: int) -> None:
    if count:
        note(f"{count} image{'s' * (count > 1)} overflowed in fp16: decoded in fp32")


def images_of(paths: list[Path]) -> Iterator[np.ndarray]:
    for path in paths:
        yield read_npz(path, "images")["arr_0"]


def write_png_dir(args: argparse.Namespace, paths: list[Path], provenance: dict) -> None:
    if args.png_dir is not None:
        content = record("generate", vars(args), provenance=provenance)
        write_pngs(images_of(paths), args.png_dir, content)


def generate(args: argparse.Namespace) -> None:
    """The command, its flags checked. Raises `InputError`."""
    accelerator = open_processes(SHARDS_TIMEOUT)
    if accelerator.is_main_process:
        check_outputs(args)
    args.generator = pinned(args.generator)
    source = open_source(args.generator)
    require_decoder(source.in_channels, args.vae, args.generator)
    resolve_sampling(args, source)
    resolve_classes(args, source)
    provenance = provenance_of_run(args, source)
    if accelerator.is_main_process and args.png_dir is not None:
        check_png_dir(args.png_dir, args.overwrite, provenance)
    there = not args.overwrite and finished(args.output, provenance)
    if not there and args.output.exists() and not args.overwrite:
        told = difference(args.output, provenance)
        raise InputError(f"{args.output} exists, made otherwise{told}; give another --output, or --overwrite")
    accelerator.wait_for_everyone()  # what is there is looked at before anything is written
    folder = shards_of(args.output)
    with open_shards(args.output, provenance) if accelerator.is_main_process else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        if not there:
            fill_shards(args, folder, provenance, source, accelerator)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            paths = [args.output]
            if not there:
                paths = [shard_path(folder, start) for start in range(0, args.num_images, args.shard_size)]
                say_decoded_again(merge_shards(paths, args.output, provenance))
            write_png_dir(args, paths, provenance)
    if accelerator.is_main_process:
        print(f"{args.num_images} images {'were there already:' if there else '->'} {args.output}")
