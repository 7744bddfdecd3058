"""evaluation/statistics.py: the figures, any number of processes, a stop and its continuation, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.samples import gathering
from evaluation.samples.gathering import merged, part_moments
from evaluation.statistics import main
from tests.conftest import refused
from train_cc.images import load_dataset
from train_cc.models.features import load_space


@pytest.fixture
def space(reward_folder):
    return f"classifier:{reward_folder}"


def digits(file: Path, rows=slice(60), **arrays: np.ndarray) -> Path:
    """Some digits as an evaluation reference."""
    images, labels = load_dataset("digits")
    arrays = {"arr_0": images[rows].permute(0, 2, 3, 1).numpy(), "arr_1": labels[rows].numpy()} | arrays
    np.savez(file, **arrays)
    return file


@pytest.fixture
def npz(tmp_path):
    return digits(tmp_path / "real.npz")


def words(images, space, output, *more) -> list[str]:
    base = ["--images", images, "--space", space, "--output", output, "--batch-size", 7, "--workers", 0]
    return [str(word) for word in (*base, *more)]


def made(images, space, output, *more) -> dict[str, np.ndarray]:
    main(words(images, space, output, *more))
    with np.load(output) as file:
        return dict(file)


def largest_difference(a: dict, b: dict) -> float:
    names = a.keys() - {"space"}
    assert names == b.keys() - {"space"} and len(names) == 5
    return max(np.abs(a[name] - b[name]).max() for name in names)


# The figures ------------------------------------------------------------------------------------------------------


def test_the_file_holds_what_numpy_computes_and_is_made_once(npz, space, tmp_path, capsys):
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
    whole = (tmp_path / "s.npz").read_bytes()
    main(words(npz, space, tmp_path / "s.npz", "--shard-size", 20))
    assert "there already" in capsys.readouterr().out and (tmp_path / "s.npz").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real.npz", "s.npz"]


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


def test_files_and_folders_give_the_same(npz, space, tmp_path, capsys):
    with np.load(npz) as file:
        images, labels = file["arr_0"], file["arr_1"]
    order = np.argsort(labels, kind="stable")
    for i in order:
        folder = tmp_path / "png" / f"{labels[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i, :, :, 0]).save(folder / f"{i:03d}.png")
    of_file = made(digits(tmp_path / "sorted.npz", order), space, tmp_path / "a.npz")
    of_folder = made(tmp_path / "png", space, tmp_path / "b.npz", "--workers", 1)
    assert largest_difference(of_file, of_folder) == 0
    assert "class 0 is 0, 1 is 1, 2 is 2, 3 is 3, ..., 9 is 9, by the folders' names" in capsys.readouterr().out
    assert json.loads(str(of_folder["space"]))["source"]["classes"] == [str(k) for k in range(10)]
    flat = made(tmp_path / "png" / "3", space, tmp_path / "c.npz")  # no class folders: no labels
    assert "class_mu" not in flat
    np.testing.assert_allclose(flat["mu"], of_file["class_mu"][3], rtol=1e-5, atol=1e-6)


def test_labels_with_gaps_leave_classes_empty(space, tmp_path, capsys):
    found = made(digits(tmp_path / "gap.npz", slice(20), arr_1=np.array([0, 2] * 10)), space, tmp_path / "s.npz")
    output = capsys.readouterr().out
    assert "WARNING: classes [1] have no image" in output and "the covariance is singular" in output
    assert found["class_count"].tolist() == [10, 0, 10] and np.abs(found["class_mu"][1]).max() == 0


# Processes and stops ----------------------------------------------------------------------------------------------


def test_the_threads_of_a_launcher_change_nothing(npz, space, tmp_path):
    """That several processes give the same file: tests.io.test_processes.py."""
    alone, threads = made(npz, space, tmp_path / "1.npz", "--shard-size", 9), torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert largest_difference(alone, made(npz, space, tmp_path / "threads.npz", "--shard-size", 9)) == 0
    finally:
        torch.set_num_threads(threads)


def test_a_stopped_command_continues_from_its_whole_parts_and_takes_none_of_another(
    npz, space, tmp_path, monkeypatch, capsys
):
    write, parts = gathering.write_part, []

    def stopped(path, **content):
        if len(parts) == 2:
            raise KeyboardInterrupt
        parts.append(path.name)
        write(path, **content)

    def stop(output: Path) -> Path:
        parts.clear()
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(gathering, "write_part", stopped)
            main(words(npz, space, output, "--shard-size", 12))
        assert not output.exists() and len(list(output.with_name(output.name + ".tmp").glob("*.npz"))) == 2
        return output

    straight = made(npz, space, tmp_path / "straight.npz", "--shard-size", 12)
    output = stop(tmp_path / "s.npz")
    (tmp_path / "s.npz.tmp" / parts[0]).write_bytes(b"damaged")
    monkeypatch.setattr(gathering, "write_part", lambda path, **c: parts.append(path.name) or write(path, **c))
    again = made(npz, space, output, "--shard-size", 12, "--batch-size", 7)
    assert "made again: " in capsys.readouterr().out
    assert parts == [f"{first:09d}-{first + 12:09d}.npz" for first in (0, 12, 0, 24, 36, 48)]
    assert largest_difference(straight, again) == 0 and not (tmp_path / "s.npz.tmp").exists()
    monkeypatch.undo()
    other = digits(tmp_path / "other.npz", slice(60, 120))
    expected = made(other, space, tmp_path / "expected.npz", "--shard-size", 12)
    assert largest_difference(expected, made(other, space, stop(tmp_path / "t.npz"), "--shard-size", 12)) == 0


# Bad input --------------------------------------------------------------------------------------------------------


def test_commands_that_cannot_work_are_refused_before_anything_is_written(npz, space, tmp_path, capsys):
    (tmp_path / "mine.npz").write_bytes(b"mine")
    (tmp_path / "taken.npz.tmp").mkdir()
    (tmp_path / "taken.npz.tmp" / "mine").write_bytes(b"mine")
    one = digits(tmp_path / "one.npz", slice(1))
    colours = digits(tmp_path / "colours.npz", slice(9), arr_0=np.full((9, 8, 8, 3), 9, np.uint8))
    made(npz, space, tmp_path / "s.npz")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.npz")}
    output = tmp_path / "o.npz"
    for arguments, message in (
        ((npz, "clip", output), "'clip' is no feature space"),
        ((npz, space, output, "--shard-size", 0), "--shard-size is 0"),
        ((one, space, output), "holds 1 image(s); a covariance needs 2"),
        ((colours, space, output), "these have 3"),
        ((npz, space, tmp_path / "mine.npz"), "mine.npz exists"),
        ((npz, space, tmp_path / "taken.npz"), "no command of this project"),
        ((digits(tmp_path / "s2.npz", slice(50)), space, tmp_path / "s.npz"), "made with images 60 (asked for: 50)"),
    ):
        assert message in refused(main, words(*arguments), capsys=capsys)
        assert not output.exists()
    assert before == {path: path.read_bytes() for path in before}
    made(tmp_path / "s2.npz", space, tmp_path / "s.npz", "--overwrite")
    assert (tmp_path / "s.npz").read_bytes() != before[tmp_path / "s.npz"]


def test_features_that_are_not_finite_name_their_image(npz, space, tmp_path, capsys, monkeypatch):
    loaded = load_space(space)
    monkeypatch.setattr(gathering, "load_space", lambda *rest: loaded)
    loaded.register_forward_hook(lambda module, args, out: out / (args[0].shape[0] != 4))  # the last batch of 60 by 7
    message = refused(main, words(npz, space, tmp_path / "s.npz"), capsys=capsys)
    assert "gives NaN or infinity for image 56 of" in message
    assert not (tmp_path / "s.npz").exists()
