"""The curves of the report: which columns, and what they look like when all is well and when not."""

from dataclasses import dataclass
from pathlib import Path

from train_cc.run.logbook import band_columns


@dataclass(frozen=True)
class Chart:
    """One picture: a panel a group of columns, and a sentence on what it looks like when all is well and when not.

    A * in a column stands for any name: of a reward.
    """

    title: str
    panels: tuple[tuple[str, ...], ...]
    told: str
    logarithmic: bool = False


CHARTS = (
    Chart(
        "Score gap",
        (("score_gap",),),
        "mean |v_real - v_fake|, not normalised: how far the generator's distribution is from the teacher's, as far as "
        "the estimator sees. Healthy: rises while the estimator learns what is wrong, then falls or stays level. "
        "Unhealthy: rises at once to several times a healthy run's, or without end.",
    ),
    Chart(
        "Score gap by band of t",
        tuple((column,) for column in band_columns("score_gap")),
        "Small t is fine detail, large t is global structure. Healthy: all four of one order. Unhealthy: one band "
        "grows alone; large t growing is a collapse of the whole, small t growing is noise in the details.",
    ),
    Chart(
        "Fake loss",
        (("loss_fake",),),
        "Velocity matching loss of the estimator on the generator's samples. Healthy: rises while the samples gain "
        "variety and the times become uniform (the dynamic phase), then level. Unhealthy: shoots up early, or ends far "
        "below a healthy run's, which means that the samples have become alike.",
    ),
    Chart(
        "Fake loss by band of t",
        tuple((column,) for column in band_columns("loss_fake")),
        "The same by band. Healthy: the first, small t, is level from the start. Unhealthy: it rises several times, "
        "which means that the estimator falls behind; raise its learning rate or --ratio-update.",
    ),
    Chart(
        "Normaliser",
        (("normaliser",),),
        "mean |v_real - (noise - x0)|: how far the teacher would move the sample. Healthy: level. Unhealthy: a steep "
        "rise: the samples have left what the teacher knows.",
    ),
    Chart(
        "DMD loss",
        (("loss_dmd",),),
        "Normalised per sample, so that it hardly falls: it oscillates in good runs too and says little by itself.",
    ),
    Chart(
        "Gradient norms",
        (("grad_norm_generator",), ("grad_norm_estimator",)),
        "Before clipping at --max-grad-norm. Healthy: level after the start. Unhealthy: growth by orders of magnitude.",
        logarithmic=True,
    ),
    Chart(
        "Update-to-weight ratios",
        (("update_ratio_generator",), ("update_ratio_estimator",)),
        "Size of an update against the weights of the middle block: generator, and the estimator's LoRA. Healthy: the "
        "generator's about 0.1 %. Unhealthy: above 0.3 %: its learning rate is too high.",
        logarithmic=True,
    ),
    Chart(
        "Reward",
        (("loss_reward_*",), ("accuracy_reward_*",)),
        "Cross-entropy and accuracy of the rewarding classifier on fresh samples. Healthy: the loss falls slowly. "
        "Unhealthy: it falls to zero at once (the weight is too high) or does not move (too low).",
    ),
    Chart(
        "Gradients at x0",
        (("grad_norm_dmd_x0",), ("grad_norm_reward_*_x0",)),
        "Of the two losses, the reward's with its weight. Healthy: of one order. Unhealthy: the reward's is many times "
        "the other: distribution matching no longer holds the samples.",
        logarithmic=True,
    ),
    Chart(
        "Frechet distance",
        (("frechet*",), ("scale_frechet*",)),
        "Of the window's samples to the real images, in the reward's own space, and the reward's scale, fixed after "
        "three updates. Healthy: it falls. In this space it always looks good: judge in others.",
    ),
    Chart(
        "Tilt (experimental)",
        (("tilt_reward_*",), ("tilt_effective_samples_*",)),
        "Mean reward of the estimator's samples, and how many equally weighted samples their weights are worth. "
        "Unhealthy: few effective samples: lower BETA.",
    ),
    Chart(
        "Cosine of the two gradients",
        (("grad_cosine_reward_*_x0",),),
        "Healthy: around zero. Unhealthy: strongly negative: each undoes the other's work; lower --reward-weight.",
    ),
    Chart(
        "Previews: accuracy",
        (("preview_accuracy_reward_*",), ("preview_accuracy_holdout",)),
        "Of the fixed previews, by the rewarding classifier and by one that never rewards. Healthy: they go together. "
        "Unhealthy: the first rises and the second does not: the reward is being hacked.",
    ),
    Chart(
        "Previews: class coverage",
        (("preview_coverage_reward_*",), ("preview_coverage_holdout",)),
        "Share of the classes asked for that are recognised at least once. Healthy: near 1. Unhealthy: it falls: a "
        "class has collapsed.",
    ),
    Chart(
        "Schedules",
        (("lora_scale_real",), ("t_mean",)),
        "LoRA scale of the real score and mean renoise time: both schedules end when the dynamic phase does.",
    ),
    Chart("Seconds a cycle", (("seconds",),), "Level, but for the first. A slow rise is a leak, or a busy machine."),
)


def curve_path(folder: Path, chart: Chart) -> Path:
    return folder / f"{chart.title.lower().replace(':', '').replace(' ', '_')}.svg"
