"""A row of figures: samples against a reference in one feature space, under ADM's protocol, at equal counts.

FID is of all samples, as ADM has it. Precision, recall, density, coverage and sliced Wasserstein depend on how many
images there are on each side: they are means over disjoint sets of one size, the same for all rows of a table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation import metrics
from evaluation.samples.files import LEAST_IMAGES
from train_cc.draws import rng_of
from train_cc.io.class_names import contradiction, dataset_of
from train_cc.io.errors import InputError
from train_cc.models.features import FeatureSpace

ORDER = 25  # first key of the draws
SIDES = {"Recall": 1, "Precision": 0, "Density": 0, "Coverage": 1}  # of which side's images: generated, reference
LEAST_SHARE = 0.8  # of the classes that a chunk in random order has


@dataclass(frozen=True)
class Embedded:
    """Images of one file in one space."""

    features: Tensor  # (N, D)
    logits: Tensor | None  # (N, classes)
    labels: np.ndarray | None  # (N,), if the file has some
    knows_labels: bool  # the logits are of the labels' classes

    @property
    def right(self) -> np.ndarray | None:
        """(N,) bool: the label is the largest logit; None if the logits are of other classes."""
        if self.labels is None or not self.knows_labels:
            return None
        return self.logits.argmax(dim=1).numpy() == self.labels


def embed(content: Mapping[str, np.ndarray], path: Path, space: FeatureSpace, batch: int, what: str) -> Embedded:
    """Raises `InputError` for features that are not finite, and labels that the space does not know."""
    features, logits = space.of(content["arr_0"], batch)
    metrics.check_features(features, what, LEAST_IMAGES)
    labels = content.get("arr_1")
    if labels is not None and space.knows_labels:
        if not (labels.min() >= 0 and labels.max() < logits.shape[1]):
            hint = ": do they count from 1?" if (labels.min(), labels.max()) == (1, logits.shape[1]) else ""
            span = f"{path} has labels from {labels.min()} to {labels.max()}"
            raise InputError(f"{span}, {space.name} knows 0 to {logits.shape[1] - 1}{hint}")
        if "classes" in content:
            check_class_folders(content["classes"].tolist(), path, space)
    return Embedded(features, logits, labels, space.knows_labels)


def check_class_folders(folders: list[str], path: Path, space: FeatureSpace) -> None:
    """The class folders are the classes of the space's classifier, in their order. Raises `InputError`."""
    if len(folders) != space.num_logits:
        counts = f"{path} has {len(folders)} class folders, {space.name} {space.num_logits} classes"
        raise InputError(f"{counts}: which is which is not known; give all of them, or one folder without classes")
    if wrong := contradiction(folders, len(folders), dataset_of(Path(space.name.partition(":")[2]))):
        raise InputError(f"{path}: {wrong} ({space.name}); name the folders by the model's numbers (0, 1, ...)")


class Reference:
    """The real side of the figures: features of its images (None: it has none), and the statistics for FID.

    ``stored``: mu and sigma of this space that the file holds, checked; None: those of its images.
    """

    def __init__(self, embedded: Embedded | None, stored: tuple[np.ndarray, np.ndarray] | None = None):
        self.features = None if embedded is None else embedded.features
        self.labels = None if embedded is None else embedded.labels
        self.whole: Tensor | None = None  # with --adm: the features of all images of the file, halved or not
        if stored is not None:
            self.statistics, self.source = stored, "mu and sigma stored in the reference"
        else:
            self.statistics = metrics.statistics(self.features)
            self.source = f"computed from the reference's {len(self.features)} images: it stores no mu and sigma"
            if len(self.features) <= self.features.shape[1]:
                self.source += f", and the covariance of so few is singular in {self.features.shape[1]} features"
        self._root = metrics.root_of(self.statistics[1])

    def distance(self, features: Tensor) -> float:
        """The FID of (N, D) features."""
        return metrics.distance_of_checked(*metrics.statistics(features), *self.statistics, self._root)


class Sets:
    """Samples against reference images in disjoint sets of ``size`` on both sides."""

    def __init__(self, generated: Tensor, reference: Reference, size: int):
        self.generated, self.reference = generated, reference
        self.counts = (len(generated), len(reference.features))
        self.pairs = metrics.equal_sets(*self.counts, size)
        # Per image: its values summed over the sets that contain it, and the number of these sets.
        self.sums = {name: torch.zeros(self.counts[side], dtype=torch.float64) for name, side in SIDES.items()}
        self.times = [torch.zeros(count) for count in self.counts]
        for pair in self.pairs:
            near = metrics.neighbours(reference.features[pair[1]], generated[pair[0]])
            values = (near.recalled, near.inside > 0, near.inside / near.k, near.near)
            for (name, side), value in zip(SIDES.items(), values, strict=True):
                self.sums[name][pair[side]] += value.double()
            for side, rows in enumerate(pair):
                self.times[side][rows] += 1

    def shares(self, rows: Sequence[Tensor | slice]) -> dict[str, float]:
        """Recall, precision, density and coverage of ``rows`` of the generated images and of the reference's."""
        times = [self.times[side][chosen].sum() for side, chosen in enumerate(rows)]
        return {name: (self.sums[name][rows[side]].sum() / times[side]).item() for name, side in SIDES.items()}

    def distances(self, rows: Tensor | slice, frechet: bool) -> dict[str, float]:
        """SW (against sets of the reference) and FD (of the sets, against the statistics) of some of the samples."""
        sides = (self.generated[rows], self.reference.features)
        distances = {"SW": metrics.mean_over(self.pairs, metrics.sliced_wasserstein, *sides)}
        if frechet:
            distances["FD"] = metrics.mean_over(self.pairs, lambda part, _: self.reference.distance(part), *sides)
        return distances

    def recall_of_classes(self) -> list[float | None] | None:
        """Per class of the reference images; None for a class without images, or if there are no labels."""
        if self.reference.labels is None:
            return None
        return by_class(self.sums["Recall"].numpy(), self.reference.labels, self.times[1].numpy())


def by_class(values: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> list[float | None]:
    """The mean of ``values`` (N,) over each class that occurs, weighted; None for one that does not."""
    weights = np.ones(len(labels)) if weights is None else weights
    total, weight = np.bincount(labels, values), np.bincount(labels, weights)
    return [float(a / b) if b else None for a, b in zip(total, weight, strict=True)]


def row_of(
    embedded: Embedded,
    reference: Reference,
    size: int,
    rounds: int = 0,
    real: dict | None = None,
    ceiling: bool = False,
) -> dict:
    """``size``: of the sets. ``real``: the distances of held-out real images, for the ratios; ``ceiling``: of these."""
    sets = None if reference.features is None else Sets(embedded.features, reference, size)
    figures, distances = figures_of(embedded, reference, sets, real, ceiling or real is not None, [slice(None)] * 2)
    errors = {}
    if sets is not None and min(len(embedded.features), len(reference.features)) >= 2 * metrics.LEAST_SUBSETS:
        figures["KID"], errors["KID"] = metrics.kid(reference.features, embedded.features)
    if reference.whole is not None:
        adm = metrics.neighbours(reference.whole, embedded.features).figures()
        figures |= {"ADM recall": adm["Recall"], "ADM precision": adm["Precision"]}
    row = {"figures": figures, "images": len(embedded.features), "standard_errors": errors, "distances": distances}
    row["classes"] = {"recall": sets and sets.recall_of_classes()}
    if embedded.right is not None:
        row["classes"]["accuracy"] = by_class(embedded.right, embedded.labels)
    if rounds:
        row["draws"] = bootstrap(embedded, reference, sets, rounds, real)
        row["intervals"] = {name: around(figures[name], values) for name, values in row["draws"].items()}
        for name, error in errors.items():
            row["intervals"][name] = [figures[name] - 1.96 * error, figures[name] + 1.96 * error]
    return row | {"notes": notes_of(embedded)}


def figures_of(
    embedded: Embedded, reference: Reference, sets: Sets | None, real: dict | None, frechet: bool, rows: Sequence
) -> tuple[dict[str, float], dict[str, float]]:
    """The figures but KID, and the distances, of ``rows`` of the generated images and of the reference's.

    FDr and SWr are ratios to the distances ``real`` of held-out real images: a fresh real draw scores 1.
    """
    generated, distances = rows[0], {}
    figures = {"FID": reference.distance(embedded.features[generated])}
    if embedded.logits is not None:
        figures["IS"] = metrics.inception_score(embedded.logits[generated])
    if embedded.right is not None:
        figures["accuracy"] = embedded.right[generated].mean().item()
    if sets is not None:
        distances = sets.distances(generated, frechet)
        figures |= sets.shares(rows) | {"SW": distances["SW"]}
    if real is not None:
        if min(real.values()) <= 0:
            raise InputError(f"the held-out images are {real} from the reference: there is nothing to measure by")
        figures |= {f"{name}r": distances[name] / real[name] for name in ("FD", "SW")}
    return figures, distances


def notes_of(embedded: Embedded) -> list[str]:
    """Warnings about the samples: too few for a covariance, or class by class."""
    (count, size), notes = embedded.features.shape, []
    if count <= size:
        notes.append(f"{count} images in {size} features: the covariance is singular, and FID too high")
    if embedded.logits is None or count <= metrics.CHUNK:
        return notes
    classes = embedded.logits.argmax(dim=1).numpy() if embedded.labels is None else embedded.labels
    order = torch.randperm(count, generator=rng_of(ORDER, count))
    if classes_in_chunks(classes) < LEAST_SHARE * classes_in_chunks(classes[order.numpy()]):
        scores = [metrics.inception_score(logits) for logits in (embedded.logits, embedded.logits[order])]
        notes.append(
            f"the samples are stored class by class, and IS is of consecutive chunks of {metrics.CHUNK}: "
            f"{scores[0]:.2f}, in random order {scores[1]:.2f}; shuffle the file for a figure that compares"
        )
    return notes


def classes_in_chunks(classes: np.ndarray) -> float:
    """exp(entropy) of the classes (N,) in each of the Inception Score's chunks, the mean."""
    parts = [classes[start : start + metrics.CHUNK] for start in range(0, len(classes), metrics.CHUNK)]
    shares = [np.unique(part, return_counts=True)[1] / len(part) for part in parts]
    return float(np.mean([np.exp(-(share * np.log(share)).sum()) for share in shares]))


def bootstrap(
    embedded: Embedded, reference: Reference, sets: Sets | None, rounds: int, real: dict | None
) -> dict[str, list[float]]:
    """Every figure but KID in ``rounds`` resamplings of the generated images (recall, coverage: of the reference's).

    The balls are those of all images: a resampled set has duplicates, which would shrink them.
    """
    resampled: dict[str, list[float]] = {}
    counts = (len(embedded.features),) if sets is None else sets.counts
    for i in range(rounds):
        generator = rng_of(0, i)
        rows = [torch.randint(count, (count,), generator=generator) for count in counts]
        for name, value in figures_of(embedded, reference, sets, real, real is not None, rows)[0].items():
            resampled.setdefault(name, []).append(value)
    return resampled


def around(figure: float, draws: list[float]) -> list[float]:
    """95 %, about the figure itself: duplicates add a bias of their own to FID and SW."""
    return (np.quantile(draws, [0.025, 0.975]) + figure - np.mean(draws)).tolist()
