"""Hostile and damaged models: one message each, nothing run, no memory reserved for what a file merely claims."""

import argparse
import datetime
import io
import json
import pickle
import random
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from convert_weight import denoising, sit_convert
from convert_weight.exports import save_pipeline
from convert_weight.pipeline import DMDRPipeline
from convert_weight.state_dicts import convert
from evaluation.standins import write_dinov2, write_vae
from tests.conftest import TINY, random_sit, refused
from tests.releases import repa_state
from train_cc.io.errors import InputError
from train_cc.io.read import read_npz, read_torch
from train_cc.models import DINOv2Classifier, SiT
from train_cc.models.backbone import check_config
from train_cc.models.classifier import ImageClassifier
from train_cc.models.generator import GenerationConfig, assemble_generator, save_generator
from train_cc.models.vae import LatentSpace, VAEDecoder, check_vae_config, load_vae, pixels_to_images

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = {"depth": 2, "hidden": 32, "input_size": 8, "classes": 10}
HEADS = 4


class Code:
    """A pickle that writes ``path`` when it is run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """One of each, whole: sit, vae, dinov2, classifier, pipeline, last.pt, legacy.pt."""
    folder = tmp_path_factory.mktemp("made")
    save_generator(random_sit(), folder / "sit", 2, 1.5)
    write_vae(folder / "vae")
    write_dinov2(folder / "dinov2", width=64, depth=4, classes=10)
    torch.manual_seed(0)
    ImageClassifier("test_resnet", num_classes=10, in_channels=1, image_size=32).save_pretrained(folder / "classifier")
    sampling = {"num_inference_steps": 2, "timestep_shift": 1.5}
    vae = load_vae(str(folder / "vae"))
    save_pipeline(random_sit(in_channels=4), vae, sampling, None, {}, folder / "pipeline")
    (folder / "repa").mkdir()
    torch.save({"ema": repa_state(**SMALL), "steps": 3}, folder / "repa" / "last.pt")
    torch.save(repa_state(**SMALL), folder / "repa" / "legacy.pt", _use_new_zipfile_serialization=False)
    return folder


def copied(made: Path, name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / name, tmp_path / name, dirs_exist_ok=True))


def read_dinov2(folder: Path) -> DINOv2Classifier:
    return DINOv2Classifier.from_official(folder / "pretrain.pth", folder / "linear4_head.pth")


def read_repa(folder: Path) -> SiT:
    return convert(sit_convert.read_checkpoint(folder / "last.pt"), num_heads=HEADS)[0]


def read_legacy(folder: Path) -> SiT:
    return convert(sit_convert.read_checkpoint(folder / "legacy.pt"), num_heads=HEADS)[0]


def change_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "LEFT OUT"}))


# Configs -------------------------------------------------------------------------------------------------------------

NO_NUMBER = ["3", None, True, [2], {"a": 1}, float("nan"), float("inf"), -1, 0, 10**9, 10**30]
SIT_CONFIGS = [
    *(("depth", value) for value in NO_NUMBER),
    *((name, value) for name in ("hidden_size", "num_classes", "mlp_ratio") for value in ("3", 0)),
    ("depth", "LEFT OUT"),
    ("num_heads", "LEFT OUT"),
    ("num_heads", 3),
    ("patch_size", 3),
    ("hidden_size", 30),
    ("depth", 1000),
    ("hidden_size", 2**16),
    ("surplus", 1),
    ("torch_dtype", "float16"),
    ("dtype", 5),
    ("_class_name", "AutoencoderKL"),
    ("_class_name", None),
]


@pytest.mark.parametrize("name,value", SIT_CONFIGS, ids=str)
def test_a_sit_config_that_does_not_fit_is_refused_by_the_name_of_its_key(made, tmp_path, name, value):
    folder = copied(made, "sit", tmp_path)
    change_json(folder / "config.json", **{name: value})
    seen = {"depth": "blocks|depth", "hidden_size": "hidden_size|shapes", "_class_name": " of a "}
    with pytest.raises(InputError, match=seen.get(name, f"{name}|shapes")):
        SiT.from_pretrained(folder)


VAE_CONFIGS = [
    *(("scaling_factor", value) for value in NO_NUMBER),
    *((name, value) for name in ("layers_per_block", "norm_num_groups") for value in ("3", 0)),
    ("block_out_channels", 8),
    ("block_out_channels", []),
    ("block_out_channels", [8] * 100),
    ("block_out_channels", [8, 8, 8, 6]),
    ("block_out_channels", [8, 8, 8, "8"]),
    ("block_out_channels", [8, 8, 8, 8192]),
    ("block_out_channels", "LEFT OUT"),
    ("down_block_types", ["DownEncoderBlock2D"]),
    ("down_block_types", "DownEncoderBlock2D"),
    ("up_block_types", ["os.system"] * 4),
    ("up_block_types", [["UpDecoderBlock2D"]] * 4),
    ("latent_channels", 16),
    ("shift_factor", "0.1"),
    ("shift_factor", float("nan")),
    ("latents_mean", [0.0, 0.0, 0.0, 0.0]),
    ("act_fn", "nothing"),
    ("use_quant_conv", False),
    ("_class_name", "AutoencoderTiny"),
    ("surplus", 1),
    ("torch_dtype", "float16"),
]


@pytest.mark.parametrize("name,value", VAE_CONFIGS, ids=lambda v: str(v)[:40])
def test_a_vae_config_that_does_not_fit_is_refused_with_its_path(made, tmp_path, name, value):
    folder = copied(made, "vae", tmp_path)
    change_json(folder / "config.json", **{name: value})
    with pytest.raises(InputError, match=rf"^{re.escape(str(folder))}/(config\.json|{WEIGHTS}\b)"):
        load_vae(str(folder))


SIT_BASE = {"input_size": 256, "in_channels": 1, "patch_size": 1, "hidden_size": 2**16, "depth": 1, "num_heads": 1}
SIT_BASE |= {"num_classes": 1, "mlp_ratio": 1.0}
SIT_LIMITS = {"input_size": (1, 4096), "in_channels": (1, 1024), "patch_size": (1, 256), "hidden_size": (4, 2**16)}
SIT_LIMITS |= {"depth": (1, 1024), "num_heads": (1, 1024), "num_classes": (1, 10**6), "mlp_ratio": (1 / 64, 64)}
VAE_LIMITS = {"in_channels": (1, 3), "out_channels": (1, 3), "latent_channels": (1, 64), "layers_per_block": (1, 16)}
VAE_LIMITS |= {"norm_num_groups": (1, 1024), "scaling_factor": (1e-6, 1e6), "shift_factor": (-1e6, 1e6)}
LIMITS = [(check_config, SIT_BASE, name, *limits) for name, limits in SIT_LIMITS.items()]
LIMITS += [(check_vae_config, {}, name, *limits) for name, limits in VAE_LIMITS.items()]


@pytest.mark.parametrize("check,base,name,low,high", LIMITS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_number_of_a_config_may_be_anything_within_its_limits(check, base, name, low, high):
    for value in (low, high):
        assert check(base | {name: value}, "config.json")[name] == value
    whole = isinstance(low, int) and name not in ("mlp_ratio", "shift_factor")
    beyond = (low - 1, high + 1) if whole else (low - abs(low) / 1e7, high + abs(high) / 1e7)
    for value in beyond:
        with pytest.raises(InputError, match=rf"config.json: {name} is .*; allowed: "):
            check(base | {name: value}, "config.json")


def test_a_sit_config_is_completed_and_its_sizes_divide():
    short = {name: value for name, value in SIT_BASE.items() if name not in ("patch_size", "mlp_ratio")}
    assert check_config(short | {"_private": 1}, "c") == SIT_BASE | {"patch_size": 2, "mlp_ratio": 4.0}
    for change, words in [
        ({"num_heads": 3}, "num_heads 3 does not divide hidden_size 65536"),
        ({"patch_size": 3}, "patch_size 3 does not divide input_size 256"),
        ({"hidden_size": 6}, "hidden_size is 6; allowed: multiples of 4"),
        ({"hidden_size": 9}, "hidden_size is 9; allowed: multiples of 4"),
        ({"_class_name": "X" * 200}, f"is of a {'X' * 80};"),
        ({"_class_name": "A"}, "is of a A;"),
    ]:
        with pytest.raises(InputError, match=words):
            check_config(SIT_BASE | change, "c")


CLASSIFIER_CONFIGS = [
    *(("num_classes", value) for value in NO_NUMBER),
    *((name, value) for name in ("in_channels", "image_size") for value in ("3", 0)),
    ("architecture", "no_such_model"),
    ("architecture", "hf-hub:timm/resnet18.a1_in1k"),
    ("architecture", 5),
    ("architecture", "test_vit"),
    ("architecture", "LEFT OUT"),
    ("pretrained", True),
    ("weights", {}),
    ("mean", "0.5"),
    ("mean", [0.5, 0.5]),
    ("std", 0),
    ("std", []),
    ("num_classes", 11),
]


@pytest.mark.parametrize("name,value", CLASSIFIER_CONFIGS, ids=str)
def test_a_classifier_config_that_does_not_fit_is_refused_without_the_network(made, tmp_path, name, value, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", no_network)
    folder = copied(made, "classifier", tmp_path)
    change_json(folder / "config.json", **{name: value})
    with pytest.raises(InputError, match=f"{name}|shapes|missing"):
        ImageClassifier.from_pretrained(folder)


# Tensors -------------------------------------------------------------------------------------------------------------


def spoils(state: dict) -> dict[str, object]:
    """Contents of a file, each ``state`` of a SiT with one thing wrong."""
    name = "blocks.1.mlp.fc1.weight"
    value = state[name]
    changes = {
        "integers": value.long(),
        "booleans": value.bool(),
        "complex": value.to(torch.complex64),
        "sparse": value.to_sparse(),
        "quantised": torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        "meta": value.to("meta"),
        "nested tensor": torch.nested.nested_tensor([value, value]),
        "expanded": torch.zeros(1).expand(10**6, 10**6),
        "empty": value[:0],
        "a number": torch.tensor(1.0),
        "one more dimension": value[None],
        "transposed": value.T,
        "nan": value.clone().index_fill_(0, torch.tensor(3), float("nan")),
        "inf": value.clone().index_fill_(0, torch.tensor(3), float("inf")),
        "too large for fp32": value.double() * 1e60,
        "no tensor": [1.0],
        "none": None,
    }
    return {kind: state | {name: change} for kind, change in changes.items()} | {
        "block bomb": state | {"blocks.1000000000000.mlp.fc1.weight": value},
        "block of many digits": state | {f"blocks.{'9' * 5000}.mlp.fc1.weight": value},
        "far block": state | {"blocks.9999.mlp.fc1.weight": value},
        "names that are numbers": {number: each for number, each in enumerate(state.values())},
        "a name that is none": state | {None: value},
        "a list": list(state.values()),
        "nothing": {},
        "empty ema": {"ema": {}, "model": {}},
        "ema of rubbish": {"ema": {"a": {"b": {"c": [1, 2]}}}},
        "ema that is a list": {"ema": [state]},
        "position 1-d": state | {"pos_embed": torch.zeros(16)},
        "position not square": state | {"pos_embed": torch.zeros(1, 15, 32)},
        "patch not square": state | {"x_embedder.proj.weight": torch.zeros(32, 4, 2, 3)},
        "no classes": state | {"y_embedder.embedding_table.weight": torch.zeros(1, 32)},
        "table 1-d": state | {"y_embedder.embedding_table.weight": torch.zeros(32)},
        "fc1 1-d": state | {"blocks.0.mlp.fc1.weight": torch.zeros(32)},
        "final layer 1-d": state | {"final_layer.linear.weight": torch.zeros(32)},
    }


SPOILS = spoils(repa_state(**SMALL))


@pytest.mark.parametrize("how", SPOILS)
def test_odd_tensors_are_refused_by_conversion_and_nothing_is_written(tmp_path, how, capsys):
    state = SPOILS[how]
    with pytest.raises(InputError):
        convert(state, num_heads=HEADS)
    try:
        torch.save(state, tmp_path / "in.pt")
    except (RuntimeError, NotImplementedError):  # torch cannot save it
        return
    words = ["--input", tmp_path / "in.pt", "--save-dir", tmp_path / "out", "--num-heads", HEADS]
    for more in ([], ["--check"]):
        refused(sit_convert.main, [str(word) for word in [*words, *more]], capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_what_merely_lies_in_memory_otherwise_converts_to_the_same(tmp_path):
    state = repa_state(**SMALL)
    other = {name: value.T.contiguous().T if value.ndim == 2 else value.double() for name, value in state.items()}
    buffer = torch.cat([value.flatten() for value in state.values()])
    sizes = [value.numel() for value in state.values()]
    shared = {name: part.view(state[name].shape) for name, part in zip(state, buffer.split(sizes), strict=True)}
    expected = convert(state, num_heads=HEADS)[0].state_dict()
    for each in (other, shared):
        found = convert(each, num_heads=HEADS)[0].state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


NOT_FINITE = {"sit": (WEIGHTS, SiT.from_pretrained), "vae": (WEIGHTS, lambda folder: load_vae(str(folder)))}
NOT_FINITE |= {"classifier": ("model.safetensors", ImageClassifier.from_pretrained)}
NOT_FINITE |= {"dinov2": ("pretrain.pth", read_dinov2), "head": ("linear4_head.pth", read_dinov2)}


@pytest.mark.parametrize("kind", NOT_FINITE)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_where_they_are_read(made, tmp_path, kind, value):
    name, read = NOT_FINITE[kind]
    folder = copied(made, "dinov2" if kind == "head" else kind, tmp_path)
    file = folder / name
    state = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    last = [key for key, each in state.items() if each.is_floating_point() and each.numel() and key != "mask_token"][-1]
    state[last] = state[last].clone()
    state[last].view(-1)[-1] = value
    (save_file if file.suffix == ".safetensors" else torch.save)(state, file)
    with pytest.raises(InputError, match="NaN or infinity"):
        read(folder)


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    model = random_sit()
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias[3] = float("nan")
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.qkv\.bias holds NaN"):
        save_generator(model, tmp_path / "generator", 1, 1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_check_does_not_pass_outputs_that_are_not_finite(value):
    class Broken:
        sample_shape, null_class = (1, 8, 8), 10

        def __call__(self, x, t, y):
            return torch.full_like(x, value)

    with pytest.raises(InputError, match="not finite"):
        denoising.require_denoising(Broken())


DINOV2_SPOILS = {
    "cls_token": [torch.zeros(64), torch.zeros(1, 1, 100), torch.zeros(1, 1, 0)],
    "pos_embed": [torch.zeros(64), torch.zeros(1, 1369, 64), torch.zeros(1, 1, 64), torch.zeros(1, 1370, 63)],
    "register_tokens": [torch.zeros(64), torch.zeros(1, 4, 63), torch.zeros(2, 4, 64)],
    "blocks.0.mlp.fc1.weight": [torch.zeros(64), torch.zeros(0, 64), torch.zeros(257, 64)],
    "blocks.1000000000000.norm1.weight": [torch.zeros(64)],
    "blocks.900.norm1.weight": [torch.zeros(64)],
    "patch_embed.proj.weight": [torch.zeros(64, 3, 16, 16), torch.zeros(64)],
    "norm.bias": [torch.zeros(64).bool(), torch.zeros(64).to_sparse()],
}


@pytest.mark.parametrize("name", DINOV2_SPOILS)
def test_a_dinov2_of_odd_tensors_is_refused(made, tmp_path, name):
    for value in DINOV2_SPOILS[name]:
        folder = copied(made, "dinov2", tmp_path)
        torch.save(torch.load(folder / "pretrain.pth") | {name: value}, folder / "pretrain.pth")
        with pytest.raises(InputError):
            read_dinov2(folder)


def test_a_dinov2_head_of_odd_shape_is_refused(made, tmp_path):
    for shape in ((10,), (0, 320), (10, 0), (10, 321), (1, 10, 320)):
        folder = copied(made, "dinov2", tmp_path)
        torch.save({"weight": torch.zeros(shape), "bias": torch.zeros(10)}, folder / "linear4_head.pth")
        with pytest.raises(InputError):
            read_dinov2(folder)


def test_a_generator_of_a_checkpoint_is_fitted_name_by_name(made):
    state = random_sit().state_dict()
    assert torch.equal(assemble_generator(TINY, state, made / "sit", None).pos_embed, state["pos_embed"])
    less = {name: value for name, value in state.items() if name != "blocks.1.attn.qkv.bias"}
    for wrong, words in (
        (less, r"missing: blocks\.1\.attn\.qkv\.bias"),
        (state | {"surplus": torch.zeros(1)}, "unexpected: surplus"),
        (state | {"pos_embed": torch.zeros(1, 4, 32)}, r"pos_embed \(1, 4, 32\), expected \(1, 16, 32\)"),
        (state | {"pos_embed": torch.full((1, 16, 32), float("nan"))}, "pos_embed holds NaN"),
    ):
        with pytest.raises(InputError, match=words):
            assemble_generator(TINY, wrong, made / "sit", None)


# Pickles, other kinds of file, what is hashed ------------------------------------------------------------------------


def test_a_vae_of_an_old_kind_of_file_is_read_by_us_and_code_in_it_is_not_run(made, tmp_path):
    folder = copied(made, "vae", tmp_path)
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
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Code(tmp_path / "code-ran")))
    with pytest.raises(InputError, match="not run"):
        load_vae(str(folder))
    assert not (tmp_path / "code-ran").exists()


def test_a_teacher_folder_is_read_from_the_one_file_that_is_hashed(made, tmp_path):
    """diffusers would follow an index to other files."""
    folder = copied(made, "sit", tmp_path)
    other = random_sit(seed=5).state_dict()
    save_file(other, folder / "shard-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "shard-1.safetensors")}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    torch.save(other, folder / "diffusion_pytorch_model.bin")
    model = SiT.from_pretrained(folder)
    assert model.files == [folder / WEIGHTS]
    expected = load_file(folder / WEIGHTS)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_half_precision_weights_are_read_to_fp32(made, tmp_path):
    folder = copied(made, "sit", tmp_path)
    save_file({name: value.half() for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    assert SiT.from_pretrained(folder).dtype == torch.float32


def test_the_shift_of_a_vae_is_honoured(made, tmp_path):
    folder = copied(made, "vae", tmp_path)
    change_json(folder / "config.json", scaling_factor=0.5, shift_factor=0.25)
    vae, x0 = load_vae(str(folder)), torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(LatentSpace.of(vae.config).unscaled(x0), x0 / 0.5 + 0.25)
    pipeline = DMDRPipeline(random_sit(in_channels=4), vae)
    with torch.no_grad():
        expected = pixels_to_images(vae.decode(x0 / 0.5 + 0.25).sample)
        plain = pixels_to_images(vae.decode(x0 / 0.5).sample)
        assert (expected - plain).abs().max() > 1e-3
        torch.testing.assert_close(pipeline._decode(x0), expected)
        torch.testing.assert_close(VAEDecoder(load_vae(str(folder)))(x0), expected)


def test_the_pipeline_samples_as_its_generator_was_trained(made, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    pipeline = DiffusionPipeline.from_pretrained(made / "pipeline", trust_remote_code=True)
    assert (pipeline.config.num_inference_steps, pipeline.config.timestep_shift) == (2, 1.5)

    def images(**options):
        return pipeline([3], generator=torch.Generator().manual_seed(0), output_type="np", **options).images

    assert (images() == images(num_inference_steps=2)).all() and (images() != images(num_inference_steps=1)).any()
    for wrong in (0, -1, 1.5, "2", True, 10**9):
        with pytest.raises(ValueError, match="num_inference_steps"):
            images(num_inference_steps=wrong)


# Random damage -------------------------------------------------------------------------------------------------------

NASTY = [None, True, -1, 0, 1e308, float("nan"), 10**30, "", "x" * 3000, [], {}, [[[]]], {"a": {"b": []}}, "\ud800"]
READERS = {
    "sit": SiT.from_pretrained,
    "vae": lambda folder: load_vae(str(folder)),
    "dinov2": read_dinov2,
    "classifier": ImageClassifier.from_pretrained,
    "repa": lambda folder: (read_repa(folder), read_legacy(folder)),
    "sampling": GenerationConfig.read,
}
TARGETS = {kind: kind for kind in READERS} | {"sampling": "sit"}


def damaged(content: bytes, dice: random.Random) -> bytes:
    """Bits flipped, a piece cut, doubled, zeroed or moved, an end lost, or all replaced; most often near the header."""
    bytes_ = bytearray(content)
    head = min(len(bytes_), 4000) if dice.random() < 0.7 else len(bytes_)
    at, length = dice.randrange(head), dice.choice([1, 2, 8, 64, 1000])
    how = dice.randrange(8)
    if how <= 1:
        for _ in range(dice.choice([1, 1, 4, 30])):
            bytes_[dice.randrange(head)] ^= 1 << dice.randrange(8)
    elif how == 2:
        del bytes_[at : at + length]
    elif how == 3:
        bytes_[at:at] = bytes_[at : at + length]
    elif how == 4:
        bytes_[at : at + length] = bytes(length)
    elif how == 5:
        bytes_[at:at] = dice.randbytes(length)
    elif how == 6:
        del bytes_[dice.choice([at, len(bytes_) - at]) :]
    else:
        bytes_ = bytearray(dice.choice([b"", b"\x80\x02.", b"<!DOCTYPE html><html></html>", dice.randbytes(500)]))
    return bytes(bytes_)


def damaged_json(content: bytes, dice: random.Random) -> bytes:
    """One value of an object replaced, one key lost, doubled under another name, or all nested deep."""
    config = json.loads(content)
    key = dice.choice(list(config))
    how = dice.randrange(8)
    if how <= 4:
        config[key] = dice.choice(NASTY)
    elif how == 5:
        del config[key]
    elif how == 6:
        config[key + "x"] = config[key]
    else:
        return b'{"depth":' * dice.choice([10, 100_000]) + b"1"
    return json.dumps(config).encode()


def damaged_inside(content: bytes, dice: random.Random) -> bytes:
    """Damage that no checksum shows: of an archive's pickle, or of a safetensors header with its length made right."""
    if content[:2] == b"PK":
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(out, "w") as after:
            for entry in before.infolist():
                part = before.read(entry)
                after.writestr(entry.filename, damaged(part, dice) if entry.filename.endswith("data.pkl") else part)
        return out.getvalue()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = header[dice.choice([name for name in header if name != "__metadata__"])]
    entry[dice.choice(list(entry))] = dice.choice(
        [*NASTY, [0, 8], [1, 1], [10**9, 10**9], [-1, 4], "F16", "BF16", "I64"]
    )
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + content[8 + length :]


def damage_and_read(made: Path, tmp_path: Path, count: int, seed: int) -> tuple[int, int]:
    """``count`` damages of random files, each read once. -> refused, read all the same."""
    dice, told = random.Random(seed), [0, 0]
    for _ in range(count):
        kind = dice.choice(list(READERS))
        source = made / TARGETS[kind]
        name = dice.choice(sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file()))
        content = (source / name).read_bytes()
        inside = damaged_json if name.suffix == ".json" else damaged_inside if name.name != "legacy.pt" else damaged
        spoil = inside if dice.random() < 0.6 else damaged
        folder = copied(made, TARGETS[kind], tmp_path)
        (folder / name).write_bytes(spoil(content, dice))
        try:
            READERS[kind](folder)
            told[1] += 1
        except InputError as error:
            assert str(error) and len(str(error)) < 3000
            told[0] += 1
        shutil.rmtree(folder)
    return tuple(told)


def test_random_damage_is_a_message(made, tmp_path):
    refusals, _ = damage_and_read(made, tmp_path, 80, seed=0)
    assert refusals > 40


@pytest.mark.slow
def test_5000_random_damages_are_messages(made, tmp_path):
    refusals, _ = damage_and_read(made, tmp_path, 5000, seed=1)
    assert refusals > 2500


@pytest.mark.parametrize(
    "names,packing,words", [("aa", 0, "twice"), ("a", 12, "unknown way"), ("a", 14, "unknown way")]
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_is_packed_otherwise_than_by_numpy_is_refused(tmp_path, names, packing, words):
    np.save(tmp_path / "a.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", packing) as archive:
        for name in names:
            archive.write(tmp_path / "a.npy", f"{name}.npy")
    with pytest.raises(InputError, match=words):
        read_npz(tmp_path / "a.npz", "images")


CLASSES = {
    "multiarray.scalar": np.float32(1),
    "multiarray._reconstruct": np.zeros(3),
    "pathlib.": Path("a"),
    "argparse.Namespace": argparse.Namespace(a=1),
    "torch.nn.modules.linear.Linear": torch.nn.Linear(2, 2),
    "datetime.datetime": datetime.datetime(2000, 1, 1),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_the_class_that_is_in_the_way_is_named(tmp_path, name, legacy):
    """With no colours of a terminal, and not torch's advice to run what the file holds."""
    torch.save({"args": CLASSES[name]}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="was not run") as caught:
        read_torch(tmp_path / "a.pt", "a checkpoint")
    message = str(caught.value)
    assert name in message.split("holds ")[1].split(",")[0] and message.isprintable()
    assert "a checkpoint is expected" in message and "weights_only" not in message
