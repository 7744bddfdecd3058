"""The curves of the report: which columns, what they look like when all is well and when not, and their drawing.

A run has a colour, a column of a panel a line style.
"""

import io
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from evaluation.report.run_log import RunLog
from train_cc.run.logbook import BANDS, band_columns

CLOSER = "Does the generator come closer to the teacher?"
KEEPS_UP = "Does the estimator keep up with the generator?"
SIZE = "Are the updates of a good size?"
REWARDS = "What does the reward do?"
PREVIEWS = "What do classifiers see in the previews?"
COURSE = "Schedules and time"

STYLES = ("-", "--", ":", "-.")  # of the columns of one panel
POINTS = 400  # of a curve: more rows are averaged
PLAIN = {"svg.fonttype": "none", "text.parse_math": False}  # a folder's name may hold a $


@dataclass(frozen=True)
class Chart:
    """Panels, and a note on what they look like when all is well and when not.

    ``panels``: a column -> its title with the unit. A * in a column is any name of a reward, and {} in the title; a
    panel without a title is named by its columns.
    """

    group: str
    title: str
    panels: dict[str, str] = field(hash=False)
    note: str
    logarithmic: bool = False


def panels_by_band(name: str) -> dict[str, str]:
    return {
        column: f"t from {low / 100:g} to {low / 100 + 0.25:g}"
        for low, column in zip(BANDS, band_columns(name), strict=True)
    }


def panels_of_classifiers(name: str, unit: str) -> dict[str, str]:
    return {
        f"preview_{name}_reward_*": f"rewarding {{}}: {unit}",
        f"preview_{name}_holdout": f"held-out classifier: {unit}",
    }


CHARTS = (
    Chart(
        CLOSER,
        "Score gap",
        {"score_gap": "score gap (velocity)"},
        "How far the generator's distribution is from the teacher's, as far as the estimator sees: the mean of "
        "|v_real - v_fake|. Healthy: rises while the estimator learns what is wrong, then levels off or falls. "
        "Unhealthy: rises at once to several times a healthy run's, or rises without end.",
    ),
    Chart(
        CLOSER,
        "Score gap by band of t",
        panels_by_band("score_gap"),
        "Small t is fine detail, large t is global structure. Healthy: all four bands move together. Unhealthy: one "
        "only one band grows. Large t growing is a collapse of the whole; small t growing is noise in the details.",
    ),
    Chart(
        CLOSER,
        "Normaliser",
        {"normaliser": "normaliser (velocity)"},
        "How far the teacher would move a sample: the mean of |v_real - (noise - x0)|. Healthy: rises while the "
        "times become uniform (the dynamic phase), then is level. Unhealthy: keeps rising; the samples have left what "
        "the teacher knows.",
    ),
    Chart(
        CLOSER,
        "DMD loss",
        {"loss_dmd": "DMD loss (no unit)"},
        "It is normalised for each sample, so it oscillates and hardly falls in good runs too. It says little.",
    ),
    Chart(
        KEEPS_UP,
        "Fake loss",
        {"loss_fake": "fake loss (squared velocity)"},
        "The estimator's loss on the generator's samples. Healthy: moves while the samples gain variety and the times "
        "become uniform (the dynamic phase), then is level. Unhealthy: shoots up early, or ends far below a healthy "
        "run's, which means that the samples have become alike.",
    ),
    Chart(
        KEEPS_UP,
        "Fake loss by band of t",
        panels_by_band("loss_fake"),
        "Healthy: the first band, small t, is level from the start. Unhealthy: it rises to a multiple; the estimator "
        "falls behind. Raise its learning rate or --ratio-update.",
    ),
    Chart(
        KEEPS_UP,
        "GAN",
        {"loss_gan": "generator's loss", "loss_gan_head": "head's loss", "accuracy_gan_head": "head: accuracy, 0 to 1"},
        "A head on the fake score tells real data from samples. Healthy: its accuracy stays between 0.5 and 0.9. "
        "Unhealthy: near 1, and the generator's loss rises: lower --gan-weight or --learning-rate-gan.",
    ),
    Chart(
        SIZE,
        "Gradient norms",
        {f"grad_norm_{name}": f"{name}: norm of the gradient" for name in ("generator", "estimator", "gan")},
        "Before clipping at --max-grad-norm. Healthy: level after the start. Unhealthy: a hundred times that.",
        logarithmic=True,
    ),
    Chart(
        SIZE,
        "Update-to-weight ratios",
        {
            "update_ratio_generator": "generator: update / weights",
            "update_ratio_estimator": "estimator's LoRA: update / weights",
        },
        "The size of an update against the weights of the middle block. Healthy: near 0.001 (0.1 %) for the generator; "
        "the estimator's LoRA moves more. Unhealthy: above 0.003 for the generator; its learning rate is too high.",
        logarithmic=True,
    ),
    Chart(
        REWARDS,
        "Reward",
        {"loss_reward_*": "{}: loss, nats for a classifier", "accuracy_reward_*": "{}: accuracy, 0 to 1"},
        "The rewarding classifier on fresh samples. Healthy: its loss falls over tens of updates. Unhealthy: it is at "
        "zero at once (the weight is too high), or does not move (too low).",
    ),
    Chart(
        REWARDS,
        "Gradients at x0",
        {
            "grad_norm_dmd_x0": "matching: norm of the gradient at x0",
            "grad_norm_reward_*_x0": "{}: norm of the gradient at x0",
        },
        "The pull of matching and of the reward (its weight included) on the generator's samples. Healthy: of similar "
        "size. Unhealthy: the reward's is more than five times the other; matching no longer holds the samples.",
        logarithmic=True,
    ),
    Chart(
        REWARDS,
        "Cosine of the two gradients",
        {"grad_cosine_reward_*_x0": "{} with matching: cosine, -1 to 1"},
        "Healthy: around zero. Unhealthy: below -0.3; each undoes the other's work. Lower --reward-weight.",
    ),
    Chart(
        REWARDS,
        "Distance of the distribution",
        {"frechet*": "", "kl*": "", "scale_frechet*": "", "scale_kl*": ""},
        "From the window's samples to the real images, in the reward's own space: Frechet's (frechet) or a divergence "
        "(kl); and the reward's scale, which is fixed after three updates. Healthy: the distance falls. In this space "
        "it always looks good: judge in others.",
    ),
    Chart(
        REWARDS,
        "Tilt (experimental)",
        {"tilt_reward_*": "{}: mean reward", "tilt_effective_samples_*": "{}: effective samples, count"},
        "The mean reward of the estimator's samples, and how many equally weighted samples they are worth. "
        "Unhealthy: few effective samples; lower BETA.",
    ),
    Chart(
        PREVIEWS,
        "Previews: accuracy",
        panels_of_classifiers("accuracy", "accuracy, 0 to 1"),
        "By the rewarding classifier, and by one that never rewards. Healthy: they go together. Unhealthy: the first "
        "rises and the second does not; the reward is being hacked.",
    ),
    Chart(
        PREVIEWS,
        "Previews: class coverage",
        panels_of_classifiers("coverage", "share of classes"),
        "The share of the classes asked for that are recognised at least once. Healthy: near 1. Unhealthy: it falls; "
        "a class has collapsed.",
    ),
    Chart(
        COURSE,
        "Schedules",
        {"lora_scale_real": "LoRA scale of the real score", "t_mean": "mean renoise time t, 0 to 1"},
        "The LoRA scale of the real score and the mean renoise time. Both schedules end when the dynamic phase does.",
    ),
    Chart(
        COURSE,
        "Seconds a cycle",
        {"seconds": "seconds for each generator update"},
        "One generator update with its estimator updates. Healthy: level, but for the first. A slow rise is a leak, or "
        "a busy machine.",
    ),
)


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Steps, means, minima, maxima of at most `POINTS` groups of rows; rows without a value are left out."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    groups = np.array_split(np.arange(len(values)), min(POINTS, len(values))) if len(values) else []
    pairs = ((np.mean, steps), (np.mean, values), (np.min, values), (np.max, values))
    return tuple(np.array([function(of[group]) for group in groups]) for function, of in pairs)


def panels_of(chart: Chart, runs: list[RunLog]) -> list[dict[str, str]]:
    """The panels that have something to draw: the columns that some run has a value of, each with its title."""
    names = dict.fromkeys(name for run in runs for name in run.series.columns)
    panels = []
    for pattern, title in chart.panels.items():
        matches = [re.fullmatch(pattern.replace("*", "(.*)"), name) for name in names]
        columns = [match for match in matches if match and any(run.series.has(match[0]) for run in runs)]
        panels.append({match[0]: title.format(*match.groups()) or match[0].replace("_", " ") for match in columns})
    return [panel for panel in panels if panel]


def draw_panel(axis: Axes, panel: dict[str, str], runs: list[RunLog], logarithmic: bool) -> None:
    styles = dict(zip(panel, itertools.cycle(STYLES), strict=False))
    for (number, run), name in itertools.product(enumerate(runs), panel):
        steps, mean, low, high = thin(run.series.steps, run.series.of_column(name))
        if len(steps):
            options = {"color": run_colour(number), "linewidth": 1.4, "marker": "." if len(steps) < 40 else None}
            axis.plot(steps, mean, styles[name], **options)
            axis.fill_between(steps, low, high, color=run_colour(number), alpha=0.18, linewidth=0)
    axis.set_title("\n".join(panel.values()), fontsize=10)
    if len(panel) > 1:
        lines = [plt.Line2D([], [], color="gray", linestyle=style) for style in styles.values()]
        axis.legend(lines, [title.partition(":")[0] for title in panel.values()], fontsize=8)
    axis.set_xlabel("generator updates", fontsize=9)
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.25)
    if logarithmic:
        axis.set_yscale("log")


def draw_panels(chart: Chart, runs: list[RunLog]) -> list[str]:
    """An SVG for each panel, for a page that is light or dark; [] if no run has any of the columns."""
    pictures = [draw(chart, runs, [panel], (4.0, 2.7)) for panel in panels_of(chart, runs)]
    pictures = [svg.replace("#000000", "currentColor").replace("fill: #ffffff", "fill: none") for svg in pictures]
    return [svg.replace("<text style=", '<text fill="currentColor" style=') for svg in pictures]


def draw_together(chart: Chart, runs: list[RunLog]) -> str:
    """All panels of the chart as one SVG file, with a legend of the runs, dark on white."""
    panels = panels_of(chart, runs)
    size = (3.6 * max(2, len(panels)), 2.8)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{draw(chart, runs, panels, size, legend=len(runs) > 1)}'


@plt.rc_context(PLAIN)
def draw(chart: Chart, runs: list[RunLog], panels: list[dict], size: tuple[float, float], legend: bool = False) -> str:
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        draw_panel(axis, panel, runs, chart.logarithmic)
    if legend:
        lines = [plt.Line2D([], [], color=run_colour(number)) for number in range(len(runs))]
        axes[0][0].legend(lines, [run.name for run in runs], fontsize=8)
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def run_colour(number: int) -> str:
    """The colour of the ``number``-th run, as a page writes it."""
    return to_hex(f"C{number % 10}")


def curve_path(folder: Path, chart: Chart) -> Path:
    return folder / f"{chart.title.lower().replace(':', '').replace(' ', '_')}.svg"
