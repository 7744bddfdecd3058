"""The frontier's picture: recall against precision, a panel per space, a mark per row with a legend."""

import io
import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from evaluation.files import HELD_OUT, named_space
from evaluation.study.rows import Row
from train_cc.io.products import write_atomically

COLOURS = {"teacher": "tab:green", "cold_start": "tab:blue", "control": "tab:gray", "reward": "tab:red"}
MARKERS = "osv^<>DPXd*phH8"  # each colour begins anew
REAL = "real images, held out"


def picture(spaces: list[dict], rows: list[Row], path: Path) -> None:
    """``spaces``: each with "features" and "rows" of means over seeds; ``rows``: those of the table.

    Error bars are standard deviations of a seed. An arrow leads from a control to the row that is compared with it.
    """
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


def panel(axes: plt.Axes, means: dict[str, dict], rows: list[Row], marks: dict[str, dict[str, str]]) -> None:
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
