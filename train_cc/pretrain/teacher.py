"""Stage 0 of the small recipes: a multi-step SiT teacher by flow matching, with label dropout and EMA.

`python -m train_cc.pretrain.teacher --dataset digits --output-dir runs/digits/teacher`
"""

import argparse
import os
import time
from typing import TYPE_CHECKING

from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.flags import DECAY, Parser, integer, number
from train_cc.pretrain.data import NUM_CLASSES, add_data_arguments, add_training_arguments, load_dataset

if TYPE_CHECKING:
    from torch import Tensor

    from train_cc.models.sit import SiT
    from train_cc.pretrain.resumable import Training


def teacher_training(model: "SiT", images: "Tensor", labels: "Tensor", args: argparse.Namespace) -> "Training":
    """Flow matching: E (v(x_t, t, y) - (noise - x0))^2, y replaced by the null class at ``label_dropout``; EMA."""
    import torch
    from torch.optim.swa_utils import AveragedModel

    from train_cc.draws import Draws
    from train_cc.flow import interpolate
    from train_cc.objectives import velocity_matching_loss
    from train_cc.pretrain.resumable import TEACHER, Training
    from train_cc.run.ema import warmed_up_average
    from train_cc.schedules import logit_normal_times

    device = next(model.parameters()).device
    data, targets = images.to(device).float() / 127.5 - 1, labels.to(device)

    def update(step: int) -> "Tensor":
        draws = Draws(args.seed, TEACHER, step, device=device)
        rows = draws.integers(len(targets), args.batch_size).to(device)
        x0, y = data[rows], targets[rows]
        dropped = draws.uniform(args.batch_size) < args.label_dropout
        y = torch.where(dropped.to(device), model.null_class, y)
        noise = draws.noise_like(x0)
        t = logit_normal_times(draws.noise(args.batch_size))
        return velocity_matching_loss(model(interpolate(x0, noise, t), t, y), x0, noise)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    return Training(model, optimizer, update, AveragedModel(model, multi_avg_fn=warmed_up_average(args.ema_decay)))


def command_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_data_arguments(parser)
    add_training_arguments(parser, max_train_steps=2000)
    parser.add_argument("--hidden-size", type=integer(4, 8192), default=64)
    parser.add_argument("--depth", type=integer(1, 128), default=4)
    parser.add_argument("--num-heads", type=integer(1, 1024), default=2)
    parser.add_argument("--patch-size", type=integer(1, 1024), default=2)
    parser.add_argument("--label-dropout", type=number(0, 1, high_open=True), default=0.1)
    parser.add_argument("--ema-decay", type=DECAY, default=0.999)
    return parser


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = command_parser().parse_args(argv)
    images, labels = load_dataset(args.dataset, args.data_dir)
    if images.shape[-1] % args.patch_size or args.hidden_size % (4 * args.num_heads):
        raise InputError(
            f"--patch-size {args.patch_size} must divide the image side {images.shape[-1]}, "
            f"and --hidden-size {args.hidden_size} be a multiple of 4 x --num-heads {args.num_heads}"
        )
    # 18 width^2 weights a block, with gradient, moments and average: missing later, it would be a killed process.
    needed, there = 20 * 18 * args.depth * args.hidden_size**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"--hidden-size {args.hidden_size} with --depth {args.depth} needs {needed / 1e9:.0f} GB of memory, "
            f"this machine has {there / 1e9:.0f} GB"
        )
    import torch  # what is wrong with the command line has been said

    from train_cc.draws import rng_of
    from train_cc.models.sit import SiT
    from train_cc.pretrain.resumable import TEACHER, output_folder, run_training

    with output_folder("pretrain.teacher", args) as something_is_left:
        if not something_is_left:
            return
        torch.manual_seed(rng_of(args.seed, TEACHER).initial_seed())
        model = SiT(
            input_size=images.shape[-1],
            in_channels=images.shape[1],
            patch_size=args.patch_size,
            hidden_size=args.hidden_size,
            depth=args.depth,
            num_heads=args.num_heads,
            num_classes=NUM_CLASSES,
        )
        began = time.monotonic()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        training = teacher_training(model, images, labels, args)
        if run_training(training, "pretrain.teacher", args, training.average.module.save_pretrained):
            print(f"teacher of {args.dataset}, {time.monotonic() - began:.0f} s -> {args.output_dir}")


if __name__ == "__main__":
    main()
