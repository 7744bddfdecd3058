"""Published checkpoints to model folders: every layout, against a plain reading of the format, and what is refused."""

import argparse
import json
import math
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from convert_weight import sit_convert
from convert_weight.state_dicts import config_of, convert
from tests.conftest import random_sit, refused
from tests.releases import authors_state, repa_state, sit_shapes
from train_cc.models import SiT
from train_cc.models.generator import GenerationConfig, save_generator

SMALL = {"depth": 3, "hidden": 64, "input_size": 8, "classes": 10}
HEADS = 4


def plain_velocity(s, x, t, y, heads=HEADS, patch=2, out_channels=4):
    """A straightforward reading of the format, with functions alone."""
    hidden = s["pos_embed"].shape[-1]
    tokens = F.conv2d(x, s["x_embedder.proj.weight"], s["x_embedder.proj.bias"], stride=patch)
    side = tokens.shape[-1]
    tokens = tokens.flatten(2).transpose(1, 2) + s["pos_embed"]

    def linear(name, value):
        return F.linear(value, s[f"{name}.weight"], s[f"{name}.bias"])

    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = t[:, None] * frequencies
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = c + s["y_embedder.embedding_table.weight"][y]

    def modulated(value, shift, scale):
        return F.layer_norm(value, (hidden,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    for i in range(1 + max(int(name.split(".")[1]) for name in s if name.startswith("blocks."))):
        modulation = linear(f"blocks.{i}.adaLN_modulation.1", F.silu(c)).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        qkv = linear(f"blocks.{i}.attn.qkv", modulated(tokens, shift_msa, scale_msa))
        q, k, v = qkv.view(len(x), -1, 3, heads, hidden // heads).permute(2, 0, 3, 1, 4)
        attended = ((q @ k.transpose(-1, -2)) / math.sqrt(hidden // heads)).softmax(-1) @ v
        attended = attended.transpose(1, 2).flatten(2)
        tokens = tokens + gate_msa[:, None] * linear(f"blocks.{i}.attn.proj", attended)
        h = F.gelu(linear(f"blocks.{i}.mlp.fc1", modulated(tokens, shift_mlp, scale_mlp)), approximate="tanh")
        tokens = tokens + gate_mlp[:, None] * linear(f"blocks.{i}.mlp.fc2", h)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, dim=1)
    out = linear("final_layer.linear", modulated(tokens, shift, scale))
    out = out.view(len(x), side, side, patch, patch, out_channels)
    return torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), out_channels, side * patch, side * patch)


def inputs(batch=3):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.tensor([0.1, 0.5, 1.0]), torch.tensor([0, 4, 10])


def converted(state, **options):
    return convert(state, num_heads=HEADS, **options)


def test_repa_release_is_the_plain_reading():
    state = repa_state(**SMALL, spread=0.2)
    model, told = converted(state)
    expected = plain_velocity(state, *inputs())
    assert expected.std() > 0.05
    torch.testing.assert_close(model(*inputs()), expected, rtol=1e-5, atol=1e-5)
    assert any("6 tensors of REPA's projectors" in line for line in told)
    assert torch.equal(model.pos_embed, state["pos_embed"])


def renamed(state, rename):
    return {rename(name): value for name, value in state.items()}


def in_blocks(name):
    """torch.compile and checkpointing of single blocks: their wrappers stand inside of names."""
    return re.sub(r"^(blocks\.\d+)\.", r"\1._checkpoint_wrapped_module._orig_mod.", name)


LAYOUTS = {
    "training checkpoint": lambda s: {
        "model": {name: value + 1 for name, value in s.items()},
        "ema": s,
        "args": argparse.Namespace(steps=4),
    },
    "legacy": lambda s: renamed(s, lambda name: name.replace("blocks.2.", "decoder_blocks.0.")),
    "DDP": lambda s: renamed(s, "module.{}".format),
    "compiled": lambda s: renamed(s, "_orig_mod.{}".format),
    "both": lambda s: {"model": renamed(s, "_orig_mod.module.{}".format)},
    "three": lambda s: {"state_dict": renamed(s, "module._orig_mod.model.{}".format)},
    "inside": lambda s: renamed(s, in_blocks),
    "ema prefix": lambda s: renamed(s, "ema.{}".format) | renamed(s, "model.{}".format) | {"step": torch.zeros(())},
    "lightning": lambda s: {"state_dict": renamed(s, "net.{}".format) | {"loss.weight": torch.ones(2)}, "epoch": 3},
    "swa": lambda s: {"ema": renamed(s, "module.{}".format) | {"n_averaged": torch.tensor(9)}},
    "two levels": lambda s: {"checkpoint": 1, "model": {"ema_state_dict": s}},
    "ema of another name": lambda s: {"net": {name: value + 1 for name, value in s.items()}, "params_ema": s},
    "generator": lambda s: {"generator": s, "discriminator": {"w": torch.ones(1)}, "step": 7},
    "ema of ema": lambda s: {"model_ema": {"decay": 0.999, "shadow": s}},
    "deepspeed": lambda s: {"module": renamed(s, "module.{}".format), "ds_version": "0.15", "optimizer": None},
    "parameters": lambda s: {name: torch.nn.Parameter(value) for name, value in s.items()},
    "half precision": lambda s: {name: value.bfloat16() for name, value in s.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_layouts_of_the_field_convert_to_one_model(tmp_path, layout, suffix):
    state = repa_state(**SMALL)
    path, content = tmp_path / f"file.{suffix}", LAYOUTS[layout](state)
    if suffix == "safetensors":
        if not all(isinstance(value, torch.Tensor) for value in content.values()):
            pytest.skip("safetensors do not nest")
        save_file({name: value.detach().clone() for name, value in content.items()}, path)
    else:
        torch.save(content, path)
    content = sit_convert.read_checkpoint(path)
    found, expected = (converted(each, encoder_depth=2)[0].state_dict() for each in (content, state))
    if layout == "half precision":
        expected = {name: value.bfloat16().float() for name, value in expected.items()}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("two_sets", [False, True])
@pytest.mark.parametrize("direction", ["data-at-0", "data-at-1", None])
def test_time_runs_as_the_flag_says_whatever_the_channels(two_sets, direction):
    state = (authors_state if two_sets else repa_state)(**SMALL, spread=0.1)
    model, notes = converted(state, time_direction=direction)
    x, t, y = inputs()
    reverse = direction == "data-at-1" or (direction is None and two_sets)  # two sets: the authors'
    theirs = plain_velocity(state, x, 1 - t if reverse else t, y, out_channels=8 if two_sets else 4)[:, :4]
    torch.testing.assert_close(model(x, t, y), -theirs if reverse else theirs, rtol=1e-5, atol=1e-5)
    assert any("folded" in note for note in notes) == reverse
    assert any("--time-direction" in note for note in notes) == (direction is None and two_sets)


@pytest.mark.parametrize("depth,hidden,patch,heads", [(12, 384, 4, 6), (28, 1152, 2, 16)])
def test_sizes_are_read_off_the_tensors(depth, hidden, patch, heads):
    shapes = sit_shapes(depth=depth, hidden=hidden, patch=patch, classes=77)
    config = config_of({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, None)
    assert config == {
        "depth": depth,
        "hidden_size": hidden,
        "num_heads": heads,
        "patch_size": patch,
        "in_channels": 4,
        "input_size": 32,
        "num_classes": 77,
        "mlp_ratio": 4.0,
    }


def convert_file(content, tmp_path, *more):
    torch.save(content, tmp_path / "last.pt")
    words = ["--input", tmp_path / "last.pt", "--save-dir", tmp_path / "out", "--num-heads", HEADS, *more]
    sit_convert.main([str(word) for word in words])


def test_the_command_writes_a_model_folder_with_its_source(tmp_path, capsys):
    state = repa_state(**SMALL)
    convert_file(state, tmp_path)
    assert "recognised" in capsys.readouterr().out
    folder = tmp_path / "out" / "SiT-custom"
    model = SiT.from_pretrained(folder)
    torch.testing.assert_close(model(*inputs()), plain_velocity(state, *inputs()), rtol=1e-5, atol=1e-5)
    source = json.loads((folder / "source.json").read_text())
    assert len(source["sha256"]) == 64 and source["bytes"] == (tmp_path / "last.pt").stat().st_size
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    convert_file(state, tmp_path)  # as after a kill when all was done
    assert "there already" in capsys.readouterr().out
    message = refused(convert_file, repa_state(seed=1, **SMALL), tmp_path, capsys=capsys)
    assert "another source" in message and "--overwrite" in message
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    again = ["--input", str(folder), "--save-dir", str(tmp_path / "out"), "--name", "again"]
    sit_convert.main(again)
    other = SiT.from_pretrained(tmp_path / "out" / "again").state_dict()
    assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items())


def test_a_generators_folder_keeps_its_steps_rewards_and_latents(tmp_path):
    save_generator(random_sit(), tmp_path / "g", 2, 1.5, rewards_sha256=["0" * 64])
    given = ["--input", str(tmp_path / "g"), "--save-dir", str(tmp_path), "--name"]
    sit_convert.main([*given, "h"])
    kept = GenerationConfig.read(tmp_path / "h")
    assert kept.sampling == (2, 1.5) and kept.rewards_sha256 == ["0" * 64]
    random_sit().save_pretrained(tmp_path / "g2")
    sit_convert.main(["--input", str(tmp_path / "g2"), *given[2:], "i"])
    assert GenerationConfig.read(tmp_path / "i") == GenerationConfig()


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_damaged_files_and_unknown_sizes_are_refused(tmp_path, capsys, monkeypatch):
    def told(*words):
        arguments = ["--input", tmp_path / "f.pt", "--save-dir", tmp_path / "out", *words]
        return refused(sit_convert.main, [str(word) for word in arguments], capsys=capsys)

    assert "does not exist" in told()
    torch.save(repa_state(**SMALL), tmp_path / "f.pt")
    assert "--num-heads" in told()
    assert "does not divide" in told("--num-heads", 7)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 10))
    assert "nothing was written" in told("--num-heads", 4)
    assert not (tmp_path / "out").exists()
    (tmp_path / "f.pt").write_bytes((tmp_path / "f.pt").read_bytes()[:5000])
    assert "truncated" in told()
    (tmp_path / "f.pt").write_bytes(pickle.dumps(Code(tmp_path / "code-ran")))
    assert "not run" in told() and not (tmp_path / "code-ran").exists()


@pytest.mark.parametrize("name", ["..", "", "/tmp/x", "a\nb", "x" * 300])
def test_a_name_is_one_plain_folder_name(tmp_path, capsys, name):
    (tmp_path / "mine.txt").write_text("kept")
    message = refused(convert_file, repa_state(**SMALL), tmp_path, "--name", name, "--overwrite", capsys=capsys)
    assert "name" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "mine.txt"]
