"""Curves as inline SVG: a panel a group of columns, a colour a run."""

import fnmatch
import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_hex

from evaluation.report.charts import Chart
from evaluation.report.runs import RunLog
from train_cc.io.write import mark_of

STYLES = ("-", "--", ":", "-.")  # of the columns of one panel
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


def present(columns: tuple[str, ...], runs: list[RunLog]) -> list[str]:
    """The columns of a panel that some run has a value of; a * in a name stands for anything."""
    names = dict.fromkeys(name for run in runs for name in run.series.columns)
    wanted = [name for column in columns for name in names if fnmatch.fnmatchcase(name, column)]
    return [name for name in wanted if any(run.series.has(name) for run in runs)]


@plt.rc_context({"svg.fonttype": "none", "text.parse_math": False})  # a folder's name may hold a $
def draw(chart: Chart, runs: list[RunLog]) -> str | None:
    """The chart as inline SVG; None where no run has any of its columns."""
    panels = [found for columns in chart.panels if (found := present(columns, runs))]
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
                style = STYLES[columns.index(name) % len(STYLES)]
                axis.plot(steps, mean, style, color=colour, linewidth=1.2, marker="." if len(steps) < 40 else None)
                axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axis.set_title(", ".join(columns), fontsize=9 if len(columns) == 1 else 7)
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


def colour_of(number: int) -> str:
    """The colour of the ``number``-th run, as a page writes it."""
    return to_hex(f"C{number % 10}")
