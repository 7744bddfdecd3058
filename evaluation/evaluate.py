"""Figures of sample files against a reference: a table, and a JSON file that carries their provenance.

`python -m evaluation.evaluate s.npz VIRTUAL_imagenet256_labeled.npz --inception`
`python -m evaluation.evaluate s.npz reference.npz --classifier runs/digits/classifier_evaluation`

ADM's protocol: FID against the reference's stored mu and sigma where it has them, else against its images; precision
and recall against its images; Inception Score of the samples alone, in consecutive chunks of 5000, unshuffled. A figure
of fewer than 50 000 images says so: FID-5k. Several sample files may stand before the reference, each a row;
`--picture` draws the first images of each, a row a file, the same noise and label a column.
"""

import argparse
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.features import FeatureSpace, classifier_space, inception_space
from evaluation.metrics import (
    check_features,
    covered,
    frechet_distance,
    inception_score,
    precision_recall,
    statistics,
)
from train_cc.draws import generator_of
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.read import sha256
from train_cc.io.write import library_versions, write_atomically
from train_cc.run.previews import save_grid

METRICS = ("FID", "Recall", "IS", "Precision", "accuracy")
HEADLINE = 50_000


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """``arr_0`` uint8 (N, H, W, C) and whatever stands beside it. Raises `InputError`."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; an .npz with arr_0 uint8 (N, H, W, C) is expected")
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is truncated or no .npz of plain arrays: {error}") from error
    images = content.get("arr_0")
    if images is None or images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3):
        told = "no arr_0" if images is None else f"arr_0 {images.dtype} {images.shape}"
        raise InputError(f"{path} has {told}; arr_0 uint8 (N, H, W, C) with C of 1 or 3 is expected")
    return content


class Reference:
    """The real side of the figures: features of its images, and the statistics for FID."""

    def __init__(self, path: Path, space: FeatureSpace, batch: int):
        content = read_npz(path)
        self.path, self.image_shape = path, content["arr_0"].shape[1:]
        self.features, _ = space.of(content["arr_0"], batch)
        check_features(self.features, "reference", 4)
        size = self.features.shape[1]
        if "mu" in content and "sigma" in content:
            if content["mu"].shape != (size,) or content["sigma"].shape != (size, size):
                raise InputError(
                    f"{path} stores mu {content['mu'].shape} and sigma {content['sigma'].shape}, "
                    f"but {space.name} has {size} features"
                )
            self.statistics = content["mu"].astype(np.float64), content["sigma"].astype(np.float64)
            self.source = "mu and sigma stored in the reference"
        else:
            self.statistics = statistics(self.features)
            self.source = f"computed from the reference's {len(self.features)} images: it stores no mu and sigma"


def figures(features: Tensor, logits: Tensor, labels: np.ndarray | None, reference: Reference) -> dict[str, float]:
    """``labels``: (N,), or None where the logits are not of the samples' classes."""
    check_features(features, "generated", 4)
    precision, recall = precision_recall(reference.features, features)
    row = {
        "FID": frechet_distance(*statistics(features), *reference.statistics),
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
        generator = generator_of(seed, i)
        rows = torch.randint(len(features), (len(features),), generator=generator)
        real = torch.randint(len(found), (len(found),), generator=generator)
        drawn["FID"].append(frechet_distance(*statistics(features[rows]), *reference.statistics))
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
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def evaluate(
    samples: Path, reference: Reference, space: FeatureSpace, batch: int, rounds: int = 0
) -> tuple[dict, np.ndarray]:
    """-> the row with its figures and their provenance, and the images."""
    content = read_npz(samples)
    images = content["arr_0"]
    if images.shape[1:] != reference.image_shape:
        raise InputError(f"{samples} holds images {images.shape[1:]}, the reference {reference.image_shape}")
    labels = content.get("arr_1") if space.knows_labels else None
    if labels is not None and labels.shape != (len(images),):
        raise InputError(f"{samples} has {len(images)} images and labels of shape {labels.shape}")
    features, logits = space.of(images, batch)
    provenance = json.loads(str(content["provenance"])) if "provenance" in content else None
    row = {"figures": figures(features, logits, labels, reference), "images": len(images), "generation": provenance}
    if rounds:
        row["intervals"] = bootstrap(features, logits, reference, rounds)
    return row, images


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", type=Path, nargs="+", help="sample .npz files")
    parser.add_argument("reference", type=Path, help="reference .npz")
    space = parser.add_mutually_exclusive_group(required=True)
    space.add_argument("--classifier", type=Path, help="features of a folder of train_cc/pretrain/classifier.py")
    space.add_argument(
        "--inception", nargs="?", type=Path, const=None, default=argparse.SUPPRESS, help="Inception; [weights file]"
    )
    parser.add_argument("--names", nargs="+", help="a name for each sample file; without it, the file's own")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--bootstrap", type=int, default=0, metavar="N", help="95 %% intervals from N resamplings")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--picture", type=Path, help="the PNG to write")
    parser.add_argument("--picture-columns", type=int, default=20)
    return parser


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    names = args.names or [path.stem for path in args.samples]
    if len(names) != len(args.samples):
        raise InputError(f"--names gives {len(names)} names for {len(args.samples)} sample files")
    if len(set(names)) != len(names):
        raise InputError(f"two rows have one name in {', '.join(names)}; tell them apart by --names")
    if args.batch_size < 1 or args.bootstrap < 0:
        raise InputError(f"--batch-size {args.batch_size} must be at least 1, --bootstrap {args.bootstrap} at least 0")
    for path in (*args.samples, args.reference):
        if not path.is_file():
            raise InputError(f"{path} does not exist; an .npz with arr_0 uint8 (N, H, W, C) is expected")
    space = classifier_space(args.classifier) if args.classifier else inception_space(args.inception)
    reference = Reference(args.reference, space, args.batch_size)
    rows, pictures = {}, []
    for name, path in zip(names, args.samples, strict=True):
        rows[name], images = evaluate(path, reference, space, args.batch_size, args.bootstrap)
        pictures.append(images[: args.picture_columns].copy())
    counts = {row["images"] for row in rows.values()}
    if len(counts) > 1:
        raise InputError(f"the sample files hold {sorted(counts)} images: figures of different counts do not compare")
    print(table(rows, counts.pop()))
    print(f"features: {space.name}; FID reference: {reference.source}")
    if args.output:
        record = {
            "rows": rows,
            "features": space.name,
            "fid_reference": reference.source,
            "reference": str(args.reference),
            "reference_sha256": sha256(args.reference),
            "arguments": vars(args),
            "versions": library_versions(),
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output, json.dumps(record, indent=2, default=str) + "\n")
    if args.picture:
        save_grid(pictures, args.picture, names)
        print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
