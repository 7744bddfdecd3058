"""Plain rules that recognise a run that goes wrong, from its log alone. docs/troubleshooting.md says what to do.

A rule maps the log to the warnings that it finds. The thresholds are far from what healthy digits runs of two seeds
show, and were met by runs made to fail (docs/results.md).
"""

import re
from dataclasses import dataclass, field

import numpy as np

from train_cc.run.logbook import band_columns

LARGEST = 1e100  # what a log can say of a loss, and an axis can show


def finite_or_nan(value: object) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and -LARGEST < value < LARGEST else float("nan")


@dataclass
class Series:
    """The columns of a run's log over its generator updates; NaN where a row has no such value."""

    steps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: list[dict], turns: list[dict]) -> "Series":
        """``rows``: of generator turns. ``turns``: of estimator turns, averaged over those of an update.

        Every row has a whole number ``step``; whatever else it holds that is no finite number is left out.
        """
        by_step: dict[int, dict[str, list[float]]] = {}
        for turn in turns:
            figures = by_step.setdefault(turn["step"], {})
            for name in ("loss_fake", "grad_norm_estimator", "update_ratio_estimator"):
                if np.isfinite(value := finite_or_nan(turn.get(name))):
                    figures.setdefault(name, []).append(value)
        merged = [
            row | {name: sum(values) / len(values) for name, values in by_step.get(row["step"], {}).items()}
            for row in rows
        ]
        names = dict.fromkeys(name for row in merged for name in row)
        columns = {name: np.array([finite_or_nan(row.get(name)) for row in merged]) for name in names}
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
    small = band_columns("loss_fake")[0]
    losses = [series.part(small, i / 10, (i + 1) / 10) for i in range(10)]
    gaps = [series.part("score_gap", i / 10, (i + 1) / 10) for i in range(10)]
    if not (np.isfinite(losses).any() and np.isfinite(gaps).any()):
        return []
    first_loss, first_gap = series.part(small, 0, 0.02), series.part("score_gap", 0, 0.02)
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


def rewards_in(series: Series, form: str) -> dict[str, str]:
    """Name of a reward -> its column, for columns of ``form``, such as "loss_reward_{}"."""
    pattern = re.compile(re.escape(form).replace(r"\{\}", "(.+)") + "$")
    found = {match[1]: column for column in series.columns if (match := pattern.match(column))}
    return {name: column for name, column in found.items() if series.has(column)}


def reward_too_strong(series: Series) -> list[str]:
    told, of_dmd = [], series.of_column("grad_norm_dmd_x0")
    for name, column in rewards_in(series, "grad_norm_reward_{}_x0").items():
        times = float(np.nanmean(series.of_column(column)) / max(np.nanmean(of_dmd), 1e-30))
        if times > 5:
            told.append(
                f"the gradient of the reward {name} at x0 is {times:.0f} times that of distribution matching, on "
                "average over the run: lower its weight"
            )
    return told


def gradients_oppose(series: Series) -> list[str]:
    told = []
    for name, column in rewards_in(series, "grad_cosine_reward_{}_x0").items():
        cosine = series.part(column, 0.1, 1)
        if cosine < -0.3:
            told.append(
                f"the gradients of the reward {name} and of matching at x0 point against each other "
                f"(cosine {cosine:.2f}): lower its weight"
            )
    return told


def reward_is_hacked(series: Series) -> list[str]:
    """A rewarding classifier is content, the one that never rewards is not."""
    told = []
    last_holdout = series.part("preview_accuracy_holdout", 0.5, 1)
    holdout = [series.part("preview_loss_holdout", *part) for part in ((0, 0.35), (0.75, 1))]
    for name, column in rewards_in(series, "preview_accuracy_reward_{}").items():
        rewarding = series.part(column, 0.5, 1)
        own = [series.part(f"preview_loss_reward_{name}", *part) for part in ((0, 0.35), (0.75, 1))]
        parted = own[1] < own[0] and holdout[1] > 3 * max(holdout[0], 0.03)
        if rewarding - last_holdout > 0.15 or parted:
            told.append(
                f"the reward {name} rises and the held-out classifier does not follow (accuracy of the previews "
                f"{rewarding:.2f} and {last_holdout:.2f}): the reward is being hacked; lower its weight or stop earlier"
            )
    return told


def class_collapsed(series: Series) -> list[str]:
    told = []
    for name in ("holdout", *(f"reward_{name}" for name in rewards_in(series, "preview_coverage_reward_{}"))):
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


def warnings_of(series: Series) -> list[str]:
    """What the rules find in one run's log."""
    return [text for rule in RULES for text in rule(series)]


def collapsed_recall(rows: dict[str, dict]) -> list[str]:
    """Precision up while recall collapses: a trained row against the row that it started from or is controlled by."""
    told = []
    for name, figures in rows.items():
        for base in [base for base in rows if is_base(base, name)]:
            before = rows[base]
            if not {"Precision", "Recall"} <= figures.keys() & before.keys():
                continue
            if figures["Precision"] > before["Precision"] and figures["Recall"] < 0.5 * before["Recall"]:
                told.append(
                    f"{name}: recall {figures['Recall']:.2f} is less than half of {before['Recall']:.2f} ({base}), "
                    "while precision rose: diversity has collapsed; lower --reward-weight or the guidance scale"
                )
    return told


def is_base(base: str, name: str) -> bool:
    return (base.startswith(("control", "cold start")) and name.startswith("DMDR")) or name == f"{base} + RL"
