"""A timm classifier with its preprocessing inside: a reward, or the feature space of an evaluation."""

import json
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from train_cc.errors import InputError


class ImageClassifier(nn.Module):
    """Images in [0, 1] (B, C, H, W) -> logits (B, num_classes); resized to ``image_size``, normalised to [-1, 1]."""

    def __init__(self, architecture: str, num_classes: int, in_channels: int, image_size: int):
        super().__init__()
        if architecture not in timm.list_models():
            raise InputError(f"timm knows no architecture {architecture!r}; timm.list_models() has the names")
        self.config = {
            "architecture": architecture,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "image_size": image_size,
        }
        options = {"img_size": image_size} if "vit" in architecture else {}
        self.network = timm.create_model(architecture, in_chans=in_channels, num_classes=num_classes, **options)

    @property
    def num_classes(self) -> int:
        return self.config["num_classes"]

    def _preprocess(self, images: Tensor) -> Tensor:
        size = (self.config["image_size"],) * 2
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        return images * 2 - 1

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self._preprocess(images))

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the last linear layer (B, D), and the logits (B, num_classes)."""
        features = self.network.forward_head(self.network.forward_features(self._preprocess(images)), pre_logits=True)
        return features, self.network.get_classifier()(features)

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.network.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")

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
