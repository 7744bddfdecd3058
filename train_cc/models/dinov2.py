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
from train_cc.io.read import read_torch, require_file
from train_cc.io.remote import download, is_url
from train_cc.io.weights import block_count, load_weights, require_tensors

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
    told = f"; delete it, and the same command downloads {source} again" if is_url(source) else ""
    expected = f"a bare state dict, as DINOv2's official files are{told}"
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
    """What `VisionTransformer` needs to take ``state``: sizes, checked, off the tensors. Raises `InputError`."""
    needed = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}
    if needed - state.keys():
        raise InputError(f"{source} is no DINOv2 backbone: it lacks {sorted(needed - state.keys())}")
    swiglu = "blocks.0.mlp.w12.weight" in state
    hidden = state.get("blocks.0.mlp.w12.weight" if swiglu else "blocks.0.mlp.fc1.weight")
    registers = state.get("register_tokens", torch.empty(1, 0, 0))
    width = state["cls_token"].shape[-1] if state["cls_token"].ndim else 0
    position = state["pos_embed"]
    heads = max(1, width // 64)
    sound = (
        1 <= width <= 2**14
        and width % heads == 0
        and state["cls_token"].shape == (1, 1, width)
        and position.ndim == 3
        and position.shape[::2] == (1, width)
        and math.isqrt(max(position.shape[1] - 1, 0)) ** 2 == position.shape[1] - 1 > 0
        and registers.ndim == 3
        and registers.shape[1] <= 1024
        and (hidden is None or (hidden.ndim == 2 and 1 <= hidden.shape[0] <= 64 * width))
        and all(value.is_floating_point() for value in (state["cls_token"], position, registers))
    )
    if not sound:
        told = {
            name: tuple(state[name].shape) for name in ("cls_token", "pos_embed", "register_tokens") if name in state
        }
        raise InputError(f"{source} is no DINOv2 backbone: its tensors are {told}")
    return {
        "img_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "embed_dim": width,
        "depth": block_count(state, source),
        "num_heads": heads,
        # Half a row more: the ratio is rounded down to rows again.
        "mlp_ratio": 4.0 if hidden is None else (hidden.shape[0] + 0.5) / width,
        "init_values": 1e-5,
        "num_classes": 0,
        "no_embed_class": True,
        "reg_tokens": registers.shape[1],
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


def official_backbone(source: str | Path) -> tuple[VisionTransformer, Path]:
    """A backbone from an official file or URL. -> it, and the file that was read. Raises `InputError`."""
    state, file = load_official(source)
    with torch.device("meta"):
        backbone = VisionTransformer(**backbone_arguments(state, source))
    load_weights(backbone, _to_timm(state), source)
    return backbone, file


class DINOv2Classifier(nn.Module):
    """Images in [0, 1] (B, 3, H, W), not clamped again -> logits (B, classes). Frozen; the gradient flows through.

    The head's width tells which of the two official heads it is: 5 D is "4 layers" (the CLS tokens of the last four
    blocks, then the mean patch token of the last), 2 D is "1 layer".
    """

    def __init__(self, backbone: VisionTransformer, head: nn.Linear):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.layers = head.in_features // backbone.embed_dim - 1
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    in_channels = 3

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    @classmethod
    def from_official(cls, backbone_file: str | Path, head_file: str | Path) -> "DINOv2Classifier":
        """Files or URLs. Sizes are read off the tensors; attention heads are 64 wide. Raises `InputError`.

        ``files`` of the result: (backbone, head), as they were read.
        """
        (backbone, backbone_read), (head_state, head_read) = official_backbone(backbone_file), load_official(head_file)
        width, depth = backbone.embed_dim, len(backbone.blocks)
        if head_state.keys() != {"weight", "bias"} or head_state["weight"].ndim != 2:
            raise InputError(f"{head_file} is no linear head: it has {sorted(head_state)[:8]}, expected bias, weight")
        classes, size = head_state["weight"].shape
        if size not in (2 * width, 5 * width) or not classes:
            raise InputError(
                f"the head {head_file} takes {size} features and gives {classes} classes; with {backbone_file} of "
                f"width {width} a head takes {2 * width} (1 layer) or {5 * width} (4 layers)"
            )
        if size == 5 * width and depth < 4:
            raise InputError(f"the head {head_file} takes 4 layers; {backbone_file} has {depth}")
        with torch.device("meta"):
            head = nn.Linear(size, classes)
        load_weights(head, head_state, head_file)
        model = cls(backbone, head)
        model.files = [backbone_read, head_read]
        return model

    def enable_gradient_checkpointing(self) -> None:
        self.backbone.set_grad_checkpointing(True)

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() - self.mean) / self.std
        if x.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            x = F.interpolate(x, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)
        x = x.to(self.head.weight.dtype)
        layers = self.backbone.forward_intermediates(
            x, indices=self.layers, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        class_tokens = [prefix[:, 0] for _, prefix in layers]
        return self.head(torch.cat([*class_tokens, layers[-1][0].mean(dim=1)], dim=1))
