"""The networks of a plan: of the right sizes, of fake tensors. What is here already is read, as by a run."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from train_cc.io.errors import InputError
from train_cc.io.remote import model_folder
from train_cc.io.weights import WEIGHTS_NAME
from train_cc.models.backbone import SIZES, Network, new_network, read_config
from train_cc.models.classifier import ImageClassifier
from train_cc.models.dinov2 import IMAGE_SIZE, PATCH_SIZE, DINOv2Classifier, official_file
from train_cc.models.features import FeatureSpace
from train_cc.models.vae import VAEDecoder, new_vae, vae_files
from train_cc.rewards.build import Networks, PythonReward
from train_cc.run.session import Session

DINOV2_SIZES = {"vits14": (384, 12), "vitb14": (768, 12), "vitl14": (1024, 24)}  # width, depth


def named_size(teacher: Path) -> dict | None:
    """The config of SiT-XL/2, DiT-XL/2, LightningDiT-XL/1, ..., or of a missing folder named SiT-XL-2; else None."""
    of_folder = {name.replace("/", "-"): size for name, size in SIZES.items()}
    return None if os.path.lexists(teacher) else SIZES.get(str(teacher), of_folder.get(teacher.name))


def apply(network: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which changes a parameter in place: a fake one refuses that, so a new one replaces it."""
    for module in network.modules() if recurse else [network]:
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(change(p.detach()), p.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else change(buffer)
    return network


class NetworksToCome(Networks):
    """Networks of fake tensors of ``mode``. ``notes``: for the plan."""

    have_values = False

    def __init__(self, session: Session):
        super().__init__(session)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.notes: list[str] = []
        self._one = self.mode.from_tensor(torch.zeros(1))
        self._classes = 0  # of the teacher

    def _fake(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else self._one.new_empty_strided(x.shape, x.stride(), dtype=x.dtype)

    def faked(self, network: nn.Module) -> nn.Module:
        """``network``, its tensors replaced by fake ones; `to` still casts them."""
        network._apply = partial(apply, network)
        return apply(network, self._fake)

    def teacher(self, folder: Path) -> Network:
        config = named_size(folder)
        if config is None:
            config = read_config(folder)
            if not (model_folder(folder) / WEIGHTS_NAME).exists():
                self.notes.append(f"{folder / WEIGHTS_NAME} does not exist yet: a run needs it")
        else:
            how = "is the name" if str(folder) in SIZES else "does not exist yet, and has the name"
            self.notes.append(f"--teacher {folder} {how} of a size: a run needs a model folder")
        with torch.device("meta"):
            model = new_network(config)
        model.files, self._classes = [], model.config.num_classes
        return self.faked(model.eval())

    def decoder(
        self, vae: str | None, device: torch.device, dtype: torch.dtype, latents: str | None
    ) -> Callable[[Tensor], Tensor]:
        if vae is None or vae_files(vae, download=False) is not None:
            decode = super().decoder(vae, device, dtype, latents)
            return decode if vae is None else self.faked(decode)
        self.notes.append(f"the VAE {vae} is to be downloaded: planned with the size of sd-vae-ft-ema")
        with torch.device("meta"):
            return self.faked(VAEDecoder(new_vae()).to(dtype))

    def classifier(self, source: str) -> ImageClassifier:
        there = Path(source).exists()
        judge = ImageClassifier.from_pretrained(source) if there else ImageClassifier.untrained(source)
        return self.faked(judge.requires_grad_(False).eval())

    def dinov2(self, backbone: str, head: str) -> DINOv2Classifier:
        """The files' network; if they are missing, one of the size in their name, or ViT-L."""
        if all([official_file(source, download_it=False) for source in (backbone, head)]):
            return self.faked(super().dinov2(backbone, head))
        width, depth = next((size for name, size in DINOV2_SIZES.items() if name in str(backbone)), (1024, 24))
        options = {"embed_dim": width, "num_heads": width // 64, "init_values": 1e-5, "num_classes": 0}
        with torch.device("meta"):
            network = VisionTransformer(IMAGE_SIZE, PATCH_SIZE, depth=depth, no_embed_class=True, **options)
            judge = DINOv2Classifier(network, nn.Linear(5 * width, self._classes))
        judge.files = []
        return self.faked(judge)

    def space(self, name: str, device: torch.device, backbone: str, dtype: torch.dtype) -> FeatureSpace:
        return self.faked(super().space(name, device, backbone, dtype))

    def function(self, source: str, device: torch.device) -> PythonReward:
        return FunctionToCome(source, device, self.notes)

    def hashes(self, files: dict[str, list[Path]]) -> dict[str, str]:
        return {"teacher": ""}


class FunctionToCome(PythonReward):
    """A user's function on tensors without values: if it does not bear that, what it needs is not known."""

    def __init__(self, source: str, device: torch.device, notes: list[str]):
        self._notes = notes
        super().__init__(source, device)

    def rewards(self, images: Tensor, y: Tensor) -> Tensor:
        if not self._takes_uint8:  # arrays need nothing of a GPU
            try:
                return super().rewards(images, y)
            except InputError:
                self._notes.append(f"what {self.source} needs is not known: its memory comes on top")
        return images.float().mean(dim=(1, 2, 3))
