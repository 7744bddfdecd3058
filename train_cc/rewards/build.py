"""A reward from its kind and source: a new kind is a file in this folder and one entry of `BUILDERS`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from train_cc.io.class_names import contradiction, order_of
from train_cc.io.errors import InputError
from train_cc.rewards.at_x0 import Reward
from train_cc.rewards.classifier import classifier_losses
from train_cc.rewards.frechet import Frechet
from train_cc.rewards.networks import Networks
from train_cc.rewards.spec import RewardSpec, named_apart
from train_cc.rewards.statistics import Statistics, read_statistics
from train_cc.rewards.tilt import Tilt

SAMPLES_A_CLASS = 10  # fewer in the window, and the class means are noise


@dataclass(frozen=True)
class Fit:
    """What every reward must fit, and where it computes."""

    num_classes: int  # of the generator
    dataset: str | None  # that the teacher was trained on, if it is recorded
    channels: int  # of an image
    device: torch.device
    dtype: torch.dtype
    reduce: Callable[[Tensor], Tensor]  # the sum over processes
    dinov2_backbone: str
    dinov2_head: str
    frechet_window: int
    frechet_unconditional: bool
    checkpointing: bool
    networks: Networks


class Built:
    """Rewards and tilts of a run, and the networks behind them. ``notes``: for the log."""

    def __init__(self) -> None:
        self.rewards: list[Reward] = []
        self.tilts: list[Tilt] = []
        self.judges: dict[str, nn.Module] = {}  # classifiers among them, by name: they score the previews too
        self.judging: list[str] = []  # names in `files` of the networks that reward
        self.spaces: set[str] = set()  # SHA-256 of the feature spaces that reward
        self.files: dict[str, list[Path]] = {}  # that were read, by the flag or name that named them
        self.notes: list[str] = []
        self.checks: list[Callable[[Tensor, Tensor], None]] = []  # of a user's function, on one batch


def require_judge_fits(name: str, judge: nn.Module, num_classes: int, channels: int) -> None:
    """``judge`` has the generator's classes, and takes images of ``channels``. Raises `InputError`."""
    if judge.num_classes != num_classes:
        told = f"{judge.num_classes} classes, the generator {num_classes}"
        raise InputError(f"the {name} classifier has {told}")
    if judge.in_channels != channels:
        raise InputError(f"the {name} classifier takes {judge.in_channels} channels, the images have {channels}")


def judge_of(spec: RewardSpec, name: str, fit: Fit, built: Built) -> nn.Module:
    """The classifier that ``spec`` names, frozen, on its device; checked against the generator."""
    if spec.kind == "dinov2":
        judge = fit.networks.dinov2(fit.dinov2_backbone, fit.dinov2_head)
        built.files |= {"dinov2_backbone": judge.files[:1], "dinov2_head": judge.files[1:]}
        built.judging.append("dinov2_backbone")
    else:
        judge = fit.networks.classifier(spec.source)
        built.files[f"reward_{name}"] = judge.files
        built.judging.append(f"reward_{name}")
    require_judge_fits("reward", judge, fit.num_classes, fit.channels)
    if fit.checkpointing:
        judge.enable_gradient_checkpointing()
    built.judges[f"reward_{name}"] = judge.to(fit.device, fit.dtype)
    return judge


def classifier_reward(spec: RewardSpec, name: str, fit: Fit, built: Built) -> Reward:
    return Reward(name, spec.weight, partial(classifier_losses, judge_of(spec, name, fit, built)))


def frechet_reward(spec: RewardSpec, name: str, fit: Fit, built: Built) -> Reward:
    """The space is the one that the statistics name, and must still be it: both hashes are compared."""
    path = Path(spec.source)
    named = str(read_statistics(path).space["name"])
    space = fit.networks.space(named, fit.device, fit.dinov2_backbone, fit.dtype)
    statistics = read_statistics(path, space.describe())
    space.require_channels(fit.channels)
    if fit.checkpointing:
        space.enable_gradient_checkpointing()
    memory = Frechet(
        space,
        statistics,
        fit.num_classes,
        fit.frechet_window,
        spec.weight,
        fit.frechet_unconditional,
        fit.device,
        fit.reduce,
        half=fit.dtype == torch.float16,
    )
    built.files[f"reward_{name}"] = [path]
    built.spaces.add(space.sha256)
    if memory.per_class and (note := class_note(statistics, path, fit)):
        built.notes.append(note)
    classes = fit.num_classes if memory.per_class else 1
    if note := window_note(fit.frechet_window, statistics.size, classes):
        built.notes.append(note)
    return Reward(name, spec.weight, memory.losses, memory)


def class_note(statistics: Statistics, path: Path, fit: Fit) -> str | None:
    """Which class folder is which class, for the log. Raises `InputError` if the teacher names them otherwise."""
    source = statistics.space.get("source")
    if statistics.classes:
        if wrong := contradiction(statistics.classes, fit.num_classes, fit.dataset):
            raise InputError(
                f"{path}: {wrong}; name the folders by the model's numbers (0, 1, ...) and make the file anew by "
                "evaluation.statistics, or give --frechet-unconditional"
            )
        return f"{path}: {order_of(statistics.classes)}"
    if isinstance(source, dict) and "sha256_of_names" in source and "sha256_of_labels" not in source:
        return (
            f"WARNING: {path} is of class folders in the order of the alphabet, 10 before 2, and does not name them: "
            "if their names are numbers, make it anew by evaluation.statistics"
        )
    return None


def window_note(window: int, size: int, num_classes: int) -> str | None:
    """A warning where the statistics of a window are noise, or None. ``num_classes``: 1 if unconditional."""
    if num_classes > 1 and window < SAMPLES_A_CLASS * num_classes:
        return (
            f"WARNING: --frechet-window {window} holds {window / num_classes:.1f} samples of each of the {num_classes} "
            f"classes: their means are noise. Raise it to {SAMPLES_A_CLASS * num_classes} or more, or give "
            "--frechet-unconditional"
        )
    if window < 2 * size:
        return (
            f"WARNING: --frechet-window {window} is short for {size} features: their covariance is noise. "
            f"Raise it to {2 * size} or more"
        )
    return None


def python_reward(spec: RewardSpec, name: str, fit: Fit, built: Built) -> Reward:
    reward = fit.networks.function(spec.source, fit.device)
    built.files[f"reward_{name}"] = [Path(spec.source.rpartition(":")[0])]
    built.checks.append(partial(reward.check, with_gradient=True))
    return Reward(name, spec.weight, reward.losses, users=True)


BUILDERS = {
    "dinov2": classifier_reward,
    "classifier": classifier_reward,
    "frechet": frechet_reward,
    "python": python_reward,
}


def tilt_of(spec: RewardSpec, name: str, fit: Fit, built: Built) -> Tilt:
    """A black box, or a classifier by its log probability of the label."""
    if spec.kind == "python":
        reward = fit.networks.function(spec.source, fit.device)
        built.files[f"tilt_{name}"] = [Path(spec.source.rpartition(":")[0])]
        built.checks.append(partial(reward.check, with_gradient=False))
        return Tilt(name, spec.weight, reward.rewards, users=True)
    judge = judge_of(spec, name, fit, built)

    def log_probability(images: Tensor, y: Tensor) -> Tensor:
        return -classifier_losses(judge, images, y)[0]

    return Tilt(name, spec.weight, log_probability)


def build_rewards(rewards: Sequence[RewardSpec], tilts: Sequence[RewardSpec], fit: Fit) -> Built:
    """Raises `InputError` where one is not there, or does not fit the generator."""
    built = Built()
    names = named_apart([*rewards, *tilts])
    for spec, name in zip(rewards, names, strict=False):
        built.rewards.append(BUILDERS[spec.kind](spec, name, fit, built))
    for spec, name in zip(tilts, names[len(rewards) :], strict=True):
        built.tilts.append(tilt_of(spec, name, fit, built))
    return built
