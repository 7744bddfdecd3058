"""Networks of a run, read from files and from the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from train_cc.io.read import sha256
from train_cc.models.classifier import ImageClassifier
from train_cc.models.dinov2 import DINOv2Classifier
from train_cc.models.features import FeatureSpace, load_space
from train_cc.models.sit import SiT
from train_cc.models.vae import load_decoder
from train_cc.rewards.python_file import PythonReward
from train_cc.run.session import Session, on_main

T = TypeVar("T")


class Networks:
    """Each network of a run, read from its source. Raises `InputError`.

    The main process of ``session`` reads what may have to be downloaded before the others do, and it alone hashes.
    A dry run has others by the same names, of sizes only (`train_cc.planning.networks`).
    """

    have_values = True  # that can be checked

    def __init__(self, session: Session):
        self._session = session

    def _main_first(self, read: Callable[[], T]) -> T:
        """``read()`` on every process: on the main one first, so that the others find its downloads."""
        found: list[T] = []
        on_main(self._session, lambda: found.append(read()))
        return found[0] if found else read()

    def sit(self, folder: Path) -> SiT:
        return SiT.from_pretrained(folder)

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
