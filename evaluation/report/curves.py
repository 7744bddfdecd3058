"""Curves as inline SVG: a panel a group of columns, a colour a run."""

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from evaluation.report.charts import Chart
from evaluation.report.runs import RunLog
from train_cc.io.write import mark_of

POINTS = 400  # of a curve: more rows are averaged


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """-> steps, means, minima, maxima of at most `POINTS` groups of rows; rows without a value are left out."""
    there = np.isfinite(values)
    steps, values = steps[there], values[there]
    groups = np.array_split(np.arange(len(values)), min(POINTS, len(values))) if len(values) else []
    columns = [[function(of[group]) for group in groups] for function, of in (
        (np.mean, steps), (np.mean, values), (np.min, values), (np.max, values)
    )]  # fmt: skip
    return tuple(np.array(column) for column in columns)


@plt.rc_context({"svg.fonttype": "none", "text.parse_math": False})  # a folder's name may hold a $
def draw(chart: Chart, runs: list[RunLog]) -> str | None:
    """The chart as inline SVG; None where no run has any of its columns."""
    panels = [columns for columns in chart.panels if any(run.series.has(name) for run in runs for name in columns)]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * max(2, len(panels)), 2.6), squeeze=False)
    for axis, columns in zip(axes[0], panels, strict=True):
        for number, run in enumerate(runs):
            for name in columns:
                steps, mean, low, high = thin(run.series.steps, run.series.of_column(name))
                if not len(steps):
                    continue
                colour = f"C{number % 10}"
                axis.plot(steps, mean, color=colour, linewidth=1.2, marker="." if len(steps) < 40 else None)
                axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axis.set_title(columns[0], fontsize=9)
        axis.set_xlabel("generator updates", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if chart.logarithmic:
            axis.set_yscale("log")
    if len(runs) > 1:
        lines = [plt.Line2D([], [], color=f"C{number % 10}") for number in range(len(runs))]
        axes[0][0].legend(lines, [run.name for run in runs], fontsize=7)
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": mark_of("a curve")})
    plt.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def curve_path(folder: Path, chart: Chart) -> Path:
    return folder / f"{chart.title.lower().replace(':', '').replace(' ', '_')}.svg"
