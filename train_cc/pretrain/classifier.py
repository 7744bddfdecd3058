"""Stage 0 of the small recipes: a classifier, to be the reward or, another one, the feature space of an evaluation.

`python -m train_cc.pretrain.classifier --dataset digits --output-dir runs/digits/classifier_reward`
"""

import argparse
import time
import zlib
from typing import TYPE_CHECKING

from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.flags import Parser, integer, number
from train_cc.io.products import product, record
from train_cc.pretrain.data import NUM_CLASSES, add_data_arguments, add_training_arguments, load_dataset

if TYPE_CHECKING:
    from torch import Tensor

    from train_cc.models.classifier import ImageClassifier
    from train_cc.pretrain.resumable import Training

PURPOSES = ("reward", "evaluation")


def draws_key(args: argparse.Namespace) -> tuple[int, ...]:
    """Of initialisation and draws: two classifiers of one seed have none in common, or the hold-out would be weak."""
    from train_cc.pretrain.resumable import CLASSIFIER

    return args.seed, CLASSIFIER, PURPOSES.index(args.purpose), zlib.crc32(args.architecture.encode())


def classifier_training(
    model: "ImageClassifier", images: "Tensor", labels: "Tensor", args: argparse.Namespace
) -> "Training":
    """Cross-entropy on images with added noise of a standard deviation uniform in [0, ``noise_augmentation``]."""
    import torch
    from torch.nn import functional as F

    from train_cc.draws import Draws, rng_of
    from train_cc.pretrain.resumable import Training

    device = next(model.parameters()).device
    data, targets = images.to(device).float() / 255, labels.to(device)

    def update(step: int) -> "Tensor":
        draws = Draws(*draws_key(args), step, device=device)
        torch.manual_seed(rng_of(*draws_key(args), step, 2).initial_seed())  # dropout and stochastic depth draw there
        rows = draws.integers(len(targets), args.batch_size).to(device)
        spread = draws.uniform(args.batch_size).float().to(device).view(-1, 1, 1, 1) * args.noise_augmentation
        noisy = (data[rows] + spread * draws.noise_like(data[rows])).clamp(0, 1)
        return F.cross_entropy(model(noisy), targets[rows])

    return Training(model, torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05), update)


def command_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_data_arguments(parser)
    add_training_arguments(parser, max_train_steps=400)
    parser.add_argument(
        "--purpose", default="reward", choices=PURPOSES, help="the two share no random numbers at one seed"
    )
    parser.add_argument("--architecture", default="test_resnet", help="any classifier of timm.list_models()")
    parser.add_argument(
        "--image-size", type=integer(1, 1024), default=32, help="images are resized to it inside the classifier"
    )
    parser.add_argument(
        "--noise-augmentation", type=number(0, 1), default=0.0, help="largest standard deviation of the noise"
    )
    return parser


def build(args: argparse.Namespace, images: "Tensor") -> "ImageClassifier":
    """A fresh classifier that was tried on two images. Raises `InputError` where it cannot take them."""
    import torch

    from train_cc.draws import rng_of
    from train_cc.models.classifier import ImageClassifier

    torch.manual_seed(rng_of(*draws_key(args)).initial_seed())
    try:
        model = ImageClassifier(args.architecture, NUM_CLASSES, images.shape[1], args.image_size)
        with torch.no_grad():
            logits = model.eval()(images[:2].float() / 255)
    except InputError:
        raise
    except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError, LookupError) as error:
        told = str(error).splitlines()[:1]
        raise InputError(
            f"--architecture {args.architecture} does not work with images of {images.shape[1]} channel(s) at "
            f"--image-size {args.image_size}: {type(error).__name__} {' '.join(told)}"
        ) from error
    if logits.shape != (len(images[:2]), NUM_CLASSES):
        raise InputError(f"--architecture {args.architecture} is no classifier: it makes {tuple(logits.shape)}")
    return model.train()


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = command_parser().parse_args(argv)
    images, labels = load_dataset(args.dataset, args.data_dir)
    import torch  # what is wrong with the command line has been said

    from train_cc.models.classifier import accuracy
    from train_cc.pretrain.resumable import train
    from train_cc.run import devices

    device = devices.device()
    content = record("pretrain.classifier", vars(args))
    with product(args.output_dir, content, args.overwrite, keep=True) as place:
        if place is None:
            return
        began = time.monotonic()
        model = build(args, images).to(device)
        training = classifier_training(model, images, labels, args)
        if not train(training, place.parts, args, "pretrain.classifier"):
            return
        model.save_pretrained(place.new)
        model.eval()
        held_out = args.dataset != "digits"
        if held_out:
            images, labels = load_dataset(args.dataset, args.data_dir, "test")
        with torch.no_grad():
            logits = torch.cat([model(batch.to(device).float() / 255) for batch in images.split(512)]).cpu()
        print(
            f"{args.architecture}, accuracy on {'test images' if held_out else 'its training set'} "
            f"{accuracy(logits, labels):.4f}, {time.monotonic() - began:.0f} s -> {args.output_dir}"
        )


if __name__ == "__main__":
    main()
