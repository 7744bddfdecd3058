"""Means over seeds: differences from controls, rows beyond the published ones, and the picture of both."""

import io
import itertools
import math
from pathlib import Path

from evaluation.figures.tables import HELD_OUT, figure_text, named_space
from evaluation.study.rows import Row
from train_cc.io.figures import markdown_table
from train_cc.io.products import write_atomically

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


# The chart -----------------------------------------------------------------------------------------------------------


COLOURS = {"teacher": "tab:green", "cold_start": "tab:blue", "control": "tab:gray", "reward": "tab:red"}
MARKERS = "osv^<>DPXd*phH8"  # each colour begins anew
REAL = "real images, held out"


def picture(spaces: list[dict], rows: list[Row], path: Path) -> None:
    """``spaces``: each with "features" and "rows" of means over seeds; ``rows``: those of the table.

    Error bars are standard deviations of a seed. An arrow leads from a control to the row that is compared with it.
    """
    import matplotlib.pyplot as plt  # takes a second

    marks = marks_of(rows)
    lines = -(-(len(marks) + 1) // 3)
    height = 5.6 + 0.2 * lines
    figure, panels = plt.subplots(1, len(spaces), figsize=(5.6 * max(len(spaces), 2), height), squeeze=False)
    for axes, space in zip(panels[0], spaces, strict=True):
        panel(axes, space["rows"], rows, marks)
        axes.set_title(plain(named_space(space["features"])), fontsize=10)
    panels[0][0].set_ylabel("recall (diversity)")
    handles = {}
    for axes in panels[0]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.tight_layout(rect=(0, (0.2 * lines + 0.1) / height, 1, 1))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


def plain(text: str) -> str:
    """Escape dollar signs: matplotlib would read a formula between two."""
    return text.replace("$", r"\$")


def marks_of(rows: list[Row]) -> dict[str, dict[str, str]]:
    """A colour by a row's kind and a marker of its own."""
    markers = {kind: itertools.cycle(MARKERS) for kind in COLOURS}
    kinds = {row.name: row.stage if row.stage != "dmdr" else "reward" if row.against else "control" for row in rows}
    return {name: {"color": COLOURS[kind], "marker": next(markers[kind])} for name, kind in kinds.items()}


def panel(axes, means: dict[str, dict], rows: list[Row], marks: dict[str, dict[str, str]]) -> None:
    points = {name: (row["figures"]["Precision"], row["figures"]["Recall"]) for name, row in means.items()}
    for row in [row for row in rows if row.name in points]:
        spread = means[row.name].get("standard_deviations", {})
        bars = {"xerr": spread.get("Precision", 0), "yerr": spread.get("Recall", 0), "elinewidth": 1}
        axes.errorbar(
            *points[row.name], **bars, **marks[row.name], markersize=6, linestyle="", label=plain(row.name), zorder=3
        )
        if row.against in points:
            arrow = {"arrowstyle": "-|>", "color": COLOURS["reward"], "alpha": 0.45, "shrinkA": 3, "shrinkB": 3}
            axes.annotate("", points[row.name], points[row.against], arrowprops=arrow, zorder=2)
    guided = sorted(points[row.name] for row in rows if row.stage == "teacher" and row.name in points)
    axes.plot(*zip(*guided, strict=True), color=COLOURS["teacher"], linewidth=1, zorder=1) if guided else None
    if HELD_OUT in points:
        axes.plot(*points[HELD_OUT], "*", color="black", markersize=11, label=REAL, zorder=4)
    axes.set_xlabel("precision (quality)")
    axes.grid(alpha=0.3)
    axes.margins(0.08)
