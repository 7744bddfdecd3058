"""Curves as inline SVG: a panel a group of columns, a colour a run."""

import fnmatch
import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from evaluation.report.charts import Chart, words_of
from evaluation.report.runs import RunLog

STYLES = ("-", "--", ":", "-.")  # of the columns of one panel
POINTS = 400  # of a curve: more rows are averaged
PLAIN = {"svg.fonttype": "none", "text.parse_math": False}  # a folder's name may hold a $


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


def panels_of(chart: Chart, runs: list[RunLog]) -> list[list[str]]:
    """The columns of each panel that has something to draw."""
    return [found for columns in chart.panels if (found := present(columns, runs))]


def draw_panel(axis: Axes, columns: list[str], runs: list[RunLog], logarithmic: bool) -> None:
    for number, run in enumerate(runs):
        for name in columns:
            steps, mean, low, high = thin(run.series.steps, run.series.of_column(name))
            if not len(steps):
                continue
            style = STYLES[columns.index(name) % len(STYLES)]
            options = {"color": colour_of(number), "linewidth": 1.4, "marker": "." if len(steps) < 40 else None}
            axis.plot(steps, mean, style, **options)
            axis.fill_between(steps, low, high, color=colour_of(number), alpha=0.18, linewidth=0)
    axis.set_title("\n".join(map(words_of, columns)), fontsize=10)
    if len(columns) > 1:
        styles = [plt.Line2D([], [], color="gray", linestyle=STYLES[i % len(STYLES)]) for i in range(len(columns))]
        axis.legend(styles, [words_of(name).partition(":")[0] for name in columns], fontsize=8)
    axis.set_xlabel("generator updates", fontsize=9)
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.25)
    if logarithmic:
        axis.set_yscale("log")


@plt.rc_context(PLAIN)
def draw(chart: Chart, runs: list[RunLog]) -> list[str]:
    """An SVG for each panel, for a page that is light or dark; empty where no run has any of the columns."""
    found = []
    for columns in panels_of(chart, runs):
        figure, axis = plt.subplots(figsize=(4.0, 2.7))
        draw_panel(axis, columns, runs, chart.logarithmic)
        svg = svg_of(figure)
        for ink, on_page in (("#000000", "currentColor"), ("fill: #ffffff", "fill: none")):
            svg = svg.replace(ink, on_page)
        found.append(svg.replace("<text style=", '<text fill="currentColor" style='))
    return found


@plt.rc_context(PLAIN)
def draw_together(chart: Chart, runs: list[RunLog]) -> str:
    """All panels of the chart as one SVG file, with a legend of the runs, dark on white."""
    panels = panels_of(chart, runs)
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * max(2, len(panels)), 2.8), squeeze=False)
    for axis, columns in zip(axes[0], panels, strict=True):
        draw_panel(axis, columns, runs, chart.logarithmic)
    if len(runs) > 1:
        lines = [plt.Line2D([], [], color=colour_of(number)) for number in range(len(runs))]
        axes[0][0].legend(lines, [run.name for run in runs], fontsize=8)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg_of(figure)}'


def svg_of(figure: Figure) -> str:
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def colour_of(number: int) -> str:
    """The colour of the ``number``-th run, as a page writes it."""
    return to_hex(f"C{number % 10}")
