"""FID, Inception Score, precision and recall under ADM's protocol. Features are (N, D) tensors, logits (N, classes).

Sources: Heusel et al. (FID), Salimans et al. (IS), Kynkaanniemi et al. (precision and recall, k = 3); ADM's choices.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_part

from train_cc.errors import InputError


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


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """(precision, recall): the share of generated samples inside a reference sample's ball, and the other way round.

    A ball reaches to the k-th nearest neighbour, itself excluded; on the boundary counts (<=). fp32 distances.
    """
    for name, features in (("reference", reference), ("generated", generated)):
        if len(features) <= k:
            raise InputError(f"precision and recall need more than {k} {name} images, {len(features)} were given")
        if not torch.isfinite(features).all():
            raise InputError(f"the {name} features are not finite")
    return calculate_precision_recall_part(generated.float().cpu(), reference.float().cpu(), k)


def inception_score(logits: Tensor, chunk: int = 5000) -> float:
    """exp E KL(p(y|x) || p(y)), the mean over consecutive chunks of ``chunk`` samples, unshuffled."""
    scores = [
        isc_features_to_metric(part, splits=1, shuffle=False)["inception_score_mean"]
        for part in logits.double().cpu().split(chunk)
    ]
    return float(np.mean(scores))


@torch.no_grad()
def extract(network: Callable[[Tensor], tuple[Tensor, Tensor]], images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Batches of images through ``network`` -> features (N, D) and logits (N, classes), on the CPU in fp32."""
    features, logits = zip(*[[out.float().cpu() for out in network(batch)] for batch in images], strict=True)
    return torch.cat(features), torch.cat(logits)
