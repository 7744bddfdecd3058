"""The small real data sets, as uint8 images (N, C, H, W) and int64 labels (N,).

`python -m train_cc.pretrain.data --dataset digits --output FILE.npz` writes one as an evaluation reference.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train_cc.io.errors import InputError, exits_on_input_error

DATASETS = ("digits", "fashion-mnist")


def _digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits, 8 x 8, grey values 0 to 16."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)
    return images.unsqueeze(1), torch.from_numpy(data.target).long()


def _read_idx(folder: Path, stem: str) -> np.ndarray:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                content = file.read()
            dimensions = content[3]
            header = 4 + 4 * dimensions
            shape = np.frombuffer(content[4:header], ">u4").astype(int)
            if content[:3] != b"\0\0\x08" or len(content) != header + shape.prod():
                raise InputError(f"{path} is not a whole idx file of unsigned bytes")
            return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    raise InputError(f"{folder} has no {stem} or {stem}.gz; the four idx files of Fashion-MNIST are expected there")


def _fashion_mnist(data_dir: str | None) -> tuple[Tensor, Tensor]:
    """The 60 000 training images, 28 x 28, from a folder of idx files, else by torchvision's download."""
    if data_dir is not None:
        images = torch.from_numpy(_read_idx(Path(data_dir), "train-images-idx3-ubyte").copy())
        labels = torch.from_numpy(_read_idx(Path(data_dir), "train-labels-idx1-ubyte").copy())
    else:
        from torchvision.datasets import FashionMNIST

        try:
            data = FashionMNIST("runs/data", train=True, download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(f"cannot download Fashion-MNIST ({error}); give its folder by --data-dir") from error
        images, labels = data.data, data.targets
    return images.unsqueeze(1), labels.long()


def load_dataset(name: str, data_dir: str | None = None) -> tuple[Tensor, Tensor]:
    """-> images uint8 (N, C, H, W), labels int64 (N,). Raises `InputError` for an unknown or unreadable data set."""
    if name == "digits":
        return _digits()
    if name == "fashion-mnist":
        return _fashion_mnist(data_dir)
    raise InputError(f"unknown data set {name!r}; there are {', '.join(DATASETS)}")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", default="digits", choices=DATASETS)
    parser.add_argument("--data-dir", help="folder of Fashion-MNIST's idx files; without it torchvision downloads them")


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise `InputError` where one of these arguments is not above 0."""
    for name in names:
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0")


@exits_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_data_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="the .npz: arr_0 images (N, H, W, C), arr_1 labels")
    args = parser.parse_args()
    images, labels = load_dataset(args.dataset, args.data_dir)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("wb") as file:
        np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    print(f"{len(images)} images of {args.dataset} -> {args.output}")


if __name__ == "__main__":
    main()
