"""Stage 0: data in, networks out; stopped anywhere and continued to the same bits; nothing of others replaced."""

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import ROOT
from tests.conftest import refused
from train_cc import images as labelled
from train_cc.draws import Draws
from train_cc.models import SiT
from train_cc.models.classifier import ImageClassifier
from train_cc.pretrain import classifier, data, networks, resumable, teacher

COMMANDS = {"teacher": teacher, "classifier": classifier}
SMALL = {
    "teacher": [
        "--hidden-size",
        "8",
        "--num-heads",
        "1",
        "--depth",
        "1",
        "--batch-size",
        "4",
        "--max-train-steps",
        "5",
    ],
    "classifier": ["--image-size", "16", "--batch-size", "4", "--max-train-steps", "5"],
}
BOTH = pytest.mark.parametrize("name", COMMANDS)


def train(name: str, folder: Path, *more: str) -> Path:
    COMMANDS[name].main(["--output-dir", str(folder), *SMALL[name], *more])
    return folder


def trained(folder: Path) -> dict[str, torch.Tensor]:
    (weights,) = folder.glob("*.safetensors")
    return load_file(weights)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and len(a) > 10 and all(torch.equal(a[name], b[name]) for name in a)


def stop_at(monkeypatch, name: str, step: int) -> None:
    """The command dies in this step, as by a kill: nothing is saved any more."""

    class Dying(Draws):
        def __init__(self, *key, **more):
            if key[-1] == step:
                raise RuntimeError("killed")
            super().__init__(*key, **more)

    monkeypatch.setattr(networks, "Draws", Dying)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("straight")
    return {name: train(name, folder / name) for name in COMMANDS}


@BOTH
def test_killed_and_continued_equals_never_stopped(straight, tmp_path, monkeypatch, name):
    """Weights, moments, average and step; the learning rate is that of the step."""
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        stop_at(patch, name, 3)
        train(name, tmp_path / "run", "--checkpoint-steps", "2")
    assert {path.name for path in (tmp_path / "run.tmp").iterdir()} == {".lock", "args.json", "checkpoint.pt", "new"}
    assert not (tmp_path / "run").exists()
    seen = []
    monkeypatch.setattr(
        "train_cc.pretrain.networks.Draws", lambda *key, **more: seen.append(key[-1]) or Draws(*key, **more)
    )
    train(name, tmp_path / "run", "--checkpoint-steps", "2")
    assert [step for step in seen if step < 5] == list(range(2, 5))  # the loss at the end has a key of its own
    assert same(trained(straight[name]), trained(tmp_path / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=str)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    run = tmp_path / "run"
    words = ["-m", "train_cc.pretrain.teacher", "--output-dir", str(run), *SMALL["teacher"][:8]]
    command = [sys.executable, *words, "--max-train-steps", "1000000", "--checkpoint-steps", "1"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run.tmp" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told[-2000:]
    assert "Traceback" not in told and "the same command continues" in told
    step = torch.load(tmp_path / "run.tmp" / "checkpoint.pt", weights_only=True)["step"]
    assert f"stopped at step {step} as asked" in told and not run.exists()


@pytest.mark.parametrize("how", ["torn", "flipped", "another", "other shapes"])
def test_a_damaged_checkpoint_is_told_and_training_starts_anew(straight, tmp_path, monkeypatch, capsys, how):
    run, name = tmp_path / "run", "teacher"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        stop_at(patch, name, 3)
        train(name, run, "--checkpoint-steps", "2")
    file = tmp_path / "run.tmp" / "checkpoint.pt"
    content = file.read_bytes()
    if how == "torn":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "another":
        torch.save({"step": 2, "model": {"a": torch.zeros(1)}}, file)
    else:
        state = torch.load(file, weights_only=True)
        moments = next(iter(state["optimizer"]["state"].values()))
        state["average"]["module.y_embedder.embedding_table.weight"] = moments["exp_avg"]
        torch.save(state, file)
    train(name, run)
    assert "starts anew" in capsys.readouterr().err
    assert same(trained(straight[name]), trained(run))


def test_what_is_written_is_read_by_the_rest(straight):
    assert SiT.from_pretrained(straight["teacher"]).config.num_classes == 10
    assert ImageClassifier.from_pretrained(straight["classifier"]).num_classes == 10
    for folder in straight.values():
        assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.glob("*.safetensors"))


@BOTH
def test_a_finished_command_changes_nothing(straight, capsys, name):
    before = {path: path.stat().st_mtime_ns for path in straight[name].iterdir()}
    train(name, straight[name])
    assert "there already" in capsys.readouterr().out
    words = ["--output-dir", str(straight[name]), *SMALL[name], "--learning-rate", "0.5"]
    message = refused(COMMANDS[name].main, words, capsys=capsys)
    assert "--learning-rate 0.002 (asked for: 0.5)" in message and "--overwrite" in message
    other = COMMANDS["teacher" if name == "classifier" else "classifier"]
    assert f"pretrain.{name}" in refused(other.main, [*words[:2], "--overwrite"], capsys=capsys)
    assert {path: path.stat().st_mtime_ns for path in straight[name].iterdir()} == before


@BOTH
def test_an_older_network_stays_until_the_new_one_is_whole(tmp_path, monkeypatch, name):
    run = train(name, tmp_path / "run")
    before = trained(run)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        stop_at(patch, name, 3)
        train(name, run, "--overwrite", "--seed", "7", "--checkpoint-steps", "2")
    assert same(before, trained(run))  # until the new one is whole
    train(name, run, "--overwrite", "--seed", "7")
    assert not same(before, trained(run)) and [path.name for path in tmp_path.iterdir()] == ["run"]


BAD_FLAGS = {
    "teacher": [
        ("--ema-decay", "nan"),
        ("--ema-decay", "1"),
        ("--label-dropout", "1"),
        ("--hidden-size", "1000000000"),
        ("--depth", "0"),
        ("--num-heads", "3"),
        ("--patch-size", "3"),
        ("--data-dir", "somewhere"),
    ],
    "classifier": [
        ("--noise-augmentation", "nan"),
        ("--noise-augmentation", "2"),
        ("--image-size", "0"),
        ("--architecture", "no_such"),
        ("--architecture", "vit_tiny_patch16_224"),  # at 8 x 8, below its patches
        ("--purpose", "both"),
    ],
    "": [
        ("--learning-rate", "inf"),
        ("--learning-rate", "1e300"),
        ("--learning-rate", "0"),
        ("--seed", "-1"),
        ("--batch-size", "1000000000000"),
        ("--max-train-steps", "0"),
        ("--checkpoint-steps", "1.5"),
        ("--output-dir", ""),
        ("--output-dir", "/proc/version/x"),
        ("--output-dir", "a" * 300),
        ("--unknown", "1"),
    ],
}


@pytest.mark.parametrize(
    "name,flag,value",
    [(name, *pair) for name in COMMANDS for pair in BAD_FLAGS[name] + BAD_FLAGS[""]],
    ids=lambda v: str(v)[:24],
)
def test_bad_values_are_refused_before_anything_is_written(tmp_path, capsys, monkeypatch, name, flag, value):
    monkeypatch.chdir(tmp_path)
    small = ["--image-size", "8"] if value.startswith("vit") else []
    message = refused(
        COMMANDS[name].main, ["--output-dir", str(tmp_path / "run"), *small, f"{flag}={value}"], capsys=capsys
    )
    assert flag in message or value[:20] in message, message
    assert not list(tmp_path.iterdir())


def test_a_network_beyond_memory_is_refused(tmp_path, capsys):
    words = ["--output-dir", str(tmp_path / "run"), "--hidden-size", "8192", "--depth", "128"]
    assert "--depth 128 needs 3092 GB" in refused(teacher.main, words, capsys=capsys)
    assert not list(tmp_path.iterdir())


def test_no_weights_of_nan_are_written(tmp_path, capsys, monkeypatch):
    words = ["--output-dir", str(tmp_path / "run"), *SMALL["teacher"], "--checkpoint-steps", "2"]
    monkeypatch.setattr(networks, "warmed_cosine", lambda _: lambda step, steps: float("nan") if step == 1 else 1.0)
    assert "holds NaN or infinity at step 2: lower" in refused(teacher.main, words, capsys=capsys)
    assert not list(tmp_path.iterdir())


def test_nothing_shares_random_numbers_at_one_seed(straight, tmp_path, monkeypatch):
    """Neither draws nor initialisation: teacher, reward and evaluation classifier, of other or one architecture."""
    keys, starts = {}, {}
    for name, kind, *more in (
        ("teacher", "teacher"),
        ("reward", "classifier"),
        ("evaluation", "classifier", "--purpose", "evaluation"),
        ("other", "classifier", "--architecture", "test_efficientnet"),
    ):
        rows = []
        monkeypatch.setattr(
            "train_cc.pretrain.networks.Draws", lambda *key, rows=rows, **kw: rows.append(key) or Draws(*key, **kw)
        )
        train(kind, tmp_path / name, *more, "--max-train-steps", "1")
        keys[name] = torch.stack([Draws(*key).uniform(64) for key in rows])
        starts[name] = trained(tmp_path / name)
    drawn = list(keys.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    reward, evaluation = starts["reward"], starts["evaluation"]
    moved = [key for key, value in reward.items() if value.ndim > 1 and (value - evaluation[key]).abs().max() > 0.05]
    assert len(moved) > 5  # more than one step of 0.002 moves anything


# Data ------------------------------------------------------------------------------------------------------------


def test_a_reference_is_whole_and_made_once(tmp_path, capsys, monkeypatch):
    file = tmp_path / "deep" / "reference.npz"
    data.main(["--output", str(file)])
    with np.load(file) as content:
        assert content["arr_0"].shape == (1797, 8, 8, 1) and content["arr_1"].shape == (1797,)
        assert json.loads(str(content["provenance"]))["stage"] == "pretrain.data"
    whole = file.read_bytes()
    data.main(["--output", str(file)])
    assert "there already" in capsys.readouterr().out
    few = ["--output", str(file), "--num-images", "9"]
    assert "exists" in refused(data.main, few, capsys=capsys) and file.read_bytes() == whole
    data.main([*few, "--overwrite"])
    assert file.read_bytes() != whole and [path.name for path in file.parent.iterdir()] == ["reference.npz"]


@pytest.mark.parametrize("kind", ["folder", "below a file", "dangling link", "too long", "empty"])
def test_odd_outputs_of_the_reference(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr("train_cc.images.load_dataset", lambda *args: pytest.fail("work before the check"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "x")
    output = {
        "folder": tmp_path,
        "below a file": tmp_path / "file" / "x.npz",
        "dangling link": tmp_path / "link",
        "too long": tmp_path / ("x" * 300),
        "empty": "",
    }[kind]
    refused(data.main, ["--output", str(output)], capsys=capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IMAGES, LABELS = np.zeros((20, 28, 28), np.uint8), np.arange(20, dtype=np.uint8) % 10
ODD = {
    "whole": (idx(IMAGES), idx(LABELS), None),
    "empty file": (b"", idx(LABELS), "train-images"),
    "torn": (idx(IMAGES)[:-1], idx(LABELS), "damaged"),
    "torn header": (idx(IMAGES)[:9], idx(LABELS), "train-images"),
    "too long": (idx(IMAGES) + b"x", idx(LABELS), "damaged"),
    "no images": (idx(IMAGES[:0]), idx(LABELS[:0]), "damaged"),
    "a header that lies": (idx(IMAGES)[:4] + b"\xff" * 4 + idx(IMAGES)[8:], idx(LABELS), "damaged"),
    "other sides": (idx(IMAGES[:, :8, :8].copy()), idx(LABELS), "28 x 28"),
    "other type": (idx(IMAGES).replace(b"\x08", b"\x0d", 1), idx(LABELS), "idx"),
    "other count": (idx(IMAGES), idx(LABELS[:-1]), "20 images, 19 labels"),
    "other labels": (idx(IMAGES), idx(LABELS + 17), "another data set"),
    "torn gz": (gzip.compress(idx(IMAGES))[:-9], gzip.compress(idx(LABELS)), "damaged"),
    "no gz": (b"<html>", b"<html>", "idx"),
}


@pytest.mark.parametrize("how", ODD)
def test_idx_files(tmp_path, capsys, how):
    images, labels, told = ODD[how]
    zipped = ".gz" if "gz" in how else ""
    (tmp_path / f"train-images-idx3-ubyte{zipped}").write_bytes(images)
    (tmp_path / f"train-labels-idx1-ubyte{zipped}").write_bytes(labels)
    if told is None:
        loaded = labelled.load_dataset("fashion-mnist", tmp_path)
        assert loaded[0].shape == (20, 3, 32, 32) and loaded[1].tolist() == LABELS.tolist()
        return
    words = ["--dataset", "fashion-mnist", "--data-dir", str(tmp_path), "--output", str(tmp_path / "o.npz")]
    assert told in refused(data.main, words, capsys=capsys)
    assert not (tmp_path / "o.npz").exists()


@pytest.mark.parametrize("kind", ["missing", "a file", "a folder of nothing", "a loop"])
def test_odd_data_dirs(tmp_path, capsys, kind):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    folder = {"missing": "nowhere", "a file": "file", "a folder of nothing": "nothing", "a loop": "loop"}[kind]
    words = ["--dataset", "fashion-mnist", "--data-dir", str(tmp_path / folder), "--output", str(tmp_path / "o.npz")]
    assert "idx files" in refused(data.main, words, capsys=capsys)


def test_two_processes_download_one_after_the_other(tmp_path, monkeypatch):
    """torchvision writes into the file itself: another process would find half of it."""
    monkeypatch.chdir(tmp_path)

    def asked(url, folder, name, md5):
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(folder / ".lock", timeout=0).acquire()

    monkeypatch.setattr("train_cc.images.download_url", asked)
    assert labelled.download() == Path("runs/data/FashionMNIST/raw")


def test_dropout_after_a_restart_is_as_without_one(tmp_path, monkeypatch):
    """Networks with dropout draw from torch's own generator, which no checkpoint holds."""
    plain = ImageClassifier.forward
    monkeypatch.setattr(
        ImageClassifier, "forward", lambda self, x: plain(self, torch.dropout(x, 0.3, train=self.training))
    )
    whole = trained(train("classifier", tmp_path / "whole"))
    with monkeypatch.context() as killed, pytest.raises(RuntimeError):
        stop_at(killed, "classifier", 3)
        train("classifier", tmp_path / "twice", "--checkpoint-steps", "2")
    torch.manual_seed(7)
    assert same(whole, trained(train("classifier", tmp_path / "twice", "--checkpoint-steps", "2")))


def test_the_learning_rate_decays_to_a_twentieth():
    assert resumable.cosine_decay(0, 100) == 1
    assert resumable.cosine_decay(100, 100) == pytest.approx(0.05)
    assert resumable.cosine_decay(50, 100) == pytest.approx(0.525)
