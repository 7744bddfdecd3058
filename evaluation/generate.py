"""Samples of a generator or a teacher as an ADM-style .npz: arr_0 uint8 (N, H, W, C), arr_1 labels, provenance.

`python -m evaluation.generate --generator runs/digits/cold_start/generator --num-images 1800 --output s.npz`

Image i depends on (seed, i) alone: its noise and its label are the same for any batch size. Values are rounded to
nearest. `--sampler few-step` is the generator's; `--sampler euler` treats the model as a multi-step teacher.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from train_cc.draws import Draws
from train_cc.errors import InputError, exits_on_input_error
from train_cc.models.latents import images_to_uint8, load_decoder
from train_cc.models.sit import SiT
from train_cc.run.logbook import library_versions
from train_cc.samplers import euler_sample, few_step_sample, guide

IMAGES, RANDOM_LABEL = 11, 12  # first keys of the draws, after the seed


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
    noise = ImageNoise(args.seed, indices, model.sample_shape, model.device)
    network = guide(model, model.null_class, args.guidance_scale, tuple(args.guidance_interval))
    if args.sampler == "few-step":
        x0 = few_step_sample(network, noise(), y.to(model.device), args.num_steps, args.timestep_shift, noise)
    else:
        x0 = euler_sample(network, noise(), y.to(model.device), args.num_steps)
    return images_to_uint8(decode(x0)).numpy(), y.numpy()


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generator", type=Path, required=True, help="model folder: a run's generator/, or a teacher")
    parser.add_argument("--output", type=Path, required=True, help="the .npz to write")
    parser.add_argument("--num-images", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--labels", choices=["balanced", "random"], default="balanced")
    parser.add_argument("--sampler", choices=["few-step", "euler"], default="few-step")
    parser.add_argument("--num-steps", type=int, default=1)
    parser.add_argument("--timestep-shift", type=float, default=1.0)
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="at most 1 is off")
    parser.add_argument("--guidance-interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"))
    parser.add_argument("--vae", default="none", help="decoder of latent models: hub name or folder; none: pixel space")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("num_images", "batch_size", "num_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed: at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = SiT.from_pretrained(args.generator).to(device).eval()
    decode = load_decoder(None if args.vae == "none" else args.vae, device)

    batches = [
        generate_batch(model, decode, range(first, min(first + args.batch_size, args.num_images)), args)
        for first in tqdm(range(0, args.num_images, args.batch_size), desc="images", mininterval=2)
    ]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    provenance = {"arguments": vars(args), "versions": library_versions()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_name(args.output.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, arr_0=images, arr_1=labels, provenance=json.dumps(provenance, default=str))
    os.replace(temporary, args.output)
    print(f"{len(images)} images -> {args.output}")


if __name__ == "__main__":
    main()
