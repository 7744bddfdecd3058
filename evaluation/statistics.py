"""Mean and covariance of real images in a feature space, and of their classes: what the Frechet reward draws towards.

`python -m evaluation.statistics --images digits --space classifier:runs/digits/classifier_reward --output real.npz`
`accelerate launch -m evaluation.statistics --images imagenet/train --image-size 256 --space dinov2 --output real.npz`

`--images`: a folder with a folder a class (or images without labels), an .npz with arr_0 uint8 (N, H, W, C) and labels
arr_1, or a data set of train_cc/images.py. Runs under `accelerate launch` or `torchrun` too, on storage that all
processes share: parts of the images are summed in a fixed order, so that any number of processes gives the same file
(a process uses one core, or its GPU).
Finished parts are kept in OUTPUT.tmp until the output is whole: the same command continues after a stop.

The file (float64): mu (D,), sigma (D, D) over N - 1 as FID takes it; with labels class_mu (K, D), class_count (K,),
within (D, D), the pooled within-class covariance, over N; space: JSON text, which network, which images.
"""

import argparse
from collections.abc import Sequence

from train_cc.io import fields
from train_cc.io.errors import exits_on_input_error, saying
from train_cc.io.products import check_output_file


def build_parser() -> argparse.ArgumentParser:
    parser = fields.Parser(description=__doc__)
    parser.add_argument("--images", required=True, help="folder, .npz or data set")
    parser.add_argument("--space", required=True, help=fields.FEATURE_SPACES)
    parser.add_argument("--output", type=fields.output_file, required=True, help="the .npz to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument("--image-size", type=fields.integer(1, 8192), help="of a folder's images: ADM's centre crop")
    parser.add_argument("--dinov2-backbone", help="official file or URL, for the space dinov2")
    parser.add_argument("--inception-weights", type=fields.path, help="torch-fidelity's file; without it, downloaded")
    parser.add_argument("--data-dir", help="folder of Fashion-MNIST's idx files; without it torchvision downloads them")
    parser.add_argument("--batch-size", type=fields.BATCH, default=250, help="per process")
    parser.add_argument(
        "--shard-size", type=fields.integer(1, 10**9), default=10_000, help="images summed at once, and kept if stopped"
    )
    parser.add_argument("--workers", type=fields.integer(0, 256), help="a process, to read a folder; default: by cores")
    return parser


@exits_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_output_file(args.output, True)
    with saying("loading libraries"):
        from evaluation.samples.gathering import gather  # networks take seconds to import: what is wrong has been said

    gather(args)


if __name__ == "__main__":
    main()
