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

import numpy as np
import torch
from torch import Tensor

from evaluation.features import FeatureSpace, classifier_space, inception_space
from evaluation.files import (
    LEAST_IMAGES,
    METRICS,
    apart,
    image_shape,
    printable,
    provenance_of,
    read_images,
    write_figures,
)
from evaluation.metrics import (
    check_features,
    check_statistics,
    covered,
    distance_of_checked,
    inception_score,
    precision_recall,
    statistics,
)
from train_cc.draws import rng_of
from train_cc.io import flags
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.read import sha256
from train_cc.io.write import check_output_file, library_versions
from train_cc.run.pictures import save_grid

HEADLINE = 50_000


class Reference:
    """The real side of the figures: features of its images, and the statistics for FID."""

    def __init__(self, path: Path, space: FeatureSpace, batch: int):
        content = read_images(path, "reference")
        self.path, self.image_shape = path, content["arr_0"].shape[1:]
        stored = stored_statistics(content, path)
        self.features, _ = space.of(content["arr_0"], batch)
        check_features(self.features, "reference", LEAST_IMAGES)
        size = self.features.shape[1]
        if stored is not None:
            if len(stored[0]) != size:
                raise InputError(f"{path} stores mu {stored[0].shape}, but {space.name} has {size} features")
            self.statistics = stored
            self.source = "mu and sigma stored in the reference"
        else:
            self.statistics = statistics(self.features)
            self.source = f"computed from the reference's {len(self.features)} images: it stores no mu and sigma"


def stored_statistics(content: dict[str, np.ndarray], path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """mu and sigma that a reference stores, checked; None where it stores none. Raises `InputError`."""
    if "mu" not in content and "sigma" not in content:
        return None
    if "mu" not in content or "sigma" not in content:
        raise InputError(f"{path} stores {'mu' if 'mu' in content else 'sigma'} alone; both are expected, or none")
    return check_statistics(content["mu"], content["sigma"], str(path))


def figures(features: Tensor, logits: Tensor, labels: np.ndarray | None, reference: Reference) -> dict[str, float]:
    """``labels``: (N,), or None where the logits are not of the samples' classes."""
    check_features(features, "generated", LEAST_IMAGES)
    precision, recall = precision_recall(reference.features, features)
    row = {
        "FID": distance_of_checked(*statistics(features), *reference.statistics),
        "Recall": recall,
        "IS": inception_score(logits),
        "Precision": precision,
    }
    if labels is not None:
        row["accuracy"] = (logits.argmax(dim=1).numpy() == labels).mean().item()
    return row


def bootstrap(features: Tensor, logits: Tensor, reference: Reference, rounds: int, seed: int = 0) -> dict[str, list]:
    """95 % intervals from ``rounds`` resamplings of the generated images (recall: of the reference's).

    The balls of precision and recall are those of all images: a resampled set has duplicates, which would shrink them.
    """
    inside, found = (
        covered(a, b).double() for a, b in ((reference.features, features), (features, reference.features))
    )
    drawn: dict[str, list[float]] = {"FID": [], "Recall": [], "IS": [], "Precision": []}
    for i in range(rounds):
        generator = rng_of(seed, i)
        rows = torch.randint(len(features), (len(features),), generator=generator)
        real = torch.randint(len(found), (len(found),), generator=generator)
        drawn["FID"].append(distance_of_checked(*statistics(features[rows]), *reference.statistics))
        drawn["Recall"].append(found[real].mean().item())
        drawn["IS"].append(inception_score(logits[rows]))
        drawn["Precision"].append(inside[rows].mean().item())
    return {name: np.quantile(values, [0.025, 0.975]).tolist() for name, values in drawn.items()}


def count_suffix(count: int) -> str:
    """ "" for a headline count, else "-5k" and the like."""
    return "" if count >= HEADLINE else f"-{count / 1000:g}k"


def table(rows: dict[str, dict], count: int) -> str:
    """A Markdown table, a line a row; ``rows``: name -> {"figures", "intervals"}."""
    columns = [name for name in METRICS if any(name in row["figures"] for row in rows.values())]
    shown = [name + ("" if name == "accuracy" else count_suffix(count)) for name in columns]
    lines = ["| | " + " | ".join(shown) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = []
        for column in columns:
            digits = 2 if column in ("FID", "IS") else 3
            cell = f"{row['figures'][column]:.{digits}f}" if column in row["figures"] else "-"
            if column in row.get("intervals", {}):
                low, high = row["intervals"][column]
                cell += f" ({low:.{digits}f} to {high:.{digits}f})"
            cells.append(cell)
        lines.append(f"| {name.replace('|', '/')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def evaluate(
    samples: Path, reference: Reference, space: FeatureSpace, batch: int, rounds: int = 0
) -> tuple[dict, np.ndarray]:
    """-> the row with its figures and their provenance, and the images."""
    content = read_images(samples)
    images, provenance = content["arr_0"], provenance_of(content, samples)
    features, logits = space.of(images, batch)
    labels = content.get("arr_1") if space.knows_labels else None
    if labels is not None and not (labels.min() >= 0 and labels.max() < logits.shape[1]):
        raise InputError(
            f"{samples} has labels from {labels.min()} to {labels.max()}, {space.name} knows 0 to {logits.shape[1] - 1}"
        )
    row = {"figures": figures(features, logits, labels, reference), "images": len(images), "generation": provenance}
    if rounds:
        row["intervals"] = bootstrap(features, logits, reference, rounds)
    return row, images


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
    parser.add_argument("--batch-size", type=flags.BATCH, default=250)
    parser.add_argument(
        "--bootstrap", type=flags.integer(0, 100_000), default=0, metavar="N", help="95 %% intervals from N resamplings"
    )
    parser.add_argument("--output", type=flags.path, help="the JSON file to write")
    parser.add_argument("--picture", type=flags.path, help="the PNG to write")
    parser.add_argument("--picture-columns", type=flags.integer(1, 1000), default=20)
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


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    names = check_arguments(args)
    space = classifier_space(args.classifier) if args.classifier else inception_space(args.inception)
    if args.check:
        check_reference(args.reference, space)
        return
    reference = Reference(args.reference, space, args.batch_size)
    rows, pictures = {}, []
    for name, path in zip(names, args.samples, strict=True):
        rows[name], images = evaluate(path, reference, space, args.batch_size, args.bootstrap)
        pictures.append(images[: args.picture_columns].copy())
    print(table(rows, next(iter(rows.values()))["images"]))
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


def check_reference(path: Path, space: FeatureSpace) -> None:
    """All that `Reference` asks of the file, without the features of all its images. Raises `InputError`."""
    content = read_images(path, "reference")
    stored = stored_statistics(content, path)
    features, _ = space.of(content["arr_0"][:LEAST_IMAGES], LEAST_IMAGES)
    if stored is not None and len(stored[0]) != features.shape[1]:
        raise InputError(f"{path} stores mu {stored[0].shape}, but {space.name} has {features.shape[1]} features")
    print(f"{path} can be evaluated against: {len(content['arr_0'])} images, {space.name}")


if __name__ == "__main__":
    main()
