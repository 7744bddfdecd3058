"""The figures against independent computations on the same features."""

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluation.metrics import frechet_distance, inception_score, precision_recall, statistics
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
