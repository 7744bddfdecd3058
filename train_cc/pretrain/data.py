"""The small real data sets, as uint8 images (N, C, H, W) and int64 labels (N,).

`python -m train_cc.pretrain.data --dataset digits --output FILE.npz` writes one as an evaluation reference.
"""

import gzip
import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train_cc.io.class_names import KNOWN
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.flags import COUNT, LEARNING_RATE, SEED, Parser, integer, output_file, path
from train_cc.io.products import need_space, product, record
from train_cc.io.read import parsing, require_folder

if TYPE_CHECKING:
    from torch import Tensor

DATASETS = tuple(KNOWN)
NUM_CLASSES = 10  # of both
SPLITS = {"train": "train", "test": "t10k"}  # -> how the idx files of Fashion-MNIST begin
# SHA-256 of Fashion-MNIST's images, unpacked: MNIST, and other sets made like it, have files of the same names.
WHOLE_SETS = {
    60_000: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    10_000: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
}
IDX_FOLDER = "a folder of Fashion-MNIST's idx files (train-images-idx3-ubyte and so on, or .gz)"


def _digits() -> "tuple[Tensor, Tensor]":
    """scikit-learn's 1797 handwritten digits, 8 x 8, grey values 0 to 16."""
    import torch
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)
    return images.unsqueeze(1), torch.from_numpy(data.target).long()


def _read_idx(folder: Path, stem: str, shape: tuple[int, ...]) -> "Tensor":
    """uint8 (N, *shape). Raises `InputError` for a file that is missing, torn, or has another shape."""
    import torch

    for file in (folder / f"{stem}.gz", folder / stem):
        if file.is_file():
            expected = f"a whole idx file of unsigned bytes, N{''.join(f' x {side}' for side in shape)},"
            with parsing(file, expected):
                content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
                header = 4 + 4 * (1 + len(shape))
                sides = np.frombuffer(content[4:header], ">u4").tolist()
                if content[:4] != bytes([0, 0, 8, 1 + len(shape)]) or tuple(sides[1:]) != shape:
                    raise InputError(f"{file} is not what it should be; {expected} is expected")
                if len(content) != header + math.prod(sides) or sides[0] == 0:
                    raise InputError(f"{file} is torn or empty; {expected} is expected")
                expected_hash = WHOLE_SETS.get(sides[0]) if shape else None
                if expected_hash not in (None, hashlib.sha256(content).hexdigest()):
                    raise InputError(f"{file} is of another data set than Fashion-MNIST; {IDX_FOLDER} is expected")
            return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(sides)
    raise InputError(f"{folder} has no {stem}.gz or {stem}; {IDX_FOLDER} is expected")


def _download() -> Path:
    """Fashion-MNIST's files from torchvision's mirror, each with its MD5: a partial one never counts. -> folder."""
    from filelock import FileLock
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import download_url

    folder = Path("runs/data/FashionMNIST/raw")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # torchvision writes into the file itself
            for name, md5 in FashionMNIST.resources:
                download_url(FashionMNIST.mirrors[0] + name, folder, name, md5)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot download Fashion-MNIST ({error}); give its folder by --data-dir") from error
    return folder


def _fashion_mnist(data_dir: Path | None, split: str) -> "tuple[Tensor, Tensor]":
    """60 000 images to train on or 10 000 to test with, from a folder of idx files, else downloaded.

    A black border makes 28 x 28 pixels 32 x 32, and the three channels are equal: so are images of a VAE's decoder.
    """
    from torch.nn.functional import pad

    folder = _download() if data_dir is None else require_folder(data_dir, IDX_FOLDER)
    images = _read_idx(folder, f"{SPLITS[split]}-images-idx3-ubyte", (28, 28))
    labels = _read_idx(folder, f"{SPLITS[split]}-labels-idx1-ubyte", ())
    if len(images) != len(labels) or labels.max() >= NUM_CLASSES:
        raise InputError(
            f"{folder} is another data set: {len(images)} images, {len(labels)} labels from {labels.min()} to "
            f"{labels.max()}; Fashion-MNIST has a label of 0 to 9 for each image"
        )
    return pad(images, (2, 2, 2, 2)).unsqueeze(1).expand(-1, 3, -1, -1), labels.long()


def load_dataset(name: str, data_dir: Path | str | None = None, split: str = "train") -> "tuple[Tensor, Tensor]":
    """-> images uint8 (N, C, H, W), labels int64 (N,). Digits (N, 1, 8, 8) have no split "test", Fashion-MNIST
    (N, 3, 32, 32) has one. Raises `InputError` for an unknown or unreadable data set."""
    if name == "digits" and data_dir is not None:
        raise InputError(f"--data-dir is {data_dir}; it is for fashion-mnist alone, digits come with scikit-learn")
    if name == "digits" and split != "train":
        raise InputError(f"--split is {split}; digits are one set, of which all 1797 images are trained on")
    if name == "digits":
        return _digits()
    if name == "fashion-mnist":
        return _fashion_mnist(None if data_dir is None else Path(data_dir), split)
    raise InputError(f"unknown data set {name!r}; there are {', '.join(DATASETS)}")


def add_data_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--dataset", default="digits", choices=DATASETS, help="8 x 8 pixels, or 32 x 32 with three channels"
    )
    parser.add_argument(
        "--data-dir", type=path, help="folder of Fashion-MNIST's idx files; without it torchvision downloads them"
    )


def add_training_arguments(parser: Parser, max_train_steps: int) -> None:
    parser.add_argument("--output-dir", type=path, required=True, help="the network's folder, and of its checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier command trained there")
    parser.add_argument("--max-train-steps", type=COUNT, default=max_train_steps, help="updates")
    parser.add_argument("--checkpoint-steps", type=COUNT, default=250, help="steps between checkpoints")
    parser.add_argument("--batch-size", type=integer(1, 2**16), default=128, help="images per update")
    parser.add_argument("--learning-rate", type=LEARNING_RATE, default=2e-3, help="at the start; decays by a cosine")
    parser.add_argument("--seed", type=SEED, default=30, help="of first weights and of all draws")


def through_vae(name: str, images: "Tensor") -> "Tensor":
    """uint8 images (N, 3, H, W), encoded and decoded by the VAE ``name``: the best that its latents allow."""
    import torch

    from train_cc.models.vae import DECODED_AT_ONCE, VAEDecoder, encode_images, images_to_uint8, load_vae
    from train_cc.run.devices import device

    if images.shape[1] != 3:
        raise InputError(f"--vae is {name}, but the images have {images.shape[1]} channel; three are needed")
    vae = load_vae(name).to(device())
    latents = encode_images(vae, images)
    decode = VAEDecoder(vae)
    with torch.no_grad():
        parts = [images_to_uint8(decode(part.to(vae.device))) for part in latents.split(DECODED_AT_ONCE)]
    return torch.cat(parts).permute(0, 3, 1, 2)


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_data_arguments(parser)
    parser.add_argument(
        "--output",
        type=output_file,
        required=True,
        help="the .npz: arr_0 images (N, H, W, C), arr_1 labels, provenance",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    parser.add_argument("--split", choices=SPLITS, default="train", help="test: the 10 000 that nothing is trained on")
    parser.add_argument("--num-images", type=COUNT, help="the first of them alone; without it all")
    parser.add_argument(
        "--vae", default="none", help="folder of a VAE that encodes and decodes each image; none: as it is"
    )
    args = parser.parse_args(argv)
    content = record("pretrain.data", vars(args))
    with product(args.output, content, args.overwrite, "--output", file=True, read=provenance_of) as place:
        if place is None:
            return
        images, labels = load_dataset(args.dataset, args.data_dir, args.split)
        images, labels = images[: args.num_images], labels[: args.num_images]
        if args.num_images is not None and len(images) < args.num_images:
            raise InputError(f"--num-images is {args.num_images}; {args.dataset}, {args.split} has {len(images)}")
        if args.vae != "none":
            images = through_vae(args.vae, images)
        need_space(place.parts, images.nbytes)
        pixels, provenance = images.permute(0, 2, 3, 1).numpy(), np.array(json.dumps(content))
        with place.new.open("wb") as file:
            np.savez(file, arr_0=pixels, arr_1=labels.numpy(), provenance=provenance)
    print(f"{len(images)} images of {args.dataset}, {args.split} -> {args.output}")


def provenance_of(file: Path) -> dict:
    """The record in a reference; {} for any other file."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return json.loads(str(arrays["provenance"]))
    except Exception:  # whatever numpy raises: the file is not one of these
        return {}


if __name__ == "__main__":
    main()
