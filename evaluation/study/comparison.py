"""Means over seeds: differences from controls, and rows beyond the published ones."""

import math

from evaluation.figures.tables import figure_text
from train_cc.io.figures import markdown_table

COMPARED = ("FID", "Recall", "Precision", "FDr", "SWr")
LARGE = 3.0  # standard errors that a difference must have to count


def difference(row: dict, other: dict, metric: str) -> tuple[float, float | None]:
    """``row`` - ``other``, and its standard error; None if a row has one seed."""
    value = row["figures"][metric] - other["figures"][metric]
    spreads = [each["standard_deviations"].get(metric) for each in (row, other)]
    if None in spreads:
        return value, None
    return value, math.sqrt(sum(s**2 / each["seeds"] for s, each in zip(spreads, (row, other), strict=True)))


def cell(row: dict, other: dict, metric: str) -> str:
    value, error = difference(row, other, metric)
    text = ("+" if value >= 0 else "") + figure_text(metric, value)
    return text + (f" ({abs(value) / error:.1f} s.e.)" if error else "")


def against_controls(means: dict[str, dict], against: dict[str, str]) -> str:
    """A Markdown table with a line per row that has a control: the difference, also in standard errors."""
    pairs = [(name, control) for name, control in against.items() if name in means and control in means]
    if not pairs:
        return ""
    columns = [metric for metric in COMPARED if all(metric in means[n]["figures"] for pair in pairs for n in pair)]
    lines = [[name, other, *(cell(means[name], means[other], each) for each in columns)] for name, other in pairs]
    return markdown_table(["", "against", *columns], lines)


def beyond(row: dict, other: dict) -> str | None:
    """The figures by which ``row`` dominates ``other``; None if it does not, or if a figure is missing.

    Dominates: FID is lower, precision or recall larger, both by `LARGE` standard errors, and the third at most one
    standard error smaller.
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
    """A line for each pair of a row that dominates a published one."""
    lines = []
    for name, row in means.items():
        for other in published if name not in published else ():
            if other in means and (how := beyond(row, means[other])):
                lines.append(f"{name} dominates {other}: {how}")
    return lines
