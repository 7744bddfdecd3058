"""evaluation/metrics.py against independent computations, naive ones or other people's, on the same features."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from evaluation import metrics
from evaluation.metrics import (
    directions,
    equal_sets,
    frechet_distance,
    inception_score,
    kid,
    mean_over,
    neighbours,
    precision_recall,
    sliced_wasserstein,
    statistics,
)
from train_cc.io.errors import InputError


def features(count, size, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator)
    return torch.randn(count, size, generator=generator) @ mix + shift


# FID --------------------------------------------------------------------------------------------------------------


def test_fid_equals_the_matrix_square_root():
    a, b = statistics(features(500, 24)), statistics(features(400, 24, seed=1, shift=0.3))
    root = scipy.linalg.sqrtm(a[1] @ b[1]).real
    expected = np.sum((a[0] - b[0]) ** 2) + np.trace(a[1] + b[1] - 2 * root)
    assert frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-6)


def test_fid_with_more_features_than_samples():
    """tr (A^T A B^T B)^(1/2) = the nuclear norm of B A^T, with A, B the scaled centred samples: no square roots."""
    x, y = features(20, 64).double(), features(30, 64, seed=1, shift=0.2).double()
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    nuclear = torch.linalg.svdvals(b @ a.T).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + a.square().sum() + b.square().sum() - 2 * nuclear
    assert frechet_distance(*statistics(x), *statistics(y)) == pytest.approx(expected.item(), rel=1e-6)


def test_fid_of_a_set_with_itself_is_zero_and_never_negative():
    own = [frechet_distance(*a, *a) for a in (statistics(features(40, 24, seed)) for seed in range(8))]
    assert min(own) >= 0 and max(own) < 1e-6


def test_statistics_with_the_rounding_of_fp32_are_taken():
    sigma = np.cov(np.random.default_rng(0).normal(size=(20, 40)), rowvar=False).astype(np.float32)  # singular
    sigma[0, 1] *= 1 + 1e-6
    assert frechet_distance(np.ones(40), sigma, np.zeros(40), sigma) == pytest.approx(40, rel=1e-4)


BAD_STATISTICS = {
    "NaN in mu": (np.array([0, np.nan, 0]), np.eye(3)),
    "infinity in sigma": (np.zeros(3), np.full((3, 3), np.inf)),
    "not symmetric": (np.zeros(3), np.eye(3) + np.eye(3, k=1)),
    "a negative eigenvalue": (np.zeros(3), np.diag([1.0, 1, -0.01])),
    "sigma of another size": (np.zeros(3), np.eye(4)),
    "both of another size": (np.zeros(4), np.eye(4)),
    "beyond all features": (np.full(3, 1e200), np.eye(3)),
}


@pytest.mark.parametrize("what", BAD_STATISTICS)
def test_statistics_that_cannot_be_are_refused(what):
    good = (np.zeros(3), np.eye(3))
    for pair in ((*BAD_STATISTICS[what], *good), (*good, *BAD_STATISTICS[what])):
        with pytest.raises(InputError):
            frechet_distance(*pair)


# Precision, recall, density, coverage -----------------------------------------------------------------------------


def naive_neighbours(reference, generated, k):
    """Naeem et al.'s definitions with all distances at once; <= as ADM has it."""
    reference, generated = reference.double().numpy(), generated.double().numpy()

    def apart(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    reach = np.sort(apart(reference, reference))[:, k]
    reach_generated = np.sort(apart(generated, generated))[:, k]
    cross = apart(reference, generated)
    return {
        "Precision": (cross <= reach[:, None]).any(0).mean(),
        "Recall": (cross <= reach_generated).any(1).mean(),
        "Density": (cross <= reach[:, None]).sum(0).mean() / k,
        "Coverage": (cross.min(1) <= reach).mean(),
    }


@pytest.mark.parametrize(("k", "counts"), [(3, (120, 120)), (1, (90, 140)), (5, (140, 90))])
def test_neighbours_are_the_naive_ones(k, counts, monkeypatch):
    reference, generated = features(counts[0], 4), features(counts[1], 4, seed=1) * 0.9
    expected = naive_neighbours(reference, generated, k)
    assert neighbours(reference, generated, k).figures() == pytest.approx(expected, abs=1e-12)
    assert all(0.05 < value < 2 for value in expected.values()) and len(set(expected.values())) == 4
    assert precision_recall(reference, generated, k) == pytest.approx((expected["Precision"], expected["Recall"]))
    monkeypatch.setattr(metrics, "rows_at_once", lambda others: 7)
    assert neighbours(reference, generated, k).figures() == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_are_torch_fidelitys_by_the_third_neighbour():
    reference, generated = features(300, 8), features(300, 8, seed=1) * 0.9
    expected = calculate_precision_recall_full(generated, reference)
    assert precision_recall(reference, generated) == pytest.approx(expected, abs=1e-7)
    assert precision_recall(reference, generated) == precision_recall(reference, generated, 3)
    assert precision_recall(reference, generated, 2) != precision_recall(reference, generated, 3)


def test_a_block_of_distances_is_bounded():
    assert metrics.rows_at_once(torch.empty(50_000, 1)) * 50_000 * 4 <= 100e6
    assert metrics.rows_at_once(torch.empty(10**8, 0)) == 1


def test_a_point_on_the_edge_of_a_ball_is_inside():
    """Whole numbers on a line, k = 1: every radius is 1, and -1 and 10 are exactly on the outermost edges."""
    generated = torch.tensor([[-1.0], [10.0], [-1.5], [10.5]])
    assert precision_recall(torch.arange(10.0)[:, None], generated, k=1)[0] == 0.5


# Inception Score --------------------------------------------------------------------------------------------------


def test_inception_score_by_hand_with_a_chunk_remainder():
    logits = features(23, 7).double()
    scores = []
    for part in (logits[:10], logits[10:20], logits[20:]):
        p = torch.softmax(part, 1).numpy()
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    assert inception_score(logits, chunk=10) == pytest.approx(np.mean(scores), rel=1e-9)


def test_a_class_whose_share_is_zero_in_float64_is_no_nan():
    certain = torch.tensor([[0.0, -2000.0, -2000.0], [-2000.0, 0.0, -2000.0]])
    assert inception_score(certain) == pytest.approx(2)


def test_chunks_of_five_thousand_in_order():
    """5000 of one class, then one of another: a chunk of its own each, and a score of 1. Any other cut mixes them."""
    logits = torch.zeros(5001, 10)
    logits[:5000, 0], logits[5000, 1] = 100, 100
    assert inception_score(logits) == pytest.approx(1, abs=1e-6)


# KID, sliced Wasserstein, sets ------------------------------------------------------------------------------------


def test_kid_is_the_naive_sum_over_pairs(monkeypatch):
    """All pairs of distinct images of one side, all pairs of both, in two subsets of each."""
    reference, generated = features(60, 5), features(60, 5, seed=1, shift=0.2)
    monkeypatch.setattr(metrics, "LEAST_SUBSETS", 2)

    def kernel(x, y):
        return (float(x @ y) / 5 + 1) ** 3

    def naive(a, b):
        within = [sum(kernel(x, y) for x, y in itertools.permutations(part, 2)) / (30 * 29) for part in (a, b)]
        return sum(within) - 2 * sum(kernel(x, y) for x in a for y in b) / 900

    orders = [torch.randperm(60, generator=metrics.rng_of(metrics.SUBSETS, side, 60)) for side in (0, 1)]
    x, y = generated.double()[orders[0]].numpy(), reference.double()[orders[1]].numpy()
    values = [naive(x[:30], y[:30]), naive(x[30:], y[30:])]
    value, error = kid(reference, generated)
    assert value == pytest.approx(np.mean(values), rel=1e-9)
    assert error == pytest.approx(abs(values[0] - values[1]) / 2, rel=1e-9) and error > 0


def test_sliced_wasserstein_is_scipys_in_each_direction():
    a, b = features(200, 6).double(), features(200, 6, seed=1, shift=0.3).double()
    along = [scipy.stats.wasserstein_distance(a.numpy() @ d, b.numpy() @ d) for d in directions(6).T.numpy()]
    assert sliced_wasserstein(a, b) == pytest.approx(np.mean(along), rel=1e-9)
    assert directions(6).norm(dim=0) == pytest.approx(1) and len(along) == 512 and sliced_wasserstein(a, a) == 0
    assert abs(directions(6).mean()) < 0.05


@pytest.mark.parametrize(
    ("generated", "reference", "size", "number"), [(10, 10, 10, 1), (25, 10, 10, 2), (4, 13, 4, 3), (2, 200, 2, 64)]
)
def test_sets_are_disjoint_and_of_the_same_size(generated, reference, size, number):
    sets = equal_sets(generated, reference, size)
    assert len(sets) == number and {len(part) for pair in sets for part in pair} == {size}
    larger = torch.cat([pair[reference > generated] for pair in sets]).tolist()
    assert len(set(larger)) == len(larger) and larger != sorted(larger)
    a, b = torch.arange(generated).double()[:, None], torch.zeros(reference, 1)
    expected = np.mean([a[rows].sum() for rows, _ in sets])
    assert mean_over(sets, lambda x, y: x.sum().item() + y.sum().item(), a, b) == pytest.approx(expected)


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.full((9, 3), float("nan")), torch.zeros(3, 3), torch.zeros(9), torch.zeros(9, 0),
                                 torch.zeros(9, 3).long(), torch.zeros(9, 3, dtype=torch.complex64),
                                 torch.full((9, 3), 1e300, dtype=torch.double), torch.zeros(9, 4)])  # fmt: skip
def test_features_that_cannot_be_are_refused(bad):
    good = features(9, 3)
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(InputError):
            precision_recall(*pair)
    if bad.shape != (9, 4) and bad.shape != (3, 3):
        with pytest.raises(InputError):
            inception_score(bad)


def test_each_figure_has_its_least_number_of_images():
    a, b = features(30, 3), features(30, 4)
    precision_recall(a[:4], a), precision_recall(a, a[:4]), kid(a, a[:20])
    for call, pair, message in [
        (precision_recall, (a[:3], a), "4 reference images or more"),
        (precision_recall, (a, a[:3]), "4 generated images or more"),
        (kid, (a, a[:19]), "20 generated images or more"),
        (kid, (a, b), "one size"),
        (sliced_wasserstein, (a, b), "one size"),
        (sliced_wasserstein, (a, a[:20]), "equal counts, not 30 and 20"),
        (precision_recall, (a * 1e30, a), "overflow"),
        (inception_score, (a[:0],), "1 generated images or more"),
        *((precision_recall, (a, a, k), "k is") for k in (0, -1, 1.5)),
    ]:
        with pytest.raises(InputError, match=message):
            call(*pair)
