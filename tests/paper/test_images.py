"""train_cc/images.py: the small data sets, folders and .npz by index, and what is refused."""

import gzip
import json
import os
import resource
import signal
import struct
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from PIL import Image

from train_cc import images
from train_cc.images import batches_of, centre_crop, load_dataset, open_images
from train_cc.io.errors import InputError

# The small data sets ----------------------------------------------------------------------------------------------


def test_digits_are_whole_and_grey():
    pixels, labels = load_dataset("digits")
    assert pixels.shape == (1797, 1, 8, 8) and pixels.dtype == torch.uint8 and labels.bincount().min() > 170
    assert pixels.max() == 255 and pixels.unique().numel() == 17


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
LABELS = np.arange(20, dtype=np.uint8) % 10
WHOLE = idx(IMAGES)


@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_fashion_mnist_has_a_border_and_three_equal_channels(tmp_path, zipped):
    for name, content in (("images-idx3", WHOLE), ("labels-idx1", idx(LABELS))):
        (tmp_path / f"t10k-{name}-ubyte{zipped}").write_bytes(gzip.compress(content) if zipped else content)
    pixels, labels = load_dataset("fashion-mnist", tmp_path, "test")
    assert pixels.shape == (20, 3, 32, 32) and labels.tolist() == LABELS.tolist()
    for channel in range(3):
        assert np.array_equal(pixels[:, channel, 2:30, 2:30], IMAGES) and pixels[:, channel].sum() == IMAGES.sum()


@pytest.mark.parametrize("content,labels,message", [
    (WHOLE[:-1], idx(LABELS), "train-images.* is damaged"),
    (idx(IMAGES[:0]), idx(LABELS[:0]), "is damaged"),
    (WHOLE[:4] + b"\xff" * 4 + WHOLE[8:], idx(LABELS), "is damaged"),  # a header that lies
    (idx(IMAGES[:, :8, :8].copy()), idx(LABELS), "N x 28 x 28"),
    (WHOLE.replace(b"\x08", b"\x0d", 1), idx(LABELS), "unsigned bytes"),
    (WHOLE, idx(LABELS[:-1]), "another data set: 20 images, 19 labels"),
    (idx(np.zeros((10_000, 28, 28), np.uint8)), idx(np.zeros(10_000, np.uint8)), "another data set than Fashion"),
])  # fmt: skip
def test_odd_idx_files_are_refused(tmp_path, content, labels, message):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(InputError, match=message):
        load_dataset("fashion-mnist", tmp_path)


ODD_SETS = [
    ("digits", ".", "train", "--data-dir is .* for fashion-mnist"),
    ("digits", None, "test", "--split is test"),
    ("fashion-mnist", ".", "train", "ubyte.gz is damaged"),
    ("fashion-mnist", "nothing", "train", "has no train-images.* idx files"),
    ("fashion-mnist", "train-images-idx3-ubyte.gz", "train", "is a file; .* idx files"),
    ("fashion-mnist", "nowhere", "train", "does not exist; .* idx files"),
]


@pytest.mark.parametrize("name,folder,split,message", ODD_SETS)
def test_odd_data_sets_are_refused(tmp_path, name, folder, split, message):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(WHOLE)[:-9])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match=message):
        load_dataset(name, folder and tmp_path / folder, split)


def test_two_processes_download_one_after_the_other(tmp_path, monkeypatch):
    """torchvision writes into the file itself: another process would find half of it."""
    monkeypatch.chdir(tmp_path)

    def download_url(url, folder, name, md5):
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(folder / ".lock", timeout=0).acquire()

    monkeypatch.setattr(images, "download_url", download_url)
    assert images.download() == Path("runs/data/FashionMNIST/raw")


# Images by index --------------------------------------------------------------------------------------------------


def save(file: Path, size: tuple[int, int] = (8, 8), mode: str = "L", grey: int = 40) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, grey if mode in ("L", "I;16") else (grey, 9, 9)).save(file)
    return file


@pytest.mark.parametrize("names", [
    [str(k) for k in range(12)],
    [f"class_{k}" for k in range(1, 13)],
    [f"{k}_bird{k % 3}" for k in range(12)],
    ["2_door", "2_seater", "3_door"],
    ["2_wheels", "3d_printer", "4_wheels"],
    ["ant", "bee", "cat 10", "cat 2"],  # names, not numbers: by the alphabet
], ids=lambda names: names[0])  # fmt: skip
def test_class_folders_are_numbered_as_their_names_are(names, tmp_path):
    for k, name in enumerate(names):
        for i in range(2):
            save(tmp_path / name / f"{i}.png", grey=100 * i + k)
    data = open_images(str(tmp_path), None, 1)
    assert data.source["classes"] == names and data.num_classes == len(names)
    assert [data[i].max() % 100 for i in range(len(data))] == data.labels.tolist()


def test_the_labels_of_edms_folders_are_those_of_their_index(tmp_path):
    names = [f"0000{k}/img{k}.png" for k in range(3)]
    for k, name in enumerate(names):
        save(tmp_path / name, grey=k)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[name, 7 - k] for k, name in enumerate(names)]}))
    data = open_images(str(tmp_path), None, 1)
    assert data.labels.tolist() == [7, 6, 5] and "classes" not in data.source
    for labels, message in (([[names[0], 1]], "dataset.json is damaged"), ([[n, -1] for n in names], "labels -1 to")):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
        with pytest.raises(InputError, match=message):
            open_images(str(tmp_path), None, 1)


def test_the_centre_crop_is_adms():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    assert np.array_equal(centre_crop(image, 64), image)
    wide = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (50, 1)))
    cut = np.array(centre_crop(wide, 50))  # nothing to resize: the middle
    assert np.array_equal(cut, np.array(wide)[:, 75:125])
    assert centre_crop(wide.resize((811, 203)), 64).size == (64, 64)


def test_files_are_cropped_and_of_the_networks_channels(tmp_path):
    save(tmp_path / "a" / "0.png", (40, 50), "RGB"), save(tmp_path / "b" / "0.png", (33, 90))
    data = open_images(str(tmp_path), 32, 3)
    assert [data[i].shape for i in (0, 1)] == [(3, 32, 32)] * 2 and data.source["image_size"] == 32
    assert data[0][:, 0, 0].tolist() == [40, 9, 9] and data[1][:, 0, 0].tolist() == [40, 40, 40]


@pytest.mark.parametrize("workers,size,mode,message", [
    (0, (9, 8), "RGB", r"1\.png has the size \(8, 9\), the first image \(8, 8\); .*--image-size"),
    (0, (8, 8), "I;16", r"1\.png has mode I;16; images of 8 bits"),
    (1, None, None, r"1\.png is damaged or something else; an image is expected"),
])  # fmt: skip
def test_an_image_that_cannot_be_used_is_named(tmp_path, workers, size, mode, message):
    save(tmp_path / "0.png", mode="RGB")
    save(tmp_path / "1.png", size, mode) if size else (tmp_path / "1.png").write_bytes(b"no image")
    data = open_images(str(tmp_path), None, 3)
    with pytest.raises(InputError, match=f"^{tmp_path}/{message}"):
        list(batches_of(data, [range(2)], workers))


PIXELS = np.full((4, 8, 8, 1), 9, np.uint8)
ODD_FOLDERS = {
    "a/0.png 0.png": "holds images of its own",
    "a/0.png b/": "class folders b of .* hold no images",
    "1/0.png 01/0.png": "class folders 01, 1 of .* have one number",
    "train/a/0.png val/a/0.png": "train, val, which are no classes",
    "colour.png": "has colours",
    "": "holds no images",
}
ODD_FILES = [
    ({"images": PIXELS}, "has no arr_0 but images"),
    ({"arr_0": PIXELS.astype(float)}, "arr_0 float64"),
    ({"arr_0": PIXELS[:0]}, "without an image"),
    ({"arr_0": PIXELS // 9}, "no value above 1"),
    ({"arr_0": PIXELS, "arr_1": np.zeros(3, int)}, r"arr_1 int64 \(3,\)"),
    ({"arr_0": PIXELS, "arr_1": np.array([-1, 0, 0, 0])}, "labels -1 to 0"),
    ({"arr_0": PIXELS, "arr_1": np.array([0, 0, 0, 10**6])}, "labels 0 to 1000000"),
]


@pytest.mark.parametrize("names", ODD_FOLDERS)
def test_odd_folders_are_refused(tmp_path, names):
    for name in names.split():
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            save(tmp_path / name, mode="RGB" if name == "colour.png" else "L")
    with pytest.raises(InputError, match=ODD_FOLDERS[names]):
        open_images(str(tmp_path), None, 1)


@pytest.mark.parametrize("arrays,message", ODD_FILES)
def test_odd_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        open_images(str(tmp_path / "a.npz"), None, 1)
    with pytest.raises(InputError, match="--image-size is for folders"):
        open_images(str(tmp_path / "a.npz"), 8, 1)


def test_reading_needs_few_descriptors_and_no_shared_memory(tmp_path):
    """As with `ulimit -n 1024`, 8 workers and batches of 250; a tensor an image would take 400 descriptors here."""
    for i in range(300):
        save(tmp_path / f"{i:03d}.png", grey=i % 256)
    data, batches = open_images(str(tmp_path), None, 1), [range(first, first + 75) for first in range(0, 300, 75)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, hard))
    try:
        greys = torch.cat([batch[:, 0, 0, 0] for batch in batches_of(data, batches, 2)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert greys.tolist() == [i % 256 for i in range(300)]


class Dying(images.Images):
    """Its reader is killed, as by a machine that is out of memory."""

    def __getitem__(self, index: int) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_reading_process_that_is_killed_is_named():
    with pytest.raises(InputError, match=r"reads here has ended .*Lower --batch-size"):
        list(batches_of(Dying(None, {"images": "here"}, (1, 8, 8)), [range(4), range(4, 8)], 1))
