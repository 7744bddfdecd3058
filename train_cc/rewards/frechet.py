"""The Frechet reward (docs/method.md): match the distribution of features, not every image to a mode.

In a frozen feature space f, with mu_r, S_r of real images and mu, S of the generator, the Frechet distance's gradient
with respect to one of B samples' features is exactly

    d FD / d f_i = (2 / B) (f_i - T(f_i | y_i)),   T(f | y) = mu_r[y] + A (f - mu[y]),   A = R (R S R)^(-1/2) R,

R = S_r^(1/2): every sample's features are drawn to where optimal transport between the two Gaussians takes them. It is
the gradient of mean |f - stop_gradient(T(f | y))|^2, whose value estimates FD: no differentiation through eigenvalues.

The other form, ``kl``, follows the divergence KL(N(mu, S) || N(mu_r, S_r)) in place of FD. Its target is

    T(f | y) = f + P_r (mu_r[y] - f) - P (mu[y] - f),   P = (S + lam I)^-1,   P_r = (S_r + lam I)^-1,

lam being the 60 % point of the spectrum of S_r: the mean of |f - stop_gradient(T)|^2 then has twice KL's gradient, and
two Cholesky solves take the place of the eigenvalues.
"""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from train_cc.io.errors import InputError
from train_cc.io.weights import fit, require_finite
from train_cc.rewards.statistics import Statistics

ROUNDING = 1e-12  # eigenvalues below this part of the largest are rounding
# A direction in which the generator varies this much less than real images is widened by no more at once: a sample that
# first shows a feature would be sent far away. A floor of 1e-6 of the largest eigenvalue, in its place, would shrink
# every direction whose variance is below 1e-3 of the largest, and a network's features have many.
LARGEST_GAIN = 100.0
SCALE_TURNS = 3  # generator turns over which the scale is measured
GRADIENTS = ("matching", "frechet")  # whose norms give the scale
RIDGE_POINT = 0.6  # of the ascending spectrum of S_r, without its zeros: lam of the form ``kl``

# Mathematics: float64, symbols as above; K classes, D features ----------------------------------------------------


def square_root(sigma: Tensor) -> Tensor:
    """sigma^(1/2) (D, D) of a covariance; rounding below 0 counts as 0."""
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def transport(sigma: Tensor, root: Tensor, largest_gain: float = 1 / ROUNDING) -> tuple[Tensor, Tensor]:
    """A = R (R S R)^(-1/2) R (D, D), and tr (R S R)^(1/2) (0-d), for R = ``root``.

    Eigenvalues w of R S R, with vectors v, are raised for A only where S or S_r is singular: above rounding, and to
    where no v adds a gain above ``largest_gain`` to A (w = variance real x generated, |R v|^2 = real). A stays
    bounded, by D gains; where nothing is raised, A S A = S_r.
    """
    inner = root @ sigma @ root
    w, v = torch.linalg.eigh((inner + inner.T) / 2)
    half = root @ v
    of_gain = (half.square().sum(dim=0) / largest_gain).square()
    raised = torch.maximum(w, of_gain).clamp(min=torch.finfo(w.dtype).tiny)
    raised = torch.maximum(raised, ROUNDING * raised.max())
    return (half * raised.rsqrt()) @ half.T, w.clamp(min=0).sqrt().sum()


def transport_matrix(sigma: Tensor, sigma_real: Tensor) -> Tensor:
    """The optimal transport between two centred Gaussians, x -> A x: A sigma A = sigma_real. (D, D), float64."""
    return transport(sigma.double(), square_root(sigma_real.double()))[0]


class Sums(NamedTuple):
    """Sums of features f with labels y, float64."""

    n: Tensor  # (K,), samples of a class
    s: Tensor  # (K, D), sum of f over a class
    m: Tensor  # (D, D), sum of f f^T


def sums_of(f: Tensor, y: Tensor, num_classes: int, counts: Tensor | None = None) -> Sums:
    """``counts`` (B,): 0 for a sample that is left out, whose features are zeros; else 1."""
    counts = f.new_ones(len(y)) if counts is None else counts
    n = f.new_zeros(num_classes).index_add_(0, y, counts)  # bincount would wait for the device
    return Sums(n, f.new_zeros(num_classes, f.shape[1]).index_add_(0, y, f), f.T @ f)


def decayed(sums: Sums, batch: Sums, window: float) -> Sums:
    """``sums`` times 1 - B / W for a global batch of B samples, plus those of the batch."""
    keep = (1 - batch.n.sum() / window).clamp(min=0)
    return Sums(*(old * keep + new for old, new in zip(sums, batch, strict=True)))


def moments(sums: Sums, mu_real: Tensor) -> tuple[Tensor, Tensor]:
    """mu (K, D) and the pooled within-class covariance S = M / N - sum_y (n[y] / N) mu[y] mu[y]^T (D, D).

    A class without a sample gets its real mean: it has nothing to move.
    """
    mu = torch.where(sums.n[:, None] > 0, sums.s / sums.n[:, None], mu_real)
    share = sums.n / sums.n.sum()
    return mu, sums.m / sums.n.sum() - (mu * share[:, None]).T @ mu


def distance_by_class(
    mu: Tensor, sigma: Tensor, mu_real: Tensor, sigma_real: Tensor, trace_root: Tensor, share: Tensor
) -> Tensor:
    """sum_y share[y] |mu[y] - mu_r[y]|^2 + tr S + tr S_r - 2 tr (R S R)^(1/2). One class: FD as FID has it."""
    between = (share * (mu - mu_real).square().sum(dim=1)).sum()
    return between + sigma.trace() + sigma_real.trace() - 2 * trace_root


def ridge_of(sigma_real: Tensor) -> Tensor:
    """lam I (D, D) of the form ``kl``."""
    values = torch.linalg.eigvalsh(sigma_real)
    values = values[values > ROUNDING * values[-1]]
    return values[int(RIDGE_POINT * len(values))] * torch.eye(len(sigma_real)).to(sigma_real)


def kl_by_class(mu: Tensor, factor: Tensor, mu_real: Tensor, factor_real: Tensor, share: Tensor) -> Tensor:
    """sum_y share[y] KL(N(mu[y], L L^T) || N(mu_r[y], L_r L_r^T)), 0-d, for the Cholesky factors L and L_r (D, D)."""
    apart = (share.sqrt()[:, None] * (mu - mu_real)).T
    squares = torch.linalg.solve_triangular(factor_real, torch.cat([factor, apart], dim=1), upper=False).square().sum()
    return (squares - len(factor)) / 2 + (factor_real.diagonal() / factor.diagonal()).log().sum()


# The reward, with its memory ---------------------------------------------------------------------------------------


class Frechet:
    """A reward of the distribution: decayed statistics of the generator's features, and the losses that they give.

    An estimator turn: `observe` every device batch, then `commit`. A generator turn: `solve`; for every device batch
    `losses`, and `weight_of` its gradient at x0; then `end_turn`. The turn's own samples enter the statistics after
    their gradient, so that they cost no second forward.

    ``features_of``: images in [0, 1] (B, C, H, W) -> features (B, D), differentiable. ``window``: W, in samples.
    ``weight``: of the scaled gradient; 1 begins as strong as matching. ``reduce``: the sum over processes of a tensor.
    ``half``: features are computed in fp16. A sample that overflows is left out of the statistics, and a turn that does
    out of the scale. ``kl``: the other form.
    Raises `InputError` where ``statistics`` do not fit ``num_classes`` of the generator.
    """

    def __init__(
        self,
        features_of: Callable[[Tensor], Tensor],
        statistics: Statistics,
        num_classes: int,
        window: int,
        weight: float = 1.0,
        unconditional: bool = False,
        device: torch.device | str = "cpu",
        reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        half: bool = False,
        kl: bool = False,
    ):
        self.half, self.kl = half, kl
        self.features_of, self.window, self.weight, self.reduce = features_of, window, weight, reduce
        self.device = torch.device(device)
        self.per_class = statistics.class_mu is not None and not unconditional
        if self.per_class:
            require_class_means(statistics, num_classes)
        mu_real, sigma_real = (
            (statistics.class_mu, statistics.within)
            if self.per_class
            else (statistics.mu.unsqueeze(0), statistics.sigma)
        )
        self.mu_real, self.sigma_real = mu_real.to(self.device), sigma_real.to(self.device)
        if kl:
            self.ridge = ridge_of(self.sigma_real)
            self.root = torch.linalg.cholesky(self.sigma_real + self.ridge)
        else:
            self.root = square_root(self.sigma_real)
        self.digest = hashlib.sha256(f"{statistics.sha256} {self.per_class}{' kl' * kl}".encode()).digest()
        self.sums = self._no_sums()
        self.observed = False  # whether the window holds any sample: known without asking the device
        self.pending: Sums | None = None  # of the device batches of a global batch that is not whole yet
        self.squares = torch.zeros(2, dtype=torch.float64, device=self.device)  # of this turn's gradients, as GRADIENTS
        self.norms: list[list[float]] = []  # of the first turns' gradients, as GRADIENTS
        self.solved: tuple[Tensor, Tensor, Tensor] | None = None  # A or L, mu, FD or KL

    def _no_sums(self) -> Sums:
        classes, size = self.mu_real.shape
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=self.device)  # noqa: E731
        return Sums(zeros(classes), zeros(classes, size), zeros(size, size))

    def _classes(self, labels: Tensor) -> Tensor:
        labels = labels.to(self.device)
        return labels if self.per_class else torch.zeros_like(labels)

    # The generator's statistics

    @property
    def samples(self) -> float:
        """The number of samples in the window: 0 before it is filled."""
        return self.sums.n.sum().item()

    @torch.no_grad()
    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Add a device batch, (B, D) and (B,), to the global batch that the next `commit` ends."""
        features = features.to(self.device, torch.float64)
        counts = None
        if self.half:
            good = features.isfinite().all(dim=1)
            features, counts = torch.where(good[:, None], features, 0.0), good.double()
        new = sums_of(features, self._classes(labels), len(self.mu_real), counts)
        self.pending = Sums(*(a + b for a, b in zip(self.pending, new, strict=True))) if self.pending else new

    @torch.no_grad()
    def commit(self) -> None:
        """A global batch is whole: sum it over processes, in one reduction, and let the window move on."""
        self.observed |= self.pending is not None
        pending = self.pending or self._no_sums()
        flat = self.reduce(torch.cat([part.flatten() for part in pending]))
        parts = flat.split([part.numel() for part in pending])
        batch = Sums(*(part.view_as(old) for part, old in zip(parts, pending, strict=True)))
        self.sums, self.pending = decayed(self.sums, batch, self.window), None

    @torch.no_grad()
    def solve(self) -> Tensor:
        """The transport of now, or the factor L; and FD or KL (0-d). Once a generator turn.

        Raises `InputError` for features not finite. The host waits for the device here: that, and eigenvalues, report.
        """
        if not self.observed:
            raise RuntimeError("the Frechet reward has observed no sample: fill its window first")
        if (~torch.isfinite(self.sums.m / self.sums.n.sum())).any():  # no sample may be left, where all overflowed
            hint = ". Take --mixed-precision bf16" if self.half else ""
            raise InputError(
                f"the features of generated images hold NaN or infinity: the Frechet reward cannot go on{hint}"
            )
        mu, sigma = moments(self.sums, self.mu_real)
        share = self.sums.n / self.sums.n.sum()
        if self.kl:
            matrix = torch.linalg.cholesky(sigma + self.ridge)
            distance = kl_by_class(mu, matrix, self.mu_real, self.root, share)
        else:
            matrix, trace_root = transport(sigma, self.root, LARGEST_GAIN)
            distance = distance_by_class(mu, sigma, self.mu_real, self.sigma_real, trace_root, share)
        self.solved = matrix, mu, distance
        return distance

    @torch.no_grad()
    def target(self, features: Tensor, labels: Tensor) -> Tensor:
        """T(f | y), (B, D), in float64 inside and as ``features`` outside."""
        matrix, mu, _ = self.solved
        y = self._classes(labels)
        f = features.to(self.device, torch.float64)
        if self.kl:
            to_real, to_own = (self.mu_real[y] - f).T, (mu[y] - f).T
            v = torch.cholesky_solve(to_real, self.root) - torch.cholesky_solve(to_own, matrix)
            return (f + v.T).to(features)
        return (self.mu_real[y] + (f - mu[y]) @ matrix).to(features)  # A is symmetric

    # The loss

    def losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """|f - stop_gradient(T(f | y))|^2 a sample, (B,), unscaled: their mean has FD's gradient, or twice KL's."""
        features = self.features_of(images)
        self.observe(features.detach(), labels)
        return (features - self.target(features.detach(), labels)).square().sum(dim=1), {}

    # The scale

    @property
    def scale(self) -> float | None:
        """weight * |gradient of matching| / |own gradient| over the first turns; None while they are measured."""
        if len(self.norms) < SCALE_TURNS:
            return None
        matching, own = (sum(column) for column in zip(*self.norms, strict=True))
        return self.weight * matching / own

    def weight_of(self, own: Tensor, of_matching: Tensor) -> float:
        """The weight of a device batch's own gradient at x0; 0 while the scale is measured, of which this is a part."""
        self.measure("frechet", own)
        self.measure("matching", of_matching)
        return self.scale or 0.0

    def figures(self, name: str) -> dict[str, Tensor]:
        """The distance of now and the scale, 0-d, for the log."""
        distance = self.solved[2]
        return {name: distance, f"scale_{name}": distance.new_full((), self.scale or 0.0)}

    def measure(self, name: str, gradient: Tensor) -> None:
        """The unscaled gradient at a device batch's x0, of "matching" or "frechet". Ignored once `scale` is known."""
        if self.scale is None:
            self.squares[GRADIENTS.index(name)] += gradient.detach().double().square().sum().to(self.device)

    def end_turn(self) -> None:
        """A generator turn is over: its samples enter the window, its gradients the scale. Raises `InputError`."""
        self.commit()
        if self.scale is not None:
            return
        norms = self.reduce(self.squares).sqrt().tolist()
        if self.half and not all(map(math.isfinite, norms)):  # an overflow: a later turn is measured in its place
            self.squares.zero_()
            return
        if not all(0 < norm < float("inf") for norm in norms):
            raise InputError(
                f"the gradients at x0 have norms {norms[0]:g} (matching) and {norms[1]:g} (Frechet): the scale of the "
                "Frechet reward cannot be measured. Does the gradient of the feature space reach the images?"
            )
        self.norms.append(norms)
        self.squares.zero_()

    # Its part of a checkpoint

    def state_dict(self) -> dict[str, Tensor]:
        """CPU tensors: everything that a resumed run needs for the same bits."""
        if self.pending is not None:
            raise RuntimeError("a global batch is not committed: the state is saved between turns")
        norms = torch.tensor(self.norms, dtype=torch.float64).view(-1, 2)
        digest = torch.tensor(list(self.digest), dtype=torch.uint8)
        return {name: part.cpu().clone() for name, part in self.sums._asdict().items()} | {
            "norms": norms,
            "digest": digest,
        }

    def load_state_dict(self, state: dict[str, Tensor], source: object = "the checkpoint") -> None:
        """Raises `InputError` for another statistics file or mode, and for what `state_dict` cannot have written."""
        shapes = {name: part.shape for name, part in self.sums._asdict().items()}
        turns, hint = min(len(state.get("norms", ())), SCALE_TURNS), "the Frechet reward's statistics"
        fit(shapes | {"norms": (turns, 2), "digest": (len(self.digest),)}, state, source, hint)
        require_finite(state, source)
        if wrong := [name for name in (*shapes, "norms") if state[name].dtype != torch.float64]:
            raise InputError(f"{source}: {', '.join(wrong)} of {hint} must be float64")
        if bytes(state["digest"].tolist()) != self.digest:
            raise InputError(
                f"{source} holds {hint} towards another file, with the other of --frechet-unconditional and not, or of "
                "frechet and kl; give what that run had, or start without its state"
            )
        if (state["n"] < 0).any() or (state["norms"] <= 0).any():
            raise InputError(f"{source}: {hint} hold a count or a norm below 0; the file is damaged")
        self.sums = Sums(*(state[name].to(self.device, copy=True) for name in shapes))
        self.observed = bool(state["n"].sum() > 0)
        self.norms = state["norms"].tolist()
        self.pending, self.solved = None, None
        self.squares.zero_()


def require_class_means(statistics: Statistics, num_classes: int) -> None:
    """Every class of the generator has a real mean. Raises `InputError`."""
    hint = "give statistics of the generator's classes, or --frechet-unconditional"
    if statistics.num_classes != num_classes:
        raise InputError(f"the statistics have {statistics.num_classes} classes, the generator {num_classes}; {hint}")
    empty = (statistics.class_count == 0).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"the statistics have no image of classes {empty[:8]}; {hint}")
