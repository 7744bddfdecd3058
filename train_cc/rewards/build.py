"""A reward from its kind and source: a new kind is a file in this folder and one entry of `BUILDERS`.

A reward from the user's own file is ``FILE.py:FUNCTION``, with ``FUNCTION(images, labels) -> (B,)``, larger is better.
Images come as float tensors (B, C, H, W) in [0, 1] on the run's device, with gradient. The file may have:

    setup(device)       called once, before the first image: load a model here
    IMAGES = "uint8"    the function takes uint8 arrays (B, H, W, C) and int labels (B,), both numpy: for --tilt only,
                        since no gradient passes through
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from train_cc.io.class_names import contradiction, order_of
from train_cc.io.errors import InputError
from train_cc.io.read import first_line, sha256
from train_cc.models.backbone import Network, choose_attention, load_network
from train_cc.models.classifier import ImageClassifier
from train_cc.models.dinov2 import DINOv2Classifier
from train_cc.models.features import FeatureSpace, load_space
from train_cc.models.vae import images_to_uint8, load_decoder
from train_cc.rewards.frechet import Frechet
from train_cc.rewards.spec import RewardSpec, named_apart
from train_cc.rewards.statistics import Statistics, read_statistics, require_space
from train_cc.rewards.terms import Reward, Scorer, Tilt, classifier_losses
from train_cc.run.session import Session, on_main

USERS_FUNCTION = "FILE.py:FUNCTION with FUNCTION(images, labels) -> (B,), larger is better"


def load_module(source: str) -> tuple[ModuleType, str]:
    """``source`` as FILE.py:FUNCTION -> the file as a module, and the function's name. Raises `InputError`."""
    file, _, name = source.rpartition(":")
    path = Path(file)
    if not name.isidentifier() or not path.is_file():
        raise InputError(f"the reward {source!r} is not there; {USERS_FUNCTION} is expected")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}_{abs(hash(path.resolve()))}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is no Python file; {USERS_FUNCTION} is expected")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for themselves there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code, whatever it does
        raise InputError(f"{path} cannot be imported ({first_line(error)})") from error
    if not callable(getattr(module, name, None)):
        raise InputError(f"{path} has no function {name}; {USERS_FUNCTION} is expected")
    return module, name


class PythonReward:
    """The function of a user's file as losses (smaller is better) or, without gradient, as plain rewards."""

    def __init__(self, source: str, device: torch.device | str):
        self.source, self.file = source, Path(source.rpartition(":")[0])
        module, self.name = load_module(source)
        self._function: Callable = getattr(module, self.name)
        self._takes_uint8 = getattr(module, "IMAGES", None) == "uint8"
        if callable(getattr(module, "setup", None)):
            self._guarded(module.setup, device)

    def _guarded(self, call: Callable, *arguments: object) -> object:
        try:
            return call(*arguments)
        except Exception as error:
            raise InputError(f"the reward {self.source} raised {first_line(error)}") from error

    def rewards(self, images: Tensor, y: Tensor) -> Tensor:
        """images (B, C, H, W) in [0, 1], y (B,) -> rewards (B,), fp32. Raises `InputError`."""
        if self._takes_uint8:
            values = self._guarded(self._function, images_to_uint8(images).numpy(), y.cpu().numpy())
        else:
            values = self._guarded(self._function, images, y)
        if isinstance(values, np.ndarray | list | tuple):
            values = self._guarded(lambda: torch.as_tensor(np.asarray(values)))
        if not isinstance(values, Tensor) or values.shape != (len(images),):
            kind = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise InputError(f"the reward {self.source} returned {kind}; ({len(images)},) is expected, one per image")
        return values.to(images.device).float()

    def losses(self, images: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return -self.rewards(images, y), {}

    def check(self, images: Tensor, y: Tensor, with_gradient: bool) -> None:
        """One batch before anything is written: shape, finiteness, and that the gradient reaches the images."""
        images = images.detach().requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            values = self.rewards(images, y)
        if (~torch.isfinite(values)).any():
            raise InputError(f"the reward {self.source} returned values that are not finite on a first batch")
        if with_gradient:
            gradients = torch.autograd.grad(values.sum(), images, allow_unused=True) if values.requires_grad else [None]
            if gradients[0] is None:
                raise InputError(
                    f"no gradient of the reward {self.source} reaches the images: use it without one, by --tilt"
                )


T = TypeVar("T")


class Networks:
    """Each network of a run, read from its source. Raises `InputError`.

    The main process of ``session`` reads what may have to be downloaded before the others do, and only it hashes.
    A dry run has others by the same names, of sizes only (`train_cc.planning.networks`).
    """

    have_values = True  # that can be checked

    def __init__(self, session: Session):
        self._session = session

    def _main_first(self, read: Callable[[], T]) -> T:
        """``read()`` on every process: on the main one first, so that the others find its downloads."""
        result: list[T] = []
        on_main(self._session, lambda: result.append(read()))
        return result[0] if result else read()

    def teacher(self, folder: Path) -> Network:
        return load_network(folder)

    def decoder(
        self, vae: str | None, device: torch.device, dtype: torch.dtype, latents: str | None
    ) -> Callable[[Tensor], Tensor]:
        """``vae``: None in pixel space. ``latents``: what the teacher records of its own."""
        return self._main_first(lambda: load_decoder(vae, device, dtype, latents))

    def classifier(self, source: str) -> ImageClassifier:
        """``source``: a folder of pretrain/classifier.py, or a timm name with published weights."""
        load = ImageClassifier.from_pretrained if Path(source).exists() else ImageClassifier.from_timm
        return self._main_first(lambda: load(source))

    def dinov2(self, backbone: str, head: str) -> DINOv2Classifier:
        return self._main_first(lambda: DINOv2Classifier.from_official(backbone, head))

    def space(self, name: str, device: torch.device, backbone: str, dtype: torch.dtype) -> FeatureSpace:
        return self._main_first(lambda: load_space(name, device, dinov2_backbone=backbone, dtype=dtype))

    def function(self, source: str, device: torch.device) -> PythonReward:
        return PythonReward(source, device)

    def hashes(self, files: dict[str, list[Path]]) -> dict[str, str]:
        """SHA-256 of every file that was read, by the flag or reward that named it."""
        return on_main(self._session, lambda: {name: sha256(path) for name, paths in files.items() for path in paths})


# Rewards -------------------------------------------------------------------------------------------------------------


SAMPLES_A_CLASS = 10  # fewer in the window, and the class means are noise


@dataclass(frozen=True)
class Fit:
    """The generator and images that every reward must fit, and the device and dtype of its networks."""

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


def place_judge(judge: nn.Module, name: str, fit: Fit) -> nn.Module:
    """The classifier ``judge``, frozen, on its device. Raises `InputError` for other classes or channels."""
    if judge.num_classes != fit.num_classes:
        classes = f"{judge.num_classes} classes, the generator {fit.num_classes}"
        raise InputError(f"the {name} classifier has {classes}")
    if judge.in_channels != fit.channels:
        raise InputError(f"the {name} classifier takes {judge.in_channels} channels, the images have {fit.channels}")
    choose_attention(judge, fit.device, fit.dtype)
    return judge.to(fit.device, fit.dtype)


def judge_of(spec: RewardSpec, name: str, fit: Fit) -> dict:
    """The classifier that ``spec`` names, and its files: fields of a `Scorer`."""
    if spec.kind == "dinov2":
        judge = fit.networks.dinov2(fit.dinov2_backbone, fit.dinov2_head)
        files = {"dinov2_backbone": judge.files[:1], "dinov2_head": judge.files[1:]}
    else:
        judge = fit.networks.classifier(spec.source)
        files = {f"reward_{name}": judge.files}
    judge = place_judge(judge, "reward", fit)
    if fit.checkpointing:
        judge.enable_gradient_checkpointing()
    return {"judge": judge, "files": files}


def classifier_reward(spec: RewardSpec, name: str, fit: Fit) -> Reward:
    own = judge_of(spec, name, fit)
    return Reward(name, spec.weight, partial(classifier_losses, own["judge"]), **own)


def frechet_reward(spec: RewardSpec, name: str, fit: Fit) -> Reward:
    """The space is the one that the statistics name, and must still be it: both hashes are compared."""
    path = Path(spec.source)
    statistics = read_statistics(path)
    space = fit.networks.space(str(statistics.space["name"]), fit.device, fit.dinov2_backbone, fit.dtype)
    require_space(statistics.space, space.describe(), path)
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
        kl=spec.kind == "kl",
    )
    classes = fit.num_classes if memory.per_class else 1
    notes = [class_note(statistics, path, fit)] if memory.per_class else []
    notes.append(window_note(fit.frechet_window, statistics.size, classes))
    files = {f"reward_{name}": [path]}
    return Reward(name, spec.weight, memory.losses, memory, files=files, notes=list(filter(None, notes)))


def class_note(statistics: Statistics, path: Path, fit: Fit) -> str | None:
    """The order of the class folders, for the log. Raises `InputError` if the teacher names them otherwise."""
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


def python_reward(spec: RewardSpec, name: str, fit: Fit) -> Reward:
    function = fit.networks.function(spec.source, fit.device)
    files, check = {f"reward_{name}": [function.file]}, partial(function.check, with_gradient=True)
    return Reward(name, spec.weight, function.losses, files=files, check=check)


BUILDERS = {
    "dinov2": classifier_reward,
    "classifier": classifier_reward,
    "frechet": frechet_reward,
    "kl": frechet_reward,
    "python": python_reward,
}


def build_tilt(spec: RewardSpec, name: str, fit: Fit) -> Tilt:
    """A black box, or a classifier by its log probability of the label."""
    if spec.kind == "python":
        function = fit.networks.function(spec.source, fit.device)
        files, check = {f"tilt_{name}": [function.file]}, partial(function.check, with_gradient=False)
        return Tilt(name, spec.weight, function.rewards, files=files, check=check)
    own = judge_of(spec, name, fit)
    return Tilt(name, spec.weight, lambda images, y: -classifier_losses(own["judge"], images, y)[0], **own)


def build_rewards(
    rewards: Sequence[RewardSpec], tilts: Sequence[RewardSpec], fit: Fit
) -> tuple[list[Reward], list[Tilt]]:
    """Raises `InputError` if one is not there, or does not fit the generator."""
    pairs = list(zip([*rewards, *tilts], named_apart([*rewards, *tilts]), strict=True))
    built = [BUILDERS[spec.kind](spec, name, fit) for spec, name in pairs[: len(rewards)]]
    return built, [build_tilt(spec, name, fit) for spec, name in pairs[len(rewards) :]]


def judges_sha256(scorers: Sequence[Scorer], hashes: dict[str, str]) -> set[str]:
    """SHA-256 of the networks that reward; ``hashes``: of the files of ``scorers``, by the same names."""
    spaces = {scorer.memory.features_of.sha256 for scorer in scorers if getattr(scorer, "memory", None) is not None}
    files = (next(iter(scorer.files)) for scorer in scorers if scorer.judge is not None)
    return spaces | {hashes[name] for name in files if name in hashes}
