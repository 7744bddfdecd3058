"""The networks of a dry run: of the right sizes, without weights. What is here already is read, as by a run."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from train_cc.io.errors import InputError
from train_cc.io.remote import model_folder
from train_cc.io.weights import WEIGHTS_NAME
from train_cc.models.classifier import ImageClassifier
from train_cc.models.dinov2 import IMAGE_SIZE, PATCH_SIZE, DINOv2Classifier, official_file
from train_cc.models.features import FeatureSpace, load_space
from train_cc.models.sit import SIT_SIZES, SiT, read_sit_config
from train_cc.models.vae import VAEDecoder, load_decoder, new_vae, vae_files
from train_cc.rewards.networks import Networks
from train_cc.rewards.python_file import PythonReward

DINOV2_SIZES = {"vits14": (384, 12), "vitb14": (768, 12), "vitl14": (1024, 24)}  # width, depth


def named_size(teacher: Path) -> dict | None:
    """The arguments of `SiT` for SiT-XL/2, or for a folder named SiT-XL-2 that is missing; None for other names."""
    of_folder = {name.replace("/", "-"): size for name, size in SIT_SIZES.items()}
    return None if os.path.lexists(teacher) else SIT_SIZES.get(str(teacher), of_folder.get(teacher.name))


class NetworksToCome(Networks):
    """``device`` is a fake GPU: a network made there takes no memory and no time. ``notes``: what to say."""

    def __init__(self, device: torch.device):
        self.device = device
        self.notes: list[str] = []
        self._classes = 0  # of the teacher

    def say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def sit(self, folder: Path) -> SiT:
        config = named_size(folder)
        if config is None:
            config = read_sit_config(folder)
            if not (model_folder(folder) / WEIGHTS_NAME).exists():
                self.say(f"{folder / WEIGHTS_NAME} does not exist yet: a run needs it")
        else:
            how = "is the name" if str(folder) in SIT_SIZES else "does not exist yet, and has the name"
            self.say(f"--teacher {folder} {how} of a size: a run needs a model folder")
        with self.device:
            model = SiT(**config)
        model.files = []
        self._classes = model.config.num_classes
        return model.eval()

    def decoder(
        self, vae: str | None, device: torch.device, dtype: torch.dtype, latents: str | None
    ) -> Callable[[Tensor], Tensor]:
        if vae is None or vae_files(vae, download=False) is not None:
            return load_decoder(vae, device, dtype, latents)
        self.say(f"the VAE {vae} is to be downloaded: planned with the size of sd-vae-ft-ema")
        with self.device:
            return VAEDecoder(new_vae()).to(device, dtype)

    def classifier(self, source: str) -> ImageClassifier:
        if Path(source).exists():
            return ImageClassifier.from_pretrained(source)
        return ImageClassifier.untrained(source).requires_grad_(False).eval()

    def dinov2(self, backbone: str, head: str) -> DINOv2Classifier:
        """Of files that are not here yet: the size that the name says, ViT-L where it says none."""
        if all([official_file(source, download_it=False) for source in (backbone, head)]):
            return DINOv2Classifier.from_official(backbone, head)
        width, depth = next((size for name, size in DINOV2_SIZES.items() if name in str(backbone)), (1024, 24))
        options = {"embed_dim": width, "num_heads": width // 64, "init_values": 1e-5, "num_classes": 0}
        with self.device:
            network = VisionTransformer(IMAGE_SIZE, PATCH_SIZE, depth=depth, no_embed_class=True, **options)
            judge = DINOv2Classifier(network, nn.Linear(5 * width, self._classes))
        judge.files = []
        return judge

    def space(self, name: str, device: torch.device, backbone: str, dtype: torch.dtype) -> FeatureSpace:
        return load_space(name, device, dinov2_backbone=backbone, dtype=dtype)

    def function(self, source: str, device: torch.device) -> PythonReward:
        return FunctionToCome(source, device, self.say)

    def hashes(self, files: dict[str, list[Path]]) -> dict[str, str]:
        return {"teacher": ""}


class FunctionToCome(PythonReward):
    """A user's function on tensors without values: where it does not bear that, what it needs is not known."""

    def __init__(self, source: str, device: torch.device, say: Callable[[str], None]):
        self._say = say
        super().__init__(source, device)

    def _unknown(self) -> None:
        self._say(f"what {self.source} needs is not known: its memory comes on top")

    def _guarded(self, call: Callable, *arguments: object) -> object:
        try:
            return super()._guarded(call, *arguments)
        except InputError:
            self._unknown()
            return None

    def rewards(self, images: Tensor, y: Tensor) -> Tensor:
        try:
            return super().rewards(images, y)
        except InputError:
            self._unknown()
            return images.float().mean(dim=(1, 2, 3))

    def check(self, images: Tensor, y: Tensor, with_gradient: bool) -> None:
        """Values are not there to be checked."""
