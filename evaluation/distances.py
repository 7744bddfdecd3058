"""Distances between two sets of features that need as many images on both sides, or no bias from their number.

Sources: Binkowski et al. (KID), Bonneel et al. (sliced Wasserstein). Features are (N, D) tensors; all in float64.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_kid import kernel_mmd

from evaluation.metrics import check_features
from train_cc.draws import rng_of
from train_cc.io.errors import InputError

CUBIC = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
KID_SUBSET, LEAST_SUBSETS = 1000, 10
DIRECTIONS, DIRECTIONS_AT_ONCE = 512, 64
MOST_SETS = 64
SETS, SUBSETS, SLICES = 21, 22, 23  # first keys of the draws


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

    The directions depend on the number of features alone: all rows of a table, and the held-out images, have the same.
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
    drawn = torch.randn(size, DIRECTIONS, generator=rng_of(SLICES, size), dtype=torch.float64)
    return drawn / drawn.norm(dim=0)


def mean_over(sets: list[tuple[Tensor, Tensor]], distance: Callable, generated: Tensor, reference: Tensor) -> float:
    """The mean of ``distance(generated set, reference set)`` over the pairs of `equal_sets`."""
    return float(np.mean([distance(generated[rows], reference[others]) for rows, others in sets]))


def check_pair(a: Tensor, b: Tensor, least: int) -> None:
    """Two sets of features of one size. Raises `InputError`."""
    check_features(a, "reference", least)
    check_features(b, "generated", least)
    if a.shape[1] != b.shape[1]:
        raise InputError(f"the two sets have {a.shape[1]} and {b.shape[1]} features; one size is expected")
