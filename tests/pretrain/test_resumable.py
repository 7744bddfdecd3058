"""train_cc/pretrain/resumable.py: stopped anywhere and continued to the same bits; an older network stays meanwhile."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import refused, words
from train_cc.draws import Draws
from train_cc.models.classifier import ImageClassifier
from train_cc.pretrain import classifier, networks, resumable, teacher

COMMANDS = {"teacher": teacher.main, "classifier": classifier.main}
SMALL = {"teacher": ("--hidden-size", 8, "--num-heads", 1, "--depth", 1), "classifier": ("--image-size", 16)}


def flags(name: str, folder: Path, *more) -> list[str]:
    return words("--output-dir", folder, *SMALL[name], "--batch-size", 4, "--max-train-steps", 5, *more)


def trained(name: str, folder: Path, *more) -> dict[str, torch.Tensor]:
    COMMANDS[name](flags(name, folder, *more))
    return weights(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and len(a) > 10 and all(torch.equal(a[name], b[name]) for name in a)


def stopped(monkeypatch, name: str, folder: Path, *more, stop=lambda: (_ for _ in ()).throw(MemoryError)) -> list[int]:
    """Run the command, with a checkpoint every three steps; ``stop`` is called in step 3. Return the steps begun."""
    steps = []

    class Stopping(Draws):
        def __init__(self, *key, **options):
            steps.append(key[-1])
            if key[-1] == 3:
                stop()
            super().__init__(*key, **options)

    with monkeypatch.context() as patch:
        patch.setattr(networks, "Draws", Stopping)
        try:
            COMMANDS[name](flags(name, folder, "--checkpoint-steps", 3, *more))
        except SystemExit as end:
            assert end.code == 2  # of the MemoryError: as a kill, it saves nothing more
    return [step for step in steps if step < 5]  # the loss at the end has a key of its own


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A teacher that was never stopped."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    trained("teacher", folder)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_and_continued_equals_never_stopped(tmp_path, monkeypatch, name):
    """Weights, moments, average and step; dropout draws from torch's own generator, which no checkpoint holds."""
    plain = ImageClassifier.forward
    monkeypatch.setattr(
        ImageClassifier, "forward", lambda self, x: plain(self, torch.dropout(x, 0.3, train=self.training))
    )
    whole = trained(name, tmp_path / "whole")
    assert stopped(monkeypatch, name, tmp_path / "run") == [0, 1, 2, 3]
    names = {path.name for path in (tmp_path / "run.tmp").iterdir()}
    assert names == {".lock", "args.json", "checkpoint.pt", "new"} and not (tmp_path / "run").exists()
    torch.manual_seed(7)
    assert stopped(monkeypatch, name, tmp_path / "run", stop=lambda: None) == [3, 4]
    assert same(whole, weights(tmp_path / "run"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(straight, tmp_path, monkeypatch, capsys, number):
    run = tmp_path / "run"
    assert stopped(monkeypatch, "teacher", run, stop=lambda: os.kill(os.getpid(), number)) == [0, 1, 2, 3]
    assert "stopped at step 4 as asked; the same command continues" in capsys.readouterr().err and not run.exists()
    assert stopped(monkeypatch, "teacher", run) == [4] and same(weights(straight), weights(run))


@pytest.mark.parametrize("damage", ["torn", "flipped", "another", "other shapes"])
def test_training_starts_anew_with_a_damaged_checkpoint(straight, tmp_path, monkeypatch, capsys, damage):
    run, file = tmp_path / "run", tmp_path / "run.tmp" / "checkpoint.pt"
    stopped(monkeypatch, "teacher", run)
    content, middle = file.read_bytes(), file.stat().st_size // 2
    if damage == "torn":
        file.write_bytes(content[:middle])
    elif damage == "flipped":
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "another":
        torch.save({"step": 2, "model": {"a": torch.zeros(1)}}, file)
    else:  # found after the network has taken its weights
        state = torch.load(file, weights_only=True)
        state["average"] = {name: value[None] for name, value in state["average"].items()}
        torch.save(state, file)
    assert same(weights(straight), trained("teacher", run))
    assert "starts anew" in capsys.readouterr().err


def test_a_finished_network_is_kept_or_replaced_whole(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    before = trained("teacher", run)
    assert stopped(monkeypatch, "teacher", run) == [] and "there already" in capsys.readouterr().out
    message = refused(teacher.main, flags("teacher", run, "--learning-rate", 0.5), capsys=capsys)
    assert "--learning-rate 0.002 (asked for: 0.5)" in message and "--overwrite" in message
    assert "pretrain.teacher" in refused(classifier.main, flags("classifier", run, "--overwrite"), capsys=capsys)
    stopped(monkeypatch, "teacher", run, "--overwrite", "--seed", 7)
    assert same(before, weights(run))
    assert not same(before, trained("teacher", run, "--overwrite", "--seed", 7))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in run.iterdir())


def test_no_weights_of_nan_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(networks, "warmed_cosine", lambda _: lambda step, steps: float("nan") if step == 1 else 1.0)
    message = refused(teacher.main, flags("teacher", tmp_path / "run", "--checkpoint-steps", 2), capsys=capsys)
    assert "holds NaN or infinity at step 2: lower --learning-rate" in message and not list(tmp_path.iterdir())


def test_the_learning_rate_rises_and_decays_to_a_twentieth():
    assert [resumable.cosine_decay(step, 100) for step in (0, 50, 100)] == pytest.approx([1, 0.525, 0.05])
    factor = resumable.warmed_cosine(3)
    assert [factor(step, 10**9) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
