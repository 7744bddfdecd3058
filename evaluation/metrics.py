"""FID, Inception Score, precision, recall, density and coverage under ADM's protocol.

Features are (N, D) tensors, logits (N, classes). Sources: Heusel et al. (FID), Salimans et al. (IS), Kynkaanniemi et
al. (precision and recall, k = 3), Naeem et al. (density and coverage); ADM's choices.
What cannot be a figure's input is an `InputError`: a NaN never becomes a figure.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric

from train_cc.io.errors import InputError

# Of a covariance, against its largest entry or eigenvalue: what rounding in fp32 leaves, with room.
ASYMMETRY, NEGATIVE = 1e-5, 1e-4
# Below it softmax is 0 in float64, and the library's 0 log 0 is NaN.
LEAST_LOGIT = -700.0
CHUNK = 5000  # consecutive samples of one Inception Score


def statistics(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """mu (D,) and sigma (D, D) of (N, D) features, in float64."""
    check_features(features, "statistics'")
    values = features.double().cpu().numpy()
    return values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False))


def check_statistics(mu: np.ndarray, sigma: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """-> mu (D,) and sigma (D, D) in float64, finite and symmetric, no eigenvalue clearly negative."""
    mu, sigma = np.asarray(mu), np.asarray(sigma)
    if mu.dtype.kind not in "fiu" or sigma.dtype.kind not in "fiu":
        raise InputError(f"{name}: mu is {mu.dtype}, sigma {sigma.dtype}; real numbers are expected")
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu),) * 2:
        raise InputError(f"{name}: mu is {mu.shape}, sigma {sigma.shape}; one feature size (D,), (D, D) is expected")
    with np.errstate(over="ignore"):
        mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    for which, values in (("mu", mu), ("sigma", sigma)):
        if not np.isfinite(values).all():
            raise InputError(f"{name}: {which} holds NaN or infinity; statistics must be finite")
    scale = np.abs(sigma).max()
    if scale > 1e100 or np.abs(mu).max() > 1e100:
        raise InputError(f"{name}: its values reach 1e100; they cannot be those of features")
    if np.abs(sigma - sigma.T).max() > ASYMMETRY * scale:
        raise InputError(f"{name}: sigma is not symmetric; a covariance is expected")
    sigma = (sigma + sigma.T) / 2
    values = np.linalg.eigvalsh(sigma)
    if values[0] < -NEGATIVE * np.abs(values).max():
        raise InputError(f"{name}: sigma has the eigenvalue {values[0]:.3g}; a covariance has no negative one")
    return mu, sigma


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
    return max(0.0, float(distance))  # rounding alone can make it negative


@dataclass(frozen=True)
class Neighbours:
    """Who lies in whose ball, which reaches to its centre's k-th nearest other one. On the boundary counts (<=)."""

    inside: Tensor  # (N,) how many reference balls hold each generated sample
    found: Tensor  # (M,) whether the ball of some generated sample holds each reference image
    near: Tensor  # (M,) whether the ball of each reference image holds some generated sample
    k: int

    def figures(self) -> dict[str, float]:
        """Precision, recall (Kynkaanniemi et al.), density and coverage (Naeem et al.)."""
        return {
            "Recall": self.found.double().mean().item(),
            "Precision": (self.inside > 0).double().mean().item(),
            "Density": self.inside.double().mean().item() / self.k,
            "Coverage": self.near.double().mean().item(),
        }


def radii(centres: Tensor, k: int) -> Tensor:
    """(N,): the distance of each centre to its k-th nearest other one."""
    parts = centres.split(rows_at_once(centres))
    # k + 1: a centre is its own nearest neighbour
    found = torch.cat([torch.cdist(part, centres).topk(k + 1, largest=False).values[:, k] for part in parts])
    if not torch.isfinite(found).all():
        raise InputError("the features are too large: their distances overflow in fp32")
    return found


def rows_at_once(others: Tensor) -> int:
    """Rows of a block of distances that takes 100 MB."""
    return max(1, 25_000_000 // len(others))


def neighbours(reference: Tensor, generated: Tensor, k: int = 3) -> Neighbours:
    """Of (M, D) and (N, D) features, in blocks. fp32 distances; ADM rounds them to fp16, up to 0.007 apart.

    Raises `InputError`.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"k is {k}; a whole number of at least 1 is expected")
    check_features(reference, "reference", k + 1)
    check_features(generated, "generated", k + 1)
    if reference.shape[1] != generated.shape[1]:
        raise InputError(f"the reference has {reference.shape[1]} features, the generated {generated.shape[1]}")
    reference, generated = reference.float().cpu(), generated.float().cpu()
    of_reference, of_generated = radii(reference, k), radii(generated, k)
    inside, found, near = [], torch.zeros(len(reference), dtype=bool), torch.zeros(len(reference), dtype=bool)
    size = rows_at_once(reference)
    for part, reach in zip(generated.split(size), of_generated.split(size), strict=True):
        distances = torch.cdist(part, reference)
        within = distances <= of_reference
        inside.append(within.sum(dim=1))
        near |= within.any(dim=0)
        found |= (distances <= reach[:, None]).any(dim=0)
    return Neighbours(torch.cat(inside), found, near, k)


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """(precision, recall): the share of generated samples inside a reference sample's ball, and the other way round.

    Raises `InputError`.
    """
    found = neighbours(reference, generated, k).figures()
    return found["Precision"], found["Recall"]


def check_features(features: Tensor, name: str, least: int = 2, what: str = "features") -> None:
    """A real (N, D) tensor of finite numbers, also in fp32, and of ``least`` rows or more. Raises `InputError`."""
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        told = f"{features.dtype} {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise InputError(f"the {name} {what} are {told}; a tensor (N, D) of real numbers is expected")
    if len(features) < least:
        raise InputError(f"{least} {name} images or more are needed, {len(features)} were given")
    if not features.shape[1]:
        raise InputError(f"the {name} {what} have no columns")
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
