"""The frontier's picture: recall against precision, a labelled point a row."""

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from train_cc.io.write import mark_of, write_atomically

# The kind of a row by a word in its name, and the colour of its point.
COLOURS = {
    "teacher": "tab:green",
    "Frechet": "tab:purple",
    "tilt": "tab:olive",
    "RL": "tab:red",
    "control": "tab:gray",
    "": "tab:blue",
}


def picture(rows: dict[str, dict], path: Path) -> None:
    """Recall against precision, one labelled point a row, an arrow where RL moved it."""
    figure, axes = plt.subplots(figsize=(10, 7))
    points = {name: (row["figures"]["Precision"], row["figures"]["Recall"]) for name, row in rows.items()}
    for name, (precision, recall) in points.items():
        kind = next(kind for kind in COLOURS if kind in name)
        axes.scatter(precision, recall, s=45, color=COLOURS[kind], marker="s" if kind == "teacher" else "o", zorder=3)
    for name, start in points.items():
        for reward, colour in (("RL", COLOURS["RL"]), ("Frechet", COLOURS["Frechet"])):
            if f"{name} + {reward}" in points:
                arrow = {"arrowstyle": "->", "color": colour, "shrinkA": 6, "shrinkB": 6}
                axes.annotate("", points[f"{name} + {reward}"], start, arrowprops=arrow)
    axes.set_xlabel("precision (quality)")
    axes.set_ylabel("recall (diversity)")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    label_points(figure, axes, points)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": mark_of("a picture")})
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


def label_points(figure: plt.Figure, axes: plt.Axes, points: dict[str, tuple[float, float]]) -> None:
    """Each name at the nearest place beside its point where it covers no other name, no point and no border."""
    figure.canvas.draw()
    frame = axes.get_window_extent()
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform(list(points.values()))]
    places = sorted(
        ((side * 9, step * 6, "left" if side > 0 else "right") for side in (1, -1) for step in range(-20, 21)),
        key=lambda place: abs(place[1]),
    )
    for name, point in points.items():
        colour = COLOURS[next(kind for kind in COLOURS if kind in name)]
        for dx, dy, alignment in places:
            style = {"textcoords": "offset points", "ha": alignment, "va": "center", "fontsize": 8, "color": colour}
            leader = {"arrowstyle": "-", "color": "lightgray", "shrinkA": 0, "shrinkB": 3} if abs(dy) > 12 else None
            text = axes.annotate(name, point, xytext=(dx, dy), arrowprops=leader, **style)
            text.update_positions(figure.canvas.get_renderer())
            words = Text.get_window_extent(text)  # without its leader
            if frame.containsx(words.x0) and frame.containsx(words.x1) and words.count_overlaps(taken) == 0:
                taken.append(words)
                break
            text.remove()
