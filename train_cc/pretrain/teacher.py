"""Stage 0 of the small recipes: a multi-step SiT teacher by flow matching, with label dropout and EMA.

`python -m train_cc.pretrain.teacher --dataset digits --output-dir runs/digits/teacher`
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from train_cc.draws import Draws
from train_cc.flow import interpolate
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.write import check_output_dir
from train_cc.models.sit import SiT
from train_cc.objectives import velocity_matching_loss
from train_cc.pretrain.data import add_data_arguments, load_dataset, require_positive
from train_cc.schedules import logit_normal_times


def cosine_decay(step: int, steps: int, floor: float = 0.05) -> float:
    """The factor of the learning rate: 1 at the start, ``floor`` at the end."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))


def warmed_up_average(decay: float):
    """The EMA of `AveragedModel` at min(decay, (1 + n) / (10 + n)): a short run must not keep its random start."""

    def average(averaged: list, current: list, count: torch.Tensor) -> None:
        n = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, count)

    return average


def train_teacher(model: SiT, images: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace) -> SiT:
    """Flow matching: E (v(x_t, t, y) - (noise - x0))^2, y replaced by the null class at ``label_dropout``. -> EMA."""
    device = next(model.parameters()).device
    data = (images.to(device).float() / 127.5 - 1, labels.to(device))
    ema = AveragedModel(model, multi_avg_fn=warmed_up_average(args.ema_decay))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_decay(step, args.max_train_steps))
    progress = tqdm(range(args.max_train_steps), desc="teacher", mininterval=2)
    for step in progress:
        draws = Draws(args.seed, step, device=device)
        rows = draws.integers(len(labels), args.batch_size).to(device)
        x0, y = data[0][rows], data[1][rows]
        dropped = draws.uniform(args.batch_size) < args.label_dropout
        y = torch.where(dropped.to(device), model.null_class, y)
        noise = draws.noise_like(x0)
        t = logit_normal_times(draws.noise(args.batch_size))
        loss = velocity_matching_loss(model(interpolate(x0, noise, t), t, y), x0, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        ema.update_parameters(model)
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
            if not math.isfinite(loss.item()):
                raise InputError(f"the teacher's loss is {loss.item()} at step {step}; lower --learning-rate")
    return ema.module


@exits_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_data_arguments(parser)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=2)
    parser.add_argument("--patch-size", type=int, default=2)
    parser.add_argument("--max-train-steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--label-dropout", type=float, default=0.1)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=30)
    args = parser.parse_args()
    sizes = ("hidden_size", "depth", "num_heads", "patch_size")
    require_positive(args, *sizes, "max_train_steps", "batch_size", "learning_rate")

    images, labels = load_dataset(args.dataset, args.data_dir)
    if images.shape[-1] % args.patch_size or args.hidden_size % (4 * args.num_heads):
        raise InputError(
            f"--patch-size {args.patch_size} must divide the image side {images.shape[-1]}, "
            f"and --hidden-size {args.hidden_size} be a multiple of 4 x --num-heads {args.num_heads}"
        )
    check_output_dir(args.output_dir, args.overwrite)
    torch.manual_seed(args.seed)
    model = SiT(
        input_size=images.shape[-1],
        in_channels=images.shape[1],
        patch_size=args.patch_size,
        hidden_size=args.hidden_size,
        depth=args.depth,
        num_heads=args.num_heads,
        num_classes=int(labels.max()) + 1,
    )
    begin = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = train_teacher(model.to(device), images, labels, args)
    teacher.save_pretrained(args.output_dir)
    print(f"teacher of {args.dataset}, {time.monotonic() - begin:.0f} s -> {args.output_dir}")


if __name__ == "__main__":
    main()
