"""evaluation/figures/row.py, and what its tables and spaces make of rows: sets, intervals, classes, seeds, notes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation.figures import tables
from evaluation.figures.row import Embedded, Reference, notes_of, row_of
from evaluation.figures.spaces import stored_by_space
from evaluation.metrics import CHUNK, equal_sets, neighbours, sliced_wasserstein
from train_cc.io.errors import InputError
from train_cc.io.figures import METRICS
from train_cc.models.features import load_space


def embedded(features, labels=None):
    logits = torch.randn(len(features), 5, generator=torch.Generator().manual_seed(1))
    return Embedded(features, logits, labels, labels is not None)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_intervals_hold_every_figure():
    labels = np.arange(200) % 5
    real = Reference(embedded(normal(200, 4), labels))
    row = row_of(embedded(normal(200, 4, seed=1) * 1.2, labels), real, 200, 30, {"FD": 0.1, "SW": 0.05})
    assert set(row["intervals"]) == set(row["figures"]) == set(METRICS) - {"ADM recall", "ADM precision"}
    for name, (low, high) in row["intervals"].items():
        assert low < row["figures"][name] < high, name
        if name in ("Precision", "Recall", "accuracy"):
            assert high - low < 0.25
    low, high = row["intervals"]["KID"]
    assert high - low == pytest.approx(2 * 1.96 * row["standard_errors"]["KID"])
    assert row["figures"]["FDr"] == pytest.approx(row["figures"]["FID"] / 0.1)  # one set of all: the same distance
    with pytest.raises(InputError, match="nothing to measure by"):
        row_of(embedded(normal(200, 4)), real, 200, 0, {"FD": 0.0, "SW": 0.05})


def test_figures_of_sets_are_means_over_equal_counts():
    """70 samples against 30 images: two sets of 30, each as a table of its own would have it."""
    real, samples = normal(30, 3), normal(70, 3, seed=1) * 1.1
    row = row_of(embedded(samples), Reference(embedded(real)), 30)["figures"]
    sets = equal_sets(70, 30, 30)
    assert len(sets) == 2
    parts = [neighbours(real[b], samples[a]).figures() for a, b in sets]
    for name in ("Precision", "Recall", "Density", "Coverage"):
        assert row[name] == pytest.approx(np.mean([part[name] for part in parts])) and parts[0][name] != parts[1][name]
    apart = [sliced_wasserstein(samples[a], real[b]) for a, b in sets]
    assert row["SW"] == pytest.approx(np.mean(apart)) and "FDr" not in row


def test_recall_and_accuracy_of_a_class():
    """Samples that are the real ones, but for class 1, which is far away and taken for class 0."""
    labels = np.arange(60) % 3
    real = normal(60, 2) + 10 * torch.from_numpy(labels)[:, None]
    samples = real + 100 * torch.from_numpy(labels == 1)[:, None]
    logits = torch.nn.functional.one_hot(torch.from_numpy(np.where(labels == 1, 0, labels)), 3).float()
    reference = Reference(Embedded(real, logits, labels, True))
    good, bad = (row_of(Embedded(x, logits, labels, True), reference, 60) for x in (real, samples))
    assert good["classes"] == {"recall": [1, 1, 1], "accuracy": [1, 0, 1]}
    assert bad["classes"]["recall"][1] < 0.9
    (line,) = tables.suffered({"first": good, "second": bad})
    assert line.startswith("second: recall against first fell most in class 1 (1.00 to 0.")
    unlabelled = {"classes": {"recall": None}}
    assert tables.suffered({"a": unlabelled, "b": unlabelled}) == []
    assert tables.suffered({"a": good, "b": unlabelled, "c": {}, "d": good}) == ["d: in none"]


def test_samples_in_the_order_of_their_classes_are_noted():
    """Also without labels, by the classes that the judge sees; in random order there is nothing to note."""
    classes = np.arange(CHUNK + 200) // (CHUNK // 10 + 20)
    order = np.random.default_rng(0).permutation(len(classes))
    logits = 100 * torch.nn.functional.one_hot(torch.from_numpy(classes), 10).float()
    features = normal(len(classes), 2)
    (note,) = notes_of(Embedded(features, logits, None, True))
    assert "class by class" in note and "chunks of 5000: 5" in note and "in random order 9." in note
    assert notes_of(Embedded(features, logits[order], classes[order], True)) == []


def test_rows_of_several_seeds_have_a_mean_and_a_spread():
    rows = {
        f"{name}, seed {seed}": {"figures": {"FID": fid, "Recall": 0.5, "IS": 9.0, "Precision": seed / 4}, "images": 8}
        for name, seed, fid in (("a", 1, 1.0), ("a", 2, 2.0), ("a", 3, 3.0), ("b", 1, 4.0))
    }
    _, _, first, second = tables.table(tables.means_of(rows), 10_000).splitlines()
    assert first == "| a | 3 | 2.00 +- 1.00 | 0.500 +- 0.000 | 9.00 +- 0.00 | 0.500 +- 0.250 |"
    assert second == "| b | 1 | 4.00 | 0.500 | 9.00 | 0.250 |"
    real = tables.means_of(rows | {"held-out real": {"figures": {"FDr": 1.0}, "images": 4}})["held-out real"]
    assert real["seeds"] == 1 and real["standard_deviations"] == {}


@pytest.mark.parametrize("count,head", [(50_000, "FID"), (60_000, "FID"), (5_000, "FID-5k"), (1_800, "FID-1.8k")])
def test_a_figure_of_few_images_names_their_number(count, head):
    assert tables.heads_of(["FID"], count) == [head]


def test_pixels_are_the_images_themselves():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    space = load_space("pixels", image_shape=(8, 8, 1))
    features, logits = space.of(images, 2)
    assert logits is None and torch.equal(features * 255, torch.from_numpy(images).reshape(5, 64).float())


def test_statistics_without_a_name_are_inceptions_if_as_wide(tmp_path):
    """ADM's file, of whose second statistics sFID is made."""
    content = {"arr_0": None, "mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.ones(6), "sigma_s": 2 * np.eye(6)}
    names = {"timm:resnet50": 2048, "inception": 2048, "inception-spatial": 6}
    wide, *others = (SimpleNamespace(name=name, size=size) for name, size in names.items())
    with pytest.raises(InputError, match="of Inception's features: ask for that space"):
        stored_by_space(content, tmp_path, [wide])
    stored = stored_by_space(content, tmp_path, [wide, *others])
    assert stored.keys() == {"inception", "inception-spatial"}
    assert np.array_equal(stored["inception-spatial"][1], 2 * np.eye(6))
    with pytest.raises(InputError, match="mu and sigma of inception without images, and timm:resnet50 needs"):
        stored_by_space({"mu": content["mu"], "sigma": content["sigma"]}, tmp_path, [wide, *others[:1]])
    narrow = {"arr_0": None, "mu": np.zeros(2), "sigma": np.eye(2)}
    with pytest.raises(InputError, match="can be of a and b: ask for one"):
        stored_by_space(narrow, tmp_path, [SimpleNamespace(name=name, size=2) for name in "ab"])
