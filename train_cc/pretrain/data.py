"""The small real data sets, as uint8 images (N, C, H, W) and int64 labels (N,).

`python -m train_cc.pretrain.data --dataset digits --output FILE.npz` writes one as an evaluation reference.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train_cc.io.class_names import DATASETS
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.fields import COUNT, LEARNING_RATE, SEED, Parser, integer, output_file, path
from train_cc.io.products import need_space, product, record

if TYPE_CHECKING:
    from torch import Tensor

PURPOSES = ("reward", "evaluation")  # of a classifier


def add_data_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--dataset", default="digits", choices=DATASETS, help="8 x 8 pixels, or 32 x 32 with three channels"
    )
    parser.add_argument(
        "--data-dir", type=path, help="folder of Fashion-MNIST's idx files; without it torchvision downloads them"
    )


def add_training_arguments(parser: Parser, max_train_steps: int) -> None:
    parser.add_argument("--output-dir", type=path, required=True, help="the network's folder, and of its checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier command trained there")
    parser.add_argument("--max-train-steps", type=COUNT, default=max_train_steps, help="updates")
    parser.add_argument("--checkpoint-steps", type=COUNT, default=250, help="steps between checkpoints")
    parser.add_argument("--batch-size", type=integer(1, 2**16), default=128, help="images per update")
    parser.add_argument("--learning-rate", type=LEARNING_RATE, default=2e-3, help="at the start; decays by a cosine")
    parser.add_argument("--seed", type=SEED, default=30, help="of first weights and of all draws")


def through_vae(name: str, images: "Tensor") -> "Tensor":
    """uint8 images (N, 3, H, W), encoded and decoded by the VAE ``name``: the best that its latents allow."""
    import torch

    from train_cc.models.vae import DECODED_AT_ONCE, VAEDecoder, encode_images, images_to_uint8, load_vae
    from train_cc.run.devices import device

    if images.shape[1] != 3:
        raise InputError(f"--vae is {name}, but the images have {images.shape[1]} channel; three are needed")
    vae = load_vae(name).to(device())
    latents = encode_images(vae, images)
    decode = VAEDecoder(vae)
    with torch.no_grad():
        parts = [images_to_uint8(decode(part.to(vae.device))) for part in latents.split(DECODED_AT_ONCE)]
    return torch.cat(parts).permute(0, 3, 1, 2)


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_data_arguments(parser)
    parser.add_argument(
        "--output",
        type=output_file,
        required=True,
        help="the .npz: arr_0 images (N, H, W, C), arr_1 labels, provenance",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    parser.add_argument(
        "--split", choices=["train", "test"], default="train", help="test: the 10 000 that nothing is trained on"
    )
    parser.add_argument("--num-images", type=COUNT, help="the first of them only; without it all")
    parser.add_argument(
        "--vae", default="none", help="folder of a VAE that encodes and decodes each image; none: as it is"
    )
    args = parser.parse_args(argv)
    content = record("pretrain.data", vars(args))
    with product(args.output, content, args.overwrite, "--output", file=True, read=provenance_of) as place:
        if place is None:
            return
        from train_cc.images import load_dataset  # torch takes seconds

        images, labels = load_dataset(args.dataset, args.data_dir, args.split)
        images, labels = images[: args.num_images], labels[: args.num_images]
        if args.num_images is not None and len(images) < args.num_images:
            raise InputError(f"--num-images is {args.num_images}; {args.dataset}, {args.split} has {len(images)}")
        if args.vae != "none":
            images = through_vae(args.vae, images)
        need_space(place.parts, images.nbytes)
        pixels, provenance = images.permute(0, 2, 3, 1).numpy(), np.array(json.dumps(content))
        with place.new.open("wb") as file:
            np.savez(file, arr_0=pixels, arr_1=labels.numpy(), provenance=provenance)
    print(f"{len(images)} images of {args.dataset}, {args.split} -> {args.output}")


def provenance_of(file: Path) -> dict:
    """The record in a reference; {} for any other file."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return json.loads(str(arrays["provenance"]))
    except Exception:  # whatever numpy raises: the file is not one of these
        return {}


if __name__ == "__main__":
    main()
