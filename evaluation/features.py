"""The two feature spaces: Inception as ADM used it, or a classifier of ours."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from train_cc.io.errors import InputError
from train_cc.io.read import sha256
from train_cc.models.classifier import ImageClassifier

# The start of the SHA-256 of torch-fidelity's weights file, from its name: weights-inception-2015-12-05-6726825d.pth
INCEPTION_SHA256 = "6726825d"


@dataclass
class FeatureSpace:
    """``extract``: uint8 images (B, C, H, W) -> features (B, D), logits (B, classes)."""

    name: str
    extract: Callable[[Tensor], tuple[Tensor, Tensor]]
    knows_labels: bool  # whether the logits are of the samples' own classes

    @torch.no_grad()
    def of(self, images: np.ndarray, batch: int) -> tuple[Tensor, Tensor]:
        """uint8 (N, H, W, C) -> features (N, D) and logits (N, classes), on the CPU in fp32."""
        parts = torch.from_numpy(images).split(batch)
        shown = tqdm(parts, desc=self.name, mininterval=2, disable=len(parts) < 20)
        outputs = [[out.float().cpu() for out in self.extract(part.permute(0, 3, 1, 2))] for part in shown]
        features, logits = (torch.cat(column) for column in zip(*outputs, strict=True))
        return features, logits


def classifier_space(folder: Path) -> FeatureSpace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifier = ImageClassifier.from_pretrained(folder).to(device)

    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1] != classifier.config["in_channels"]:
            raise InputError(
                f"{folder} takes {classifier.config['in_channels']} channels, the images {images.shape[1]}"
            )
        return classifier.features_and_logits(images.to(device).float() / 255)

    return FeatureSpace(f"classifier {folder}", extract, knows_labels=True)


def inception_space(weights: Path | None) -> FeatureSpace:
    """torch-fidelity's "inception-v3-compat": ADM-compatible in weights, resize, scaling; 2048 features, 1008 classes.

    ``weights``: its file, checked by its hash; None: torch-fidelity downloads it.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if weights is not None:
        if not weights.is_file():
            raise InputError(f"the Inception weights {weights} do not exist")
        found = sha256(weights)
        if not found.startswith(INCEPTION_SHA256):
            raise InputError(f"{weights} has SHA-256 {found[:8]}..., torch-fidelity's Inception {INCEPTION_SHA256}...")
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights and str(weights)
        )
    except OSError as error:
        raise InputError(f"cannot download the Inception weights ({error}); give their file by --inception") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = network.to(device).eval()

    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return network(images.to(device))

    return FeatureSpace("inception-v3-compat", extract, knows_labels=False)
