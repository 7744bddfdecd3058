"""Distances beside FID against naive or other people's computations on the same features."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from evaluation import metrics
from evaluation.metrics import directions, equal_sets, kid, mean_over, neighbours, sliced_wasserstein
from tests.test_metrics import features
from train_cc.io.errors import InputError


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
    monkeypatch.setattr(metrics, "rows_at_once", lambda others: 7)
    assert neighbours(reference, generated, k).figures() == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_are_torch_fidelitys():
    reference, generated = features(300, 8), features(300, 8, seed=1) * 0.9
    assert metrics.precision_recall(reference, generated) == pytest.approx(
        calculate_precision_recall_full(generated, reference), abs=1e-7
    )


def test_a_block_of_distances_is_bounded():
    assert metrics.rows_at_once(torch.empty(50_000, 1)) * 50_000 * 4 <= 100e6
    assert metrics.rows_at_once(torch.empty(10**8, 0)) == 1


def test_kid_is_the_naive_sum_over_pairs(monkeypatch):
    """All pairs of distinct images of one side, all pairs of both; by subsets of the size that is asked for."""
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


def test_kid_agrees_with_torch_fidelitys_random_subsets():
    reference, generated = features(2000, 8).double(), features(2000, 8, seed=1).double()
    settings = {"kid_subsets": 60, "kid_subset_size": 200, "kid_kernel": "poly", "kid_kernel_poly_degree": 3}
    settings |= {"kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1, "rng_seed": 0, "verbose": False}
    found = kid_features_to_metric(generated, reference, **settings)
    value, error = kid(reference, generated)
    assert abs(value - found["kernel_inception_distance_mean"]) < 3 * error
    assert 2 < found["kernel_inception_distance_std"] / error < 5  # of one subset, against that of ten


def test_kid_of_one_distribution_is_zero_within_its_error():
    mix = features(6, 6, seed=9)
    z = []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(400, 6, generator=generator) @ mix for _ in range(2))
        value, error = kid(a, b)
        z.append(value / error)
    assert abs(np.mean(z)) < 0.7 and 0.6 < np.std(z) < 1.8


def test_sliced_wasserstein_is_scipys_in_each_direction():
    a, b = features(200, 6).double(), features(200, 6, seed=1, shift=0.3).double()
    along = [scipy.stats.wasserstein_distance(a.numpy() @ d, b.numpy() @ d) for d in directions(6).T.numpy()]
    assert sliced_wasserstein(a, b) == pytest.approx(np.mean(along), rel=1e-9)
    assert directions(6).norm(dim=0) == pytest.approx(1) and len(along) == 512 and sliced_wasserstein(a, a) == 0
    assert abs(directions(6).mean()) < 0.05


def test_sliced_wasserstein_of_a_shift_in_closed_form():
    """A shift by s moves every projection by |s . d|."""
    a, s = features(50, 4).double(), torch.tensor([3.0, 0, -1, 0.5]).double()
    assert sliced_wasserstein(a, a + s) == pytest.approx((s @ directions(4)).abs().mean().item(), rel=1e-9)


@pytest.mark.parametrize(
    ("generated", "reference", "size", "number"), [(10, 10, 10, 1), (25, 10, 10, 2), (4, 13, 4, 3), (2, 200, 2, 64)]
)
def test_sets_are_disjoint_and_of_one_size(generated, reference, size, number):
    sets = equal_sets(generated, reference, size)
    assert len(sets) == number and {len(part) for pair in sets for part in pair} == {size}
    larger = torch.cat([pair[reference > generated] for pair in sets]).tolist()
    assert len(set(larger)) == len(larger) and larger != sorted(larger)
    a, b = torch.arange(generated).double()[:, None], torch.zeros(reference, 1)
    expected = np.mean([a[rows].sum() for rows, _ in sets])
    assert mean_over(sets, lambda x, y: x.sum().item() + y.sum().item(), a, b) == pytest.approx(expected)


def test_what_is_no_pair_of_features_is_refused():
    a, b = features(30, 3), features(30, 4)
    for call in (kid, sliced_wasserstein):
        with pytest.raises(InputError, match="one size"):
            call(a, b)
    with pytest.raises(InputError, match="equal counts, not 30 and 20"):
        sliced_wasserstein(a, a[:20])
    with pytest.raises(InputError, match="20 generated images or more"):
        kid(a, a[:19])
    with pytest.raises(InputError, match="not finite"):
        sliced_wasserstein(a, a / 0)
