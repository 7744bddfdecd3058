"""The statistics of real images in a feature space: what the Frechet reward draws towards, read and checked."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train_cc.io.errors import InputError
from train_cc.io.read import parsing, read_npz, sha256

STATISTICS_FILE = "a statistics file of evaluation/statistics.py"
# Of a covariance, against its largest entry or eigenvalue: what rounding in fp32 leaves, with room.
ASYMMETRY, NEGATIVE = 1e-5, 1e-4
BEYOND = 1e100  # no feature is that large, and its square would overflow
CLASS_ARRAYS = ("class_mu", "class_count", "within")


@dataclass(frozen=True)
class Statistics:
    """Moments of N images in D dimensions, float64; the class arrays are None if labels were not known."""

    mu: Tensor  # (D,)
    sigma: Tensor  # (D, D)
    class_mu: Tensor | None  # (K, D)
    class_count: Tensor | None  # (K,)
    within: Tensor | None  # (D, D), the pooled within-class covariance
    space: dict  # name, sha256, preprocessing, images, source
    sha256: str  # of the file

    @property
    def size(self) -> int:
        return len(self.mu)

    @property
    def num_classes(self) -> int | None:
        return None if self.class_mu is None else len(self.class_mu)

    @property
    def classes(self) -> list[str] | None:
        """The names of the class folders, in the order of their numbers; None for a file that does not record them."""
        source = self.space.get("source")
        names = source.get("classes") if isinstance(source, dict) else None
        fits = isinstance(names, list) and len(names) == self.num_classes
        return names if fits and all(isinstance(name, str) for name in names) else None


def read_statistics(path: Path) -> Statistics:
    """Read a file of evaluation/statistics.py. Raises `InputError`."""
    content = read_npz(path, STATISTICS_FILE)
    missing = [name for name in ("mu", "sigma", "space") if name not in content]
    missing += [name for name in CLASS_ARRAYS if name not in content and content.keys() & set(CLASS_ARRAYS)]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; {STATISTICS_FILE} is expected")
    space = read_space(content["space"], path)
    mu, sigma = check_statistics(content["mu"], content["sigma"], path)
    arrays = [mu, sigma, None, None, None]
    if "class_mu" in content:
        classes, size = content["class_mu"].shape[:1], len(mu)
        class_mu = real_array(content["class_mu"], (*classes, size), "class_mu", path)
        count = real_array(content["class_count"], classes, "class_count", path)
        if (count < 0).any() or (count != count.round()).any() or not count.sum() > 0:
            raise InputError(f"{path}: class_count holds {count.tolist()[:8]}...; whole numbers from 0 are expected")
        arrays = [mu, sigma, class_mu, count, covariance(content["within"], size, "within", path)]
    tensors = (None if array is None else torch.from_numpy(array) for array in arrays)
    return Statistics(*tensors, space, sha256(path))


def read_space(array: np.ndarray, path: Path) -> dict:
    """The JSON text ``space``: at least name, sha256 and preprocessing."""
    with parsing(f"{path}: space", STATISTICS_FILE, "is no JSON text"):
        content = json.loads(str(array))
    needed = ("name", "sha256", "preprocessing")
    missing = [name for name in needed if not (isinstance(content, dict) and name in content)]
    if missing:
        raise InputError(f"{path}: space lacks {', '.join(missing)}; {STATISTICS_FILE} is expected")
    return content


def require_space(of_file: dict, in_use: dict, path: Path) -> None:
    """One network and one preprocessing: names may differ, a folder may have moved. Raises `InputError`."""
    if of_file["sha256"] != in_use["sha256"]:
        raise InputError(
            f"{path} is of another space: {of_file['name']} with SHA-256 {of_file['sha256']}, "
            f"but {in_use['name']} in use has {in_use['sha256']}; make the file anew by evaluation/statistics.py"
        )
    if of_file["preprocessing"] != in_use["preprocessing"]:
        raise InputError(
            f"{path} was made with preprocessing {of_file['preprocessing']}, but {in_use['name']} in use has "
            f"{in_use['preprocessing']} (one network, SHA-256 {in_use['sha256']}); make the file anew"
        )


def check_statistics(mu: np.ndarray, sigma: np.ndarray, source: object) -> tuple[np.ndarray, np.ndarray]:
    """mu (D,) and sigma (D, D) in float64. Raises `InputError` unless they can be those of features."""
    mu, sigma = np.asarray(mu), np.asarray(sigma)
    if mu.ndim != 1 or not len(mu):
        raise InputError(f"{source}: mu has shape {mu.shape}; (D,) is expected")
    return real_array(mu, mu.shape, "mu", source), covariance(sigma, len(mu), "sigma", source)


def real_array(array: np.ndarray, shape: tuple[int, ...], name: str, source: object) -> np.ndarray:
    """``array`` in float64. Raises `InputError` unless it is real, of ``shape``, and finite."""
    if array.shape != shape:
        raise InputError(f"{source}: {name} has shape {array.shape}; {shape} is expected")
    if array.dtype.kind not in "fiu":
        raise InputError(f"{source}: {name} is {array.dtype}; float64 is expected")
    with np.errstate(over="ignore"):
        array = array.astype(np.float64)
    if not (np.abs(array) < BEYOND).all():
        raise InputError(f"{source}: {name} holds NaN or infinity, or numbers beyond {BEYOND:g}")
    return array


def covariance(array: np.ndarray, size: int, name: str, source: object) -> np.ndarray:
    """``array`` (D, D) in float64, symmetric to the bit. Raises `InputError` unless it can be a covariance."""
    sigma = real_array(array, (size, size), name, source)
    if np.abs(sigma - sigma.T).max() > ASYMMETRY * np.abs(sigma).max():
        raise InputError(f"{source}: {name} is not symmetric; a covariance is expected")
    sigma = (sigma + sigma.T) / 2
    values = np.linalg.eigvalsh(sigma)
    if values[0] < -NEGATIVE * np.abs(values).max():
        raise InputError(f"{source}: {name} has an eigenvalue {values[0]:.3g}; a covariance has none below 0")
    return sigma
