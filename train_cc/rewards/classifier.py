"""ReFL with a classifier: loss_reward = cross_entropy(classifier(images), y) (docs/method.md: per-image rewards)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def classifier_losses(classifier: nn.Module, images: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy and whether the class was right, per image: images (B, C, H, W) in [0, 1], y (B,) -> (B,) each."""
    logits = classifier(images).float()
    with torch.no_grad():
        hits = (logits.argmax(dim=1) == y).float()
    return F.cross_entropy(logits, y, reduction="none"), {"accuracy": hits}
