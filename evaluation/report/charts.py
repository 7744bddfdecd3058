"""The curves of the report: which columns, in which words, and what they look like when all is well and when not."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from train_cc.run.logbook import BANDS, band_columns

CLOSER = "Does the generator come closer to the teacher?"
KEEPS_UP = "Does the estimator keep up with the generator?"
SIZE = "Are the updates of a good size?"
REWARD = "What does the reward do?"
PREVIEWS = "What do classifiers see in the previews?"
COURSE = "Schedules and time"


@dataclass(frozen=True)
class Chart:
    """A panel for each group of columns, and a sentence on what they look like when all is well and when not.

    A * in a column stands for any name: of a reward.
    """

    group: str
    title: str
    panels: tuple[tuple[str, ...], ...]
    told: str
    logarithmic: bool = False


CHARTS = (
    Chart(
        CLOSER,
        "Score gap",
        (("score_gap",),),
        "How far the generator's distribution is from the teacher's, as far as the estimator sees: the mean of "
        "|v_real - v_fake|. Healthy: rises while the estimator learns what is wrong, then levels off or falls. "
        "Unhealthy: rises at once to several times a healthy run's, or rises without end.",
    ),
    Chart(
        CLOSER,
        "Score gap by band of t",
        tuple((column,) for column in band_columns("score_gap")),
        "Small t is fine detail, large t is global structure. Healthy: all four bands move together. Unhealthy: one "
        "band grows alone. Large t growing is a collapse of the whole; small t growing is noise in the details.",
    ),
    Chart(
        CLOSER,
        "Normaliser",
        (("normaliser",),),
        "How far the teacher would move a sample: the mean of |v_real - (noise - x0)|. Healthy: rises while the "
        "times become uniform (the dynamic phase), then is level. Unhealthy: keeps rising; the samples have left what "
        "the teacher knows.",
    ),
    Chart(
        CLOSER,
        "DMD loss",
        (("loss_dmd",),),
        "It is normalised for each sample, so it oscillates and hardly falls in good runs too. It says little.",
    ),
    Chart(
        KEEPS_UP,
        "Fake loss",
        (("loss_fake",),),
        "The estimator's loss on the generator's samples. Healthy: moves while the samples gain variety and the times "
        "become uniform (the dynamic phase), then is level. Unhealthy: shoots up early, or ends far below a healthy "
        "run's, which means that the samples have become alike.",
    ),
    Chart(
        KEEPS_UP,
        "Fake loss by band of t",
        tuple((column,) for column in band_columns("loss_fake")),
        "Healthy: the first band, small t, is level from the start. Unhealthy: it rises to a multiple; the estimator "
        "falls behind. Raise its learning rate or --ratio-update.",
    ),
    Chart(
        SIZE,
        "Gradient norms",
        (("grad_norm_generator",), ("grad_norm_estimator",)),
        "Before clipping at --max-grad-norm. Healthy: level after the start. Unhealthy: a hundred times that.",
        logarithmic=True,
    ),
    Chart(
        SIZE,
        "Update-to-weight ratios",
        (("update_ratio_generator",), ("update_ratio_estimator",)),
        "The size of an update against the weights of the middle block. Healthy: near 0.001 (0.1 %) for the generator; "
        "the estimator's LoRA moves more. Unhealthy: above 0.003 for the generator; its learning rate is too high.",
        logarithmic=True,
    ),
    Chart(
        REWARD,
        "Reward",
        (("loss_reward_*",), ("accuracy_reward_*",)),
        "The rewarding classifier on fresh samples. Healthy: its loss falls over tens of updates. Unhealthy: it is at "
        "zero at once (the weight is too high), or does not move (too low).",
    ),
    Chart(
        REWARD,
        "Gradients at x0",
        (("grad_norm_dmd_x0",), ("grad_norm_reward_*_x0",)),
        "The pull of matching and of the reward (its weight included) on the generator's samples. Healthy: of similar "
        "size. Unhealthy: the reward's is more than five times the other; matching no longer holds the samples.",
        logarithmic=True,
    ),
    Chart(
        REWARD,
        "Cosine of the two gradients",
        (("grad_cosine_reward_*_x0",),),
        "Healthy: around zero. Unhealthy: below -0.3; each undoes the other's work. Lower --reward-weight.",
    ),
    Chart(
        REWARD,
        "Frechet distance",
        (("frechet*",), ("scale_frechet*",)),
        "From the window's samples to the real images, in the reward's own space, and the reward's scale, which is "
        "fixed after three updates. Healthy: the distance falls. In this space it always looks good: judge in others.",
    ),
    Chart(
        REWARD,
        "Tilt (experimental)",
        (("tilt_reward_*",), ("tilt_effective_samples_*",)),
        "The mean reward of the estimator's samples, and how many equally weighted samples they are worth. "
        "Unhealthy: few effective samples; lower BETA.",
    ),
    Chart(
        PREVIEWS,
        "Previews: accuracy",
        (("preview_accuracy_reward_*",), ("preview_accuracy_holdout",)),
        "By the rewarding classifier, and by one that never rewards. Healthy: they go together. Unhealthy: the first "
        "rises and the second does not; the reward is being hacked.",
    ),
    Chart(
        PREVIEWS,
        "Previews: class coverage",
        (("preview_coverage_reward_*",), ("preview_coverage_holdout",)),
        "The share of the classes asked for that are recognised at least once. Healthy: near 1. Unhealthy: it falls; "
        "a class has collapsed.",
    ),
    Chart(
        COURSE,
        "Schedules",
        (("lora_scale_real",), ("t_mean",)),
        "The LoRA scale of the real score and the mean renoise time. Both schedules end when the dynamic phase does.",
    ),
    Chart(
        COURSE,
        "Seconds a cycle",
        (("seconds",),),
        "One generator update with its estimator updates. Healthy: level, but for the first. A slow rise is a leak, or "
        "a busy machine.",
    ),
)

# A column -> what its panel is called, with its unit. {} is what the * stands for.
WORDS = {
    "score_gap": "score gap (velocity)",
    "normaliser": "normaliser (velocity)",
    "loss_dmd": "DMD loss (no unit)",
    "loss_fake": "fake loss (squared velocity)",
    "grad_norm_generator": "generator: norm of the gradient",
    "grad_norm_estimator": "estimator: norm of the gradient",
    "update_ratio_generator": "generator: update / weights",
    "update_ratio_estimator": "estimator's LoRA: update / weights",
    "loss_reward_*": "{}: loss, nats for a classifier",
    "accuracy_reward_*": "{}: accuracy, 0 to 1",
    "grad_norm_dmd_x0": "matching: norm of the gradient at x0",
    "grad_norm_reward_*_x0": "{}: norm of the gradient at x0",
    "grad_cosine_reward_*_x0": "{} with matching: cosine, -1 to 1",
    "tilt_reward_*": "{}: mean reward",
    "tilt_effective_samples_*": "{}: effective samples, count",
    "preview_accuracy_reward_*": "rewarding {}: accuracy, 0 to 1",
    "preview_accuracy_holdout": "held-out classifier: accuracy, 0 to 1",
    "preview_coverage_reward_*": "rewarding {}: share of classes",
    "preview_coverage_holdout": "held-out classifier: share of classes",
    "lora_scale_real": "LoRA scale of the real score",
    "t_mean": "mean renoise time t, 0 to 1",
    "seconds": "seconds for each generator update",
}
WORDS |= {
    column: f"t from {low / 100:g} to {low / 100 + 0.25:g}"
    for name in ("score_gap", "loss_fake")
    for low, column in zip(BANDS, band_columns(name), strict=True)
}


def words_of(column: str) -> str:
    """What a panel of ``column`` is called."""
    for pattern, words in WORDS.items():
        if column == pattern:
            return words
        if "*" in pattern and fnmatchcase(column, pattern):
            return words.format(re.fullmatch(pattern.replace("*", "(.*)"), column)[1])
    return column.replace("_", " ")


def curve_path(folder: Path, chart: Chart) -> Path:
    return folder / f"{chart.title.lower().replace(':', '').replace(' ', '_')}.svg"
