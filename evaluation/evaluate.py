"""Figures of sample files against a reference: a table, and a JSON file with the figures' provenance.

`python -m evaluation.evaluate s.npz reference.npz --classifier runs/digits/classifier_evaluation`

Several sample files may stand before the reference, each a row; `--picture` draws the first images of each, a row a
file, the same noise and label a column.
"""

import argparse
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics import extract, frechet_distance, inception_score, precision_recall, statistics
from train_cc.errors import InputError, exits_on_input_error
from train_cc.models.classifier import ImageClassifier, accuracy
from train_cc.run.logbook import library_versions, write_atomically
from train_cc.run.previews import save_grid

COLUMNS = ("FID", "Recall", "IS", "Precision", "accuracy")


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


def features_of(classifier: ImageClassifier, images: np.ndarray, batch: int = 500) -> tuple[Tensor, Tensor]:
    device = next(classifier.parameters()).device
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    return extract(classifier.features_and_logits, (part.to(device).float() / 255 for part in tensor.split(batch)))


def figures(samples: dict, reference: dict, reference_features: Tensor, classifier: ImageClassifier) -> dict:
    features, logits = features_of(classifier, samples["arr_0"])
    precision, recall = precision_recall(reference_features, features)
    row = {
        "FID": frechet_distance(*statistics(features), *statistics(reference_features)),
        "Recall": recall,
        "IS": inception_score(logits),
        "Precision": precision,
    }
    if "arr_1" in samples:
        row["accuracy"] = accuracy(logits, torch.from_numpy(samples["arr_1"])).item()
    return row


def table(rows: dict[str, dict]) -> str:
    """A Markdown table, a line a row."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[c]:.{2 if c in ('FID', 'IS') else 3}f}" if c in row else "-" for c in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", type=Path, nargs="+", help="sample .npz files")
    parser.add_argument("reference", type=Path, help="reference .npz")
    parser.add_argument("--classifier", type=Path, required=True, help="folder of train_cc/pretrain/classifier.py")
    parser.add_argument("--names", nargs="+", help="a name for each sample file; without it, the file's own")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--picture", type=Path, help="the PNG to write")
    parser.add_argument("--picture-columns", type=int, default=20)
    args = parser.parse_args(argv)
    names = args.names or [path.stem for path in args.samples]
    if len(names) != len(args.samples):
        raise InputError(f"--names gives {len(names)} names for {len(args.samples)} sample files")
    reference = read_npz(args.reference)
    classifier = ImageClassifier.from_pretrained(args.classifier)
    samples = [read_npz(path) for path in args.samples]
    for path, content in zip(args.samples, samples, strict=True):
        if content["arr_0"].shape[1:] != reference["arr_0"].shape[1:]:
            raise InputError(
                f"{path} holds images {content['arr_0'].shape[1:]}, the reference {reference['arr_0'].shape[1:]}"
            )
    reference_features, _ = features_of(classifier, reference["arr_0"])
    rows = {
        name: figures(content, reference, reference_features, classifier)
        for name, content in zip(names, samples, strict=True)
    }
    print(table(rows))
    if args.output:
        record = {"rows": rows, "arguments": vars(args), "versions": library_versions()}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output, json.dumps(record, indent=2, default=str) + "\n")
    if args.picture:
        save_grid([content["arr_0"][: args.picture_columns] for content in samples], args.picture)
        print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
