"""The frontier's picture: recall against precision, a panel a space, numbered points with a legend."""

import io
import itertools
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from evaluation.figures.tables import HELD_OUT, named_space
from train_cc.io.products import write_atomically

TEACHER, COLD_START, CONTROL, REWARD, REAL = "tab:green", "tab:blue", "tab:gray", "tab:red", "black"


def picture(spaces: list[dict], colours: dict[str, str], against: dict[str, str], path: Path) -> None:
    """``spaces``: each with "features" and "rows" of means; ``colours``: of the rows, whose order numbers the points.

    Error bars are standard deviations of a seed. An arrow leads from a control to the row that is compared with it.
    """
    height = 5.6 + 0.2 * -(-len(colours) // 3)
    figure, panels = plt.subplots(1, len(spaces), figsize=(5.6 * max(len(spaces), 2), height), squeeze=False)
    for axes, space in zip(panels[0], spaces, strict=True):
        panel(axes, space["rows"], colours, against)
        axes.set_title(plain(named_space(space["features"])), fontsize=10)
    panels[0][0].set_ylabel("recall (diversity)")
    handles = [
        plt.Line2D(
            [],
            [],
            color=colour,
            marker=f"${number}$",
            markersize=5 + 2 * len(str(number)),
            linestyle="",
            label=plain(name),
        )
        for number, (name, colour) in enumerate(colours.items(), 1)
    ]
    handles += shown(spaces, colours, against)
    rows = -(-len(handles) // 3)
    figure.tight_layout(rect=(0, (0.2 * rows + 0.1) / height, 1, 1))
    figure.legend(handles=handles, loc="lower center", ncols=3, fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


def plain(text: str) -> str:
    """As matplotlib shows it word for word: two dollar signs would be a formula's."""
    return text.replace("$", r"\$")


def shown(spaces: list[dict], colours: dict[str, str], against: dict[str, str]) -> list[plt.Line2D]:
    """Legend entries of marks that have no number, where the picture has them."""
    rows = set().union(*(space["rows"] for space in spaces))
    handles = []
    if HELD_OUT in rows:
        handles += [
            plt.Line2D([], [], color=REAL, marker="*", markersize=11, linestyle="", label="real images, held out")
        ]
    if sum(colours.get(name) == TEACHER for name in rows) > 1:
        handles += [plt.Line2D([], [], color=TEACHER, linewidth=1, label="the teacher's line, over guidance")]
    if any({name, control} <= rows for name, control in against.items()):
        handles += [plt.Line2D([], [], color=REWARD, marker=">", linewidth=1, label="from the control to the reward")]
    return handles


def panel(axes: plt.Axes, rows: dict[str, dict], colours: dict[str, str], against: dict[str, str]) -> None:
    points = {
        name: (rows[name]["figures"]["Precision"], rows[name]["figures"]["Recall"]) for name in rows if name in colours
    }
    numbers = {name: number for number, name in enumerate(colours, 1)}
    for name, (precision, recall) in points.items():
        spread = rows[name].get("standard_deviations", {})
        bars = {"xerr": spread.get("Precision", 0), "yerr": spread.get("Recall", 0)}
        axes.errorbar(precision, recall, **bars, color=colours[name], elinewidth=1, marker="o", markersize=4, zorder=3)
    line = sorted(points[name] for name in points if colours[name] == TEACHER)
    axes.plot(*zip(*line, strict=True), color=TEACHER, linewidth=1, zorder=1) if line else None
    for name, control in against.items():
        if name in points and control in points:
            arrow = {"arrowstyle": "-|>", "color": REWARD, "alpha": 0.45, "shrinkA": 3, "shrinkB": 3, "linewidth": 1}
            axes.annotate("", points[name], points[control], arrowprops=arrow, zorder=2)
    real = rows.get(HELD_OUT)
    if real is not None:
        axes.plot(real["figures"]["Precision"], real["figures"]["Recall"], "*", color=REAL, markersize=11, zorder=4)
    axes.set_xlabel("precision (quality)")
    axes.grid(alpha=0.3)
    axes.margins(0.08)
    points = {name: clipped(axes, point, low_of(points), colours[name]) for name, point in points.items()}
    number_points(axes, points, numbers, colours)


def low_of(points: dict[str, tuple[float, float]]) -> float:
    """The recall below which rows have collapsed.

    They have less than half of it, and the gap is under most rows and wider than all of these together.
    """
    values = sorted((recall for _, recall in points.values()), reverse=True)
    for above, (upper, lower) in enumerate(itertools.pairwise(values), 1):
        if above >= max(3, len(values) / 2) and upper - lower > values[0] - upper and lower < upper / 2:
            return upper
    return values[-1]


def clipped(axes: plt.Axes, point: tuple[float, float], low: float, colour: str) -> tuple[float, float]:
    """``point``, or where its mark stands on the lower border: a collapsed row would press all others together."""
    precision, recall = point
    top = axes.get_ylim()[1]
    border = low - 0.12 * (top - low)
    axes.set_ylim(bottom=border)
    if recall >= low:
        return point
    axes.plot(precision, border, "v", color=colour, markersize=8, clip_on=False, zorder=4)
    left, right = axes.get_xlim()
    inwards, side = (-1, "right") if precision > left + 0.8 * (right - left) else (1, "left")
    beside = {"textcoords": "offset points", "ha": side, "va": "center", "fontsize": 7, "color": colour}
    axes.annotate(f"recall {recall:.2f}", (precision, border), xytext=(10 * inwards, 12), **beside)
    return precision, border


def number_points(axes: plt.Axes, points: dict, numbers: dict[str, int], colours: dict[str, str]) -> None:
    """Each number beside its point, on the free side: few points and numbers near, none nearer than its own."""
    axes.figure.canvas.draw()
    marks = list(axes.transData.transform(list(points.values())))
    taken = list(marks)
    for name, point in points.items():
        x, y = axes.transData.transform(point)
        places = [(dx * r, dy * r) for r in (10, 16, 22, 30) for dx in (-1, 0, 1) for dy in (-1, 0, 1) if dx or dy]

        def crowded(place: tuple[int, int], x: float = x, y: float = y) -> float:
            at = (x + place[0], y + place[1])
            near = sum(abs(at[0] - a) < 13 and abs(at[1] - b) < 11 for a, b in taken)
            nearer = sum(math.dist(at, mark) < math.hypot(*place) - 1 for mark in marks)
            return 100 * near + 60 * nearer + abs(place[0]) + abs(place[1])

        best = min(places, key=crowded)
        taken.append((x + best[0], y + best[1]))
        scale = 72 / axes.figure.dpi
        leader = {"arrowstyle": "-", "color": colours[name], "alpha": 0.5, "linewidth": 0.6, "shrinkB": 2}
        axes.annotate(
            str(numbers[name]),
            point,
            xytext=(best[0] * scale, best[1] * scale),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold",
            color=colours[name],
            arrowprops=leader if max(map(abs, best)) > 16 else None,
            zorder=5,
        )
