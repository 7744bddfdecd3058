"""The reward: DINOv2 against its official forward, gradients through decoder and classifier, micro-batches."""

import copy
import json
import math
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from evaluation.standins import write_dinov2, write_vae
from tests.conftest import (
    assert_close_and_not_zero,
    build_run,
    flags,
    random_sit,
    refused,
    reward_gradient,
    spread_lora_b,
)
from train_cc import dmdr_refl
from train_cc.distillation import turns
from train_cc.io.errors import InputError
from train_cc.models import DINOv2Classifier
from train_cc.models.classifier import ImageClassifier
from train_cc.models.dinov2 import resample_position
from train_cc.models.vae import (
    channels_of,
    images_to_uint8,
    load_decoder,
    new_vae,
    pixels_to_images,
    require_decoder,
    vae_files,
)
from train_cc.objectives import dmd_loss
from train_cc.rewards.terms import classifier_losses


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


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("layers", [4, 1])
def test_dinov2_gives_the_official_logits(tmp_path, layers, registers):
    backbone, head = write_dinov2(tmp_path, layers=layers, registers=registers)
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = official_logits(torch.load(backbone), torch.load(head), images)
    logits = DINOv2Classifier.from_official(backbone, head)(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_dinov2_sizes_have_timms_own_shapes(size):
    """What `from_official` reads off the tensors is the model that timm builds under the official name."""
    import timm

    from evaluation.standins import dinov2_shapes

    width, depth = {"small": (384, 12), "base": (768, 12), "large": (1024, 24)}[size]
    with torch.device("meta"):
        model = timm.create_model(f"vit_{size}_patch14_dinov2", img_size=518, num_classes=0)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    official = dinov2_shapes(width, depth)
    assert len(official) == 7 + 14 * depth
    official.pop("mask_token")
    assert shapes == official
    assert model.blocks[0].attn.num_heads == width // 64


DINOV2_DAMAGES = {
    "backbone missing": "does not exist",
    "head missing": "does not exist",
    "backbone truncated": "cannot load|damaged",
    "backbone key missing": r"blocks\.1\.ls1\.gamma",
    "backbone key more": "surplus",
    "head of another width": r"takes 5120 features.* takes 256 \(1 layer\) or 640 \(4 layers\)",
    "head with other keys": "linear",
    "head of one dimension": "no linear head",
    "a wider tensor": "other shapes: norm.weight",
    "head and backbone swapped": "no DINOv2 backbone",
    "backbone with code": "not run",
    "nested": "no bare state dict",
}


@pytest.mark.parametrize("how", DINOV2_DAMAGES)
def test_dinov2_files_that_do_not_fit_are_refused(tmp_path, how):
    backbone, head = write_dinov2(tmp_path)
    state = torch.load(backbone)
    if how.endswith(" missing") and "key" not in how:
        (backbone if "backbone" in how else head).unlink()
    elif how == "backbone truncated":
        backbone.write_bytes(backbone.read_bytes()[:10_000])
    elif how == "backbone key missing":
        del state["blocks.1.ls1.gamma"]
        torch.save(state, backbone)
    elif how == "backbone key more":
        torch.save(state | {"surplus": torch.zeros(1)}, backbone)
    elif how == "head of another width":
        torch.save({"weight": torch.zeros(1000, 5120), "bias": torch.zeros(1000)}, head)
    elif how == "head with other keys":
        torch.save({"linear.weight": torch.zeros(1000, 640), "bias": torch.zeros(1000)}, head)
    elif how == "head of one dimension":
        torch.save({"weight": torch.zeros(1000), "bias": torch.zeros(1000)}, head)
    elif how == "a wider tensor":
        torch.save(state | {"norm.weight": torch.ones(129)}, backbone)
    elif how == "head and backbone swapped":
        backbone, head = head, backbone
    elif how == "backbone with code":

        class Code:
            def __reduce__(self):
                return (open, (str(tmp_path / "code-ran"), "w"))

        backbone.write_bytes(pickle.dumps(Code()))
    elif how == "nested":
        torch.save({"model": state}, backbone)
    with pytest.raises(InputError, match=DINOV2_DAMAGES[how]):
        DINOv2Classifier.from_official(backbone, head)
    assert not (tmp_path / "code-ran").exists()


# The gradient


@pytest.fixture(scope="module")
def latent_reward(tmp_path_factory):
    """(decoder, classifier, x0, y): a small VAE and a small DINOv2, both in the official layouts."""
    folder = tmp_path_factory.mktemp("reward")
    decode = load_decoder(str(write_vae(folder / "vae")))
    classifier = DINOv2Classifier.from_official(*write_dinov2(folder, width=64, depth=4, classes=10))
    x0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2
    return decode, classifier, x0, torch.arange(4)


def plain_gradient(decode, classifier, x0, y):
    x0 = x0.clone().requires_grad_()
    loss = F.cross_entropy(classifier(decode(x0)), y)
    return loss, torch.autograd.grad(loss, x0)[0]


def test_the_gradient_reaches_x0_through_decoder_and_classifier(latent_reward):
    decode, classifier, x0, y = latent_reward
    loss, expected = plain_gradient(decode, classifier, x0, y)
    result = reward_gradient(classifier, decode, x0, y)
    assert (expected.abs().amax(dim=(1, 2, 3)) > 0).all()
    torch.testing.assert_close(result.loss, loss.detach())
    torch.testing.assert_close(result.gradient, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    assert all(p.grad is None and not p.requires_grad for p in [*decode.parameters(), *classifier.parameters()])


def test_micro_batches_and_checkpointing_give_the_same_gradient(latent_reward):
    decode, classifier, x0, y = latent_reward
    # In float64, where what is left is a difference of method and not the rounding of other matrix sizes.
    decode, classifier, x0 = copy.deepcopy(decode).double(), copy.deepcopy(classifier).double(), x0.double()
    whole = reward_gradient(classifier, decode, x0, y)
    tolerance = 1e-6 * whole.gradient.abs().max().item()
    for micro_batch in (1, 2, 3):
        parts = reward_gradient(classifier, decode, x0, y, micro_batch)
        torch.testing.assert_close(parts.gradient, whole.gradient, rtol=1e-6, atol=tolerance)
        torch.testing.assert_close(parts.loss, whole.loss)
    decode.enable_gradient_checkpointing()
    classifier.enable_gradient_checkpointing()
    recomputed = reward_gradient(classifier, decode, x0, y, 2)
    torch.testing.assert_close(recomputed.gradient, whole.gradient, rtol=1e-6, atol=tolerance)


def test_images_are_not_clamped_again(tmp_path):
    classifier = DINOv2Classifier.from_official(*write_dinov2(tmp_path, width=64, depth=4, classes=10))
    images = torch.rand(1, 3, 32, 32)
    assert not torch.equal(classifier(images * 2), classifier((images * 2).clamp(0, 1)))


def test_images_are_the_decoded_latents_over_the_scaling_factor(tmp_path):
    """clamp((decode(x0 / 0.18215) + 1) / 2, 0, 1), the stand-in's config naming no factor, as the official one's."""
    folder = write_vae(tmp_path / "vae")
    decode = load_decoder(str(folder))
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    vae = AutoencoderKL.from_pretrained(folder)
    plain, unscaled = ((vae.decode(z).sample + 1) / 2 for z in (x0 / 0.18215, x0))
    assert plain.min() < -0.1 and plain.max() > 1.1 and (plain - unscaled).abs().max() > 0.1
    torch.testing.assert_close(decode(x0), plain.clamp(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [8, 16, 37])
def test_positions_of_any_grid_become_sixteen_by_sixteen(side):
    patches = torch.randn(1, side * side, 6, generator=torch.Generator().manual_seed(0))
    grid = patches.view(1, side, side, 6).permute(0, 3, 1, 2)
    for registers in (False, True):
        options = {"size": (16, 16), "antialias": True} if registers else {"scale_factor": 16.1 / side}
        expected = grid if side == 16 else F.interpolate(grid, mode="bicubic", **options)
        assert expected.shape[2:] == (16, 16) and expected.std() > 0.1
        found = resample_position(patches, registers)
        torch.testing.assert_close(found, expected.permute(0, 2, 3, 1).reshape(1, 256, 6))


def test_loss_and_hits_of_a_classifier_a_sample():
    """Logits are the images: labels above, at and below what is said."""
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0], [0.0, 5.0, 1.0]])
    losses, figures = classifier_losses(torch.nn.Identity(), logits, torch.tensor([0, 1, 2]))
    hits = figures["accuracy"]
    assert hits.tolist() == [0, 1, 0]
    total = sum(math.exp(value) for value in (0, 5, 1))
    assert losses.tolist() == pytest.approx([math.log(total) - value for value in (0, 5, 1)], rel=1e-5)


def test_pixels_are_images_clamped():
    x0 = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0]).view(1, 1, 1, 7)
    assert pixels_to_images(x0).flatten().tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert images_to_uint8(pixels_to_images(x0)).flatten().tolist() == [0, 0, 64, 128, 191, 255, 255]


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_resizes_bicubic_with_antialias(tmp_path, registers):
    """256 pixels, as ImageNet's, down to 224: without antialias the logits are others."""
    backbone, head = write_dinov2(tmp_path, width=64, depth=4, classes=10, registers=registers)
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    plain = [
        official_logits(torch.load(backbone), torch.load(head), F.interpolate(images, (224, 224), **how))
        for how in (
            {"mode": "bicubic", "antialias": True},
            {"mode": "bicubic"},
            {"mode": "bilinear", "antialias": True},
        )
    ]
    logits = DINOv2Classifier.from_official(backbone, head)(images)
    difference = [(logits - each).abs().max().item() for each in plain]
    assert difference[0] < 1e-4 and min(difference[1:]) > 10 * max(difference[0], 1e-6)


def test_a_timm_classifier_resizes_bicubic_with_antialias_and_normalises(reward_folder):
    classifier = ImageClassifier.from_pretrained(reward_folder)
    images = torch.rand(2, 1, 80, 80, generator=torch.Generator().manual_seed(0))
    resized = F.interpolate(images, (32, 32), mode="bicubic", antialias=True)
    expected = classifier.network((resized - 0.5) / 0.5)
    torch.testing.assert_close(classifier(images), expected, rtol=1e-5, atol=1e-6)
    aliased = classifier.network((F.interpolate(images, (32, 32), mode="bicubic") - 0.5) / 0.5)
    assert (aliased - expected).abs().max() > 1e-3
    features, logits = classifier.features_and_logits(images)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(classifier.network.get_classifier()(features), expected, rtol=1e-5, atol=1e-6)


def rewarded_run(teacher, tmp_path, reward_folder, *more):
    words = ["--encoder-type", "classifier", "--reward-classifier", reward_folder, *more]
    run = build_run(teacher, tmp_path / "run", *words, stage=dmdr_refl)
    spread_lora_b(run.estimator)
    return run


def rewarded(teacher, tmp_path, reward_folder, *more):
    words = ["--encoder-type", "classifier", "--reward-classifier", reward_folder, "--reward-weight", 0.5]
    return flags(teacher, tmp_path / "run", *words, *more)


def test_the_generators_gradient_is_that_of_both_losses_on_one_graph(teacher, tmp_path, reward_folder, monkeypatch):
    """With B spread, so that matching pulls; at a weight at which neither gradient hides the other."""
    run = rewarded_run(teacher, tmp_path, reward_folder, "--reward-weight", 4.0)
    kept, direction = {}, turns.dmd_direction

    def direction_of(*tensors):
        kept["direction"] = direction(*tensors)
        return kept["direction"]

    monkeypatch.setattr(turns, "dmd_direction", direction_of)
    figures = turns.generator_turn(run, 0)
    kept |= {name: p.grad.clone() for name, p in run.generator.named_parameters() if p.grad is not None}

    draws = turns.chunk_draws(run, turns.GENERATOR_TURN, 0, 0)
    y = turns.draw_labels(run, draws)
    run.generator.zero_grad()
    x0 = turns.generate(run, draws, y)
    loss_reward = F.cross_entropy(run.judges["reward_classifier"](run.decode(x0)), y)
    loss_dmd = dmd_loss(x0, kept.pop("direction"))
    (loss_dmd + 4.0 * loss_reward).backward(retain_graph=True)
    torch.testing.assert_close(figures["loss_reward_classifier"], loss_reward.detach())
    expected = {name: p.grad for name, p in run.generator.named_parameters()}
    assert kept.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close_and_not_zero(kept[name], gradient, 1e-4, name)

    of_dmd, of_reward = (torch.autograd.grad(each, x0, retain_graph=True)[0] for each in (loss_dmd, 4.0 * loss_reward))
    assert 0.1 < of_reward.norm() / of_dmd.norm() < 10
    torch.testing.assert_close(figures["grad_norm_dmd_x0"], of_dmd.norm(), rtol=1e-4, atol=0)
    torch.testing.assert_close(figures["grad_norm_reward_classifier_x0"], of_reward.norm(), rtol=1e-4, atol=0)
    cosine = torch.cosine_similarity(of_dmd.flatten(), of_reward.flatten(), dim=0)
    torch.testing.assert_close(figures["grad_cosine_reward_classifier_x0"], cosine, rtol=1e-3, atol=1e-5)
    hits = run.judges["reward_classifier"](run.decode(x0)).argmax(dim=1) == y
    assert figures["accuracy_reward_classifier"] == hits.float().mean()


def test_both_stages_in_latent_space_with_dinov2(tmp_path):
    """The full-size path in small: VAE folder and official DINOv2 files, through both stages, hashes written down."""
    import json

    from tests.conftest import logged, run_cold_start

    random_sit(in_channels=4).save_pretrained(tmp_path / "sit")
    vae = write_vae(tmp_path / "vae")
    backbone, head = write_dinov2(tmp_path / "dinov2", width=64, depth=4, classes=10)
    cold = run_cold_start(tmp_path / "sit", tmp_path / "cold", "--vae", vae)
    words = ["--vae", vae, "--encoder-type", "dinov2", "--dinov2-backbone", backbone, "--dinov2-head", head]
    words += ["--resume-ckpt", cold / "checkpoints/torch_units/step-3.pt", "--max-train-steps", 5]
    words += ["--reward-micro-batch", 2, "--reward-checkpointing"]
    dmdr_refl.main(flags(tmp_path / "sit", tmp_path / "dmdr", *words))
    assert logged(tmp_path / "dmdr")[-1]["grad_norm_reward_dinov2_x0"] > 0
    hashes = json.loads((tmp_path / "dmdr" / "args.json").read_text())["sha256"]
    assert hashes.keys() == {"teacher", "vae", "dinov2_backbone", "dinov2_head"}
    assert all(len(digest) == 64 for digest in hashes.values())


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_vae_folder_with_missing_files_is_refused(tmp_path, name):
    folder = write_vae(tmp_path / "vae")
    (folder / name).unlink()
    with pytest.raises(InputError, match="must hold"):
        load_decoder(str(folder))


# The VAE


def test_a_new_vae_has_the_published_size():
    """stabilityai/sd-vae-ft-ema: 83 653 863 parameters, f = 8."""
    with torch.device("meta"):
        vae = new_vae()
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert (vae.config.norm_num_groups, vae.config.sample_size, vae.config.latent_channels) == (32, 256, 4)


def test_a_decoder_is_frozen_lies_channels_last_and_recomputes_every_block(tmp_path):
    decode = load_decoder(str(write_vae(tmp_path / "vae")), "cpu", torch.bfloat16)
    assert not decode.training and not any(p.requires_grad for p in decode.parameters())
    assert decode.vae.encoder is None and decode.vae.dtype == torch.bfloat16 and load_decoder(None) is pixels_to_images
    weight = decode.vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    seen = []
    decode.vae.decode = lambda z: seen.append(z) or SimpleNamespace(sample=torch.full((1, 3, 4, 4), 3.0))
    assert (decode(torch.randn(1, 4, 3, 3)) == 1).all() and decode(torch.randn(1, 4, 3, 3)).dtype == torch.float32
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and seen[0].dtype == torch.bfloat16
    decode.enable_gradient_checkpointing()
    again = [m for m in decode.vae.decoder.modules() if isinstance(m.__dict__.get("forward"), partial)]
    assert {type(m).__name__ for m in again} == {"ResnetBlock2D", "Attention", "Upsample2D"}
    assert len(again) == 3 * 4 + 2 + 1 + 3 and all(m.forward.keywords == {"use_reentrant": False} for m in again)


def test_where_a_vae_is_looked_for(tmp_path, monkeypatch):
    """What looks like a path or is one is a folder, and its safetensors come first; else the hub, or its cache."""
    folder = write_vae(tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    (folder / names[1]).write_bytes(b"")
    for word in (str(folder), "./vae", "vae"):
        config, weights = vae_files(word)
        assert (config.name, weights.name) == ("config.json", names[0]) and config.parent.samefile(folder)
    (folder / names[0]).unlink()
    assert vae_files("vae")[1].name == names[1]
    asked, there = [], {"config.json", names[1]}

    def found(way):
        def look(vae, name, *rest):
            asked.append((way, vae, name, rest[-1]))
            return tmp_path / name if name in there else None

        return look

    monkeypatch.setattr("train_cc.models.vae.hub_file", found("hub"))
    monkeypatch.setattr("train_cc.models.vae.cached_hub_file", found("cache"))
    for wrong in ("./nowhere", "/nowhere", "~/nowhere"):
        with pytest.raises(InputError, match=r"must hold config\.json and diffusion_pytorch_model\.safetensors"):
            vae_files(wrong)
    assert not asked
    for download, way in ((True, "hub"), (False, "cache")):
        asked.clear()
        assert vae_files("a/b", download) == (tmp_path / "config.json", tmp_path / names[1])
        assert asked == [(way, "a/b", name, None) for name in ("config.json", *names)]
    vae_files("stabilityai/sd-vae-ft-ema")
    assert asked[-1][3] == "f04b2c4b98319346dad8c65879f680b1997b204a"
    for lacking in (names[1], "config.json"):
        there = {"config.json", names[1]} - {lacking}
        assert vae_files("a/b", download=False) is None
        with pytest.raises(InputError, match=r"'a/b' lacks a file on the hub: config.json or .*safetensors or .*bin"):
            vae_files("a/b")


def test_a_vae_must_decode_what_the_model_samples(tmp_path):
    assert channels_of("stabilityai/sd-vae-ft-ema") == (4, 3)
    folder = str(write_vae(tmp_path / "vae"))
    assert channels_of(folder) == (4, 3) and require_decoder(4, folder, "s") == 3
    assert [require_decoder(channels, "none", "s") for channels in (1, 3)] == [1, 3]
    file = tmp_path / "vae" / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"latent_channels": 8, "out_channels": 1}))
    assert channels_of(folder) == (8, 1) and require_decoder(8, folder, "s") == 1
    bare = {name: value for name, value in content.items() if name not in ("latent_channels", "out_channels")}
    file.write_text(json.dumps(bare))
    assert channels_of(folder) == (4, 3)
    for channels, vae, words in [
        (4, "none", "s has 4 channels, that is latents: a VAE is needed"),
        (2, "none", "s has 2 channels, that is latents: a VAE is needed"),
        (1, "nowhere/asked", "s has 1 channel, that is pixels: --vae none is needed"),
        (3, folder, "of latents of 4 channels, but s has 3 channels, that is pixels: --vae none is needed"),
        (5, folder, "of latents of 4 channels, but s has 5 channels$"),
    ]:
        with pytest.raises(InputError, match=words):
            require_decoder(channels, vae, "s")


def test_images_become_bytes_by_rounding():
    images = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 1.0]).view(1, 1, 1, 5).half().float()
    found = images_to_uint8(images.repeat(1, 3, 2, 1))
    assert found.shape == (1, 2, 5, 3) and found[0, 0, :, 0].tolist() == [0, 0, 1, 127, 255]


BAD_REWARDS = [
    (["--reward-weight", -1], "--reward-weight is -1"),
    (["--reward-micro-batch", -1], "--reward-micro-batch is -1"),
    (["--encoder-type", "clip"], "clip"),
    (["--encoder-type", "dinov2", "--dinov2-backbone", "nowhere.pth"], "nowhere.pth does not exist"),
    (["--reward-classifier", "no_such_model"], "no_such_model"),
    (["--holdout-classifier", "no_such_model"], "no_such_model"),
]


@pytest.mark.parametrize("more,words", BAD_REWARDS, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_reward_input_is_refused(teacher, tmp_path, reward_folder, capsys, more, words):
    from train_cc import cold_start

    assert words in refused(cold_start.main, rewarded(teacher, tmp_path, reward_folder, *more), capsys=capsys)
    assert not (tmp_path / "run").exists()


def test_a_classifier_of_other_classes_is_refused(tmp_path, reward_folder, capsys):
    from train_cc import cold_start

    random_sit(num_classes=7).save_pretrained(tmp_path / "seven")
    message = refused(cold_start.main, rewarded(tmp_path / "seven", tmp_path, reward_folder), capsys=capsys)
    assert "10 classes, the generator 7" in message


def test_stage_two_needs_a_checkpoint(teacher, tmp_path, reward_folder, capsys):
    message = refused(dmdr_refl.main, rewarded(teacher, tmp_path, reward_folder), capsys=capsys)
    assert "--resume-ckpt is missing" in message
