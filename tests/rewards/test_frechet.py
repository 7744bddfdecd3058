"""The Frechet reward: its gradient against autograd, its memory over chunks, processes and checkpoints."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from evaluation import metrics
from train_cc.io.errors import InputError
from train_cc.rewards.build import window_note
from train_cc.rewards.frechet import (
    Frechet,
    decayed,
    moments,
    ridge_of,
    square_root,
    sums_of,
    transport,
    transport_matrix,
)
from train_cc.rewards.frechet import (
    distance_by_class as frechet_distance,
)
from train_cc.rewards.statistics import Statistics
from train_cc.rewards.terms import Reward, Term, reward_terms


def covariance(size: int, rank: int, seed: int) -> torch.Tensor:
    x = torch.randn(rank, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / rank


def real_statistics(size: int, classes: int, seed: int = 5, sha256: str = "a" * 64) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    class_mu = torch.randn(classes, size, generator=generator, dtype=torch.float64)
    count = torch.full((classes,), 100.0, dtype=torch.float64)
    within = covariance(size, 4 * size, seed)
    sigma = within + torch.cov(class_mu.T, correction=0)
    return Statistics(class_mu.mean(dim=0), sigma, class_mu, count, within, {}, sha256)


def samples(count: int, size: int, classes: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(count, size, generator=generator, dtype=torch.float64) * 0.7 + 0.2
    return f @ covariance(size, 3 * size, seed + 1), torch.arange(count) % classes


def reward(size=6, classes=3, **options) -> Frechet:
    options = {"window": 100, "features_of": lambda images: images.flatten(1)} | options
    return Frechet(statistics=options.pop("statistics", real_statistics(size, classes)), num_classes=classes, **options)


def differentiable_distance(f, y, mu_real, sigma_real) -> torch.Tensor:
    """FD as written down, for autograd: the trace of a matrix square root by its singular values, no formula of ours.

    tr (S S_r)^(1/2) is the nuclear norm of X R for S = X^T X and R = S_r^(1/2).
    """
    classes = len(mu_real)
    mu = torch.stack([f[y == k].mean(dim=0) for k in range(classes)])
    share = torch.bincount(y, minlength=classes).double() / len(y)
    x = (f - mu[y]) / len(f) ** 0.5
    values, vectors = np.linalg.eigh(sigma_real.numpy())
    root = torch.from_numpy((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)
    between = (share * (mu - mu_real).square().sum(dim=1)).sum()
    return between + x.square().sum() + sigma_real.trace() - 2 * torch.linalg.svdvals(x @ root).sum()


# Mathematics


@pytest.mark.parametrize("size", [1, 8, 256])
def test_the_transport_takes_one_covariance_to_the_other(size):
    sigma, sigma_real = covariance(size, 4 * size, 0), 3 * covariance(size, 4 * size, 1)
    a = transport_matrix(sigma.float(), sigma_real)  # any dtype in
    assert a.dtype == torch.float64 and a.shape == (size, size)
    a = transport_matrix(sigma, sigma_real)
    torch.testing.assert_close(a @ sigma @ a, sigma_real, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a, a.T, rtol=1e-12, atol=1e-12)
    assert torch.linalg.eigvalsh(a)[0] > 0  # optimal: the symmetric positive one
    assert size == 1 or (a - torch.diag(a.diagonal())).abs().max() > 1e-3


def test_small_directions_are_not_shrunk():
    """Two equal covariances: the transport is the identity, also where the variance is 1e-5 of the largest."""
    variances = torch.logspace(0, -5, 8, dtype=torch.float64)
    basis = torch.linalg.qr(covariance(8, 8, 3))[0]
    sigma = (basis * variances) @ basis.T
    a = transport(sigma, square_root(sigma), largest_gain=100)[0]
    torch.testing.assert_close(a, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-4)
    a = transport(sigma / 100**3, square_root(sigma), largest_gain=100)[0]  # 1000 times narrower: 100 times wider
    torch.testing.assert_close(a, 100 * torch.eye(8, dtype=torch.float64), rtol=0, atol=1)


def test_singular_covariances_are_finite():
    full, thin = covariance(16, 64, 0), covariance(16, 5, 1)
    a = transport_matrix(full, thin)  # fewer real images than features: still exact
    torch.testing.assert_close(a @ full @ a, thin, rtol=1e-8, atol=1e-8)
    dead = full.clone()
    dead[3], dead[:, 3] = 0, 0  # a unit that never fires
    zero = torch.zeros(16, 16)
    for sigma in (full, thin, dead, zero):
        for sigma_real in (full, thin, dead, zero):
            a = transport_matrix(sigma, sigma_real)
            assert torch.isfinite(a).all()
            bounded = transport(sigma.double(), square_root(sigma_real.double()), largest_gain=10)[0]
            assert torch.linalg.eigvalsh(bounded)[-1] <= 16 * 10  # a sample beyond S does not explode


@pytest.mark.parametrize(("size", "classes"), [(4, 1), (32, 5), (256, 1), (256, 4)])
def test_the_gradient_is_autograds_through_the_matrix_square_root(size, classes):
    """d FD / d f_i = (2 / B) (f_i - T(f_i | y_i)), with classes and without, to 1e-10."""
    count = 3 * size
    (f, y), real = samples(count, size, classes), real_statistics(size, classes)
    free = f.clone().requires_grad_()
    distance = differentiable_distance(free, y, real.class_mu, real.within)
    (expected,) = torch.autograd.grad(distance, free)
    fd = reward(size, classes, statistics=real, window=count)
    fd.observe(f, y)
    fd.commit()
    found = fd.solve()
    assert expected.abs().max() > 1e-3
    assert (2 / count * (f - fd.target(f, y)) - expected).abs().max() < 1e-10
    assert found.item() == pytest.approx(distance.item(), rel=1e-10)
    # The losses' mean has this gradient, and FD as its value.
    images = f.view(count, size, 1, 1).clone().requires_grad_()
    losses, _ = fd.losses(images, y)
    (gradient,) = torch.autograd.grad(losses.mean(), images)
    assert (gradient.flatten(1) - expected).abs().max() < 1e-10
    assert losses.mean().item() == pytest.approx(distance.item(), rel=1e-9)


@pytest.mark.parametrize(("size", "classes"), [(4, 1), (32, 5)])
def test_kl_has_autograds_gradient_and_torchs_value(size, classes):
    """d KL / d f_i = (1 / B) (f_i - T(f_i | y_i)), KL as torch.distributions has it, for covariances plus the ridge."""
    count = 3 * size
    (f, y), real = samples(count, size, classes), real_statistics(size, classes)
    ridge = ridge_of(real.within)
    assert torch.equal(ridge[0, 0], torch.linalg.eigvalsh(real.within)[int(0.6 * size)])
    free = f.clone().requires_grad_()
    mu = torch.stack([free[y == k].mean(dim=0) for k in range(classes)])
    x = free - mu[y]
    of_classes = (torch.distributions.MultivariateNormal(m, x.T @ x / count + ridge) for m in mu)
    of_real = (torch.distributions.MultivariateNormal(m, real.within + ridge) for m in real.class_mu)
    share = torch.bincount(y, minlength=classes).double() / count
    each = [torch.distributions.kl_divergence(p, q) for p, q in zip(of_classes, of_real, strict=True)]
    divergence = (torch.stack(each) * share).sum()
    (expected,) = torch.autograd.grad(divergence, free)
    kl = reward(size, classes, statistics=real, window=count, kl=True)
    kl.observe(f, y)
    kl.commit()
    assert kl.solve().item() == pytest.approx(divergence.item(), rel=1e-10) and divergence > 0.1
    assert expected.abs().max() > 1e-3
    assert ((f - kl.target(f, y)) / count - expected).abs().max() < 1e-10


def test_kl_is_finite_where_real_features_are_constant():
    thin = replace(real_statistics(16, 2), within=covariance(16, 5, 1))
    kl = reward(16, 2, statistics=thin, kl=True)
    f, y = samples(40, 16, 2)
    kl.observe(f, y)
    kl.commit()
    assert torch.isfinite(kl.solve()) and torch.isfinite(kl.target(f, y)).all()


def test_with_one_class_it_is_the_distance_of_fid():
    (f, y), real = samples(50, 6, 1), real_statistics(6, 1)
    sums = sums_of(f, y, 1)
    mu, sigma = moments(sums, real.class_mu)
    trace_root = transport(sigma, square_root(real.sigma))[1]
    found = frechet_distance(mu, sigma, real.class_mu, real.sigma, trace_root, torch.ones(1))
    pairs = [each.numpy() for each in (mu[0], sigma, real.class_mu[0], real.sigma)]
    assert found.item() == pytest.approx(metrics.frechet_distance(*pairs), rel=1e-10) and found > 0.1


def test_sums_decay_and_a_window_holds_its_samples():
    f, y = samples(40, 3, 2)
    sums = sums_of(f[:20], y[:20], 2)
    later = decayed(sums, sums_of(f[20:], y[20:], 2), window=80)
    torch.testing.assert_close(later.s[1], 0.75 * f[1:20:2].sum(dim=0) + f[21::2].sum(dim=0))
    torch.testing.assert_close(later.m, 0.75 * f[:20].T @ f[:20] + f[20:].T @ f[20:])
    for _ in range(100):
        later = decayed(later, sums_of(f[:20], y[:20], 2), window=80)
    assert later.n.sum().item() == pytest.approx(80)
    all_new = decayed(sums, sums_of(f, y, 2), window=30)  # a batch beyond the window is the window
    torch.testing.assert_close(all_new.n, torch.tensor([20.0, 20.0], dtype=torch.float64))


def test_a_class_without_samples_has_nothing_to_move():
    (f, y), real = samples(30, 4, 2), real_statistics(4, 3)
    mu, _ = moments(sums_of(f, y, 3), real.class_mu)
    assert torch.equal(mu[2], real.class_mu[2]) and not torch.equal(mu[1], real.class_mu[1])


# State


def term_of(fd, x0, y, decode=lambda x: x, micro_batch=0, of_matching=None) -> Term:
    of_matching = torch.ones_like(x0) if of_matching is None else of_matching
    (term,) = reward_terms([Reward("frechet", 1.0, fd.losses, fd)], decode, x0, y, micro_batch, of_matching)
    return term


def cycle(fd: Frechet, turn: int, parts: int = 1, part: int | None = None) -> None:
    """An estimator's and a generator's turn of 12 samples in ``parts`` device batches, or ``part`` of them alone."""
    chosen = range(parts) if part is None else [part]
    for estimator in (True, False):
        f, y = samples(12, 6, 3, seed=100 + 2 * turn + estimator)
        if not estimator:
            fd.solve()
        for i in chosen:
            rows = slice(i * 12 // parts, (i + 1) * 12 // parts)
            if estimator:
                fd.observe(f[rows], y[rows])
            else:
                x0 = f[rows].float().view(-1, 6, 1, 1)
                term_of(fd, x0, y[rows], of_matching=x0 * 0.1 / len(x0))  # a mean over the device batch, as ours
        (fd.commit if estimator else fd.end_turn)()


def test_chunks_and_processes_give_what_one_batch_gives():
    one, two = reward(), reward()
    for turn in range(4):
        cycle(one, turn)
        cycle(two, turn, parts=2)
    assert one.scale == pytest.approx(two.scale, rel=1e-6) and one.scale > 0
    for name, value in one.sums._asdict().items():
        torch.testing.assert_close(getattr(two.sums, name), value, rtol=1e-12, atol=1e-12)
    assert two.solve().item() == pytest.approx(one.solve().item(), rel=1e-12)
    # Two processes in step: the sum of both parts is what `reduce` gives to each.
    sent = [[], []]
    ranks = [reward(reduce=lambda tensor, own=own: own.append(tensor) or tensor) for own in sent]
    for rank, fd in enumerate(ranks):
        f, y = samples(12, 6, 3)
        fd.observe(f[rank::2], y[rank::2])
        fd.commit()
    total = sent[0][0] + sent[1][0]
    both = reward(reduce=lambda tensor: total)
    f, y = samples(12, 6, 3)
    both.observe(f[::2], y[::2])
    both.commit()
    alone = reward()
    alone.observe(f, y)
    alone.commit()
    for name, value in alone.sums._asdict().items():
        torch.testing.assert_close(getattr(both.sums, name), value, rtol=1e-13, atol=1e-13)


def test_nothing_moves_before_the_global_batch_is_whole():
    fd = reward()
    fd.observe(*samples(6, 6, 3))
    assert fd.samples == 0
    with pytest.raises(RuntimeError, match="not committed"):
        fd.state_dict()
    fd.observe(*samples(6, 6, 3))
    fd.commit()
    assert fd.samples == 12


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("turns", [1, 5])
def test_the_state_resumes_to_the_bit(turns, kl):
    """While the scale is measured, and after."""
    straight, broken = reward(kl=kl), reward(kl=kl)
    for turn in range(turns + 3):
        cycle(straight, turn)
    for turn in range(turns):
        cycle(broken, turn)
    resumed = reward(kl=kl)
    resumed.load_state_dict(broken.state_dict())
    for turn in range(turns, turns + 3):
        cycle(resumed, turn)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert straight.scale == resumed.scale and straight.scale > 0
    assert straight.solve().item() == resumed.solve().item()


def test_the_scale_makes_it_begin_as_strong_as_matching():
    fd, norms = reward(weight=0.5), []
    x0, y = torch.randn(12, 6, 1, 1, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    fd.observe(x0.flatten(1), y)
    fd.commit()
    for turn in range(4):
        fd.solve()
        term = term_of(fd, x0, y, of_matching=torch.full_like(x0, 1.0 + turn))
        assert (term.gradient.norm() > 0) == (turn == 3)
        assert term.figures["scale_frechet"].item() == (fd.scale or 0)
        if turn < 3:
            free = x0.clone().requires_grad_()
            target = fd.target(x0.flatten(1), y)
            (raw,) = torch.autograd.grad((free.flatten(1) - target).square().sum() / 12, free)
            norms.append(raw.norm().item())
        fd.end_turn()
    matching = x0.numel() ** 0.5 * 2  # the mean of 1, 2, 3: the fourth turn is not measured
    assert fd.scale == pytest.approx(0.5 * matching / np.mean(norms), rel=1e-5)


def test_micro_batches_and_the_decoder_give_the_same_term():
    def decode(x):
        return (x * 2).tanh()

    x0, y = torch.randn(7, 6, 1, 1, generator=torch.Generator().manual_seed(3)), torch.arange(7) % 3
    terms = []
    for micro_batch in (0, 3):
        fd = reward()
        for turn in range(3):
            cycle(fd, turn)
        fd.solve()
        terms.append(term_of(fd, x0, y, decode, micro_batch))
        fd.end_turn()
        assert fd.samples > 15
    free = x0.clone().requires_grad_()
    f = decode(free).flatten(1)
    target = fd.target(f.detach(), y)  # not solved again since
    (expected,) = torch.autograd.grad(fd.scale * (f - target).square().sum() / 7, free)
    for term in terms:
        torch.testing.assert_close(term.gradient, expected, rtol=1e-4, atol=1e-7)
        assert term.gradient.dtype == torch.float32 and term.gradient.norm() > 0 and not term.loss.requires_grad


@pytest.mark.parametrize("kl", [False, True])
def test_following_the_gradient_closes_the_distance(kl):
    real = real_statistics(6, 3)
    fd = reward(statistics=real, window=30, kl=kl)
    f, y = samples(30, 6, 3)
    fd.observe(f, y)
    fd.commit()
    distances = [fd.solve().item()]
    for _ in range(40):
        f = f - 0.2 * (f - fd.target(f, y))
        fd.observe(f, y)
        fd.commit()
        distances.append(fd.solve().item())
    assert distances[0] > 1 and distances[-1] < 1e-3 * distances[0]


# Modes and bad input


def test_unconditional_and_files_without_classes_use_one_mean():
    real = real_statistics(6, 3)
    bare = Statistics(real.mu, real.sigma, None, None, None, {}, real.sha256)
    f, y = samples(50, 6, 3)
    values = []
    for fd in (reward(statistics=real, unconditional=True), reward(statistics=bare), reward(statistics=real)):
        fd.observe(f, y)
        fd.commit()
        values.append(fd.solve().item())
    assert values[0] == values[1] != values[2]
    sigma = (f - f.mean(dim=0)).T @ (f - f.mean(dim=0)) / len(f)
    pairs = [each.numpy() for each in (f.mean(dim=0), sigma, real.mu, real.sigma)]
    assert values[0] == pytest.approx(metrics.frechet_distance(*pairs), rel=1e-10)


def test_a_window_of_few_samples_a_class_is_warned_of():
    assert "Raise it to 10000" in window_note(6400, 384, 1000)
    assert "Raise it to 4096" in window_note(4000, 2048, 10)
    assert window_note(6400, 64, 10) is None and window_note(6400, 64, 1) is None


def test_states_that_do_not_fit_are_refused():
    fd = reward()
    for turn in range(4):
        cycle(fd, turn)
    state = fd.state_dict()
    before = {name: value.clone() for name, value in state.items()}

    def told(change: dict, target: Frechet = fd) -> str:
        with pytest.raises(InputError) as refused:
            target.load_state_dict({k: v for k, v in (state | change).items() if v is not None}, "step-4.pt")
        return str(refused.value)

    assert "missing: m" in told({"m": None})
    assert "unexpected: more" in told({"more": torch.zeros(1)})
    assert "m (5, 5), expected (6, 6)" in told({"m": torch.zeros(5, 5, dtype=torch.float64)})
    assert "NaN or infinity" in told({"s": state["s"] * float("nan")})
    assert "float64" in told({"s": state["s"].float()})
    assert "below 0" in told({"n": -state["n"]})
    assert "norms (4, 2), expected (3, 2)" in told({"norms": torch.ones(4, 2, dtype=torch.float64)})
    assert "another file" in told({}, reward(statistics=real_statistics(6, 3, sha256="b" * 64)))
    assert "of frechet and kl" in told({}, reward(kl=True))
    assert "n (3,), expected (1,)" in told({}, reward(unconditional=True))
    for name, value in fd.state_dict().items():  # refused states leave no trace
        assert torch.equal(value, before[name])


def test_generators_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="3 classes, the generator 10"):
        reward(statistics=real_statistics(6, 3), classes=10)
    real = real_statistics(6, 3)
    real.class_count[1] = 0
    with pytest.raises(InputError, match=r"no image of classes \[1\]"):
        reward(statistics=real)
    reward(statistics=real, classes=10, unconditional=True)


def test_features_that_are_not_finite_and_gradients_that_vanish_stop_the_run():
    fd = reward()
    fd.observe(torch.full((3, 6), float("nan")), torch.arange(3))
    fd.commit()
    with pytest.raises(InputError, match="NaN or infinity"):
        fd.solve()
    fd = reward()
    fd.observe(*samples(12, 6, 3))
    fd.commit()
    fd.measure("matching", torch.ones(2))
    with pytest.raises(InputError, match="scale"):
        fd.end_turn()
    with pytest.raises(RuntimeError, match="no sample"):
        reward().solve()
