"""A row of figures: samples against a reference in one feature space, under ADM's protocol."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.files import LEAST_IMAGES, provenance_of, read_images
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
from train_cc.io.errors import InputError
from train_cc.io.saying import saying
from train_cc.models.features import FeatureSpace


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
    with saying("FID, recall, IS and precision"):
        found = figures(features, logits, labels, reference)
    row = {"figures": found, "images": len(images), "generation": provenance}
    if rounds:
        row["intervals"] = bootstrap(features, logits, reference, rounds)
    return row, images


def check_reference(path: Path, space: FeatureSpace) -> None:
    """All that `Reference` asks of the file, without the features of all its images. Raises `InputError`."""
    content = read_images(path, "reference")
    stored = stored_statistics(content, path)
    features, _ = space.of(content["arr_0"][:LEAST_IMAGES], LEAST_IMAGES)
    if stored is not None and len(stored[0]) != features.shape[1]:
        raise InputError(f"{path} stores mu {stored[0].shape}, but {space.name} has {features.shape[1]} features")
    print(f"{path} can be evaluated against: {len(content['arr_0'])} images, {space.name}")
