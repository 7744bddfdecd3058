"""The picture of evaluation/sample.py: images of chosen classes, and their names above."""

import argparse
import json

import numpy as np
import torch

from evaluation.sample import classes_of
from evaluation.sampling import images_of_labels, load_sampler, open_source, resolve_sampling, say_decoded_again
from train_cc.io.products import write_atomically
from train_cc.models.vae import require_decoder
from train_cc.run import devices
from train_cc.run.pictures import above, grid, png_bytes


def sample(args: argparse.Namespace) -> None:
    """The command, its flags checked. Raises `InputError`."""
    device = devices.device()
    source = open_source(args.generator)
    require_decoder(source.in_channels, args.vae, args.generator)
    resolve_sampling(args, source)
    classes, names = classes_of(args, source)
    model, decode, *_ = load_sampler(args, source, device)
    columns = []
    for k in classes:
        # Of a balanced set of samples, those of the class: evaluation.generate makes the same images.
        indices = range(k, source.num_classes * args.per_class, source.num_classes)
        columns.append(images_of_labels(model, decode, indices, torch.full((args.per_class,), k), args))
    say_decoded_again(decode.again)
    told = [str(k) if names is None else names[k].split(",")[0] for k in classes]
    picture = above(grid(list(np.stack(columns, axis=1))), told)
    args.grid.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.grid, png_bytes(picture))
    print(f"{len(columns)} classes ({json.dumps(told, ensure_ascii=False)}), {args.per_class} images each: {args.grid}")
