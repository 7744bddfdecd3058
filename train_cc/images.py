"""Real images with their labels: a small data set, an .npz, or a folder of files that are read by index."""

import gzip
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import FashionMNIST
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.datasets.utils import download_url

from train_cc.io.class_names import DATASETS
from train_cc.io.errors import InputError
from train_cc.io.read import (
    MAX_LABEL,
    first_line,
    images_shape,
    parsing,
    read_json,
    read_npz,
    require_file,
    require_folder,
    require_scale,
    sha256,
)

SPLIT_FOLDERS = {"train", "val", "valid", "validation", "test"}
IMAGE_SOURCES = f"a folder of images, an .npz with arr_0 uint8 (N, H, W, C), or one of {', '.join(DATASETS)}"
NUM_CLASSES = 10  # of both
STEMS = {"train": "train", "test": "t10k"}  # -> how the idx files of Fashion-MNIST begin
# SHA-256 of Fashion-MNIST's images, unpacked: MNIST, and other sets made like it, have files of the same names.
WHOLE_SETS = {
    60_000: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    10_000: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
}
IDX_FOLDER = "a folder of Fashion-MNIST's idx files (train-images-idx3-ubyte and so on, or .gz)"


# The small data sets ------------------------------------------------------------------------------------------------


def read_idx(folder: Path, stem: str, *shape: int) -> Tensor:
    """uint8 (N, *shape). Raises `InputError` for a file that is missing, torn, or has another shape."""
    file = next((each for each in (folder / f"{stem}.gz", folder / stem) if each.is_file()), None)
    if file is None:
        raise InputError(f"{folder} has no {stem}.gz or {stem}; {IDX_FOLDER} is expected")
    expected = f"a whole idx file of unsigned bytes, N{''.join(f' x {side}' for side in shape)},"
    with parsing(file, expected):
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        kind, count, *sides = np.frombuffer(content, ">u4", 2 + len(shape)).tolist()
        if (kind, sides) != (0x801 + len(shape), list(shape)) or not count:
            raise ValueError(f"it begins with {[kind, count, *sides]}")
        values = np.frombuffer(content, np.uint8, offset=4 * (2 + len(shape))).reshape(count, *shape)
    if shape and WHOLE_SETS.get(count) not in (None, hashlib.sha256(content).hexdigest()):
        raise InputError(f"{file} is of another data set than Fashion-MNIST; {IDX_FOLDER} is expected")
    return torch.from_numpy(values.copy())


def download() -> Path:
    """Fashion-MNIST's files from torchvision's mirror, each with its MD5: a partial one never counts. -> folder."""
    folder = Path("runs/data/FashionMNIST/raw")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # torchvision writes into the file itself
            for name, md5 in FashionMNIST.resources:
                download_url(FashionMNIST.mirrors[0] + name, folder, name, md5)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot download Fashion-MNIST ({error}); give its folder by --data-dir") from error
    return folder


def fashion_mnist(data_dir: Path | None, split: str) -> tuple[Tensor, Tensor]:
    """60 000 images to train on or 10 000 to test with, from a folder of idx files, else downloaded.

    A black border makes 28 x 28 pixels 32 x 32, and the three channels are equal: so are images of a VAE's decoder.
    """
    folder = download() if data_dir is None else require_folder(data_dir, IDX_FOLDER)
    images = read_idx(folder, f"{STEMS[split]}-images-idx3-ubyte", 28, 28)
    labels = read_idx(folder, f"{STEMS[split]}-labels-idx1-ubyte")
    if len(images) != len(labels) or labels.max() >= NUM_CLASSES:
        raise InputError(
            f"{folder} is another data set: {len(images)} images, {len(labels)} labels from {labels.min()} to "
            f"{labels.max()}; Fashion-MNIST has a label of 0 to 9 for each image"
        )
    return nn.functional.pad(images, (2, 2, 2, 2)).unsqueeze(1).expand(-1, 3, -1, -1), labels.long()


def load_dataset(name: str, data_dir: Path | str | None = None, split: str = "train") -> tuple[Tensor, Tensor]:
    """Return images uint8 (N, C, H, W), labels int64 (N,). Digits (N, 1, 8, 8) have no split "test", Fashion-MNIST
    (N, 3, 32, 32) has one. Raises `InputError` for an unreadable data set."""
    if name != "digits":
        return fashion_mnist(None if data_dir is None else Path(data_dir), split)
    if data_dir is not None:
        raise InputError(f"--data-dir is {data_dir}; it is for fashion-mnist only, digits come with scikit-learn")
    if split != "train":
        raise InputError(f"--split is {split}; digits are one set, of which all 1797 images are trained on")
    from sklearn.datasets import load_digits  # takes a second

    digits = load_digits()  # 8 x 8, grey values 0 to 16
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)
    return images.unsqueeze(1), torch.from_numpy(digits.target).long()


# Images by index ----------------------------------------------------------------------------------------------------


class Images:
    """``self[i]``: image i, uint8 (C, H, W). NumPy arrays, because a tensor would come from a worker process by a file
    descriptor and shared memory, and both are scarce (`ulimit -n`, a container's /dev/shm).

    ``labels``: (N,) int64, or None. ``shape``: of the first image. ``source``: what the images are, for a record.
    """

    def __init__(self, labels: Tensor | None, source: dict, shape: tuple[int, ...]):
        self.labels, self.source, self.shape = labels, source, shape

    @property
    def num_classes(self) -> int | None:
        return None if self.labels is None else int(self.labels.max()) + 1


class ArrayImages(Images):
    """``images``: uint8 (N, C, H, W)."""

    def __init__(self, images: np.ndarray, labels: Tensor | None, source: dict):
        super().__init__(labels, source, images.shape[1:])
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"image {index} of {self.source['images']}"


class FolderImages(Images):
    """Image files. ``size``: ADM's centre crop to size x size, None: as they are; ``channels``: None: the first's."""

    def __init__(self, paths: list[str], labels: Tensor | None, size: int | None, channels: int | None, source: dict):
        self.paths, self.size, self.channels = paths, size, channels
        super().__init__(labels, source, self.read(paths[0]).shape)
        self.channels = self.shape[0]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        image = self.read(self.paths[index])
        if image.shape != self.shape:
            raise InputError(
                f"{self.paths[index]} has the size {image.shape[1:]}, the first image {self.shape[1:]}; "
                "images of one size are expected: crop them by --image-size of evaluation.statistics"
            )
        return image

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, path: str) -> np.ndarray:
        with parsing(path, "an image"), Image.open(path) as file:
            grey = file.mode in ("1", "L")
            channels = self.channels or (1 if grey else 3)
            if file.mode.startswith(("I", "F")):
                raise InputError(f"{path} has mode {file.mode}; images of 8 bits a channel are expected")
            if channels == 1 and not grey:
                raise InputError(f"{path} has colours (mode {file.mode}); greyscale images are expected")
            image = file.convert("L" if channels == 1 else "RGB")
        if self.size is not None:
            image = centre_crop(image, self.size)
        return np.array(image).reshape(image.height, image.width, channels).transpose(2, 0, 1)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's: halve by boxes while twice too large, bicubic to the short side, cut the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def batches_of(images: Images, batches: Sequence[Sequence[int]], workers: int) -> Iterator[Tensor]:
    """uint8 (B, C, H, W) of each of ``batches``, read by ``workers`` processes. Raises `InputError`."""
    try:
        loader = DataLoader(images, batch_sampler=batches, num_workers=workers, collate_fn=np.stack)
        yield from map(torch.from_numpy, loader)
    except InputError as error:  # a worker's traceback stands before a worker's message
        raise InputError(str(error).rpartition("InputError: ")[2].strip()) from error
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"a process that reads {images.source['images']} has ended ({first_line(error)}); "
            "was it short of memory? Lower --batch-size, or --workers of evaluation.statistics"
        ) from error


def choose_workers(processes: int) -> int:
    return max(0, min(8, (os.cpu_count() or 1) // processes - 1))


# Opening -----------------------------------------------------------------------------------------------------------


def open_images(text: str, size: int | None, channels: int, data_dir: str | None = None) -> Images:
    """``size``: for folders; ``channels``: what the feature space takes. Raises `InputError`."""
    path = Path(text)
    if size is not None and (text in DATASETS or path.is_file()):
        raise InputError(f"--image-size is for folders of images; those of {text} are taken as they are")
    if text in DATASETS:
        images, labels = load_dataset(text, data_dir)
        digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        return ArrayImages(images.numpy(), labels, {"images": text, "sha256": digest})
    return open_folder(path, size, channels) if path.is_dir() else open_npz(require_file(path, IMAGE_SOURCES))


def open_npz(path: Path) -> ArrayImages:
    content = read_npz(path, IMAGE_SOURCES)
    images_shape({name: (array.shape, array.dtype) for name, array in content.items()}, path, IMAGE_SOURCES)
    images, labels = content["arr_0"], content.get("arr_1")
    if not images.size:
        raise InputError(f"{path} has arr_0 {images.shape}, without an image; {IMAGE_SOURCES} is expected")
    if labels is not None:
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise InputError(
                f"{path} has arr_1 {labels.dtype} {labels.shape}; {len(images)} whole numbers are expected"
            )
        labels = labels_in_range(labels, path)
    require_scale(images, path)
    return ArrayImages(images.transpose(0, 3, 1, 2), labels, {"images": str(path), "sha256": sha256(path)})


def labels_in_range(labels: Sequence[int] | np.ndarray, source: Path) -> Tensor:
    if not 0 <= min(labels) <= max(labels) <= MAX_LABEL:
        raise InputError(f"{source} has labels {min(labels)} to {max(labels)}; allowed: 0 to {MAX_LABEL}")
    return torch.tensor(labels, dtype=torch.long)


def in_order(names: list[str], folder: Path) -> list[str]:
    """Class folders by their numbers: 2, class_2 or 2_bird before 10; others by the alphabet, as ImageNet's ids are.

    Raises `InputError` for two folders of one number.
    """
    parts = [re.fullmatch(r"(\D*)([0-9]+)(\D*|[\W_].*)", name) for name in names]
    if not all(parts) or len({part[1] for part in parts}) > 1:
        return sorted(names)
    numbers = [int(part[2]) for part in parts]
    repeated = len(set(numbers)) < len(numbers)
    words = repeated or any(part[3][:1].isalnum() for part in parts)  # such as 3d_printer
    if words and len({part[3] for part in parts}) > 1:
        return sorted(names)
    if repeated:
        twice = sorted(name for name, number in zip(names, numbers, strict=True) if numbers.count(number) > 1)
        raise InputError(f"the class folders {', '.join(twice[:8])} of {folder} have one number; rename or merge them")
    return [name for _, name in sorted(zip(numbers, names, strict=True))]


def indexed_labels(index: Path, names: list[str]) -> Tensor | None:
    """Labels that ``index`` gives the images ``names``; None if it has none. Raises `InputError`."""
    expected = 'a dataset.json of EDM\'s dataset_tool, {"labels": [["00000/img00000000.png", 0], ...]},'
    pairs = read_json(index, expected).get("labels")
    if pairs is None:
        return None
    with parsing(index, expected):
        by_name = {name: int(label) for name, label in pairs}
        labels = [by_name[name] for name in names]
    return labels_in_range(labels, index)


def open_folder(folder: Path, size: int | None = None, channels: int | None = None) -> FolderImages:
    """A folder per class, in the order of `in_order`; or images without labels in ``folder`` itself.

    Where there is a dataset.json (EDM's and REPA's data), the labels are its, and the folders are no classes.
    """
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    classes = in_order([entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")], folder)
    flat = [entry.path for entry in entries if not entry.is_dir() and entry.name.lower().endswith(IMG_EXTENSIONS)]
    if classes and {name.lower() for name in classes} <= SPLIT_FOLDERS:
        raise InputError(
            f"{folder} holds {', '.join(classes)}, which are no classes; give one of them: {folder / classes[0]}"
        )
    numbers = {name: i for i, name in enumerate(classes)}
    pairs = make_dataset(folder, numbers, extensions=IMG_EXTENSIONS, allow_empty=True) if classes else []
    if flat and pairs:
        raise InputError(f"{folder} holds images of its own ({flat[0]}) and folders of images; one of both is expected")
    if not flat and not pairs:
        raise InputError(f"{folder} holds no images ({', '.join(IMG_EXTENSIONS)}); {IMAGE_SOURCES} is expected")
    empty = sorted(set(classes) - {classes[label] for _, label in pairs})
    if pairs and empty:
        raise InputError(f"the class folders {', '.join(empty[:8])} of {folder} hold no images; remove or fill them")
    paths = [path for path, _ in pairs] or flat
    labels = torch.tensor([label for _, label in pairs]) if pairs else None
    names = [os.path.relpath(path, folder) for path in paths]
    digest = hashlib.sha256("\n".join(names).encode(errors="replace")).hexdigest()
    source = {"images": str(folder), "sha256_of_names": digest}
    if (index := folder / "dataset.json").is_file():
        labels, source = indexed_labels(index, names), source | {"sha256_of_labels": sha256(index)}
    elif pairs:
        source["classes"] = classes
    if size is not None:
        source["image_size"] = size
    return FolderImages(paths, labels, size, channels, source)
