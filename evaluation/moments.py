"""Mean and covariance of features in parts, and from the parts those of all."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def shard_moments(features: Tensor, labels: Tensor | None) -> dict[str, np.ndarray]:
    """Of (B, D) features, in float64: mean, scatter about it (its upper triangle), and sums of the classes it holds."""
    f = features.double()
    mean = f.mean(dim=0)
    scatter = (f - mean).T @ (f - mean)
    content = {"count": torch.tensor(len(f)), "mean": mean, "scatter": scatter[tuple(triangle(len(mean)))]}
    if labels is not None:
        classes, inverse = labels.unique(return_inverse=True)
        sums = f.new_zeros(len(classes), f.shape[1]).index_add_(0, inverse.to(f.device), f)
        content |= {"classes": classes, "class_count": torch.bincount(inverse), "class_sum": sums}
    return {name: value.cpu().numpy() for name, value in content.items()}


def triangle(size: int) -> Tensor:
    return torch.triu_indices(size, size)


def merged(shards: Iterator[dict[str, np.ndarray]], size: int, num_classes: int | None) -> dict[str, np.ndarray]:
    """Moments of all images from those of the shards, in their order (Chan et al.: no large sums are subtracted)."""
    count, mean, scatter = 0, np.zeros(size), np.zeros((size, size))
    class_count, class_sum = np.zeros(num_classes or 0), np.zeros((num_classes or 0, size))
    rows, columns = triangle(size).numpy()
    for shard in shards:
        n, delta = shard["count"].item(), shard["mean"] - mean
        part = np.zeros((size, size))
        part[rows, columns] = part[columns, rows] = shard["scatter"]
        scatter += part + np.outer(delta, delta) * (count * n / (count + n))
        mean, count = mean + delta * (n / (count + n)), count + n
        if num_classes:
            class_count[shard["classes"]] += shard["class_count"]
            class_sum[shard["classes"]] += shard["class_sum"]
    moments = {"mu": mean, "sigma": scatter / (count - 1)}
    if num_classes:
        class_mu = class_sum / np.maximum(class_count, 1)[:, None]
        between = (class_mu - mean) * np.sqrt(class_count)[:, None]
        moments |= {"class_mu": class_mu, "class_count": class_count, "within": (scatter - between.T @ between) / count}
    return moments
