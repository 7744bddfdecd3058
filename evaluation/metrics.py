"""Figures of features: FID, Inception Score, precision, recall, density, coverage, KID and sliced Wasserstein.

Features are (N, D) tensors, logits (N, classes). Sources: Heusel et al. (FID), Salimans et al. (IS), Kynkaanniemi et
al. (precision and recall, k = 3), Naeem et al. (density and coverage), all under ADM's protocol; Binkowski et al. (KID)
and Bonneel et al. (sliced Wasserstein) in float64. Input that cannot give a figure is an `InputError`: never a NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kernel_mmd

from train_cc.draws import rng_of
from train_cc.io.errors import InputError
from train_cc.rewards.statistics import check_statistics

# Below it softmax is 0 in float64, and the library's 0 log 0 is NaN.
LEAST_LOGIT = -700.0
CHUNK = 5000  # consecutive samples of one Inception Score
CUBIC = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
KID_SUBSET, LEAST_SUBSETS = 1000, 10
DIRECTIONS, DIRECTIONS_AT_ONCE = 512, 64
MOST_SETS = 64
SETS, SUBSETS, SLICES = 21, 22, 23  # first keys of the draws


def statistics(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """mu (D,) and sigma (D, D) of (N, D) features, in float64."""
    check_features(features, "statistics'")
    values = features.double().cpu().numpy()
    return values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False))


def frechet_distance(
    mu_generated: np.ndarray, sigma_generated: np.ndarray, mu_reference: np.ndarray, sigma_reference: np.ndarray
) -> float:
    """|mu_g - mu_r|^2 + tr(sigma_g + sigma_r - 2 (sigma_g sigma_r)^(1/2)), in float64. Raises `InputError`."""
    generated = check_statistics(mu_generated, sigma_generated, "the generated statistics")
    reference = check_statistics(mu_reference, sigma_reference, "the reference statistics")
    return distance_of_checked(*generated, *reference)


def root_of(sigma: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance (D, D)."""
    values, vectors = np.linalg.eigh(sigma)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def distance_of_checked(
    mu_g: np.ndarray, sigma_g: np.ndarray, mu_r: np.ndarray, sigma_r: np.ndarray, root_r: np.ndarray | None = None
) -> float:
    """`frechet_distance` of what `check_statistics` gave, or of our own `statistics`. ``root_r``: `root_of` sigma_r.

    tr (sigma_g sigma_r)^(1/2) is the sum of the roots of the eigenvalues of sigma_r^(1/2) sigma_g sigma_r^(1/2), which
    is symmetric: exact also for singular covariances (more features than samples), where a general square root or the
    eigenvalues of the product lose half the digits.
    """
    if mu_g.shape != mu_r.shape:
        raise InputError(f"FID needs statistics of one feature size: mu {mu_g.shape} and {mu_r.shape}")
    root = root_of(sigma_r) if root_r is None else root_r
    roots = np.sqrt(np.linalg.eigvalsh(root @ sigma_g @ root).clip(min=0))
    distance = np.sum((mu_g - mu_r) ** 2) + np.trace(sigma_g) + np.trace(sigma_r) - 2 * roots.sum()
    if not np.isfinite(distance):
        raise InputError(f"the FID is {distance}: the statistics are beyond what float64 holds")
    return max(0.0, float(distance))  # only rounding can make it negative


@dataclass(frozen=True)
class Neighbours:
    """k-NN balls: the radius is the distance to the k-th nearest neighbour; the boundary belongs to the ball."""

    inside: Tensor  # (N,) number of reference balls that hold each generated sample
    recalled: Tensor  # (M,) True if the ball of some generated sample holds the reference image
    near: Tensor  # (M,) True if the ball of the reference image holds some generated sample
    k: int

    def figures(self) -> dict[str, float]:
        """Precision, recall (Kynkaanniemi et al.), density and coverage (Naeem et al.)."""
        return {
            "Recall": self.recalled.double().mean().item(),
            "Precision": (self.inside > 0).double().mean().item(),
            "Density": self.inside.double().mean().item() / self.k,
            "Coverage": self.near.double().mean().item(),
        }


def radii(centres: Tensor, k: int) -> Tensor:
    """(N,): the distance of each centre to its k-th nearest other one."""
    parts = centres.split(rows_at_once(centres))
    # k + 1: a centre is its own nearest neighbour
    nearest = torch.cat([torch.cdist(part, centres).topk(k + 1, largest=False).values[:, k] for part in parts])
    if not torch.isfinite(nearest).all():
        raise InputError("the features are too large: their distances overflow in fp32")
    return nearest


def rows_at_once(others: Tensor) -> int:
    """Rows of a block of distances that takes 100 MB."""
    return max(1, 25_000_000 // len(others))


def neighbours(reference: Tensor, generated: Tensor, k: int = 3) -> Neighbours:
    """Balls of (M, D) and (N, D) features, in blocks. fp32 distances; ADM rounds them to fp16, up to 0.007 apart.

    Raises `InputError`.
    """
    if type(k) is not int or k < 1:
        raise InputError(f"k is {k}; a whole number of at least 1 is expected")
    check_pair(reference, generated, k + 1)
    reference, generated = reference.float().cpu(), generated.float().cpu()
    of_reference, of_generated = radii(reference, k), radii(generated, k)
    inside, recalled, near = [], *torch.zeros(2, len(reference), dtype=bool)
    size = rows_at_once(reference)
    for part, reach in zip(generated.split(size), of_generated.split(size), strict=True):
        distances = torch.cdist(part, reference)
        within = distances <= of_reference
        inside.append(within.sum(dim=1))
        near |= within.any(dim=0)
        recalled |= (distances <= reach[:, None]).any(dim=0)
    return Neighbours(torch.cat(inside), recalled, near, k)


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """(precision, recall): the share of generated samples inside a reference sample's ball, and the other way round.

    Raises `InputError`.
    """
    figures = neighbours(reference, generated, k).figures()
    return figures["Precision"], figures["Recall"]


def check_features(features: Tensor, name: str, least: int = 2, what: str = "features") -> None:
    """A real (N, D) tensor of finite numbers, also in fp32, and of ``least`` rows or more. Raises `InputError`."""
    if features.ndim != 2 or not features.shape[1] or not features.is_floating_point():
        kind = f"{features.dtype} {tuple(features.shape)}"
        raise InputError(f"the {name} {what} are {kind}; a tensor (N, D) of real numbers is expected")
    if len(features) < least:
        raise InputError(f"{least} {name} images or more are needed, {len(features)} were given")
    if not torch.isfinite(features.float()).all():
        raise InputError(f"the {name} {what} are not finite")


def inception_score(logits: Tensor, chunk: int = CHUNK) -> float:
    """exp E KL(p(y|x) || p(y)), the mean over consecutive chunks of ``chunk`` samples, unshuffled."""
    check_features(logits, "generated", 1, "logits")
    if chunk < 1:
        raise InputError(f"the Inception Score's chunk is {chunk}; at least 1 is expected")
    logits = logits.double().cpu()
    logits = (logits - logits.amax(dim=1, keepdim=True)).clamp(min=LEAST_LOGIT)
    scores = [
        isc_features_to_metric(part, splits=1, shuffle=False)["inception_score_mean"] for part in logits.split(chunk)
    ]
    return float(np.mean(scores))


# Distances that need as many images on both sides, or have no bias from their number ---------------------------------


def equal_sets(generated: int, reference: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Indices of disjoint sets of ``size``, drawn at random, as many as the larger side has; the other side's recur.

    No more than 64: a handful of samples against many images would have thousands.
    """
    sides = []
    for side, count in enumerate((generated, reference)):
        order = torch.randperm(count, generator=rng_of(SETS, side, count))
        sides.append(order.split(size)[: count // size])
    number = min(MOST_SETS, max(map(len, sides)))
    return [tuple(sets[i % len(sets)] for sets in sides) for i in range(number)]


def kid(reference: Tensor, generated: Tensor) -> tuple[float, float]:
    """(KID, its standard error): unbiased, cubic kernel (x.y / D + 1)^3, the mean of disjoint subsets of 1000 images.

    Ten smaller subsets where there are fewer images. Disjoint subsets are independent, so their spread is the error.
    """
    check_pair(reference, generated, 2 * LEAST_SUBSETS)
    least = min(len(reference), len(generated))
    size = min(KID_SUBSET, least // LEAST_SUBSETS)
    parts = []
    for side, features in enumerate((generated, reference)):
        order = torch.randperm(len(features), generator=rng_of(SUBSETS, side, len(features)))
        parts.append([features[rows].double().cpu().numpy() for rows in order.split(size)[: least // size]])
    values = [kernel_mmd(a, b, **CUBIC) for a, b in zip(*parts, strict=True)]
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """The mean over random directions of the one-dimensional Wasserstein-1 distance; as many rows in ``a`` as in ``b``.

    The directions depend on the number of features only: all rows of a table, and the held-out images, have the same.
    """
    check_pair(a, b, 1)
    if len(a) != len(b):
        raise InputError(f"sliced Wasserstein compares equal counts, not {len(a)} and {len(b)} images")
    a, b = a.double().cpu(), b.double().cpu()
    parts = [
        ((a @ part).sort(dim=0).values - (b @ part).sort(dim=0).values).abs().mean(dim=0)
        for part in directions(a.shape[1]).split(DIRECTIONS_AT_ONCE, dim=1)
    ]
    return torch.cat(parts).mean().item()


def directions(size: int) -> Tensor:
    """(size, 512) unit vectors, uniform on the sphere."""
    normal = torch.randn(size, DIRECTIONS, generator=rng_of(SLICES, size), dtype=torch.float64)
    return normal / normal.norm(dim=0)


def mean_over(sets: list[tuple[Tensor, Tensor]], distance: Callable, generated: Tensor, reference: Tensor) -> float:
    """The mean of ``distance(generated set, reference set)`` over the pairs of `equal_sets`."""
    return float(np.mean([distance(generated[rows], reference[others]) for rows, others in sets]))


def check_pair(a: Tensor, b: Tensor, least: int) -> None:
    """Two sets of features of one size. Raises `InputError`."""
    check_features(a, "reference", least)
    check_features(b, "generated", least)
    if a.shape[1] != b.shape[1]:
        raise InputError(f"the two sets have {a.shape[1]} and {b.shape[1]} features; one size is expected")
