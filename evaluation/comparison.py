"""Rows over seeds: means and spreads, the difference from a control, and what lies beyond the published rows."""

import math
import statistics

from evaluation.figures.tables import figure_text, over_seeds
from train_cc.io.figures import METRICS, markdown_table

COMPARED = ("FID", "Recall", "Precision", "FDr", "SWr")
LARGE = 3.0  # standard errors that a difference must have to count


def means_of(rows: dict[str, dict]) -> dict[str, dict]:
    """Rows named "NAME, seed N" -> NAME -> means, standard deviations of a seed where there are several, and seeds."""
    found = {}
    for name, group in over_seeds(rows).items():
        values = {metric: [row["figures"][metric] for row in group if metric in row["figures"]] for metric in METRICS}
        values = {metric: each for metric, each in values.items() if each}
        found[name] = {
            "figures": {metric: statistics.mean(each) for metric, each in values.items()},
            "standard_deviations": {m: statistics.stdev(each) for m, each in values.items() if len(each) > 1},
            "seeds": len(group),
            "images": group[0]["images"],
        }
    return found


def difference(row: dict, other: dict, metric: str) -> tuple[float, float | None]:
    """-> row - other, and its standard error: None where a row has one seed."""
    value = row["figures"][metric] - other["figures"][metric]
    spreads = [each["standard_deviations"].get(metric) for each in (row, other)]
    if None in spreads:
        return value, None
    return value, math.sqrt(sum(s**2 / each["seeds"] for s, each in zip(spreads, (row, other), strict=True)))


def told(row: dict, other: dict, metric: str) -> str:
    value, error = difference(row, other, metric)
    text = ("+" if value >= 0 else "") + figure_text(metric, value)
    return text + (f" ({abs(value) / error:.1f} s.e.)" if error else "")


def against_controls(means: dict[str, dict], against: dict[str, str]) -> str:
    """A Markdown table, a line a row that has a control: its difference, and that in standard errors."""
    pairs = [(name, control) for name, control in against.items() if name in means and control in means]
    if not pairs:
        return ""
    columns = [metric for metric in COMPARED if all(metric in means[n]["figures"] for pair in pairs for n in pair)]
    lines = [[name, other, *(told(means[name], means[other], each) for each in columns)] for name, other in pairs]
    return markdown_table(["", "against", *columns], lines)


def beyond(row: dict, other: dict) -> str | None:
    """How ``row`` dominates ``other``: a lower FID, and of precision and recall one larger, the other not smaller.

    Larger and lower by `LARGE` standard errors; not smaller: by no more than one. None: it does not, or nobody knows.
    """
    errors, metrics = {}, ("FID", "Recall", "Precision")
    if not all(metric in each["figures"] for metric in metrics for each in (row, other)):
        return None  # the means over spaces, and held-out images of another count
    for metric in metrics:
        value, error = difference(row, other, metric)
        if error is None:
            return None
        errors[metric] = value / error if error else math.copysign(math.inf, value) if value else 0.0
    lower, recall, precision = -errors["FID"], errors["Recall"], errors["Precision"]
    if lower < LARGE or max(recall, precision) < LARGE or min(recall, precision) < -1:
        return None
    return f"FID {-lower:+.1f}, recall {recall:+.1f}, precision {precision:+.1f} s.e."


def domination(means: dict[str, dict], published: list[str]) -> list[str]:
    """A line a pair: which of our rows dominates which published one."""
    lines = []
    for name, row in means.items():
        for other in published if name not in published else ():
            if other in means and (found := beyond(row, means[other])):
                lines.append(f"{name} dominates {other}: {found}")
    return lines
