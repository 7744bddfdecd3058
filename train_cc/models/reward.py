"""The reward (docs/method.md: ReFL): a frozen classifier behind the decoder, and its gradient at x0.

`DINOv2Classifier` is the official DINOv2 backbone with its official linear head, through timm; any other classifier is
an `ImageClassifier`.
"""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from train_cc.io.errors import InputError

IMAGE_SIZE, PATCH_SIZE = 224, 14
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Half precision would lose small gradients on the way back through decoder and classifier. A power of two is exact.
GRADIENT_SCALE = 1024.0


def load_official(source: str | Path) -> dict[str, Tensor]:
    """A state dict from a file or URL, never running code from it. Raises `InputError`."""
    try:
        if str(source).startswith(("http://", "https://")):
            state = torch.hub.load_state_dict_from_url(str(source), map_location="cpu", weights_only=True)
        else:
            if not Path(source).is_file():
                raise InputError(f"{source} does not exist; a DINOv2 .pth file or its URL is expected")
            state = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{source} is damaged or holds more than tensors; it was not run") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise InputError(f"cannot load {source}: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{source} is no bare state dict of tensors, as DINOv2's official files are")
    return state


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
        """Files or URLs. Sizes are read off the tensors; attention heads are 64 wide. Raises `InputError`."""
        state, head_state = load_official(backbone_file), load_official(head_file)
        needed = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}
        if needed - state.keys():
            raise InputError(f"{backbone_file} is no DINOv2 backbone: it lacks {sorted(needed - state.keys())}")
        width = state["cls_token"].shape[-1]
        swiglu = "blocks.0.mlp.w12.weight" in state
        hidden = state.get("blocks.0.mlp.w12.weight" if swiglu else "blocks.0.mlp.fc1.weight")
        backbone = VisionTransformer(
            img_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            embed_dim=width,
            depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
            num_heads=max(1, width // 64),
            mlp_ratio=4.0 if hidden is None else hidden.shape[0] / width,
            init_values=1e-5,
            num_classes=0,
            no_embed_class=True,
            reg_tokens=state["register_tokens"].shape[1] if "register_tokens" in state else 0,
            **({"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if swiglu else {}),
        )
        _load_strictly(backbone, _to_timm(state), backbone_file)
        if head_state.keys() != {"weight", "bias"} or head_state["weight"].ndim != 2:
            raise InputError(f"{head_file} is no linear head: it has {sorted(head_state)[:8]}, expected bias, weight")
        classes, size = head_state["weight"].shape
        if size not in (2 * width, 5 * width):
            raise InputError(
                f"the head {head_file} takes {size} features; with {backbone_file} of width {width} "
                f"a head takes {2 * width} (1 layer) or {5 * width} (4 layers)"
            )
        head = nn.Linear(size, classes)
        _load_strictly(head, head_state, head_file)
        return cls(backbone, head)

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


def _load_strictly(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    if missing or unexpected or reshaped:
        raise InputError(
            f"{source} does not fit: missing {missing[:8]}, unexpected {unexpected[:8]}, other shapes {reshaped[:8]}"
        )
    module.load_state_dict(state)


class RewardResult(NamedTuple):
    loss: Tensor  # 0-d, the mean over the batch
    accuracy: Tensor  # 0-d
    gradient: Tensor  # of the loss at x0, (B, C, H, W), fp32


def classifier_loss(classifier: nn.Module, images: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """cross_entropy(classifier(images), y) and the share of right answers, each a sample: (B,), (B,)."""
    logits = classifier(images).float()
    return F.cross_entropy(logits, y, reduction="none"), (logits.detach().argmax(dim=1) == y).float()


def reward_gradient(
    classifier: nn.Module,
    decode: Callable[[Tensor], Tensor],
    x0: Tensor,
    y: Tensor,
    micro_batch: int = 0,
) -> RewardResult:
    """loss_reward = mean cross_entropy(classifier(decode(x0)), y) and its gradient at x0.

    The gradient is taken at a detached x0, ``micro_batch`` samples at a time (0: all at once), so that decoder and
    classifier hold the activations of a micro-batch alone, and none when the generator's own backward runs.
    """
    gradients, losses, hits = [], [], []
    for part, labels in zip(x0.detach().split(micro_batch or len(x0)), y.split(micro_batch or len(y)), strict=True):
        part = part.clone().requires_grad_()
        with torch.enable_grad():
            loss, hit = classifier_loss(classifier, decode(part), labels)
        (gradient,) = torch.autograd.grad(loss.sum() * (GRADIENT_SCALE / len(x0)), part)
        gradients.append(gradient / GRADIENT_SCALE)
        losses.append(loss.detach())
        hits.append(hit)
    return RewardResult(torch.cat(losses).mean(), torch.cat(hits).mean(), torch.cat(gradients))
