"""Feature spaces: one class for rewards, statistics and evaluation. Differentiable, preprocessing inside, with a hash.

| notation | features | logits |
|---|---|---|
| `classifier:FOLDER` | input of the last linear layer, of a folder of pretrain/classifier.py | of the data's classes |
| `dinov2` | class token of the last block, normed, of an official backbone | none |
| `inception` | torch-fidelity's inception-v3-compat, 2048 | 1008, unbiased |
| `inception-spatial` | ADM's for sFID: 7 channels of the 17 x 17 positions of mixed_6/conv, 2023 | none |
| `timm:NAME` | pre-logits of a timm model with its published weights | of its own classes, if it has any |
| `pixels` | the image itself, in [0, 1], flattened; only to judge small images | none |

Greyscale images are repeated to three channels for a space that takes three; any other mismatch is refused. Inception
takes uint8: images are rounded to 1/255 there, and the gradient passes the rounding unchanged. An image that came from
uint8 thus has torch-fidelity's features; one from a decoder, those that it will have once it is saved. The other
spaces take images as they are. Weights in half precision move the features a little: statistics are of fp32.
"""

import io
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from train_cc.io.errors import InputError
from train_cc.io.fields import FEATURE_SPACES, JUDGING_SPACES
from train_cc.io.read import parsing, read_torch, require_file, sha256
from train_cc.io.remote import download
from train_cc.models.classifier import ImageClassifier
from train_cc.models.dinov2 import DINOv2Classifier

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of this file
SPATIAL, SPATIAL_CHANNELS = "inception-spatial", 7  # of sFID, as ADM's evaluator has it
MOST_PIXELS = 4096  # a covariance of more would take minutes


def without_tf32() -> AbstractContextManager:
    """Convolutions of fp32, for figures and statistics: cuDNN's have 10 bits of mantissa unless told otherwise."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


class FeatureSpace(nn.Module):
    """Images in [0, 1] (B, C, H, W) -> features (B, size) float32. Frozen; the gradient flows through.

    ``network`` has ``features_and_logits(images)`` with its preprocessing inside, ``preprocessing`` in words,
    ``in_channels`` and ``files``. ``knows_labels``: its logits are of the samples' own classes.
    """

    def __init__(self, name: str, network: nn.Module, knows_labels: bool = False):
        super().__init__()
        self.name, self.network, self.knows_labels = name, network, knows_labels
        self.in_channels, self.preprocessing = network.in_channels, network.preprocessing
        self.sha256 = sha256(network.files[0]) if network.files else ""
        self.requires_grad_(False).eval()
        side = self.preprocessing["image_size"]
        with torch.no_grad(), parsing(name, "a network with features before one linear layer", "gives no features"):
            features, logits = network.features_and_logits(torch.zeros(1, self.in_channels, side, side))
        self.size, self.num_logits = features.shape[1], None if logits is None else logits.shape[1]

    def train(self, mode: bool = True) -> "FeatureSpace":
        return super().train(False)  # a frozen measure, whatever it is a part of

    def describe(self) -> dict:
        """Name and identity of the space in a file: one space iff ``sha256`` and ``preprocessing`` are equal."""
        return {"name": self.name, "sha256": self.sha256, "preprocessing": self.preprocessing}

    def require_channels(self, channels: int) -> None:
        """Raises `InputError` for images that the space does not take."""
        if channels != self.in_channels and (channels, self.in_channels) != (1, 3):
            raise InputError(f"{self.name} takes images of {self.in_channels} channel(s), these have {channels}")

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, size) and logits (B, num_logits), float32; None if the space has no logits."""
        self.require_channels(images.shape[1])
        if images.shape[1] != self.in_channels:
            images = images.expand(-1, self.in_channels, -1, -1)
        features, logits = self.network.features_and_logits(images.float())
        return features.float(), None if logits is None else logits.float()

    def forward(self, images: Tensor) -> Tensor:
        return self.features_and_logits(images)[0]

    def enable_gradient_checkpointing(self) -> None:
        if hasattr(self.network, "enable_gradient_checkpointing"):
            self.network.enable_gradient_checkpointing()

    @torch.no_grad()
    def of(self, images: np.ndarray, batch: int) -> tuple[Tensor, Tensor | None]:
        """uint8 (N, H, W, C) -> features (N, size) and logits (N, num_logits) or None, on the CPU."""
        device = next(self.parameters()).device
        parts = tqdm(torch.from_numpy(images).split(batch), desc=self.name, mininterval=2, delay=5)
        with without_tf32():
            outputs = [self.features_and_logits(part.permute(0, 3, 1, 2).to(device) / 255) for part in parts]
        features, logits = zip(*outputs, strict=True)
        return torch.cat(features).cpu(), None if logits[0] is None else torch.cat(logits).cpu()


class Pixels(nn.Module):
    """The space ``pixels``. Raises `InputError` for images that are not small squares."""

    def __init__(self, height: int, width: int, channels: int):
        if height != width or height * width * channels > MOST_PIXELS:
            raise InputError(
                f"the space pixels is for square images of at most {MOST_PIXELS} numbers, these have "
                f"{height} x {width} x {channels}; choose another space"
            )
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0))  # the device of a space is that of its parameters
        self.in_channels, self.files = channels, []
        self.preprocessing = {"image_size": height, "channels": channels, "scale": "x / 255"}

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, None]:
        return images.flatten(1), None


class InceptionFeatures(nn.Module):
    """torch-fidelity's network with a path for gradients: its own forward takes uint8 only. Always fp32.

    ``file``: its weights, None: downloaded. ``spatial``: the features of sFID. TensorFlow's mixed_6/conv is the first
    branch of Mixed_6d here, after its ReLU. Raises `InputError`.
    """

    in_channels = 3

    def __init__(self, file: Path | None, spatial: bool = False):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        file = downloaded_inception() if file is None else require_file(file, "torch-fidelity's Inception weights")
        if (digest := sha256(file)) != INCEPTION_SHA256:
            raise InputError(f"{file} has SHA-256 {digest}, torch-fidelity's Inception {INCEPTION_SHA256}")
        # The constructor unpickles what it is given: never a file from outside, but tensors that were read safely.
        tensors = io.BytesIO()
        torch.save(read_torch(file, "torch-fidelity's Inception weights"), tensors)
        tensors.seek(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=tensors)
        self.size, self.spatial, self.files = network.INPUT_IMAGE_SIZE, spatial, [file]
        self.preprocessing = {
            "image_size": self.size,
            "resize": "bilinear as TensorFlow 1, of uint8",
            "scale": "(x-128)/128",
        }
        self.fc = network.fc
        parts = {name: part for name, part in network.named_children() if name != "fc"}
        if spatial:
            self.preprocessing["layer"] = f"mixed_6/conv, {SPATIAL_CHANNELS} channels"
            names = list(parts)
            parts = {name: parts[name] for name in names[: names.index("Mixed_6d")]}
            parts["mixed_6/conv"] = network.Mixed_6d.branch1x1
        self.trunk = nn.Sequential(*parts.values())

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        x = images * 255
        x = x + (x.detach().clamp(0, 255).round() - x.detach())  # the gradient of x, the value of uint8
        x = interpolate_bilinear_2d_like_tensorflow1x(x, size=(self.size, self.size), align_corners=False)
        features = self.trunk((x - 128) / 128)
        if self.spatial:
            return features[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1), None
        features = features.flatten(1)
        return features, features @ self.fc.weight.T

    def _apply(self, function, recurse: bool = True) -> nn.Module:
        """Moves, but stays in fp32: FID in half precision is another figure."""
        return super()._apply(lambda tensor: tensor.to(function(tensor).device), recurse)


def load_space(
    text: str,
    device: torch.device | str = "cpu",
    dinov2_backbone: str | Path | None = None,
    inception_weights: Path | None = None,
    dtype: torch.dtype = torch.float32,
    image_shape: tuple[int, int, int] | None = None,
) -> FeatureSpace:
    """The space that ``text`` names, frozen, on ``device`` with weights in ``dtype``. Raises `InputError`.

    ``dinov2_backbone``: official file or its URL; ``inception_weights``: torch-fidelity's file, None: downloaded.
    ``image_shape``: (H, W, C), if the space may be `pixels`.
    """
    kind, _, source = text.partition(":")
    if kind == "classifier" and source:
        network: nn.Module = ImageClassifier.from_pretrained(source)
    elif kind == "timm" and source:
        network = ImageClassifier.from_timm(source)
    elif text == "dinov2":
        if dinov2_backbone is None:
            raise InputError("the space dinov2 needs an official backbone: give its file or URL by --dinov2-backbone")
        network = DINOv2Classifier.from_official(dinov2_backbone, None)
    elif text in ("inception", SPATIAL):
        network = InceptionFeatures(inception_weights, spatial=text == SPATIAL)
    elif text == "pixels" and image_shape is not None:
        network = Pixels(*image_shape)
    else:
        allowed = FEATURE_SPACES if image_shape is None else JUDGING_SPACES
        raise InputError(f"{text[:200]!r} is no feature space here; allowed: {allowed}")
    return FeatureSpace(text, network, knows_labels=kind == "classifier").to(device, dtype)


def downloaded_inception() -> Path:
    """torch-fidelity's file in torch's folder of downloads; one that is damaged there is downloaded again.

    Raises `InputError` if the download fails.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(INCEPTION_URL).name
    if path.is_file() and sha256(path) != INCEPTION_SHA256:
        path.unlink()
    hint = "fetch it where you can, and give its file by --inception-weights"
    return download(INCEPTION_URL, path, hint, INCEPTION_SHA256)
