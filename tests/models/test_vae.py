"""The VAE: where it is looked for, what it must decode, images of latents and of pixels."""

import copy
import hashlib
import json
import os
import pickle
import shlex
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from convert_weight.pipeline import DMDRPipeline
from evaluation.samples.sampling import decoder_of
from evaluation.standins import write_vae
from tests.conftest import ldm_names, random_sit
from train_cc.io.errors import InputError
from train_cc.io.weights import WEIGHTS_NAME as WEIGHTS
from train_cc.models.vae import (
    LatentSpace,
    VAEDecoder,
    channels_of,
    encode_images,
    images_to_uint8,
    latent_space_sha256,
    load_decoder,
    load_vae,
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


def test_pixels_are_clamped_and_bytes_are_rounded():
    x0 = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0]).view(1, 1, 1, 7)
    assert pixels_to_images(x0).flatten().tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    images = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 1.0]).view(1, 1, 1, 5).half().float()
    values = images_to_uint8(images.repeat(1, 3, 2, 1))
    assert values.shape == (1, 2, 5, 3) and values[0, 0, :, 0].tolist() == [0, 0, 1, 127, 255]


# Other configs and files ---------------------------------------------------------------------------------------------


def configured(folder: Path, **changes: object) -> Path:
    """The VAE in ``folder`` with ``changes`` in its config."""
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return folder


@pytest.fixture(scope="module")
def f16d32(tmp_path_factory) -> Path:
    """In the shape of VA-VAE's f16d32: five stages, 32 channels, mean and deviation per channel."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae") / "f16d32"
    whole = type(new_vae((8,) * 5, groups=4))(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(8,) * 5,
        latent_channels=32,
        norm_num_groups=4,
        scaling_factor=1.0,
        latents_mean=torch.linspace(-2, 3, 32).tolist(),
        latents_std=torch.linspace(0.5, 4, 32).tolist(),
        force_upcast=False,
    )
    whole.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_latents_are_normalised_per_channel_as_diffusers_pipelines_do(f16d32, tmp_path, scale):
    """x0 = (z - mean) scale / std, z = x0 std / scale + mean: encoded, decoded, and decoded in a pipeline."""
    folder = tmp_path / "vae"
    load_vae(str(f16d32)).save_pretrained(folder)
    model = load_vae(str(configured(folder, scaling_factor=scale)))
    mean = torch.linspace(-2, 3, 32).view(1, 32, 1, 1)
    std = torch.linspace(0.5, 4, 32).view(1, 32, 1, 1)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z = model.encode(images.float() / 127.5 - 1).latent_dist.mean
        x0 = (z - mean) * scale / std
        torch.testing.assert_close(encode_images(model, images), x0)
        assert (x0 - z).abs().max() > 0.5
        expected = ((model.decode(z).sample + 1) / 2).clamp(0, 1)
        torch.testing.assert_close(DMDRPipeline(random_sit(in_channels=32), model)._decode(x0), expected)
        torch.testing.assert_close(VAEDecoder(copy.deepcopy(model))(x0), expected)


def test_the_hash_of_a_latent_space(f16d32, tmp_path):
    """With scaling and shift it is that of files made before there were statistics per channel."""
    folder = configured(write_vae(tmp_path / "vae"), scaling_factor=0.5, shift_factor=0.25)
    model = load_vae(str(folder))
    digest = hashlib.sha256(b"[0.5, 0.25]")
    for name, value in sorted(model.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
    assert latent_space_sha256(model) == digest.hexdigest()
    seen = {latent_space_sha256(load_vae(str(f16d32)))}
    load_vae(str(f16d32)).save_pretrained(tmp_path / "other")
    for changes in ({"scaling_factor": 0.5}, {"latents_mean": [0.0] * 32}, {"latents_std": [1.0] * 32}):
        seen.add(latent_space_sha256(load_vae(str(configured(tmp_path / "other", **changes)))))
    assert len(seen) == 4


@pytest.fixture(params=[True, False], ids=["force_upcast", "not named"])
def hot(request, tmp_path) -> Path:
    """A VAE whose activations overflow fp16, not fp32; the next layer normalises them again."""
    folder = write_vae(tmp_path / "hot")
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    state["decoder.conv_in.weight"] *= 2e5  # up to 33 000: the weights themselves fit
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config.pop("force_upcast")
    (folder / "config.json").write_text(json.dumps(config | ({"force_upcast": True} if request.param else {})))
    return folder


def test_a_pipeline_in_fp16_decodes_in_fp32_where_fp16_overflows(hot):
    """By the VAE's config, or by its result; afterwards the VAE is in fp16 again."""
    model, x0 = load_vae(str(hot)).half(), torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    pipeline = DMDRPipeline(random_sit(in_channels=4).half(), model)
    with torch.no_grad():
        assert not torch.isfinite(model.decode(x0.half() / 0.18215).sample).all()
        found = pipeline._decode(x0)
        assert model.dtype == torch.float16
        expected = ((copy.deepcopy(model).float().decode(x0 / 0.18215).sample + 1) / 2).clamp(0, 1)
        assert torch.equal(found, expected) and expected.std() > 1e-3
        with pytest.raises(ValueError, match=r"NaN or infinity, computed in torch\.float16"):
            pipeline._decode(x0 * float("inf"))
    assert model.dtype == torch.float16


def test_our_decoder_is_in_fp32_where_a_config_says_so(hot, capsys):
    """Instead of fp16; also under autocast. diffusers' default, true, does not count: sd-vae-ft-ema has it."""
    named = "force_upcast" in (hot / "config.json").read_text()
    half, x0 = load_decoder(str(hot), dtype=torch.float16), torch.randn(2, 4, 4, 4)
    assert half.vae.dtype == (torch.float32 if named else torch.float16)
    assert load_decoder(str(hot), dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        images = half(x0)
    assert torch.isfinite(images).all() == named
    if named:
        assert torch.equal(images, load_decoder(str(hot))(x0))
    _, precision, _ = decoder_of(str(hot), None, (4, 4, 4), torch.device("cpu"), lambda: x0, True)
    assert precision == "fp32" and ("force_upcast" in capsys.readouterr().out) == named


def test_the_command_for_a_vae_in_ldms_names_makes_the_same_vae(tmp_path, monkeypatch):
    """As it is printed, without a network: of one file, of a whole model's checkpoint, of a folder."""
    monkeypatch.chdir(tmp_path)
    expected = load_vae(str(write_vae(tmp_path / "vae"))).state_dict()
    state = ldm_names(expected, stages=4)
    save_file(state, "one.safetensors")
    torch.save({"state_dict": {f"first_stage_model.{name}": value for name, value in state.items()}}, "whole.ckpt")
    os.mkdir("mixed")
    os.link("vae/config.json", "mixed/config.json")
    save_file(state, "mixed/diffusion_pytorch_model.safetensors")
    for source, made in (
        ("one.safetensors", "one"),
        ("whole.ckpt", "whole"),
        ("mixed", "mixed/diffusion_pytorch_model"),
    ):
        with pytest.raises(InputError, match="LDM's names") as error:
            load_vae(f"./{source}")
        command = str(error.value).partition("expected. ")[2].partition("): ")[2]
        python, flag, program = shlex.split(command.replace("'stabilityai/sd-vae-ft-ema'", "'vae'"))
        assert (python, flag) == ("python", "-c")
        exec(program)
        converted = load_vae(f"./{made}").state_dict()
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[name], value) for name, value in expected.items())


def test_a_vae_in_fp16_files_alone_is_read(tmp_path):
    folder = write_vae(tmp_path / "vae")
    file = folder / "diffusion_pytorch_model.safetensors"
    state = {name: value.half() for name, value in load_file(file).items()}
    save_file(state, folder / "diffusion_pytorch_model.fp16.safetensors")
    file.unlink()
    model = load_vae(str(folder))
    assert model.dtype == torch.float32 and model.files == [folder / "diffusion_pytorch_model.fp16.safetensors"]
    assert all(torch.equal(value, state[name].float()) for name, value in model.state_dict().items())


class Code:
    def __reduce__(self):
        return open, ("code-ran", "w")


def test_a_vae_of_an_old_kind_of_file_is_read_by_us_and_code_in_it_is_not_run(tmp_path):
    folder = write_vae(tmp_path / "vae")
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = state
    for new, name in old.items():
        renamed = {key.replace(f".{new}.", f".{name}."): value for key, value in renamed.items()}
    assert renamed.keys() != state.keys()
    torch.save(renamed, folder / "diffusion_pytorch_model.bin")
    found = load_vae(str(folder))
    assert all(torch.equal(found.state_dict()[name], value) for name, value in state.items())
    assert VAEDecoder(found).files == [folder / "diffusion_pytorch_model.bin"]
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Code()))
    with pytest.raises(InputError, match="not run"):
        load_vae(str(folder))
    assert not (tmp_path / "code-ran").exists()


def test_the_shift_of_a_vae_is_honoured(tmp_path):
    folder = write_vae(tmp_path / "vae")
    configured(folder, scaling_factor=0.5, shift_factor=0.25)
    vae, x0 = load_vae(str(folder)), torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(LatentSpace.of(vae.config).unscaled(x0), x0 / 0.5 + 0.25)
    pipeline = DMDRPipeline(random_sit(in_channels=4), vae)
    with torch.no_grad():
        expected = pixels_to_images(vae.decode(x0 / 0.5 + 0.25).sample)
        plain = pixels_to_images(vae.decode(x0 / 0.5).sample)
        assert (expected - plain).abs().max() > 1e-3
        torch.testing.assert_close(pipeline._decode(x0), expected)
        torch.testing.assert_close(VAEDecoder(load_vae(str(folder)))(x0), expected)
