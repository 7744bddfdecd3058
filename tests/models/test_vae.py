"""The VAE: where it is looked for, what it must decode, images of latents and of pixels."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL

from evaluation.standins import write_vae
from train_cc.io.errors import InputError
from train_cc.models.vae import (
    channels_of,
    images_to_uint8,
    load_decoder,
    new_vae,
    pixels_to_images,
    require_decoder,
    vae_files,
)


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
    calls, hub = [], {"config.json", names[1]}

    def look(way):
        def file(vae, name, *rest):
            calls.append((way, vae, name, rest[-1]))
            return tmp_path / name if name in hub else None

        return file

    monkeypatch.setattr("train_cc.models.vae.hub_file", look("hub"))
    monkeypatch.setattr("train_cc.models.vae.cached_hub_file", look("cache"))
    for wrong in ("./nowhere", "/nowhere", "~/nowhere"):
        with pytest.raises(InputError, match=r"must hold config\.json and diffusion_pytorch_model\.safetensors"):
            vae_files(wrong)
    assert not calls
    for download, way in ((True, "hub"), (False, "cache")):
        calls.clear()
        assert vae_files("a/b", download) == (tmp_path / "config.json", tmp_path / names[1])
        assert calls == [(way, "a/b", name, None) for name in ("config.json", *names)]
    vae_files("stabilityai/sd-vae-ft-ema")
    assert calls[-1][3] == "f04b2c4b98319346dad8c65879f680b1997b204a"
    for lacking in (names[1], "config.json"):
        hub = {"config.json", names[1]} - {lacking}
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


def test_images_are_the_decoded_latents_over_the_scaling_factor(tmp_path):
    """clamp((decode(x0 / 0.18215) + 1) / 2, 0, 1), the stand-in's config naming no factor, as the official one's."""
    folder = write_vae(tmp_path / "vae")
    decode = load_decoder(str(folder))
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    vae = AutoencoderKL.from_pretrained(folder)
    plain, unscaled = ((vae.decode(z).sample + 1) / 2 for z in (x0 / 0.18215, x0))
    assert plain.min() < -0.1 and plain.max() > 1.1 and (plain - unscaled).abs().max() > 0.1
    torch.testing.assert_close(decode(x0), plain.clamp(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_vae_folder_with_missing_files_is_refused(tmp_path, name):
    folder = write_vae(tmp_path / "vae")
    (folder / name).unlink()
    with pytest.raises(InputError, match="must hold"):
        load_decoder(str(folder))


def test_pixels_are_clamped_and_bytes_are_rounded():
    x0 = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0]).view(1, 1, 1, 7)
    assert pixels_to_images(x0).flatten().tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    images = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 1.0]).view(1, 1, 1, 5).half().float()
    values = images_to_uint8(images.repeat(1, 3, 2, 1))
    assert values.shape == (1, 2, 5, 3) and values[0, 0, :, 0].tolist() == [0, 0, 1, 127, 255]
