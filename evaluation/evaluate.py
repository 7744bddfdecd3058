"""Figures of sample files against a reference: a table, and a JSON file that carries their provenance.

`python -m evaluation.evaluate s.npz VIRTUAL_imagenet256_labeled.npz --inception`
`python -m evaluation.evaluate s.npz reference.npz --classifier runs/digits/classifier_evaluation`

ADM's protocol: FID against the reference's stored mu and sigma where it has them, else against its images; precision
and recall against its images; Inception Score of the samples alone, in consecutive chunks of 5000, unshuffled. A figure
of fewer than 50 000 images says so: FID-5k. Several sample files may stand before the reference, each a row;
`--picture` draws the first images of each, a row a file, the same noise and label a column.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.files import apart, image_shape, over_seeds, printable, table, table_over_seeds, write_figures
from train_cc.io import flags
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.read import sha256
from train_cc.io.saying import saying
from train_cc.io.write import check_output_file, library_versions

if TYPE_CHECKING:
    from train_cc.models.features import FeatureSpace


def row_name(text: str) -> str:
    if not text.strip() or len(text) > 200 or text != printable(text):
        flags.refuse(repr(text), "one line of printable characters, at most 200")
    return text


def build_parser() -> flags.Parser:
    parser = flags.Parser(description=__doc__)
    parser.add_argument("samples", type=flags.path, nargs="+", help="sample .npz files")
    parser.add_argument("reference", type=flags.path, help="reference .npz")
    space = parser.add_mutually_exclusive_group(required=True)
    space.add_argument("--classifier", type=flags.path, help="features of a folder of train_cc/pretrain/classifier.py")
    space.add_argument(
        "--inception",
        nargs="?",
        type=flags.path,
        const=None,
        default=argparse.SUPPRESS,
        help="Inception; [weights file]",
    )
    parser.add_argument(
        "--names", type=row_name, nargs="+", help="a name for each sample file; without it, the file's own"
    )
    parser.add_argument(
        "--over-seeds", action="store_true", help="rows named 'NAME, seed N': also their means and standard deviations"
    )
    parser.add_argument("--batch-size", type=flags.BATCH, default=250, help="images through the features at once")
    parser.add_argument(
        "--bootstrap", type=flags.integer(0, 100_000), default=0, metavar="N", help="95 %% intervals from N resamplings"
    )
    parser.add_argument("--output", type=flags.path, help="the JSON file to write")
    parser.add_argument("--picture", type=flags.path, help="the PNG to write")
    parser.add_argument("--picture-columns", type=flags.integer(1, 1000), default=20, help="images a row of --picture")
    parser.add_argument(
        "--check", action="store_true", help="check the reference, the features and the outputs; samples need not exist"
    )
    return parser


def check_arguments(args: argparse.Namespace) -> list[str]:
    """What can be refused before a network is loaded. -> the rows' names."""
    names = args.names or [printable(path.stem) for path in args.samples]
    if len(names) != len(args.samples):
        raise InputError(f"--names gives {len(names)} names for {len(args.samples)} sample files")
    if len(set(names)) != len(names):
        raise InputError(f"two rows have one name in {', '.join(names)}; tell them apart by --names")
    if args.over_seeds:
        over_seeds({name: {} for name in names})
    for flag, path, kind in (("--output", args.output, "figures"), ("--picture", args.picture, "a picture")):
        if path is not None:
            check_output_file(path, flag=flag, kind=kind)
    apart((("--output", args.output), ("--picture", args.picture)))
    _, *real = image_shape(args.reference, "reference")
    shapes = {path: image_shape(path) for path in args.samples if not args.check}
    for path, (_, *shape) in shapes.items():
        if shape != real:
            raise InputError(f"{path} holds images {tuple(shape)}, the reference {tuple(real)}")
        if os.path.samefile(path, args.reference) or sha256(path) == sha256(args.reference):
            print(f"warning: {path} is the reference itself, not samples", file=sys.stderr)
    counts = sorted({shape[0] for shape in shapes.values()})
    if len(counts) > 1:
        raise InputError(f"the sample files hold {counts} images: figures of different counts do not compare")
    return names


def warn_of_rewards(path: Path, provenance: dict | None, space: "FeatureSpace") -> None:
    """A reward moves its own space first: figures there say little."""
    rewarded = (provenance or {}).get("rewards_sha256")
    if isinstance(rewarded, list) and space.sha256 in rewarded:
        print(
            f"warning: {space.name} rewarded the generator of {path}: judge it in a space that no reward used",
            file=sys.stderr,
        )


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    names = check_arguments(args)
    # Networks take seconds to import: what is wrong with the command line has been said.
    with saying("loading libraries"):
        import torch

        from evaluation.figures import Reference, check_reference, evaluate
        from train_cc.models.features import load_space
        from train_cc.run.pictures import save_grid

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.classifier:
        space = load_space(f"classifier:{args.classifier}", device)
    else:
        space = load_space("inception", device, inception_weights=args.inception)
    if args.check:
        check_reference(args.reference, space)
        return
    reference = Reference(args.reference, space, args.batch_size)
    rows, pictures = {}, []
    for name, path in zip(names, args.samples, strict=True):
        rows[name], images = evaluate(path, reference, space, args.batch_size, args.bootstrap)
        warn_of_rewards(path, rows[name]["generation"], space)
        pictures.append(images[: args.picture_columns].copy())
    print(table(rows, next(iter(rows.values()))["images"]))
    if args.over_seeds:
        print(table_over_seeds(rows, next(iter(rows.values()))["images"]))
    print(f"features: {space.name}; FID reference: {reference.source}")
    if args.output:
        write_figures(
            args.output,
            rows,
            features=space.name,
            features_sha256=space.sha256,
            fid_reference=reference.source,
            reference=str(args.reference),
            reference_sha256=sha256(args.reference),
            arguments=vars(args),
            versions=library_versions(),
        )
    if args.picture:
        save_grid(pictures, args.picture, names)
        print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
