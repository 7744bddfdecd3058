"""FID, Inception Score, precision and recall under ADM's protocol. Features are (N, D) tensors, logits (N, classes).

Sources: Heusel et al. (FID), Salimans et al. (IS), Kynkaanniemi et al. (precision and recall, k = 3); ADM's choices.
"""

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calc_cdist_part

from train_cc.io.errors import InputError


def statistics(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """mu (D,) and sigma (D, D) of (N, D) features, in float64."""
    values = features.double().cpu().numpy()
    return values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False))


def frechet_distance(
    mu_generated: np.ndarray, sigma_generated: np.ndarray, mu_reference: np.ndarray, sigma_reference: np.ndarray
) -> float:
    """|mu_g - mu_r|^2 + tr(sigma_g + sigma_r - 2 (sigma_g sigma_r)^(1/2)), in float64.

    tr (sigma_g sigma_r)^(1/2) is the sum of the roots of the eigenvalues of sigma_g^(1/2) sigma_r sigma_g^(1/2), which
    is symmetric: exact also for singular covariances (more features than samples), where a general square root or the
    eigenvalues of the product lose half the digits.
    """
    mu_g, sigma_g, mu_r, sigma_r = (
        np.asarray(x, dtype=np.float64) for x in (mu_generated, sigma_generated, mu_reference, sigma_reference)
    )
    if mu_g.shape != mu_r.shape or sigma_g.shape != sigma_r.shape or sigma_g.shape != (len(mu_g),) * 2:
        raise InputError(
            f"FID needs statistics of one feature size: mu {mu_g.shape} and {mu_r.shape}, "
            f"sigma {sigma_g.shape} and {sigma_r.shape}"
        )
    values, vectors = np.linalg.eigh(sigma_g)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    roots = np.sqrt(np.linalg.eigvalsh(root @ sigma_r @ root).clip(min=0))
    distance = np.sum((mu_g - mu_r) ** 2) + np.trace(sigma_g) + np.trace(sigma_r) - 2 * roots.sum()
    return max(0.0, float(distance))  # rounding alone can make it negative


def covered(centres: Tensor, points: Tensor, k: int = 3, batch: int = 2500) -> Tensor:
    """Which ``points`` lie in a ball around some centre that reaches to that centre's k-th nearest other one. (N,)."""
    centres, points = centres.float().cpu(), points.float().cpu()
    radii = torch.cat(
        [calc_cdist_part(part, centres, batch).kthvalue(k + 1).values for part in centres.split(batch)]
    )  # k + 1: a centre is its own nearest neighbour
    inside = [(calc_cdist_part(part, centres, batch) <= radii).any(dim=1) for part in points.split(batch)]
    return torch.cat(inside)


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """(precision, recall): the share of generated samples inside a reference sample's ball, and the other way round.

    On the boundary counts (<=). fp32 distances; ADM rounds them to fp16, up to 0.007 apart.
    """
    check_features(reference, "reference", k + 1)
    check_features(generated, "generated", k + 1)
    return (
        covered(reference, generated, k).double().mean().item(),
        covered(generated, reference, k).double().mean().item(),
    )


def check_features(features: Tensor, name: str, least: int = 2) -> None:
    if len(features) < least:
        raise InputError(f"{least} {name} images or more are needed, {len(features)} were given")
    if not torch.isfinite(features).all():
        raise InputError(f"the {name} features are not finite")


def inception_score(logits: Tensor, chunk: int = 5000) -> float:
    """exp E KL(p(y|x) || p(y)), the mean over consecutive chunks of ``chunk`` samples, unshuffled."""
    scores = [
        isc_features_to_metric(part, splits=1, shuffle=False)["inception_score_mean"]
        for part in logits.double().cpu().split(chunk)
    ]
    return float(np.mean(scores))
