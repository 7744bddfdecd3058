"""The statistics of real images in a feature space: what the Frechet reward draws towards, read and checked."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train_cc.io.errors import InputError
from train_cc.io.read import first_line, read_npz, sha256

EXPECTED = "a statistics file of evaluation/statistics.py"
SYMMETRY = 1e-8  # largest |S - S^T|, relative to the largest |S|
NEGATIVE = 1e-8  # most negative eigenvalue, relative to the largest
CLASS_ARRAYS = ("class_mu", "class_count", "within")


@dataclass(frozen=True)
class Statistics:
    """Of N images in D dimensions, float64; the class arrays are None where labels were not known."""

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
        return classes_of(self.space, self.num_classes)


def read_statistics(path: Path, space: dict | None = None) -> Statistics:
    """``space``: what `FeatureSpace.describe` says of the space in use; None: any. Raises `InputError`."""
    content = read_npz(path, EXPECTED)
    missing = [name for name in ("mu", "sigma", "space") if name not in content]
    missing += [name for name in CLASS_ARRAYS if name not in content and content.keys() & set(CLASS_ARRAYS)]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; {EXPECTED} is expected")
    of_space = read_space(content["space"], path)
    if space is not None:
        require_space(of_space, space, path)
    size = content["mu"].shape[0] if content["mu"].ndim == 1 else 0
    if not size:
        raise InputError(f"{path}: mu has shape {content['mu'].shape}; (D,) is expected")
    classes = len(content["class_mu"]) if content.get("class_mu", np.empty(0)).ndim == 2 else 0
    shapes = {"mu": (size,), "sigma": (size, size)}
    if "class_mu" in content:
        if not classes:
            raise InputError(f"{path}: class_mu has shape {content['class_mu'].shape}; (K, {size}) is expected")
        shapes |= {"class_mu": (classes, size), "class_count": (classes,), "within": (size, size)}
    arrays = {name: array_of(content[name], shape, name, path) for name, shape in shapes.items()}
    for name in ("sigma", "within"):
        if name in arrays:
            require_covariance(arrays[name], name, path)
    if "class_count" in arrays:
        count = arrays["class_count"]
        if (count < 0).any() or (count != count.round()).any() or not count.sum() > 0:
            raise InputError(f"{path}: class_count holds {count.tolist()[:8]}...; whole numbers from 0 are expected")
    parts = (arrays.get(name) for name in ("mu", "sigma", *CLASS_ARRAYS))
    return Statistics(*parts, of_space, sha256(path))


def read_space(array: np.ndarray, path: Path) -> dict:
    """The JSON text ``space``: at least name, sha256 and preprocessing."""
    try:
        content = json.loads(str(array))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: space is no JSON text ({first_line(error)}); {EXPECTED} is expected") from error
    needed = ("name", "sha256", "preprocessing")
    missing = [name for name in needed if not (isinstance(content, dict) and name in content)]
    if missing:
        raise InputError(f"{path}: space lacks {', '.join(missing)}; {EXPECTED} is expected")
    return content


def classes_of(space: dict, num_classes: int | None = None) -> list[str] | None:
    """The class folders that a statistics file's ``space`` records; ``num_classes``: how many they must be."""
    source = space.get("source")
    names = source.get("classes") if isinstance(source, dict) else None
    fits = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if fits and num_classes in (None, len(names)) else None


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


def array_of(array: np.ndarray, shape: tuple[int, ...], name: str, path: Path) -> Tensor:
    """``array`` as a float64 tensor: real, of ``shape``, finite."""
    if array.shape != shape:
        raise InputError(f"{path}: {name} has shape {array.shape}; {shape} is expected")
    if array.dtype.kind not in "fiu":
        raise InputError(f"{path}: {name} is {array.dtype}; float64 is expected")
    if not np.isfinite(array).all():
        raise InputError(f"{path}: {name} holds NaN or infinity; make the file anew by evaluation/statistics.py")
    return torch.from_numpy(array.astype(np.float64))


def require_covariance(matrix: Tensor, name: str, path: Path) -> None:
    """Symmetric, and no eigenvalue below 0 by more than rounding. Raises `InputError`."""
    largest = matrix.abs().max().item()
    if (matrix - matrix.T).abs().max().item() > SYMMETRY * largest:
        raise InputError(f"{path}: {name} is not symmetric; make the file anew by evaluation/statistics.py")
    values = torch.linalg.eigvalsh(matrix)
    if values[0] < -NEGATIVE * values[-1].abs():
        raise InputError(
            f"{path}: {name} has an eigenvalue {values[0]:.3g} below 0 (the largest is {values[-1]:.3g}), "
            "so it is no covariance; make the file anew by evaluation/statistics.py"
        )
