"""The two feature spaces: Inception as ADM used it, or a classifier of ours."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from train_cc.io.errors import InputError
from train_cc.io.read import read_torch, require_file, sha256
from train_cc.models.classifier import ImageClassifier
from train_cc.models.features import INCEPTION_SHA256, downloaded_inception


@dataclass
class FeatureSpace:
    """``extract``: uint8 images (B, C, H, W) -> features (B, D), logits (B, classes)."""

    name: str
    extract: Callable[[Tensor], tuple[Tensor, Tensor]]
    knows_labels: bool  # whether the logits are of the samples' own classes
    sha256: str = ""  # of the network's weights

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

    digest = sha256(folder / "model.safetensors")
    return FeatureSpace(f"classifier {folder}", extract, knows_labels=True, sha256=digest)


def inception_space(weights: Path | None) -> FeatureSpace:
    """torch-fidelity's "inception-v3-compat": ADM-compatible in weights, resize, scaling; 2048 features, 1008 classes.

    ``weights``: its file; None: the one that is downloaded once into torch's own folder. Both are read after their hash
    was checked, without running code from them, and the library is given the tensors.
    """
    from torch_fidelity import feature_extractor_inceptionv3 as library

    path = downloaded_inception("give their file by --inception") if weights is None else weights
    digest = sha256(require_file(path, "torch-fidelity's Inception weights"))
    if not digest.startswith(INCEPTION_SHA256):
        raise InputError(f"{path} has SHA-256 {digest[:8]}..., torch-fidelity's Inception {INCEPTION_SHA256[:8]}...")
    state = read_torch(path, "torch-fidelity's Inception weights")
    # The constructor loads by itself, from a path, whatever the file's pickle says: its loader is handed the tensors.
    with mock.patch.object(library, "load_state_dict_from_url", lambda *args, **kwargs: state):
        network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = network.to(device).eval()

    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return network(images.to(device))

    return FeatureSpace("inception-v3-compat", extract, knows_labels=False, sha256=digest)
