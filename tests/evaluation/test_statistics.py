"""Statistics of real images: the figures, any number of processes, a kill and its continuation, what is refused."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.samples import gathering
from evaluation.samples.gathering import merged, part_moments
from evaluation.statistics import main
from tests import ROOT
from tests.conftest import refused
from train_cc.images import Images, batches_of, centre_crop, load_dataset, open_images
from train_cc.io import products
from train_cc.io.errors import InputError
from train_cc.io.products import record, write_record
from train_cc.models.classifier import ImageClassifier
from train_cc.models.features import load_space
from train_cc.rewards.statistics import read_statistics, require_space


@pytest.fixture
def space(reward_folder):
    return f"classifier:{reward_folder}"


@pytest.fixture
def npz(tmp_path):
    """The first 60 digits, three channels apart, as an evaluation reference."""
    images, labels = load_dataset("digits")
    np.savez(tmp_path / "real.npz", arr_0=images[:60].permute(0, 2, 3, 1).numpy(), arr_1=labels[:60].numpy())
    return tmp_path / "real.npz"


def words(images, space, output, *more) -> list[str]:
    base = ["--images", images, "--space", space, "--output", output, "--batch-size", 7, "--workers", 0]
    return [str(word) for word in (*base, *more)]


def made(images, space, output, *more) -> dict[str, np.ndarray]:
    main(words(images, space, output, *more))
    with np.load(output) as file:
        return {name: file[name] for name in file.files}


def largest_difference(a: dict, b: dict) -> float:
    names = a.keys() - {"space"}
    assert names == b.keys() - {"space"} and len(names) == 5
    return max(np.abs(a[name] - b[name]).max() for name in names)


# The figures


def test_the_file_holds_what_numpy_says(npz, space, tmp_path):
    found = made(npz, space, tmp_path / "s.npz", "--shard-size", 20)
    images, labels = load_dataset("digits")
    y = labels[:60].numpy()
    f = load_space(space)(images[:60].float() / 255).double().numpy()
    class_mu = np.stack([f[y == k].mean(axis=0) for k in range(10)])
    deviation = f - class_mu[y]
    expected = {"mu": f.mean(axis=0), "sigma": np.cov(f, rowvar=False), "class_mu": class_mu}
    expected |= {"class_count": np.bincount(y), "within": deviation.T @ deviation / 60}
    assert f.std() > 1e-4
    for name, value in expected.items():
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6 * np.abs(value).max(), err_msg=name)
    about = json.loads(str(found["space"]))
    assert about["images"] == 60 and about["source"]["images"] == str(npz)
    read = read_statistics(tmp_path / "s.npz")
    require_space(read.space, load_space(space).describe(), tmp_path)
    assert np.array_equal(read.sigma.numpy(), found["sigma"]) and read.num_classes == 10 and read.size == f.shape[1]
    assert not (tmp_path / "s.npz.tmp").exists()


def test_parts_merge_without_losing_small_variances():
    """Features of mean 1e6 and deviation 1e-3: sums of squares would keep nothing of them."""
    generator = torch.Generator().manual_seed(0)
    f = 1e6 + 1e-3 * torch.randn(90, 4, generator=generator, dtype=torch.float64)
    y = torch.arange(90) % 3
    parts = [slice(0, 40), slice(40, 41), slice(41, 90)]
    found = merged(iter([part_moments(f[part], y[part]) for part in parts]), 4, 3)
    np.testing.assert_allclose(found["sigma"], np.cov((f - 1e6).numpy(), rowvar=False), rtol=1e-5, atol=1e-11)
    deviation = f - torch.stack([f[y == k].mean(dim=0) for k in range(3)])[y]
    np.testing.assert_allclose(found["within"], (deviation.T @ deviation).numpy() / 90, rtol=1e-3, atol=1e-9)


def test_files_and_folders_say_the_same(npz, space, tmp_path):
    with np.load(npz) as file:
        images, labels = file["arr_0"], file["arr_1"]
    order = np.argsort(labels, kind="stable")
    for i in order:
        folder = tmp_path / "png" / f"{labels[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i, :, :, 0]).save(folder / f"{i:03d}.png")
    np.savez(tmp_path / "sorted.npz", arr_0=images[order], arr_1=labels[order])
    of_file = made(tmp_path / "sorted.npz", space, tmp_path / "a.npz")
    of_folder = made(tmp_path / "png", space, tmp_path / "b.npz", "--workers", 1)
    assert largest_difference(of_file, of_folder) == 0
    flat = made(tmp_path / "png" / "3", space, tmp_path / "c.npz")  # no class folders: no labels
    assert "class_mu" not in flat and read_statistics(tmp_path / "c.npz").num_classes is None
    np.testing.assert_allclose(flat["mu"], of_file["class_mu"][3], rtol=1e-5, atol=1e-6)


def class_folders(folder: Path, names: list[str]) -> Path:
    """Images of the grey values k and 100 + k in the folder ``names[k]``."""
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (8, 8), 100 * i + k).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    "names",
    [
        [str(k) for k in range(12)],
        [f"{k:03d}" for k in range(12)],
        [str(k) for k in range(1, 13)],
        [f"class_{k}" for k in range(12)],
        [f"{k}_bird{k % 3}" for k in range(12)],
        ["2_door", "2_seater", "3_door"],
        ["2_wheels", "3d_printer", "4_wheels"],
        ["ant", "bee", "cat 10", "cat 2"],  # names, not numbers: by the alphabet
        ["n01440764", "n01443537", "n02123045"],
    ],
    ids=lambda names: names[0],
)
def test_class_folders_are_numbered_as_their_names_are(names, tmp_path):
    images = open_images(str(class_folders(tmp_path / "images", names)), None, 1)
    assert images.source["classes"] == names
    assert set(images.labels.tolist()) == set(range(len(names)))
    assert [images[i].max().item() % 100 for i in range(len(images))] == images.labels.tolist()


def test_the_order_of_class_folders_is_printed_and_recorded(space, tmp_path, capsys):
    folder = class_folders(tmp_path / "images", [str(k) for k in range(11)])
    made(folder, space, tmp_path / "s.npz")
    assert "class 0 is 0, 1 is 1, 2 is 2, 3 is 3, ..., 10 is 10, by the folders' names" in capsys.readouterr().out
    assert read_statistics(tmp_path / "s.npz").classes == [str(k) for k in range(11)]
    (folder / "1").rename(folder / "010")
    assert "folders 010, 10 of" in refused(main, words(folder, space, tmp_path / "t.npz"), capsys=capsys)


# Processes and kills


class Rank:
    """One of several processes that are threads here: what the command uses of a `PartialState`."""

    def __init__(self, index: int, barrier: threading.Barrier):
        self.process_index, self.num_processes, self.is_main_process = index, barrier.parties, index == 0
        self.device, self.wait_for_everyone = torch.device("cpu"), barrier.wait


def made_by(count: int, monkeypatch, *arguments) -> dict[str, np.ndarray]:
    barrier, own, failed = threading.Barrier(count), threading.local(), []
    monkeypatch.setattr(gathering, "open_processes", lambda timeout: Rank(own.rank, barrier))

    def run(rank: int) -> None:
        own.rank = rank
        try:
            main(words(*arguments))
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    with np.load(arguments[2]) as file:
        return {name: file[name] for name in file.files}


def test_any_number_of_processes_gives_the_same_file(npz, space, tmp_path, monkeypatch):
    writers = []
    sum_parts = gathering.sum_parts

    def filled(parts, images, space, processes, *rest):
        writers.extend([processes.process_index] * len(parts))
        sum_parts(parts, images, space, processes, *rest)

    monkeypatch.setattr(gathering, "sum_parts", filled)
    alone = made(npz, space, tmp_path / "1.npz", "--shard-size", 9)
    assert writers == [0] * 7
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)  # what a launcher sets differs from what one process has
    assert largest_difference(alone, made(npz, space, tmp_path / "threads.npz", "--shard-size", 9)) == 0
    torch.set_num_threads(threads)
    for count in (2, 3):
        writers.clear()
        many = made_by(count, monkeypatch, npz, space, tmp_path / f"{count}.npz", "--shard-size", 9)
        assert set(writers) == set(range(count)) and len(writers) == 7
        assert largest_difference(alone, many) < 1e-10


@pytest.mark.slow
def test_two_processes_of_a_launcher_give_the_same_file(npz, space, tmp_path):
    alone = made(npz, space, tmp_path / "one.npz", "--shard-size", 9)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--module"]
    command += ["evaluation.statistics", *words(npz, space, tmp_path / "two.npz", "--shard-size", 9)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    with np.load(tmp_path / "two.npz") as two:
        assert largest_difference(alone, dict(two)) < 1e-10


def test_a_stopped_command_continues_from_its_parts(npz, space, tmp_path, monkeypatch):
    straight = made(npz, space, tmp_path / "straight.npz", "--shard-size", 12)
    write, written = gathering.write_part, []

    def stopped(path, **content):
        if len(written) == 2:
            (path.parent / f"{path.name}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, **content)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(gathering, "write_part", stopped)
        main(words(npz, space, tmp_path / "s.npz", "--shard-size", 12))
    assert not (tmp_path / "s.npz").exists() and len(list((tmp_path / "s.npz.tmp").glob("*.npz"))) == 2
    monkeypatch.setattr(gathering, "write_part", lambda path, **c: written.append(path.name) or write(path, **c))
    again = made(npz, space, tmp_path / "s.npz", "--shard-size", 12, "--batch-size", 7)
    assert written == [f"{first:09d}-{first + 12:09d}.npz" for first in (0, 12, 24, 36, 48)]  # none twice
    assert largest_difference(straight, again) == 0
    assert not (tmp_path / "s.npz.tmp").exists()


@pytest.mark.slow
def test_a_killed_command_continues(space, tmp_path):
    arguments = words("digits", space, tmp_path / "s.npz", "--shard-size", 20)
    command = [sys.executable, "-m", "evaluation.statistics", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob("s.npz.tmp/*.npz"))) < 5 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "s.npz").exists()
    main(arguments)
    straight = made("digits", space, tmp_path / "straight.npz", "--shard-size", 20)
    with np.load(tmp_path / "s.npz") as file:
        assert largest_difference(straight, dict(file)) == 0


def test_parts_of_another_command_are_not_taken_and_folders_of_others_not_touched(npz, space, tmp_path, capsys):
    expected = made(npz, space, tmp_path / "expected.npz", "--shard-size", 30)
    folder = tmp_path / "s.npz.tmp"
    folder.mkdir()
    write_record(folder, record("statistics", {}, images=30))
    np.savez(folder / "000000000-000000030.npz", count=1)
    assert largest_difference(expected, made(npz, space, tmp_path / "s.npz", "--shard-size", 30)) == 0
    folder = tmp_path / "t.npz.tmp"
    folder.mkdir()
    (folder / "mine.npz").write_bytes(b"mine")
    assert "no command of this project" in refused(main, words(npz, space, tmp_path / "t.npz"), capsys=capsys)
    assert (folder / "mine.npz").read_bytes() == b"mine"


# Images


def test_the_centre_crop_is_adms():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    assert np.array_equal(centre_crop(image, 64), image)
    wide = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (50, 1)))
    cut = np.array(centre_crop(wide, 50))  # nothing to resize: the middle
    assert np.array_equal(cut, np.array(wide)[:, 75:125])
    assert centre_crop(wide.resize((811, 203)), 64).size == (64, 64)


def write_folder(folder: Path, *sizes: tuple[int, int], mode: str = "RGB") -> Path:
    folder.mkdir(parents=True)
    for i, size in enumerate(sizes):
        Image.new(mode, size, 40 * i if mode == "L" else (40 * i, 9, 9)).save(folder / f"{i}.png")
    return folder


def test_folders_of_images_are_cropped_and_broken_ones_named(tmp_path, capsys):
    torch.manual_seed(0)
    ImageClassifier("test_resnet", num_classes=2, in_channels=3, image_size=32).save_pretrained(tmp_path / "rgb")
    space, folder = f"classifier:{tmp_path / 'rgb'}", tmp_path / "images"
    write_folder(folder / "a", (40, 50), (32, 32))
    write_folder(folder / "b", (33, 90), mode="L")
    found = made(folder, space, tmp_path / "s.npz", "--image-size", 32)
    assert found["class_count"].tolist() == [2, 1]
    assert json.loads(str(found["space"]))["source"]["image_size"] == 32

    def told(*more):
        return refused(main, words(folder, space, tmp_path / "t.npz", *more), capsys=capsys)

    assert "0.png has the size (90, 33), the first image (50, 40)" in told() or "1.png has the size" in told()
    (folder / "a" / "2.jpg").write_bytes(b"no image")
    for workers in (0, 1):
        message = told("--image-size", 32, "--workers", workers)
        assert "2.jpg is damaged or something else; an image is expected" in message
    (folder / "a" / "2.jpg").unlink()
    Image.new("I;16", (40, 40)).save(folder / "a" / "2.png")
    assert "2.png has mode I;16; images of 8 bits" in told("--image-size", 32)
    (folder / "a" / "2.png").unlink()
    (folder / "c").mkdir()
    assert "class folders c of" in told()
    (folder / "c").rmdir()
    Image.new("L", (8, 8)).save(folder / "x.png")
    assert "images of its own" in told()


def test_reading_needs_few_descriptors_and_no_shared_memory(space, tmp_path):
    """As with `ulimit -n 1024`, 8 workers and batches of 250; a tensor an image would take 400 descriptors here."""
    folder = write_folder(tmp_path / "images", *[(16, 16)] * 300, mode="L")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, hard))
    try:
        many = made(folder, space, tmp_path / "many.npz", "--workers", 2, "--batch-size", 75)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    alone = made(folder, space, tmp_path / "alone.npz", "--batch-size", 75)
    assert alone["mu"].std() > 0 and np.array_equal(many["sigma"], alone["sigma"])


class Dying(Images):
    """Its reader is killed, as by a machine that is out of memory."""

    def __getitem__(self, index: int) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_reading_process_that_is_killed_is_named():
    with pytest.raises(InputError, match=r"reads here has ended .*Lower --batch-size"):
        list(batches_of(Dying(None, {"images": "here"}, (1, 8, 8)), [range(4), range(4, 8)], 1))


# Bad input


def test_commands_that_cannot_work_are_refused_before_anything_is_written(npz, space, tmp_path, capsys):
    output = tmp_path / "s.npz"

    def told(images=npz, of=space, to=output, *more):
        return refused(main, words(images, of, to, *more), capsys=capsys)

    def with_arrays(**arrays):
        np.savez(tmp_path / "bad.npz", **arrays)
        return told(tmp_path / "bad.npz")

    pixels = np.full((4, 8, 8, 1), 9, np.uint8)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "mine.npz").write_bytes(b"mine")
    before = sorted(tmp_path.iterdir())
    assert "nowhere does not exist; a folder of images" in told(tmp_path / "nowhere")
    assert "empty holds no images" in told(tmp_path / "empty")
    assert "text.npz is damaged or something else" in told(tmp_path / "text.npz")
    assert "'clip' is no feature space" in told(npz, "clip")
    assert "--batch-size is 0" in told(npz, space, output, "--batch-size", 0)
    assert "--shard-size is 0" in told(npz, space, output, "--shard-size", 0)
    assert "--image-size is for folders" in told(npz, space, output, "--image-size", 32)
    assert "mine.npz exists" in told(npz, space, tmp_path / "mine.npz")
    assert sorted(tmp_path.iterdir()) == before
    assert "has no arr_0" in with_arrays(images=pixels)
    assert "arr_0 float64" in with_arrays(arr_0=pixels.astype(float))
    assert "arr_1 int64 (3,)" in with_arrays(arr_0=pixels, arr_1=np.zeros(3, int))
    assert "labels -1 to 0" in with_arrays(arr_0=pixels, arr_1=np.array([-1, 0, 0, 0]))
    assert "labels 0 to 1000000" in with_arrays(arr_0=pixels, arr_1=np.array([0, 0, 0, 10**6]))
    assert "holds 1 image(s); a covariance needs 2" in with_arrays(arr_0=pixels[:1])
    assert "these have 3" in with_arrays(arr_0=pixels.repeat(3, axis=3))
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "bad.npz"])
    made(npz, space, output)
    shutil.copy(npz, tmp_path / "other.npz")
    assert "replace it with --overwrite" in told(tmp_path / "other.npz")
    made(tmp_path / "other.npz", space, output, "--overwrite")


def test_a_finished_command_changes_nothing_and_removes_what_a_kill_has_left(npz, space, tmp_path, capsys, monkeypatch):
    made(npz, space, tmp_path / "s.npz")
    whole = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "s.npz").unlink()
    with monkeypatch.context() as patch:  # dies after the file, before its parts are removed
        patch.setattr(products, "clear", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            main(words(npz, space, tmp_path / "s.npz"))
    assert (tmp_path / "s.npz").exists() and (tmp_path / "s.npz.tmp").exists()
    monkeypatch.setattr(gathering, "sum_parts", lambda *args: pytest.fail("made again"))
    main(words(npz, space, tmp_path / "s.npz"))
    assert "there already" in capsys.readouterr().out
    assert (tmp_path / "s.npz").read_bytes() == whole and not (tmp_path / "s.npz.tmp").exists()


def test_features_that_are_not_finite_name_their_image(npz, space, tmp_path, capsys, monkeypatch):
    loaded = load_space(space)
    monkeypatch.setattr(gathering, "load_space", lambda *rest: loaded)
    loaded.register_forward_hook(lambda module, args, out: out / (args[0].shape[0] != 4))  # the last batch of 60 by 7
    message = refused(main, words(npz, space, tmp_path / "s.npz"), capsys=capsys)
    assert "gives NaN or infinity for image 56 of" in message
    assert not (tmp_path / "s.npz").exists()


@pytest.fixture(scope="module")
def good(reward_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "s.npz"
    main(words("digits", f"classifier:{reward_folder}", path, "--batch-size", 500))
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("mu"), "lacks mu"),
        (lambda c: c.pop("within"), "lacks within"),
        (lambda c: c.pop("space"), "lacks space"),
        (lambda c: c.update(space=np.array("{")), "space is no JSON"),
        (lambda c: c.update(space=np.array("{}")), "space lacks name, sha256, preprocessing"),
        (lambda c: c.update(mu=c["mu"][1:]), r"sigma has shape"),
        (lambda c: c.update(class_mu=c["class_mu"][0]), r"class_mu has shape"),
        (lambda c: c.update(class_mu=c["class_mu"][:, 1:]), r"class_mu has shape"),
        (lambda c: c.update(class_count=c["class_count"][1:]), r"class_count has shape \(9,\)"),
        (lambda c: c.update(mu=c["mu"] * np.nan), "mu holds NaN or infinity"),
        (lambda c: c.update(within=c["within"] / 0.0), "within holds NaN or infinity"),
        (lambda c: c.update(sigma=np.triu(c["sigma"])), "sigma is not symmetric"),
        (
            lambda c: c.update(sigma=c["sigma"] - 0.1 * c["sigma"].max() * np.eye(len(c["mu"]))),
            "sigma has an eigenvalue",
        ),
        (lambda c: c.update(class_count=-c["class_count"]), "whole numbers"),
        (lambda c: c.update(class_count=c["class_count"] + 0.5), "whole numbers"),
        (lambda c: c.update(mu=c["mu"].astype(complex)), "mu is complex128"),
        (lambda c: c.update(mu=np.array([None] * 3)), "damaged|Python objects"),
    ],
)
def test_statistics_that_cannot_be_are_refused(good, tmp_path, change, message):
    content = dict(good)
    with np.errstate(all="ignore"):
        change(content)
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(InputError, match=message):
        read_statistics(tmp_path / "bad.npz")


def test_a_data_set_is_taken_whole(good):
    assert good["class_count"].sum() == 1797 == len(open_images("digits", None, 1))
    assert json.loads(str(good["space"]))["source"]["images"] == "digits"


def test_another_space_is_refused_by_both_hashes(good, tmp_path):
    own = json.loads(str(good["space"]))
    about = {name: own[name] for name in ("name", "sha256", "preprocessing")}
    require_space(own, about | {"name": "classifier:elsewhere"}, tmp_path)
    with pytest.raises(InputError, match=f"{own['sha256']}.*{'f' * 64}"):
        require_space(own, about | {"sha256": "f" * 64}, tmp_path)
    with pytest.raises(InputError, match="preprocessing"):
        require_space(own, about | {"preprocessing": about["preprocessing"] | {"image_size": 64}}, tmp_path)
    with pytest.raises(InputError, match=r"no\.npz does not exist"):
        read_statistics(tmp_path / "no.npz")


def test_labels_with_gaps_leave_classes_empty(space, tmp_path, capsys):
    images, _ = load_dataset("digits")
    arrays = {"arr_0": images[:20].permute(0, 2, 3, 1).numpy(), "arr_1": np.array([0, 2] * 10)}
    np.savez(tmp_path / "gap.npz", **arrays)
    made(tmp_path / "gap.npz", space, tmp_path / "s.npz")
    said = capsys.readouterr().out
    assert "WARNING: classes [1] have no image" in said and "the covariance is singular" in said
    read = read_statistics(tmp_path / "s.npz")  # a few images in many dimensions: still a covariance
    assert read.class_count.tolist() == [10, 0, 10] and read.class_mu[1].abs().max() == 0
