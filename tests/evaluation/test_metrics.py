"""The figures against independent computations, naive ones or other people's, on the same features."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch_fidelity.metric_kid import kid_features_to_metric
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


def test_fid_equals_the_matrix_square_root():
    a, b = statistics(features(500, 24)), statistics(features(400, 24, seed=1, shift=0.3))
    root = scipy.linalg.sqrtm(a[1] @ b[1]).real
    expected = np.sum((a[0] - b[0]) ** 2) + np.trace(a[1] + b[1] - 2 * root)
    assert frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-6)


def test_fid_of_gaussians_in_closed_form():
    """Diagonal covariances: |mu|^2 + sum (s - r)^2."""
    s, r = np.array([1.0, 2.0, 0.0]), np.array([0.5, 3.0, 1.0])
    assert frechet_distance(np.ones(3), np.diag(s**2), np.zeros(3), np.diag(r**2)) == pytest.approx(
        3 + ((s - r) ** 2).sum()
    )


def test_fid_with_more_features_than_samples():
    """tr (A^T A B^T B)^(1/2) = the nuclear norm of B A^T, with A, B the scaled centred samples: no square roots."""
    x, y = features(20, 64).double(), features(30, 64, seed=1, shift=0.2).double()
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    nuclear = torch.linalg.svdvals(b @ a.T).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + a.square().sum() + b.square().sum() - 2 * nuclear
    assert frechet_distance(*statistics(x), *statistics(y)) == pytest.approx(expected.item(), rel=1e-6)


def test_fid_of_a_set_with_itself_is_zero():
    a = statistics(features(300, 16))
    assert frechet_distance(*a, *a) == pytest.approx(0, abs=1e-6)


def brute_precision_recall(reference, generated, k):
    def covered(centres, points):
        hits = 0
        balls = [sorted(torch.dist(c, other).item() for other in centres)[k] for c in centres]
        for p in points:
            hits += any(torch.dist(c, p).item() <= radius for c, radius in zip(centres, balls, strict=True))
        return hits / len(points)

    return covered(reference, generated), covered(generated, reference)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_brute_force(k):
    reference, generated = features(60, 5), features(50, 5, seed=1)
    precision, recall = brute_precision_recall(reference, generated, k)
    assert precision_recall(reference, generated, k) == pytest.approx((precision, recall), abs=1e-6)
    assert 0 < precision < 1 and 0 < recall < 1


def test_precision_is_of_the_generated():
    """Generated samples at one real point: all inside real balls, and they cover almost nothing."""
    reference = features(100, 4)
    generated = reference[:1] + 1e-3 * features(50, 4, seed=1)
    precision, recall = precision_recall(reference, generated)
    assert precision == 1.0 and recall < 0.05


def test_inception_score_by_hand_with_a_chunk_remainder():
    logits = features(23, 7).double()
    scores = []
    for part in (logits[:10], logits[10:20], logits[20:]):
        p = torch.softmax(part, 1).numpy()
        q = p.mean(0)
        scores.append(np.exp((p * (np.log(p) - np.log(q))).sum(1).mean()))
    assert inception_score(logits, chunk=10) == pytest.approx(np.mean(scores), rel=1e-9)


def test_inception_score_bounds():
    certain = torch.eye(10).repeat(20, 1) * 100
    assert inception_score(certain) == pytest.approx(10)
    assert inception_score(torch.zeros(50, 10)) == pytest.approx(1)


def test_too_few_or_not_finite_features():
    with pytest.raises(InputError, match="4 reference images or more"):
        precision_recall(features(3, 2), features(10, 2))
    with pytest.raises(InputError, match="not finite"):
        precision_recall(features(10, 2) * float("nan"), features(10, 2))


def test_frechet_distance_refuses_another_size():
    with pytest.raises(InputError, match="feature size"):
        frechet_distance(*statistics(features(10, 3)), *statistics(features(10, 4)))


def test_a_point_on_the_edge_of_a_ball_is_inside():
    """Whole numbers on a line, k = 1: every radius is 1, and -1 and 10 lie exactly on the outermost edges."""
    reference = torch.arange(10.0)[:, None]
    generated = torch.tensor([[-1.0], [10.0], [-1.5], [10.5]])
    assert precision_recall(reference, generated, k=1)[0] == 0.5


def test_precision_and_recall_take_the_third_neighbour_unless_told():
    reference, generated = features(60, 5), features(50, 5, seed=1)
    results = [precision_recall(reference, generated, k) for k in (2, 3, 4)]
    assert precision_recall(reference, generated) == results[1] and results[0] != results[1] != results[2]


def test_chunks_of_five_thousand_in_order():
    """5000 of one class, then one of another: a chunk of its own each, and a score of 1. Any other cut mixes them."""
    logits = torch.zeros(5001, 10)
    logits[:5000, 0], logits[5000, 1] = 100, 100
    assert inception_score(logits) == pytest.approx(1, abs=1e-6)


def test_four_images_are_enough_and_three_are_not():
    four, many = features(4, 2), features(10, 2)
    for least, sets in (("reference", (four[:3], many)), ("generated", (many, four[:3]))):
        precision_recall(four, many), precision_recall(many, four)
        with pytest.raises(InputError, match=f"4 {least} images or more"):
            precision_recall(*sets)


@pytest.mark.parametrize("sizes", [(3, 3, 3, 4), (3, 4, 3, 3), (3, 3, 4, 3), (4, 3, 3, 3), (3, 4, 3, 4), (4, 3, 4, 3)])
def test_statistics_of_two_sizes_are_refused(sizes):
    """Of mu and sigma, generated and reference: whichever differs."""
    mu_g, sigma_g, mu_r, sigma_r = sizes
    with pytest.raises(InputError, match=r"feature size|sigma has shape"):
        frechet_distance(np.zeros(mu_g), np.eye(sigma_g), np.zeros(mu_r), np.eye(sigma_r))


def test_rounding_never_makes_a_distance_negative():
    sets = [statistics(features(40, 24, seed)) for seed in range(8)]
    assert min(frechet_distance(*a, *a) for a in sets) >= 0


# Distances beside FID


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
    assert precision_recall(reference, generated) == pytest.approx(
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
