"""Samples of a generator or a teacher as an ADM-style .npz: arr_0 uint8 (N, H, W, C), arr_1 labels, provenance.

`python -m evaluation.generate --generator runs/digits/cold_start/generator --num-images 1800 --output s.npz`

Image i depends on (seed, i) alone: noise and label are the same for any batch size and number of processes, and the
images equal within one grey level. Values are rounded to nearest. `--sampler few-step` is the generator's own; `euler`
and `heun` treat the model as a multi-step teacher. Runs under `accelerate launch` or `torchrun` too. Finished shards
are kept beside the output until it is whole: the same command continues where it was stopped.
"""

import argparse
import json
import math
import os
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from convert_weight.export_generator import generator_of
from train_cc.draws import Draws
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.read import sha256
from train_cc.io.write import library_versions, write_atomically
from train_cc.models.latents import images_to_uint8, load_decoder, require_decoder_kind
from train_cc.models.sit import WEIGHTS_NAME, SiT
from train_cc.run.checkpoint import open_checkpoint
from train_cc.samplers import euler_sample, few_step_sample, guide, heun_sample

IMAGES, RANDOM_LABEL = 11, 12  # first keys of the draws, after the seed
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MULTI_STEP = {"euler": euler_sample, "heun": heun_sample}
# What may differ between the runs that fill the shards of one output.
FREE = ("batch_size", "output", "png_dir", "overwrite")


class ImageNoise:
    """Noise for the images ``indices``, one step after another; each row is a function of (seed, i, step)."""

    def __init__(self, seed: int, indices: range, shape: tuple[int, ...], device: torch.device):
        self._draws = [Draws(seed, IMAGES, i) for i in indices]
        self._shape, self._device = shape, device

    def __call__(self, like: Tensor | None = None) -> Tensor:
        return torch.stack([draws.noise(*self._shape) for draws in self._draws]).to(self._device)


def labels_of(indices: range, seed: int, num_classes: int, mode: str) -> Tensor:
    """balanced: i mod num_classes; random: uniform. (N,) int64."""
    if mode == "balanced":
        return torch.tensor(indices) % num_classes
    return torch.cat([Draws(seed, RANDOM_LABEL, i).integers(num_classes, 1) for i in indices])


@torch.no_grad()
def generate_batch(model: SiT, decode, indices: range, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """-> images uint8 (B, H, W, C), labels (B,)."""
    y = labels_of(indices, args.seed, model.null_class, args.labels)
    noise, labels = ImageNoise(args.seed, indices, model.sample_shape, model.device), y.to(model.device)

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, t, y).float()  # the solver's algebra is fp32 whatever the network's dtype

    network = guide(network, model.null_class, args.guidance_scale, tuple(args.guidance_interval))
    if args.sampler == "few-step":
        x0 = few_step_sample(network, noise(), labels, args.num_steps, args.timestep_shift, noise)
    else:
        x0 = MULTI_STEP[args.sampler](network, noise(), labels, args.num_steps)
    return images_to_uint8(decode(x0)).numpy(), y.numpy()


def load_model(source: Path) -> tuple[SiT, str]:
    """A model folder, or a checkpoint's torch_units file (EMA where there is one). -> model, its weights' SHA-256."""
    if source.suffix == ".pt":
        checkpoint = open_checkpoint(source)
        weights = "ema" if checkpoint.has("accelerator_1/ema.safetensors") else "generator"
        return generator_of(checkpoint, "auto"), sha256(checkpoint.file(f"accelerator_1/{weights}.safetensors"))
    return SiT.from_pretrained(source), sha256(source / WEIGHTS_NAME)


# Shards ------------------------------------------------------------------------------------------------------------


def open_shards(folder: Path, provenance: dict) -> None:
    """Make ``folder``; shards that another command left in it are deleted."""
    note = folder / "provenance.json"
    if folder.exists() and (not note.exists() or json.loads(note.read_text()) != provenance):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(provenance))


def write_shard(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, arr_0=images, arr_1=labels)
    os.replace(temporary, path)


def merge_shards(shards: list[Path], output: Path, provenance: dict) -> None:
    """One .npz of all shards in order, a shard in memory at a time."""
    with np.load(shards[0]) as first:
        image_shape = first["arr_0"].shape[1:]
    labels = np.concatenate([np.load(shard)["arr_1"] for shard in shards])
    temporary = output.with_name(output.name + ".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *image_shape)}
            np.lib.format.write_array_header_1_0(entry, header)
            for shard in shards:
                entry.write(np.ascontiguousarray(np.load(shard)["arr_0"]).tobytes())
        for name, array in (("arr_1", labels), ("provenance", np.array(json.dumps(provenance)))):
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, array)
    os.replace(temporary, output)


def write_pngs(shards: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard in shards:
        for image in np.load(shard)["arr_0"]:
            Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(folder / f"{number:06d}.png")
            number += 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--generator", type=Path, required=True, help="a run's generator/, a teacher folder, or a torch_units/step-N.pt"
    )
    parser.add_argument("--output", type=Path, required=True, help="the .npz to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument("--png-dir", type=Path, help="also write the images as PNG files there")
    parser.add_argument("--num-images", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=250, help="per process")
    parser.add_argument(
        "--shard-size", type=int, default=1_000, help="images written at once, and kept on interruption"
    )
    parser.add_argument("--labels", choices=["balanced", "random"], default="balanced")
    parser.add_argument("--sampler", choices=["few-step", *MULTI_STEP], default="few-step")
    parser.add_argument("--num-steps", type=int, default=1)
    parser.add_argument("--timestep-shift", type=float, default=1.0, help="of the few-step sampler's time grid")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="at most 1 is off")
    parser.add_argument("--guidance-interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"))
    parser.add_argument("--vae", default="none", help="decoder of latent models: hub name or folder; none: pixel space")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the network and the decoder")
    parser.add_argument("--seed", type=int, default=0)
    return parser


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    for name in ("num_images", "batch_size", "num_steps", "shard_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed: at least 1")
    if not 0 <= args.seed < 2**63 or not args.timestep_shift > 0:
        raise InputError(f"--seed {args.seed} must be 0 to 2^63 - 1, --timestep-shift {args.timestep_shift} above 0")
    low, high = args.guidance_interval
    if not 0 <= low < high <= 1 or not math.isfinite(args.guidance_scale):
        raise InputError(f"guidance {args.guidance_scale} on {low} to {high}: a finite scale, 0 <= LOW < HIGH <= 1")
    if args.output.exists() and not args.overwrite:
        raise InputError(f"{args.output} exists; give another --output, or --overwrite")
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model, digest = load_model(args.generator)
    dtype = DTYPES[args.dtype]
    model = model.to(accelerator.device, dtype).eval()
    require_decoder_kind(model.config.in_channels, args.vae, args.generator)
    decode = load_decoder(None if args.vae == "none" else args.vae, accelerator.device)
    if isinstance(decode, torch.nn.Module):
        network = decode.to(dtype)
        decode = lambda x0: network(x0.to(dtype))  # noqa: E731

    what = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    provenance = {"arguments": what, "generator_sha256": digest, "versions": library_versions()}
    shards_folder = args.output.with_name(args.output.name + ".shards")
    if accelerator.is_main_process:
        open_shards(shards_folder, provenance)
    accelerator.wait_for_everyone()
    starts = range(0, args.num_images, args.shard_size)
    shards = {start: shards_folder / f"{start:08d}.npz" for start in starts}
    mine = starts[accelerator.process_index :: accelerator.num_processes]
    stops = {start: min(start + args.shard_size, args.num_images) for start in mine}
    total = sum(stop - start for start, stop in stops.items())
    progress = tqdm(desc="images", total=total, disable=not accelerator.is_main_process)
    for start, stop in stops.items():
        if not shards[start].exists():
            firsts = range(start, stop, args.batch_size)
            ranges = [range(first, min(first + args.batch_size, stop)) for first in firsts]
            batches = [generate_batch(model, decode, indices, args) for indices in ranges]
            write_shard(shards[start], *(np.concatenate(parts) for parts in zip(*batches, strict=True)))
        progress.update(stop - start)
    progress.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        merge_shards(list(shards.values()), args.output, provenance)
        if args.png_dir:
            write_pngs(shards.values(), args.png_dir)
        shutil.rmtree(shards_folder)
        print(f"{args.num_images} images -> {args.output}")


if __name__ == "__main__":
    main()
