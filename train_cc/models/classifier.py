"""A timm classifier with its preprocessing inside: a reward, or the feature space of an evaluation."""

import json
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from train_cc.io.errors import InputError


class ImageClassifier(nn.Module):
    """Images in [0, 1] (B, C, H, W) -> logits (B, num_classes); resized to ``image_size``, normalised."""

    def __init__(
        self,
        architecture: str,
        num_classes: int,
        in_channels: int,
        image_size: int,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        pretrained: bool = False,
    ):
        super().__init__()
        if not timm.is_model(architecture):
            raise InputError(f"timm knows no architecture {architecture!r}; timm.list_models() has the names")
        self.config = {
            "architecture": architecture,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "image_size": image_size,
            "mean": mean,
            "std": std,
        }
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(1, -1, 1, 1), persistent=False)
        # Vision transformers are built for one size; other architectures know no such argument.
        options = {"in_chans": in_channels, "num_classes": num_classes, "pretrained": pretrained}
        try:
            self.network = timm.create_model(architecture, img_size=image_size, **options)
        except TypeError:
            self.network = timm.create_model(architecture, **options)

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

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the last linear layer (B, D), and the logits (B, num_classes)."""
        features = self.network.forward_head(self.network.forward_features(self._preprocess(images)), pre_logits=True)
        return features, self.network.get_classifier()(features)

    def enable_gradient_checkpointing(self) -> None:
        self.network.set_grad_checkpointing(True)

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.network.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def from_timm(cls, name: str) -> "ImageClassifier":
        """A timm model with its published weights and preprocessing, frozen and in eval mode. Raises `InputError`."""
        published = timm.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
        if published is None:
            raise InputError(f"timm has no weights for {name!r}; give such a name or a classifier folder")
        channels, image_size, _ = published.input_size
        try:
            model = cls(
                name, published.num_classes, channels, image_size, published.mean, published.std, pretrained=True
            )
        except (OSError, RuntimeError, TypeError) as error:
            raise InputError(f"cannot load timm's weights of {name!r}: {error}") from error
        return model.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImageClassifier":
        """Read what `save_pretrained` wrote, frozen and in eval mode. Raises `InputError` on anything else."""
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise InputError(
                    f"{folder / name} does not exist; a folder of train_cc/pretrain/classifier.py is expected"
                )
        try:
            model = cls(**json.loads((folder / "config.json").read_text()))
            model.network.load_state_dict(load_file(folder / "model.safetensors"))
        except (SafetensorError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"cannot read a classifier from {folder}: {error}") from error
        return model.requires_grad_(False).eval()


@torch.no_grad()
def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == y).float().mean()
