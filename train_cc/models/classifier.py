"""A timm classifier with its preprocessing inside: a reward, or the feature space of an evaluation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from train_cc.io.errors import InputError
from train_cc.io.fields import check, setting
from train_cc.io.products import plain_mode
from train_cc.io.read import parsing, read_json, read_safetensors, require_folder, value_text
from train_cc.io.remote import hub_file
from train_cc.io.weights import load_weights, require_finite, require_tensors

TIMM_WEIGHTS = "model.safetensors"  # as timm's repositories name theirs
CLASSIFIER_FOLDER = "a folder of train_cc/pretrain/classifier.py"


@dataclass(frozen=True)
class ClassifierConfig:
    """The arguments of `ImageClassifier`; ``mean`` and ``std`` are one number, or one per channel."""

    architecture: str = setting()
    num_classes: int = setting(high=10**6)
    in_channels: int = setting(high=1024)
    image_size: int = setting(low=8, high=4096)
    mean: float | list = setting(0.5, low=-1e3, high=1e3)
    std: float | list = setting(0.5, low=1e-6, high=1e3)


def check_classifier_config(config: Mapping, source: Path | str) -> dict:
    """The arguments of `ImageClassifier` in ``config``. Raises `InputError`."""
    values = check(ClassifierConfig, config, source)
    if not timm.is_model(values["architecture"]):
        name, hint = value_text(values["architecture"]), "timm.list_models() has the names"
        raise InputError(f"{source}: timm knows no architecture {name}; {hint}")
    for key in ("mean", "std"):
        each = values[key] if isinstance(values[key], list) else [values[key]]
        for number in each:
            check(ClassifierConfig, values | {key: number}, source)
        if len(each) not in (1, values["in_channels"]):
            raise InputError(f"{source}: {key} has {len(each)} values; one, or one per channel, is allowed")
    return values


class ImageClassifier(nn.Module):
    """Images in [0, 1] (B, C, H, W) -> logits (B, num_classes); resized to ``image_size``, normalised."""

    def __init__(self, architecture: str, *, weights: dict[str, Tensor] | None = None, **arguments: object):
        """``weights``: those that timm publishes for ``architecture``; ``arguments``: `ClassifierConfig`'s.

        Raises `InputError`.
        """
        super().__init__()
        self.config = check_classifier_config({"architecture": architecture} | arguments, "the classifier")
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(self.config[name]).view(1, -1, 1, 1), persistent=False)
        in_channels, num_classes, image_size = (
            self.config[name] for name in ("in_channels", "num_classes", "image_size")
        )
        options = {"in_chans": in_channels, "num_classes": num_classes}
        if weights is not None:  # tensors, not a name: timm would look for pickles too
            options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": weights}}
        size = f"{in_channels} channels, {image_size} pixels and {num_classes} classes"
        with parsing(f"timm's {architecture}", size, "cannot be built"):
            try:  # vision transformers are built for one size; other architectures know no such argument
                self.network = timm.create_model(architecture, img_size=image_size, **options)
            except TypeError:
                self.network = timm.create_model(architecture, **options)
        self.files: list[Path] = []  # that it was read from

    @property
    def num_classes(self) -> int:
        return self.config["num_classes"]

    @property
    def in_channels(self) -> int:
        return self.config["in_channels"]

    def _preprocess(self, images: Tensor) -> Tensor:
        size = (self.config["image_size"],) * 2
        if images.shape[-2:] != size:
            images = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
        return ((images - self.mean) / self.std).to(next(self.network.parameters()).dtype)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self._preprocess(images))

    @property
    def preprocessing(self) -> dict:
        """Size, resizing and normalisation, in words and numbers for a file."""
        return {
            "image_size": self.config["image_size"],
            "resize": "bicubic, antialias, no crop",
            "mean": torch.tensor(self.config["mean"], dtype=torch.float64).flatten().tolist(),
            "std": torch.tensor(self.config["std"], dtype=torch.float64).flatten().tolist(),
        }

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input of the last linear layer (B, D), and the logits (B, num_classes), None without classes."""
        features = self.network.forward_head(self.network.forward_features(self._preprocess(images)), pre_logits=True)
        logits = self.network.get_classifier()(features)
        return features, logits if self.num_classes else None

    def enable_gradient_checkpointing(self) -> None:
        """Raises `InputError` for an architecture that timm cannot recompute."""
        try:
            self.network.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            hint = "leave --reward-checkpointing out, or take --reward-micro-batch"
            raise InputError(f"{self.config['architecture']} cannot be recomputed by timm: {hint}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """`config.json` and `model.safetensors`, with one mode."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.network.state_dict(), folder / TIMM_WEIGHTS)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        plain_mode(folder / TIMM_WEIGHTS)

    @classmethod
    def untrained(cls, name: str) -> "ImageClassifier":
        """The architecture and preprocessing of a timm model with published weights. Raises `InputError`."""
        return cls(name, **published_arguments(name)[0])

    @classmethod
    def from_timm(cls, name: str) -> "ImageClassifier":
        """A timm model with its published weights and preprocessing, frozen and in eval mode. Raises `InputError`."""
        arguments, repository = published_arguments(name)
        file = hub_file(repository, TIMM_WEIGHTS, f"timm's weights of {name!r}")
        if file is None:
            raise InputError(f"{repository} has no {TIMM_WEIGHTS}, the one kind of file that runs no code")
        state = require_tensors(read_safetensors(file, "weights of timm"), file, "weights of timm")
        require_finite(state, file)
        model = cls(name, **arguments, weights=state)
        model.files = [file]
        return model.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImageClassifier":
        """Read a folder of `save_pretrained`, frozen and in eval mode. Raises `InputError` for anything else."""
        folder = require_folder(Path(folder), CLASSIFIER_FOLDER, "config.json", TIMM_WEIGHTS)
        path, file = folder / "config.json", folder / TIMM_WEIGHTS
        model = cls(**check_classifier_config(read_json(path, CLASSIFIER_FOLDER), path))
        load_weights(model.network, read_safetensors(file, CLASSIFIER_FOLDER), file, "by its config.json")
        model.files = [file]
        return model.requires_grad_(False).eval()


def published_arguments(name: str) -> tuple[dict, str]:
    """`ImageClassifier`'s arguments besides the name, and the repository, of a timm model with published weights."""
    published = None
    if timm.is_model(name.split(".")[0]) and timm.is_model(name):
        with parsing(f"timm's {name}", "a name of timm.list_pretrained()", "has no weights"):
            published = timm.get_pretrained_cfg(name)
    if published is None or not published.hf_hub_id:
        raise InputError(f"timm has no weights for {name!r}; give such a name or a classifier folder")
    channels, image_size, _ = published.input_size
    arguments = {"num_classes": published.num_classes, "in_channels": channels, "image_size": image_size}
    return arguments | {"mean": list(published.mean), "std": list(published.std)}, published.hf_hub_id


@torch.no_grad()
def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == y).float().mean()
