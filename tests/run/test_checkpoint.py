"""train_cc/run/checkpoint.py on a few small tensors: writing, opening, counting, rotating and deleting."""

import os
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY
from train_cc.io.errors import InputError
from train_cc.io.read import sha256
from train_cc.run import checkpoint as checkpoints
from train_cc.run.checkpoint import FORMAT_VERSION, NewerFormat, check_units

ARGUMENTS = {
    "lora_rank": 4,
    "num_steps": 1,
    "timestep_shift": 1.0,
    "use_lora_gen": False,
    "teacher": "t",
    "vae": "none",
}
UNITS = {
    "samples_seen": 0,
    "model_config": TINY | {"patch_size": 2, "mlp_ratio": 4.0},
    "teacher_sha256": "0" * 64,
    "arguments": ARGUMENTS,
    "scalers": [None, None],
}
PARTS = {
    "accelerator_1/generator.safetensors": {"weight": torch.arange(3.0)},
    "accelerator_1/optimizer.pt": {"state": {"step": torch.tensor(2.0)}},
    "accelerator_2/estimator_lora.safetensors": {"lora": torch.ones(2, 2)},
    "accelerator_2/optimizer.pt": {"state": {}},
}


def written(root: Path, *steps: int) -> Path:
    for step in steps:
        checkpoints.write_checkpoint(root, step, PARTS, UNITS)
    return root


def names(root: Path) -> list[str]:
    """Every file and every empty folder."""
    paths = [path for path in root.rglob("*") if path.is_file() or not any(path.iterdir())]
    return sorted(str(path.relative_to(root)) for path in paths)


def files_of(step: int) -> list[str]:
    return [name.replace("/", f"/step-{step}/") for name in PARTS] + [f"torch_units/step-{step}.pt"]


def test_what_is_written_is_read_with_sizes_and_hashes(tmp_path):
    root = tmp_path / "a" / "checkpoints"
    path = checkpoints.write_checkpoint(root, 3, PARTS, UNITS)
    assert path == root / "torch_units" / "step-3.pt" and names(root) == sorted(files_of(3))
    (tmp_path / "link.pt").symlink_to(path)
    for opened in map(checkpoints.open_checkpoint, (path, tmp_path / "link.pt")):
        assert opened.complete()
        assert (opened.step, opened.hashed, opened.units["format_version"]) == (3, True, FORMAT_VERSION)
        for name, content in PARTS.items():
            size = opened.file(name).stat().st_size
            assert opened.has(name) and opened.read(name).keys() == content.keys()
            assert opened.units["files"][name] == {"size": size, "sha256": sha256(opened.file(name))}
        assert not opened.has("accelerator_1/ema.safetensors")
        assert torch.equal(opened.read("accelerator_1/generator.safetensors")["weight"], torch.arange(3.0))


def test_a_checkpoint_ends_before_its_files_change(tmp_path, monkeypatch):
    root = written(tmp_path, 1)
    (root / "torch_units/step-1.pt.damaged").write_bytes(b"of an earlier time")
    for name in ("1/step-1.tmp/optimizer.pt", "1/step-1/ema.safetensors", "2/step-1.tmp/notes.txt"):
        (root / f"accelerator_{name}").parent.mkdir(exist_ok=True)
        (root / f"accelerator_{name}").write_bytes(b"of a killed run, or mine")

    def full(content, path):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        written(root, 1)
    assert checkpoints.complete_steps(root) == [] and not list(root.glob("torch_units/*"))
    monkeypatch.undo()
    assert names(written(root, 1)) == sorted([*files_of(1), "accelerator_2/step-1.tmp/notes.txt"])


@pytest.mark.parametrize("change", ["missing", "shorter", "longer", "a folder"])
def test_a_checkpoint_is_complete_if_every_file_has_its_size(tmp_path, change):
    opened = checkpoints.open_checkpoint(written(tmp_path, 1) / "torch_units/step-1.pt")
    file = opened.file("accelerator_2/optimizer.pt")
    content = file.read_bytes()
    file.unlink()
    other = {"shorter": content[:-1], "longer": content + b"0"}.get(change)
    if change == "a folder":
        file.mkdir()
    elif other:
        file.write_bytes(other)
    problem = f"has {len(other)} bytes" if other else "is missing"
    assert not opened.complete()
    with pytest.raises(InputError, match=f"{problem}, {len(content)} bytes were written"):
        checkpoints.open_checkpoint(opened.path)


@pytest.mark.parametrize("name", files_of(2))
def test_one_flipped_bit_is_found_in_every_file(tmp_path, name):
    root = written(tmp_path, 1, 2)
    content = bytearray((root / name).read_bytes())
    content[len(content) // 2] ^= 1
    (root / name).write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        checkpoints.open_checkpoint(root / "torch_units/step-2.pt")
    newest, damaged = checkpoints.newest_intact(root)
    assert newest.step == 1 and list(damaged) == [2]


def test_the_newest_whole_checkpoint_is_found_and_what_is_wrong_with_newer_ones(tmp_path):
    assert checkpoints.newest_intact(tmp_path) == (None, {})
    root = written(tmp_path, 1, 2, 3, 4)
    (root / "accelerator_1/step-4/optimizer.pt").unlink()
    for old, new in ((2, "x"), (3, 2), ("x", 3)):  # each says the other's step, whose files are there
        os.replace(root / f"torch_units/step-{old}.pt", root / f"torch_units/step-{new}.pt")
    newest, damaged = checkpoints.newest_intact(root)
    assert newest.step == 1 and list(damaged) == [4, 3, 2]
    assert "incomplete" in damaged[4] and "it says step 2" in damaged[3] and "it says step 3" in damaged[2]
    (root / "accelerator_1/step-1/optimizer.pt").unlink()
    with pytest.raises(InputError, match=r"no whole checkpoint: .*step-4.*; .*step-3.*; .*step-1"):
        checkpoints.newest_intact(root)
    content = torch.load(root / "torch_units/step-4.pt", weights_only=True)
    torch.save(content | {"format_version": FORMAT_VERSION + 1}, root / "torch_units/step-4.pt")
    with pytest.raises(NewerFormat):
        checkpoints.newest_intact(root)


@pytest.mark.parametrize(
    "keep,protected,left", [(0, None, [1, 2, 3]), (1, None, [3]), (9, None, [1, 2, 3]), (1, 1, [1, 3])]
)
def test_rotation_leaves_the_newest_and_the_protected(tmp_path, keep, protected, left):
    """A protected checkpoint is the same by whatever link it was named."""
    root = written(tmp_path / "run", 1, 2, 3)
    (tmp_path / "link").symlink_to(root)
    path = None if protected is None else checkpoints.units_path(tmp_path / "link", protected)
    checkpoints.rotate_checkpoints(root, keep, path)
    assert names(root) == sorted(name for step in left for name in files_of(step))


def test_leftovers_are_what_no_units_file_counts(tmp_path):
    root = written(tmp_path, 1, 2, 30)
    checkpoints.mark_damaged(root, 2)
    assert names(root / "torch_units") == ["step-1.pt", "step-2.pt.damaged", "step-30.pt"]
    assert checkpoints.newest_words(root) == "the checkpoint of step 30 is kept"
    (root / "torch_units/step-30.pt").rename(root / "torch_units/step-30.pt.tmp")  # killed before it was renamed
    for name in ("1/step-1.tmp", "2/step-5", "3/step-5", "1/step-5-mine"):
        (root / f"accelerator_{name}").mkdir(parents=True)
        (root / f"accelerator_{name}/optimizer.pt").write_bytes(b"")
    (root / "accelerator_2/step-5/notes.txt").write_text("mine")
    checkpoints.delete_leftovers(root)
    foreign = ["accelerator_2/step-5/notes.txt", "accelerator_3/step-5/optimizer.pt"]
    foreign += ["accelerator_1/step-5-mine/optimizer.pt", "torch_units/step-2.pt.damaged"]
    assert names(root) == sorted(files_of(1) + files_of(2)[:-1] + foreign)


NEARLY = ["step-0003", "step-\u0663", "step-3 ", "step-+3", "step-3.0", "step-x", "STEP-3", "step-99999999999"]


@pytest.mark.parametrize("name", NEARLY)
def test_a_name_that_is_nearly_ours_is_not_ours(tmp_path, name):
    """It is neither counted, rotated nor deleted, and what is ours is rotated and found as without it."""
    root = written(tmp_path, 2, 10)
    foreign = [f"torch_units/{name}{ending}" for ending in (".pt", ".pt.tmp", ".pt.damaged", ".pt.bak")]
    foreign += [f"accelerator_1/{name}{ending}/optimizer.pt" for ending in ("", ".tmp")]
    for path in foreign:
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(b"")
    assert checkpoints.complete_steps(root) == [2, 10] and checkpoints.newest_intact(root)[0].step == 10
    checkpoints.delete_leftovers(root)
    checkpoints.rotate_checkpoints(root, 1, None)
    assert names(root) == sorted([*files_of(10), *foreign])


HASHED = {"size": 1, "sha256": "0" * 64}
WHOLE = UNITS | {"step": 1, "format_version": FORMAT_VERSION, "files": dict.fromkeys(PARTS, HASHED)}


def test_fields_of_a_units_file_are_those_that_others_read():
    """A part's own field or file is the part's business; older formats are read."""
    more = WHOLE["files"] | {"accelerator_2/discriminator.safetensors": HASHED}
    for good in (WHOLE, WHOLE | {"files": more, "own": 1}, WHOLE | {"format_version": 2}):
        assert check_units(good, Path("u")) == good
    old = WHOLE | {"format_version": 1, "files": dict.fromkeys(PARTS, 5)}
    assert check_units(old, Path("u"))["files"] == {name: {"size": 5, "sha256": None} for name in PARTS}
    with pytest.raises(InputError, match=r"it lacks \['scalers'\]"):
        check_units({name: value for name, value in WHOLE.items() if name != "scalers"}, Path("u"))


PATHS = ("../../../etc/passwd", "/etc/passwd", "accelerator_1/../x.pt", "a/b/c", "", "\0")
BAD_FIELDS = [
    ({"format_version": FORMAT_VERSION + 1}, f"this code reads up to {FORMAT_VERSION}"),
    ({"format_version": 0}, "no format version"),
    ({"format_version": True}, "no format version"),
    ({"step": 1.0}, "step is 1.0; allowed: a whole number"),
    ({"scalers": None}, "scalers is None; allowed: a list"),
    ({"arguments": ARGUMENTS | {"lora_rank": 0}}, "arguments: lora_rank is 0; allowed: 1 to 4096"),
    ({"files": dict.fromkeys(PARTS, 5)}, "files has 'accelerator_1/generator.safetensors': 5"),
    *(({"files": {name: HASHED}}, "files has .*allowed: files of accelerator_1 and accelerator_2") for name in PATHS),
]


@pytest.mark.parametrize("change,words", BAD_FIELDS)
def test_a_field_of_another_kind_is_refused_by_its_name(change, words):
    with pytest.raises(InputError, match=words):
        check_units(WHOLE | change, Path("u"))
