"""The official DINOv2 backbone with its official linear head, through timm: files, names, position embeddings."""

import math
import urllib.parse
from pathlib import Path

import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from train_cc.io.errors import InputError
from train_cc.io.read import parsing, read_torch, require_file
from train_cc.io.remote import download, is_url
from train_cc.io.weights import block_count, fit, load_weights, require_tensors

IMAGE_SIZE, PATCH_SIZE = 224, 14
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def official_file(source: str | Path, download_it: bool = True) -> Path | None:
    """The file of a path or URL; a URL's lies in torch.hub's cache. Raises `InputError`.

    ``download_it``: whether it is fetched where the cache lacks it; without, None.
    """
    if not is_url(source):
        return require_file(Path(source), "a DINOv2 .pth file or its URL")
    name = urllib.parse.urlsplit(str(source)).path.rsplit("/", 1)[-1]
    if not name:
        raise InputError(f"{source} names no file; a DINOv2 .pth file or its URL is expected")
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not target.is_file() and not download_it:
        return None
    flags = "give local files by --dinov2-backbone and --dinov2-head"
    return download(str(source), target, hint=flags)


def load_official(source: str | Path) -> tuple[dict[str, Tensor], Path]:
    """A state dict from a file or URL, never running code from it. -> it, and the file. Raises `InputError`."""
    file = official_file(source)
    hint = f"; delete it, and the same command downloads {source} again" if is_url(source) else ""
    expected = f"a bare state dict, as DINOv2's official files are{hint}"
    return require_tensors(read_torch(file, expected), file, expected), file


def resample_position(patches: Tensor, registers: bool) -> Tensor:
    """(1, M^2, D) -> (1, 256, D), as the official models do at 224 pixels, in fp32.

    Without registers by a scale factor of 16.1 / M, which itself sets the coordinates; with them to size, antialiased.
    """
    side, target = math.isqrt(patches.shape[1]), IMAGE_SIZE // PATCH_SIZE
    if side == target:
        return patches
    grid = patches.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    if registers:
        grid = F.interpolate(grid, size=(target, target), mode="bicubic", antialias=True)
    else:
        grid = F.interpolate(grid, scale_factor=(target + 0.1) / side, mode="bicubic", antialias=False)
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


def backbone_arguments(state: dict[str, Tensor], source: str | Path) -> dict:
    """The arguments of the `VisionTransformer` that takes ``state``, read off its shapes. Raises `InputError`."""
    needed = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}
    if needed - state.keys():
        raise InputError(f"{source} is no DINOv2 backbone: it lacks {sorted(needed - state.keys())}")
    swiglu = "blocks.0.mlp.w12.weight" in state
    hidden = state.get("blocks.0.mlp.w12.weight" if swiglu else "blocks.0.mlp.fc1.weight")
    width, side = state["cls_token"].shape[-1], math.isqrt(state["pos_embed"].shape[1] - 1)
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    tokens = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side**2, width)}
    tokens |= {"register_tokens": (1, registers, width)} if registers else {}
    fit(tokens, {name: state[name] for name in tokens}, source, "as a DINOv2 backbone")
    return {
        "img_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "embed_dim": width,
        "depth": block_count(state, source),
        "num_heads": max(1, width // 64),
        # Half a row more: the ratio is rounded down to rows again.
        "mlp_ratio": 4.0 if hidden is None else (hidden.shape[0] + 0.5) / width,
        "init_values": 1e-5,
        "num_classes": 0,
        "no_embed_class": True,
        "reg_tokens": registers,
        **({"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if swiglu else {}),
    }


def _to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to timm's, with the class token's position folded into the token: registers have none."""
    state = {name: value for name, value in state.items() if name != "mask_token"}
    position = state.pop("pos_embed")
    state["cls_token"] = state["cls_token"] + position[:, :1]
    state["pos_embed"] = resample_position(position[:, 1:], "register_tokens" in state)
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
    renames = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}  # the giant model's SwiGLU
    for old, new in renames.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    return state


class DINOv2Classifier(nn.Module):
    """Images in [0, 1] (B, 3, H, W), not clamped again -> logits (B, classes). Frozen; the gradient flows through.

    The head's width tells which of the two official heads it is: 5 D is "4 layers" (the CLS tokens of the last four
    blocks, then the mean patch token of the last), 2 D is "1 layer". Without a head it gives features.
    """

    in_channels = 3
    preprocessing = {  # noqa: RUF012
        "image_size": IMAGE_SIZE,
        "resize": "bicubic, antialias, no crop",
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }

    def __init__(self, backbone: VisionTransformer, head: nn.Linear | None):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.files: list[Path] = []  # (backbone, head), as they were read
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    @classmethod
    def from_official(cls, backbone_file: str | Path, head_file: str | Path | None) -> "DINOv2Classifier":
        """Files or URLs; head None: features only. Sizes are read off the tensors; attention heads are 64 wide.

        Raises `InputError`.
        """
        state, file = load_official(backbone_file)
        with parsing(backbone_file, "an official DINOv2 backbone"):
            with torch.device("meta"):
                backbone = VisionTransformer(**backbone_arguments(state, backbone_file))
            load_weights(backbone, _to_timm(state), backbone_file)
        model = cls(backbone, None)
        model.files = [file]
        if head_file is None:
            return model
        width, depth = backbone.embed_dim, len(backbone.blocks)
        head_state, file = load_official(head_file)
        weight = head_state.get("weight", torch.empty(0))
        layers = {2 * width: 1, 5 * width: 4}.get(weight.shape[-1], 0)
        if weight.ndim != 2 or not len(weight) or not 0 < layers <= depth:
            raise InputError(
                f"{head_file} is no head of {backbone_file}, of width {width} and depth {depth}: its weight is "
                f"{tuple(weight.shape)}; a head takes {2 * width} features (1 layer) or {5 * width} (4 layers)"
            )
        classes, size = weight.shape
        with torch.device("meta"):
            model.head = nn.Linear(size, classes)
        load_weights(model.head, head_state, head_file)
        model.head.requires_grad_(False).eval()
        model.files.append(file)
        return model

    def enable_gradient_checkpointing(self) -> None:
        self.backbone.set_grad_checkpointing(True)

    def _preprocess(self, images: Tensor) -> Tensor:
        x = (images.float() - self.mean) / self.std
        if x.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            x = F.interpolate(x, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)
        return x.to(self.backbone.cls_token.dtype)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, None]:
        """The class token of the last block, normed, (B, D); the space has no logits."""
        return self.backbone.forward_features(self._preprocess(images))[:, 0], None

    def forward(self, images: Tensor) -> Tensor:
        layers = self.backbone.forward_intermediates(
            self._preprocess(images),
            indices=self.head.in_features // self.backbone.embed_dim - 1,
            return_prefix_tokens=True,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        class_tokens = [prefix[:, 0] for _, prefix in layers]
        return self.head(torch.cat([*class_tokens, layers[-1][0].mean(dim=1)], dim=1))
