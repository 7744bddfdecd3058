"""Hostile and damaged files: one message each, nothing run, no memory reserved for what a file merely claims."""

import argparse
import datetime
import io
import json
import random
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert_weight import sit_convert
from convert_weight.state_dicts import convert
from evaluation.standins import write_dinov2, write_vae
from tests.conftest import random_sit, refused, words
from tests.releases import repa_state
from train_cc.io.errors import InputError
from train_cc.io.read import read_torch
from train_cc.models import DINOv2Classifier, SiT
from train_cc.models.classifier import ImageClassifier
from train_cc.models.generator import GenerationConfig, save_generator
from train_cc.models.vae import load_vae

SMALL = {"depth": 2, "hidden": 32, "input_size": 8, "classes": 10}
HEADS = 4


@pytest.fixture(scope="module")
def sound(tmp_path_factory, classifier) -> Path:
    """One of each kind in READERS."""
    folder = tmp_path_factory.mktemp("sound")
    save_generator(random_sit(), folder / "sit", 2, 1.5)
    write_vae(folder / "vae")
    write_dinov2(folder / "dinov2", width=64, depth=4, classes=10)
    shutil.copytree(classifier, folder / "classifier")
    (folder / "repa").mkdir()
    torch.save({"ema": repa_state(**SMALL), "steps": 3}, folder / "repa" / "last.pt")
    torch.save(repa_state(**SMALL), folder / "repa" / "legacy.pt", _use_new_zipfile_serialization=False)
    return folder


def read_repa(folder: Path) -> None:
    for name in ("last.pt", "legacy.pt"):
        convert(sit_convert.read_checkpoint(folder / name), num_heads=HEADS)


def read_dinov2(folder: Path) -> None:
    DINOv2Classifier.from_official(folder / "pretrain.pth", folder / "linear4_head.pth")


def read_sit(folder: Path) -> None:
    GenerationConfig.read(folder)
    SiT.from_pretrained(folder)


READERS = {
    "sit": read_sit,
    "vae": lambda folder: load_vae(str(folder)),
    "dinov2": read_dinov2,
    "classifier": ImageClassifier.from_pretrained,
    "repa": read_repa,
}

# Configs -------------------------------------------------------------------------------------------------------------

NO_NUMBER = ["3", None, True, [2], float("nan"), -1, 0, 10**30]
WRONG = {  # kind -> key -> values that do not fit
    "sit": {
        "depth": [*NO_NUMBER, "LEFT OUT", 1000],
        "num_heads": ["LEFT OUT", 3],
        "patch_size": [3],
        "hidden_size": [30, 2**16],
        "mlp_ratio": [0],
        "surplus": [1],
        "_class_name": ["AutoencoderKL", None],
    },
    "vae": {
        "scaling_factor": NO_NUMBER,
        "norm_num_groups": ["3", 0],
        "block_out_channels": [8, [], [8] * 100, [8, 8, 8, 6], [8, 8, 8, "8"], [8, 8, 8, 8192], "LEFT OUT"],
        "down_block_types": [["DownEncoderBlock2D"], "DownEncoderBlock2D"],
        "up_block_types": [["os.system"] * 4, [["UpDecoderBlock2D"]] * 4],
        "latent_channels": [16],
        "latents_mean": [[0.0] * 4],
        "act_fn": ["nothing"],
        "use_quant_conv": [False],
        "_class_name": ["AutoencoderTiny"],
        "surplus": [1],
    },
    "classifier": {
        "num_classes": [*NO_NUMBER, 11],
        "architecture": ["no_such_model", "hf-hub:timm/resnet18.a1_in1k", 5, "test_vit", "LEFT OUT"],
        "surplus": [1],
        "mean": ["0.5", [0.5, 0.5]],
        "std": [0, []],
    },
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_config_that_does_not_fit_is_refused_with_its_path(sound, tmp_path, kind):
    folder = shutil.copytree(sound / kind, tmp_path / kind)
    config = json.loads((folder / "config.json").read_text())
    for key, values in WRONG[kind].items():
        for value in values:
            content = {name: each for name, each in (config | {key: value}).items() if each != "LEFT OUT"}
            (folder / "config.json").write_text(json.dumps(content))
            with pytest.raises(InputError, match=re.escape(str(folder)) + "|the classifier|timm's") as error:
                READERS[kind](folder)
            assert len(str(error.value)) < 3000, (key, value)


# Tensors -------------------------------------------------------------------------------------------------------------

NAME = "blocks.1.mlp.fc1.weight"
STATE = repa_state(**SMALL)
SPOILS = {  # kind -> content of a file, a SiT's state with one thing wrong
    kind: STATE | {NAME: value}
    for kind, value in {
        "integers": STATE[NAME].long(),
        "complex": STATE[NAME].to(torch.complex64),
        "sparse": STATE[NAME].to_sparse(),
        "quantised": torch.quantize_per_tensor(STATE[NAME], 0.1, 0, torch.qint8),
        "meta": STATE[NAME].to("meta"),
        "nested tensor": torch.nested.nested_tensor([STATE[NAME], STATE[NAME]]),
        "expanded": torch.zeros(1).expand(10**6, 10**6),
        "transposed": STATE[NAME].T,
        "nan": STATE[NAME].clone().index_fill_(0, torch.tensor(3), float("nan")),
        "too large for fp32": STATE[NAME].double() * 1e60,
        "no tensor": [1.0],
    }.items()
} | {
    "block bomb": STATE | {f"blocks.{'9' * 5000}.mlp.fc1.weight": STATE[NAME]},
    "far block": STATE | {"blocks.9999.mlp.fc1.weight": STATE[NAME]},
    "a missing block": {name: value for name, value in STATE.items() if not name.startswith("blocks.0.")},
    "a missing tensor": {name: value for name, value in STATE.items() if name != NAME},
    "one more": STATE | {"surplus.weight": torch.zeros(1)},
    "names that are numbers": dict(enumerate(STATE.values())),
    "a list": list(STATE.values()),
    "nothing": {},
    "ema of rubbish": {"ema": {"a": {"b": {"c": [1, 2]}}}},
    "ema that is a list": {"ema": [STATE]},
    "nested wrongly": {"state": STATE},
    "position not square": STATE | {"pos_embed": torch.zeros(1, 15, 32)},
    "patch not square": STATE | {"x_embedder.proj.weight": torch.zeros(32, 4, 2, 3)},
    "no classes": STATE | {"y_embedder.embedding_table.weight": torch.zeros(1, 32)},
    "final layer 1-d": STATE | {"final_layer.linear.weight": torch.zeros(32)},
}


@pytest.mark.parametrize("how", SPOILS)
def test_odd_tensors_are_refused_by_conversion_and_nothing_is_written(tmp_path, how, capsys):
    with pytest.raises(InputError):
        convert(SPOILS[how], num_heads=HEADS)
    try:
        torch.save(SPOILS[how], tmp_path / "in.pt")
    except (RuntimeError, NotImplementedError):  # torch cannot save it
        return
    arguments = words("--input", tmp_path / "in.pt", "--save-dir", tmp_path / "out", "--num-heads", HEADS)
    refused(sit_convert.main, arguments, capsys=capsys)
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


@pytest.mark.parametrize("kind", ["sit", "vae", "classifier"])
def test_weights_that_are_not_finite_are_refused_and_halves_become_fp32(sound, tmp_path, kind):
    folder = shutil.copytree(sound / kind, tmp_path / kind)
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    save_file({name: value.half() if value.is_floating_point() else value for name, value in state.items()}, file)
    network = READERS[kind](folder)
    assert kind == "sit" or all(value.dtype != torch.float16 for value in network.state_dict().values())
    last = [name for name, value in state.items() if value.is_floating_point() and value.numel()][-1]
    state[last].view(-1)[-1] = float("-inf")
    save_file(state, file)
    with pytest.raises(InputError, match="NaN or infinity"):
        READERS[kind](folder)


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    model = random_sit()
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias[3] = float("nan")
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.qkv\.bias holds NaN"):
        save_generator(model, tmp_path / "generator", 1, 1.0)
    assert not list(tmp_path.iterdir())


# Random damage -------------------------------------------------------------------------------------------------------

NASTY = [None, True, -1, 0, 1e308, float("nan"), 10**30, "", "x" * 3000, [], {}, [[[]]], {"a": {"b": []}}, "\ud800"]


def damaged(content: bytes, dice: random.Random) -> bytes:
    """Bits flipped, a piece cut, doubled or zeroed, an end lost, or all replaced; most often near the header."""
    head = min(len(content), 4000) if dice.random() < 0.7 else len(content)
    at, length = dice.randrange(head), dice.choice([1, 8, 64, 1000])
    before, piece, after = content[:at], content[at : at + length], content[at + length :]
    flipped = bytes([content[at] ^ 1 << dice.randrange(8)])
    other = dice.choice([b"", b"\x80\x02.", b"<!DOCTYPE html><html></html>", dice.randbytes(500)])
    parts = [before + after, before + piece + piece + after, before + bytes(length) + after, before, other]
    return dice.choice([*parts, before + flipped + content[at + 1 :], before + dice.randbytes(length) + content[at:]])


def damaged_json(content: bytes, dice: random.Random) -> bytes:
    """One value of an object replaced, one key lost, or all nested deep."""
    config = json.loads(content)
    key, how = dice.choice(list(config)), dice.randrange(8)
    if how == 7:
        return b'{"depth":' * 100_000 + b"1"
    value = config.pop(key)
    if how:
        config |= {key + "x": value} if how == 1 else {key: dice.choice(NASTY)}
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


@pytest.mark.parametrize("count", [80, pytest.param(5000, marks=pytest.mark.slow)])
def test_random_damage_is_a_message(sound, tmp_path, count):
    dice, refusals = random.Random(count), 0
    for number in range(count):
        kind = dice.choice(list(READERS))
        folder = shutil.copytree(sound / kind, tmp_path / str(number))
        file = dice.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        inside = damaged_json if file.suffix == ".json" else damaged if file.name == "legacy.pt" else damaged_inside
        spoil = inside if dice.random() < 0.6 else damaged
        file.write_bytes(spoil(file.read_bytes(), dice))
        try:
            READERS[kind](folder)
        except InputError as error:
            assert 0 < len(str(error)) < 3000
            refusals += 1
        shutil.rmtree(folder)
    assert refusals > count / 2


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
