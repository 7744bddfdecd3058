"""DINOv2 against its official forward, and official files that do not fit."""

import pickle

import pytest
import timm
import torch
from torch.nn import functional as F

from evaluation.standins import dinov2_shapes, write_dinov2
from train_cc.io.errors import InputError
from train_cc.models import DINOv2Classifier


def official_logits(backbone, head, images):
    """The forward of the official model and head, written from their description (224 pixels)."""
    s, width = backbone, backbone["cls_token"].shape[-1]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = F.conv2d((images - mean) / std, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=14)
    x = x.flatten(2).transpose(1, 2)
    grid = s["pos_embed"][:, 1:].view(1, 37, 37, width).permute(0, 3, 1, 2)
    if "register_tokens" in s:
        grid = F.interpolate(grid, size=(16, 16), mode="bicubic", antialias=True)
    else:
        grid = F.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic", antialias=False)
    position = torch.cat([s["pos_embed"][:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, width)], dim=1)
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], dim=1) + position
    prefix = 1
    if "register_tokens" in s:
        x = torch.cat([x[:, :1], s["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], dim=1)
        prefix += s["register_tokens"].shape[1]
    outputs = []
    for i in range(1 + max(int(name.split(".")[1]) for name in s if name.startswith("blocks."))):
        b = {name.removeprefix(f"blocks.{i}."): value for name, value in s.items() if name.startswith(f"blocks.{i}.")}
        h = F.layer_norm(x, (width,), b["norm1.weight"], b["norm1.bias"], eps=1e-6)
        qkv = F.linear(h, b["attn.qkv.weight"], b["attn.qkv.bias"])
        q, k, v = qkv.view(len(x), -1, 3, width // 64, 64).permute(2, 0, 3, 1, 4)
        h = ((q @ k.transpose(-1, -2)) / 8).softmax(dim=-1) @ v
        h = F.linear(h.transpose(1, 2).flatten(2), b["attn.proj.weight"], b["attn.proj.bias"])
        x = x + b["ls1.gamma"] * h
        h = F.layer_norm(x, (width,), b["norm2.weight"], b["norm2.bias"], eps=1e-6)
        h = F.linear(h, b["mlp.fc1.weight"], b["mlp.fc1.bias"])
        x = x + b["ls2.gamma"] * F.linear(F.gelu(h), b["mlp.fc2.weight"], b["mlp.fc2.bias"])
        outputs.append(F.layer_norm(x, (width,), s["norm.weight"], s["norm.bias"], eps=1e-6))
    layers = head["weight"].shape[1] // width - 1
    features = [output[:, 0] for output in outputs[-layers:]] + [outputs[-1][:, prefix:].mean(dim=1)]
    return F.linear(torch.cat(features, dim=1), head["weight"], head["bias"])


@pytest.mark.parametrize("layers,registers", [(4, 0), (1, 4)])
def test_dinov2_gives_the_official_logits(tmp_path, layers, registers):
    backbone, head = write_dinov2(tmp_path, 64, 5, layers=layers, registers=registers)
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = official_logits(torch.load(backbone), torch.load(head), images)
    logits = DINOv2Classifier.from_official(backbone, head)(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_dinov2_sizes_have_timms_own_shapes(size):
    """The network read off the tensors is the one that timm builds under the official name."""
    width, depth = {"small": (384, 12), "base": (768, 12), "large": (1024, 24)}[size]
    with torch.device("meta"):
        model = timm.create_model(f"vit_{size}_patch14_dinov2", img_size=518, num_classes=0)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    official = dinov2_shapes(width, depth)
    assert len(official) == 7 + 14 * depth
    official.pop("mask_token")
    assert shapes == official
    assert model.blocks[0].attn.num_heads == width // 64


class Code:
    def __reduce__(self):
        return (open, ("code-ran", "w"))


def head_of(*shape: int, prefix: str = "") -> dict:
    return {f"{prefix}weight": torch.zeros(shape), f"{prefix}bias": torch.zeros(10)}


def changed(**tensors: torch.Tensor):
    return lambda file: torch.load(file) | {name.replace("__", "."): value for name, value in tensors.items()}


# What is wrong, which file it is in, its content from the sound one, words
DAMAGES = [
    ("missing", "backbone", None, "does not exist"),
    ("missing", "head", None, "does not exist"),
    ("truncated", "backbone", lambda file: file.read_bytes()[:10_000], "cannot load|damaged"),
    ("code", "backbone", lambda file: pickle.dumps(Code()), "not run"),
    ("nested", "backbone", lambda file: {"model": torch.load(file)}, "no bare state dict"),
    ("a head", "backbone", lambda file: head_of(10, 320), "no DINOv2 backbone"),
    ("surplus", "backbone", changed(surplus=torch.zeros(1)), "surplus"),
    ("wider", "backbone", changed(norm__weight=torch.ones(65)), "other shapes: norm.weight"),
    ("narrow class token", "backbone", changed(cls_token=torch.zeros(1, 1, 0)), "as a DINOv2 backbone"),
    ("no square of positions", "backbone", changed(pos_embed=torch.zeros(1, 1369, 64)), "as a DINOv2 backbone"),
    ("two sets of registers", "backbone", changed(register_tokens=torch.zeros(2, 4, 64)), "as a DINOv2 backbone"),
    ("far block", "backbone", changed(blocks__1000000000000__norm1__weight=torch.zeros(64)), "has a block 1000"),
    ("gap", "backbone", changed(blocks__900__norm1__weight=torch.zeros(64)), "are missing of 0 to 900"),
    ("NaN", "backbone", changed(norm__bias=torch.full((64,), float("nan"))), "NaN or infinity"),
    ("other width", "head", lambda file: head_of(10, 321), r"takes 128 features \(1 layer\) or 320 \(4 layers\)"),
    ("other keys", "head", lambda file: head_of(10, 320, prefix="linear."), "is no head of"),
    ("one dimension", "head", lambda file: head_of(10), "is no head of"),
    ("no classes", "head", lambda file: head_of(0, 320), "is no head of"),
    ("another bias", "head", lambda file: head_of(11, 320), "other shapes: bias"),
    ("infinity", "head", lambda file: head_of(10, 320) | {"bias": torch.full((10,), float("inf"))}, "NaN or infinity"),
]


@pytest.mark.parametrize(("what", "name", "damage", "words"), DAMAGES)
def test_official_files_that_do_not_fit_are_refused(tmp_path, monkeypatch, what, name, damage, words):
    monkeypatch.chdir(tmp_path)
    files = dict(zip(("backbone", "head"), write_dinov2(tmp_path, width=64, depth=4, classes=10), strict=True))
    content = damage(files[name]) if damage else None
    files[name].unlink()
    if isinstance(content, bytes):
        files[name].write_bytes(content)
    elif content is not None:
        torch.save(content, files[name])
    with pytest.raises(InputError, match=words):
        DINOv2Classifier.from_official(*files.values())
    assert not (tmp_path / "code-ran").exists()


@pytest.mark.parametrize("registers", [0, 4])
def test_images_are_resized_bicubic_with_antialias_and_not_clamped(tmp_path, registers):
    """256 pixels, as ImageNet's, down to 224: without antialias the logits are others."""
    files = write_dinov2(tmp_path, width=64, depth=4, classes=10, registers=registers)
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))

    def official(x, **how):
        return official_logits(*map(torch.load, files), F.interpolate(x, (224, 224), **how))

    classifier = DINOv2Classifier.from_official(*files)
    logits, bicubic = classifier(images), {"mode": "bicubic", "antialias": True}
    assert (logits - official(images, **bicubic)).abs().max() < 1e-4
    for how in ({"mode": "bicubic"}, {"mode": "bilinear", "antialias": True}):
        assert (logits - official(images, **how)).abs().max() > 1e-3
    assert not torch.equal(classifier(images * 2), classifier((images * 2).clamp(0, 1)))
