"""Stage 0 of the small recipes: a multi-step SiT teacher by flow matching, with label dropout and EMA.

`python -m train_cc.pretrain.teacher --dataset digits --output-dir runs/digits/teacher`
`python -m train_cc.pretrain.teacher --dataset fashion-mnist --vae runs/fashion/vae --output-dir runs/fashion/teacher`
"""

import argparse
import os
import time
from typing import TYPE_CHECKING

from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.flags import COUNT_OR_0, DECAY, Parser, integer, number
from train_cc.io.products import product, record
from train_cc.pretrain.data import NUM_CLASSES, add_data_arguments, add_training_arguments, load_dataset

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from train_cc.draws import Draws
    from train_cc.models.sit import SiT
    from train_cc.pretrain.resumable import Training

LATENTS = "latents.safetensors"
HELD_OUT = 1_000  # images


def teacher_training(model: "SiT", x: "Tensor", labels: "Tensor", args: argparse.Namespace) -> "Training":
    """Flow matching: E (v(x_t, t, y) - (noise - x0))^2, y replaced by the null class at ``label_dropout``; EMA.

    ``x`` (N, C, H, W): pixels in [-1, 1], or scaled latents.
    """
    import torch
    from torch.optim.swa_utils import AveragedModel

    from train_cc.draws import Draws
    from train_cc.models.sit import choose_attention
    from train_cc.pretrain.resumable import TEACHER, Training, warmed_cosine
    from train_cc.run.ema import warmed_up_average

    device = next(model.parameters()).device
    data, targets = x.to(device), labels.to(device)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    choose_attention(model, device, dtype)

    def update(step: int) -> "Tensor":
        draws = Draws(args.seed, TEACHER, step, device=device)
        rows = draws.integers(len(targets), args.batch_size).to(device)
        y = targets[rows]
        dropped = draws.uniform(args.batch_size) < args.label_dropout
        return flow_matching_loss(model, data[rows], torch.where(dropped.to(device), model.null_class, y), draws, dtype)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    average = AveragedModel(model, multi_avg_fn=warmed_up_average(args.ema_decay))
    return Training(model, optimizer, update, average, warmed_cosine(args.warmup_steps))


def flow_matching_loss(model: "SiT", x0: "Tensor", y: "Tensor", draws: "Draws", dtype: "torch.dtype") -> "Tensor":
    """At logit-normal times, with the network's products in ``dtype``. 0-d."""
    import torch

    from train_cc.flow import interpolate
    from train_cc.objectives import velocity_matching_loss
    from train_cc.schedules import logit_normal_times

    noise = draws.noise_like(x0)
    t = logit_normal_times(draws.noise(len(x0)))
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        v = model(interpolate(x0, noise, t), t, y)
    return velocity_matching_loss(v.float(), x0, noise)


def held_out_loss(model: "SiT", x: "Tensor", labels: "Tensor", seed: int) -> float:
    """The loss, in fp32, on images that nothing was trained on, or on the first of those that were: digits."""
    import torch

    from train_cc.draws import Draws
    from train_cc.pretrain.resumable import TEACHER

    device = next(model.parameters()).device
    with torch.no_grad():
        draws = Draws(seed, TEACHER, device=device)
        return flow_matching_loss(model, x.to(device), labels.to(device), draws, torch.float32).item()


def training_data(
    args: argparse.Namespace, split: str, number: int | None = None, parts: "Path | None" = None
) -> "tuple[Tensor, Tensor]":
    """-> pixels in [-1, 1], or with --vae the scaled latents (N, C, H, W), of the first ``number`` images; labels (N,).

    Latents are computed once if they can be kept in folder ``parts``, beside the checkpoint.
    """
    from train_cc.models.vae import cached_latents, encode_images, load_vae

    images, labels = load_dataset(args.dataset, args.data_dir, split)
    images, labels = images[:number], labels[:number]
    if args.vae == "none":
        return images.float() / 127.5 - 1, labels
    if images.shape[1] != 3:
        raise InputError(
            f"--vae is {args.vae}, but --dataset {args.dataset} has {images.shape[1]} channel; three are needed"
        )
    vae = load_vae(args.vae)
    return (encode_images(vae, images) if parts is None else cached_latents(parts / LATENTS, vae, images)), labels


def save(teacher: "SiT", args: argparse.Namespace, folder: "Path") -> None:
    """The network, and which latents it has learnt."""
    from train_cc.models.generator import GenerationConfig
    from train_cc.models.vae import latent_space_sha256, load_vae

    teacher.save_pretrained(folder)
    if args.vae != "none":
        GenerationConfig(latent_space_sha256=latent_space_sha256(load_vae(args.vae))).write(folder)


def command_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_data_arguments(parser)
    add_training_arguments(parser, max_train_steps=2000)
    parser.add_argument("--vae", default="none", help="VAE folder whose latents are learnt; none: pixels")
    parser.add_argument("--hidden-size", type=integer(4, 8192), default=64, help="width of the network")
    parser.add_argument("--depth", type=integer(1, 128), default=4, help="blocks of the network")
    parser.add_argument("--num-heads", type=integer(1, 1024), default=2, help="attention heads per block")
    parser.add_argument("--patch-size", type=integer(1, 1024), default=2, help="side of a token, in pixels or latents")
    parser.add_argument(
        "--label-dropout",
        type=number(0, 1, high_open=True),
        default=0.1,
        help="share of labels that become the null class",
    )
    parser.add_argument("--ema-decay", type=DECAY, default=0.999, help="of the average that is saved")
    parser.add_argument("--warmup-steps", type=COUNT_OR_0, default=0, help="over which the learning rate rises")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no", help="of the network's products")
    return parser


def check(args: argparse.Namespace, side: int) -> None:
    """Raises `InputError` for a network that does not fit inputs of ``side``, or this machine's memory."""
    if side % args.patch_size or args.hidden_size % (4 * args.num_heads):
        of = "image" if args.vae == "none" else "latent"
        raise InputError(
            f"--patch-size {args.patch_size} must divide the {of} side {side}, "
            f"and --hidden-size {args.hidden_size} be a multiple of 4 x --num-heads {args.num_heads}"
        )
    # 18 width^2 weights a block, with gradient, moments and average: missing later, it would be a killed process.
    needed, there = 20 * 18 * args.depth * args.hidden_size**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"--hidden-size {args.hidden_size} with --depth {args.depth} needs {needed / 1e9:.0f} GB of memory, "
            f"this machine has {there / 1e9:.0f} GB"
        )


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = command_parser().parse_args(argv)
    held_out = "train" if args.dataset == "digits" else "test"
    x, labels = training_data(args, held_out, HELD_OUT)
    check(args, x.shape[-1])
    import torch  # what is wrong with the command line has been said

    from train_cc.draws import rng_of
    from train_cc.models.sit import SiT
    from train_cc.pretrain.resumable import TEACHER, train
    from train_cc.run import devices

    device = devices.device()
    content = record("pretrain.teacher", vars(args))
    with product(args.output_dir, content, args.overwrite, keep=True) as place:
        if place is None:
            return
        torch.manual_seed(rng_of(args.seed, TEACHER).initial_seed())
        model = SiT(
            input_size=x.shape[-1],
            in_channels=x.shape[1],
            patch_size=args.patch_size,
            hidden_size=args.hidden_size,
            depth=args.depth,
            num_heads=args.num_heads,
            num_classes=NUM_CLASSES,
        )
        began = time.monotonic()
        model.to(device)
        training = teacher_training(model, *training_data(args, "train", parts=place.parts), args)
        teacher = training.average.module
        if not train(training, place.parts, args, "pretrain.teacher"):
            return
        save(teacher, args, place.new)
        told = f"loss {held_out_loss(teacher, x, labels, args.seed):.4f} on {HELD_OUT} {held_out} images"
        print(f"teacher of {args.dataset}: {told}, {time.monotonic() - began:.0f} s -> {args.output_dir}")


if __name__ == "__main__":
    main()
