"""The picture of evaluation/sample.py: images of chosen classes, and their names above."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from evaluation.sample import class_of
from evaluation.sampling import Source, images_of_labels, load_sampler, open_source, resolve_sampling
from train_cc.io.class_names import class_names
from train_cc.io.write import record_of, write_atomically
from train_cc.models.vae import require_decoder
from train_cc.run import devices
from train_cc.run.pictures import above, grid, png_bytes


def data_of(source: Source) -> str | None:
    """The data set that the generator's teacher was trained on, as far as records lead there."""
    # A file is a run's checkpoints/torch_units/step-N.pt.
    folder = source.path if source.path.is_dir() else source.path.resolve().parents[2]
    for _ in range(3):  # the generator's folder, its run's, its teacher's
        arguments = record_of(folder).get("arguments", {})
        if isinstance(arguments.get("dataset"), str):
            return arguments["dataset"]
        folder = Path(str(arguments["teacher"])) if arguments.get("teacher") else folder.parent
    return None


def sample(args: argparse.Namespace) -> None:
    """The command, its flags checked. Raises `InputError`."""
    device = devices.device()
    source = open_source(args.generator)
    require_decoder(source.in_channels, args.vae, args.generator)
    resolve_sampling(args, source.sampling)
    given = str(args.names.absolute()) if args.names else "auto"  # a file, though it be named like a data set
    names = class_names(given, source.num_classes, data_of(source), "--names")
    classes = [class_of(text, names, source.num_classes) for text in args.classes]
    model, decode, *_ = load_sampler(args, source, device)
    columns = []
    for k in classes:
        # Of a balanced set of samples, those of the class: evaluation.generate makes the same images.
        indices = range(k, source.num_classes * args.per_class, source.num_classes)
        columns.append(images_of_labels(model, decode, indices, torch.full((args.per_class,), k), args))
    told = [str(k) if names is None else names[k].split(",")[0] for k in classes]
    picture = above(grid(list(np.stack(columns, axis=1))), told)
    args.grid.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.grid, png_bytes(picture))
    print(f"{len(columns)} classes ({json.dumps(told, ensure_ascii=False)}), {args.per_class} images each: {args.grid}")
