"""Plain rules that recognise a run that goes wrong, from its log alone. docs/troubleshooting.md says what to do.

A rule maps the log to the warnings that it finds. The thresholds are far from what healthy digits runs of two seeds
show, and were met by runs made to fail (docs/results.md).
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Series:
    """The columns of a run's log over its generator updates; NaN where a row has no such value."""

    steps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: list[dict], turns: list[dict]) -> "Series":
        """``rows``: of generator turns. ``turns``: of estimator turns, averaged over those of an update."""
        by_step: dict[int, dict[str, list[float]]] = {}
        for turn in turns:
            figures = by_step.setdefault(turn["step"], {})
            for name in ("loss_fake", "grad_norm_estimator", "update_ratio_estimator"):
                if isinstance(turn.get(name), int | float):
                    figures.setdefault(name, []).append(turn[name])
        merged = [
            row | {name: sum(values) / len(values) for name, values in by_step.get(row["step"], {}).items()}
            for row in rows
        ]
        names = dict.fromkeys(name for row in merged for name, value in row.items() if isinstance(value, int | float))
        columns = {
            name: np.array([v if isinstance(v := row.get(name), int | float) else np.nan for row in merged], float)
            for name in names
        }
        return cls(np.array([row["step"] for row in merged], float), columns)

    def has(self, name: str) -> bool:
        return bool(np.isfinite(self.of_column(name)).any())

    def of_column(self, name: str) -> np.ndarray:
        return self.columns.get(name, np.full(len(self.steps), np.nan))

    def part(self, name: str, begin: float, end: float) -> float:
        """The median of a column between two fractions of the run; NaN where it has no values there."""
        values = self.of_column(name)
        values = values[int(begin * len(values)) : max(1, int(end * len(values)))]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else float("nan")


def estimator_falls_behind(series: Series) -> list[str]:
    """The score gap grows while the fake loss rises, in the band of small t.

    There a good fake score's loss hardly depends on what the generator makes; at large t it does, and may well rise.
    """
    losses = [series.part("loss_fake_t00", i / 10, (i + 1) / 10) for i in range(10)]
    gaps = [series.part("score_gap", i / 10, (i + 1) / 10) for i in range(10)]
    if not np.isfinite([*losses, *gaps]).any():
        return []
    first_loss, first_gap = series.part("loss_fake_t00", 0, 0.02), series.part("score_gap", 0, 0.02)
    first_loss = first_loss if np.isfinite(first_loss) else losses[0]
    worst = float(np.nanmax(losses))
    if worst > 1.6 * first_loss and np.nanmax(gaps) > 2 * first_gap:
        return [
            f"the estimator falls behind the generator: at small t its loss rose to {worst:.3g} from {first_loss:.3g} "
            f"while the score gap rose to {np.nanmax(gaps):.3g} from {first_gap:.3g}. Raise --learning-rate-estimator "
            "or --ratio-update, or lower --learning-rate-generator"
        ]
    return []


def generator_too_fast(series: Series) -> list[str]:
    ratio = series.part("update_ratio_generator", 0, 1)
    if ratio > 3e-3:
        return [
            f"the generator's updates are {ratio:.2%} of its weights each (healthy: about 0.1 %): "
            "lower --learning-rate-generator"
        ]
    return []


def reward_too_strong(series: Series) -> list[str]:
    of_reward, of_dmd = series.of_column("grad_norm_reward_x0"), series.of_column("grad_norm_dmd_x0")
    if not series.has("grad_norm_reward_x0"):
        return []
    times = float(np.nanmean(of_reward) / max(np.nanmean(of_dmd), 1e-30))
    if times > 5:
        return [
            f"the reward's gradient at x0 is {times:.0f} times that of distribution matching, on average over the run: "
            "lower --reward-weight"
        ]
    return []


def gradients_oppose(series: Series) -> list[str]:
    cosine = series.part("grad_cosine_x0", 0.1, 1)
    if cosine < -0.3:
        return [f"the two gradients at x0 point against each other (cosine {cosine:.2f}): lower --reward-weight"]
    return []


def reward_is_hacked(series: Series) -> list[str]:
    """The rewarding classifier is content, the one that never rewards is not."""
    rewarding, holdout = (series.part(f"preview_accuracy_{name}", 0.5, 1) for name in ("reward", "holdout"))
    losses = {
        name: (series.part(f"preview_loss_{name}", 0, 0.35), series.part(f"preview_loss_{name}", 0.75, 1))
        for name in ("reward", "holdout")
    }
    parted = losses["reward"][1] < losses["reward"][0] and losses["holdout"][1] > 3 * max(losses["holdout"][0], 0.03)
    if rewarding - holdout > 0.15 or parted:
        return [
            "the reward rises and the held-out classifier does not follow (accuracy of the previews "
            f"{rewarding:.2f} and {holdout:.2f}): the reward is being hacked; lower --reward-weight or stop earlier"
        ]
    return []


def class_collapsed(series: Series) -> list[str]:
    told = []
    for name in ("holdout", "reward"):
        last = series.part(f"preview_coverage_{name}", 0.75, 1)
        if last < 0.85:
            told.append(
                f"{1 - last:.0%} of the previews' classes are no longer recognised once by the {name} classifier: "
                "a class has collapsed"
            )
    return told[:1]


RULES = (
    estimator_falls_behind,
    generator_too_fast,
    reward_too_strong,
    gradients_oppose,
    reward_is_hacked,
    class_collapsed,
)
