"""Where the networks of a run come from: files, and the hub."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from train_cc.io.read import sha256
from train_cc.models.classifier import ImageClassifier
from train_cc.models.dinov2 import DINOv2Classifier
from train_cc.models.features import FeatureSpace, load_space
from train_cc.models.sit import SiT
from train_cc.models.vae import load_decoder
from train_cc.rewards.python_file import PythonReward


class Networks:
    """Each network of a run, read from its source. Raises `InputError`.

    A dry run has others by the same names, which take sizes alone (`train_cc.setup.to_come`).
    """

    def sit(self, folder: Path) -> SiT:
        return SiT.from_pretrained(folder)

    def decoder(self, vae: str | None, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """``vae``: None in pixel space."""
        return load_decoder(vae, device, dtype)

    def classifier(self, source: str) -> ImageClassifier:
        """``source``: a folder of pretrain/classifier.py, or a timm name with published weights."""
        return ImageClassifier.from_pretrained(source) if Path(source).exists() else ImageClassifier.from_timm(source)

    def dinov2(self, backbone: str, head: str) -> DINOv2Classifier:
        return DINOv2Classifier.from_official(backbone, head)

    def space(self, name: str, device: torch.device, backbone: str, dtype: torch.dtype) -> FeatureSpace:
        return load_space(name, device, dinov2_backbone=backbone, dtype=dtype)

    def function(self, source: str, device: torch.device) -> PythonReward:
        return PythonReward(source, device)

    def hashes(self, files: dict[str, list[Path]]) -> dict[str, str]:
        """SHA-256 of every file that was read, by the flag or reward that named it."""
        return {name: sha256(path) for name, paths in files.items() for path in paths}
