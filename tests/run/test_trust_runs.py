"""A run trusts no file and deletes nothing that is not its own: hashes, fields, moments, damages, folders, records."""

import contextlib
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert_weight import export_generator
from evaluation import generate
from tests import ROOT
from tests.conftest import flags, logged, random_sit, refused, run_cold_start, words
from tests.run.test_resume import assert_same_run, torchrun, units
from train_cc import cold_start, dmdr_refl
from train_cc.distillation import loop
from train_cc.distillation.state import restore
from train_cc.io.errors import InputError, message_of
from train_cc.io.products import check_output_dir, check_parent, record, write_atomically, write_record
from train_cc.io.read import sha256
from train_cc.models.generator import GenerationConfig
from train_cc.run import checkpoint as checkpoints
from train_cc.run import states
from train_cc.run.folder import is_run
from train_cc.run.logbook import JsonLines
from train_cc.run.session import open_session
from train_cc.run.states import decay_at
from train_cc.setup.arguments import build_parser
from train_cc.setup.build import build

QUICK = ("--num-previews", 0, "--ratio-update", 1)


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    """A run of two updates with an EMA, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return run_cold_start(teacher, folder, "--ema-decay", 0.9, "--max-train-steps", 2, "--sample-steps", 1)


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` but the lock, which a refused command may touch."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def continued(teacher, run, *more):
    return flags(teacher, run, *QUICK, "--ema-decay", 0.9, "--auto-resume", *more)


def rewrite_units(path: Path, **changes: object) -> None:
    """A torch_units file with other fields, and hashes of the files as they are now."""
    content = torch.load(path, weights_only=True) | changes
    root = path.parent.parent
    for name, entry in content["files"].items() if "files" not in changes else ():
        accelerator, file = name.split("/")
        real = root / accelerator / f"step-{content['step']}" / file
        entry |= {"size": real.stat().st_size, "sha256": sha256(real)}
    torch.save(content, path)


# Hashes


def flip(path: Path, at: int = -9) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


STEP_FILES = [
    "accelerator_1/step-2/generator.safetensors",
    "accelerator_1/step-2/ema.safetensors",
    "accelerator_1/step-2/optimizer.pt",
    "accelerator_2/step-2/estimator_lora.safetensors",
    "accelerator_2/step-2/optimizer.pt",
    "torch_units/step-2.pt",
]


@pytest.mark.parametrize("name", STEP_FILES)
def test_one_flipped_bit_is_found_in_every_file(run, name):
    path = run / "checkpoints" / name
    flip(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match="damaged"):
        checkpoints.open_checkpoint(units(run, 2))
    found, damaged = checkpoints.newest_intact(run / "checkpoints")
    assert found.step == 1 and list(damaged) == [2]


def test_files_of_another_step_do_not_pass(run):
    root = run / "checkpoints" / "accelerator_1"
    shutil.copy(root / "step-1" / "generator.safetensors", root / "step-2" / "generator.safetensors")
    with pytest.raises(InputError, match=r"SHA-256 of .*generator.safetensors"):
        checkpoints.open_checkpoint(units(run, 2))


def test_no_parser_sees_a_file_whose_hash_is_wrong(run, monkeypatch):
    def parsed(*args, **kwargs):
        raise AssertionError("a damaged file was parsed")

    path = run / "checkpoints/accelerator_1/step-2/optimizer.pt"
    path.write_bytes(bytes(path.stat().st_size))
    for name in ("read_safetensors", "torch.save"):
        monkeypatch.setattr(f"train_cc.run.checkpoint.{name}", parsed)
    with pytest.raises(InputError, match="SHA-256"):
        checkpoints.open_checkpoint(units(run, 2))


def test_auto_resume_goes_around_a_damaged_checkpoint_and_names_it(teacher, run, tmp_path, capsys):
    straight = run_cold_start(teacher, tmp_path / "straight", *QUICK, "--ema-decay", 0.9)
    again = run_cold_start(teacher, tmp_path / "again", *QUICK, "--ema-decay", 0.9, "--max-train-steps", 2)
    flip(again / "checkpoints/accelerator_2/step-2/optimizer.pt")
    more = flags(teacher, tmp_path / "new", "--resume-ckpt", units(again, 2), "--max-train-steps", 3)
    assert "step-2" in refused(cold_start.main, more, capsys=capsys)
    cold_start.main(continued(teacher, again))
    told = capsys.readouterr().err
    assert "WARNING" in told and "accelerator_2/step-2/optimizer.pt" in told and "continues from step 1" in told
    assert_same_run(straight, again, 3)
    assert not list(again.rglob("*.damaged"))  # step 2 was written anew


def test_a_damaged_checkpoint_neither_counts_in_the_rotation_nor_is_lost(teacher, run):
    flip(run / "checkpoints/accelerator_1/step-2/generator.safetensors")
    cold_start.main(continued(teacher, run, "--checkpoint-steps", 3, "--keep-checkpoints", 2))
    assert checkpoints.complete_steps(run / "checkpoints") == [1, 3]
    assert (run / "checkpoints/torch_units/step-2.pt.damaged").exists()
    assert (run / "checkpoints/accelerator_1/step-2/generator.safetensors").exists()


def test_where_every_checkpoint_is_damaged_nothing_is_started_anew(teacher, run, capsys):
    for step in (1, 2):
        flip(run / f"checkpoints/accelerator_1/step-{step}/generator.safetensors")
    before = contents(run)
    message = refused(cold_start.main, continued(teacher, run), capsys=capsys)
    assert "no whole checkpoint" in message and "step-1" in message and "step-2" in message
    assert contents(run) == before


def test_a_checkpoint_of_format_1_is_read_by_its_sizes(teacher, run, capsys):
    path = units(run, 2)
    content = torch.load(path, weights_only=True)
    content["files"] = {name: entry["size"] for name, entry in content["files"].items()}
    content.pop("ema_updates")
    torch.save(content | {"format_version": 1}, path)
    cold_start.main(continued(teacher, run))
    assert "older format, without hashes" in capsys.readouterr().err
    assert torch.load(units(run, 3), weights_only=True)["ema_updates"] == 3


def test_files_can_be_read_by_all_who_may_read_the_folder(teacher, tmp_path):
    before = os.umask(0o027)
    try:
        run = run_cold_start(teacher, tmp_path / "run", *QUICK, "--max-train-steps", 1, "--ema-decay", 0.5)
    finally:
        os.umask(before)
    files = [path for path in run.rglob("*") if path.suffix in (".safetensors", ".pt", ".json")]
    assert len(files) > 8
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}


@pytest.mark.parametrize("odd", ["/dev/zero", "/dev/null", "x" * 5000, "nowhere/step-1.pt", "loop", "dangling", "fifo"])
def test_odd_paths_of_a_checkpoint_are_refused(teacher, tmp_path, capsys, odd):
    path = tmp_path / odd
    if odd == "loop":
        path.symlink_to(path)
    elif odd == "dangling":
        path.symlink_to(tmp_path / "gone")
    elif odd == "fifo":
        os.mkfifo(path)
    arguments = flags(teacher, tmp_path / "new", "--resume-ckpt", path)
    assert "checkpoints/torch_units/step-N.pt is expected" in refused(cold_start.main, arguments, capsys=capsys)
    assert not (tmp_path / "new").exists()


# Moments


def moments_of(model):
    return {
        name: {"step": torch.tensor(2.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.ones_like(p)}
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("state", [None, [], {}, {"weight": {}}, {1: 2}, "all"])
def test_moments_of_other_parameters_are_refused(state):
    model = torch.nn.Linear(4, 4)
    state = moments_of(model) | {"other": {}} if state == "all" else state
    with pytest.raises(InputError, match="optimizer"):
        states.restore_optimizer(model, torch.optim.AdamW(model.parameters(), fused=True), state, "optimizer.pt")


def test_moments_of_other_strides_become_contiguous_copies():
    model = torch.nn.Linear(4, 4)
    state = moments_of(model)
    values = torch.rand(4, 4)
    state["weight"]["exp_avg"] = values.t()  # another order in memory
    state["weight"]["exp_avg_sq"] = torch.ones(()).expand(4, 4)  # one number, sixteen times
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    states.restore_optimizer(model, optimizer, state, "optimizer.pt")
    held = optimizer.state[model.weight]
    assert torch.equal(held["exp_avg"], values.t()) and held["exp_avg"].stride() == (4, 1)
    assert held["exp_avg_sq"].stride() == (4, 1) and held["exp_avg"].data_ptr() != values.data_ptr()
    model(torch.rand(2, 4)).sum().backward()
    optimizer.step()


RESIDENT = """
import ctypes, gc, re, sys
from pathlib import Path
import torch
from train_cc.io.read import read_torch
from train_cc.run import states

def status(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(8)])
optimizer, before_it = (torch.optim.AdamW(model.parameters(), fused=True) for _ in range(2))
# Once before: what the libraries load at their first use is not counted.
states.restore_optimizer(model, before_it, read_torch(Path(sys.argv[1]), "moments"), "optimizer.pt")
del before_it
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
states.restore_optimizer(model, optimizer, read_torch(Path(sys.argv[1]), "moments"), "optimizer.pt")
print(status("VmHWM") - before)
assert all(torch.equal(state["exp_avg"], torch.full_like(p, 3)) for p, state in optimizer.state.items())
"""


def test_resuming_holds_the_moments_and_the_mapped_file_and_no_more(tmp_path):
    """Both are of one size: two of it, less than half of a third."""
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(8)])
    state = {
        name: {"step": torch.tensor(2.0), "exp_avg": torch.full_like(p, 3), "exp_avg_sq": torch.ones_like(p)}
        for name, p in model.state_dict().items()
    }
    torch.save(state, tmp_path / "optimizer.pt")
    command = [sys.executable, "-c", RESIDENT, str(tmp_path / "optimizer.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "optimizer.pt").stat().st_size
    assert size < int(done.stdout) < 2.4 * size


def test_only_the_main_process_keeps_whole_copies():
    tensors = {"a": torch.ones(3), "b": torch.zeros(2)}
    assert states.whole_on_main(SimpleNamespace(is_main=True), tensors).keys() == tensors.keys()
    assert states.whole_on_main(SimpleNamespace(is_main=False), tensors) == {}


# What is nearly ours, and a disk that takes no more


def test_a_copy_of_a_checkpoint_under_a_longer_name_is_not_in_the_way(teacher, run):
    """Twice: it would have been found as step 2 again, and step 2 deleted as the older of the two."""
    copied = units(run, 2).with_name("step-0002.pt")
    shutil.copy(units(run, 2), copied)
    for steps in (3, 4):
        cold_start.main(continued(teacher, run, "--keep-checkpoints", 1, "--max-train-steps", steps))
        assert checkpoints.complete_steps(run / "checkpoints") == [steps] and copied.exists()


@contextlib.contextmanager
def files_of_at_most(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("file", ["generator.safetensors", "optimizer.pt"])
def test_a_checkpoint_that_cannot_be_written_is_a_full_disks_message(teacher, run, capsys, file):
    """Of safetensors and of torch, which have their own errors for it. The same command goes on from the last one."""
    limit = (run / "checkpoints/accelerator_1/step-2" / file).stat().st_size - 1000
    before = contents(run / "checkpoints")
    arguments = continued(teacher, run, "--max-train-steps", 3)
    with files_of_at_most(limit):
        message = refused(cold_start.main, arguments, capsys=capsys)
    assert "step-3.pt is not written, the checkpoint of step 2 is kept" in message and "free some space" in message
    assert contents(run / "checkpoints") == before
    cold_start.main(arguments)
    assert checkpoints.complete_steps(run / "checkpoints")[-1] == 3


def buffered(value: torch.Tensor, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(value, file)


WRITERS = {
    "safetensors": lambda value, path: save_file({"a": value}, path),
    "torch": torch.save,
    "torch, a buffer": buffered,
    "torch, as it was": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "npy": lambda value, path: np.save(path.with_suffix(".npy"), value.numpy()),
    "npz": lambda value, path: np.savez(path, a=value.numpy()),
    "tofile": lambda value, path: value.numpy().tofile(path),
    "bytes": lambda value, path: path.write_bytes(bytes(99999)),
}


@pytest.mark.parametrize("how", WRITERS)
def test_a_librarys_error_at_a_full_disk_is_a_message(tmp_path, how):
    with files_of_at_most(9000), pytest.raises(Exception) as caught:
        WRITERS[how](torch.rand(20000), tmp_path / "file")
    assert "free some space, or raise the limit" in message_of(caught.value)


def test_a_full_disks_message_names_what_is_not_written(teacher, run, tmp_path, capsys):
    samples = words("--generator", teacher, "--num-steps", 1, "--num-images", 200, "--output", tmp_path / "s.npz")
    exported = words("--checkpoint", units(run, 2), "--output-dir", tmp_path / "new")
    with files_of_at_most(9000):
        told = refused(generate.main, samples, capsys=capsys)
        assert "s.npz.tmp/00000000.npz is not written: File too large" in told
        told = refused(export_generator.main, exported, capsys=capsys)
        assert f"{tmp_path / 'new'} is not written: File too large" in told and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "error",
    [RuntimeError("[enforce fail at inline_container.cc:197] . file not found: data.pkl"), ValueError("(os error x)")],
)
def test_errors_of_other_kinds_stay_bugs(error):
    assert message_of(error) is None


# What is not finite


def test_weights_that_are_not_finite_are_never_written(teacher, tmp_path, capsys, monkeypatch):
    """An update's losses are those before it: what it breaks shows in the weights alone, outside the middle block."""
    turn = loop.generator_turn

    def breaking(run, step):
        figures = turn(run, step)
        if step == 1:
            with torch.no_grad():
                run.plain_generator.final_layer.linear.bias[0] = math.inf
        return figures

    monkeypatch.setattr(loop, "generator_turn", breaking)
    arguments = flags(teacher, tmp_path / "run", *QUICK)
    message = refused(cold_start.main, arguments, capsys=capsys)
    assert "step 2" in message and "generator's weights" in message and "checkpoint of step 1 is kept" in message
    assert checkpoints.complete_steps(tmp_path / "run" / "checkpoints") == [1]
    assert not (tmp_path / "run" / "generator").exists()
    arguments = flags(teacher, tmp_path / "other", *QUICK, "--checkpoint-steps", 2)
    assert "there is no checkpoint yet" in refused(cold_start.main, arguments, capsys=capsys)


def test_every_group_of_tensors_is_looked_at():
    session = open_session("no")
    good, bad = torch.ones(3), torch.tensor([1.0, math.nan])
    groups = {"a": [good], "b": [good, bad], "c": [torch.tensor(-math.inf)], "d": [], "e": [torch.zeros(0)]}
    assert states.not_finite_groups(session, groups) == ["b", "c"]


@pytest.mark.parametrize("name", ["accelerator_1/step-2/generator", "accelerator_1/step-2/ema"])
def test_a_checkpoint_of_nan_is_refused(teacher, run, capsys, name):
    path = run / "checkpoints" / f"{name}.safetensors"
    content = load_file(path)
    content["final_layer.linear.bias"][0] = math.nan
    save_file(content, path)
    rewrite_units(units(run, 2))
    arguments = flags(teacher, run.parent / "new", *QUICK, "--ema-decay", 0.9, "--resume-ckpt", units(run, 2))
    assert "NaN or infinity" in refused(cold_start.main, arguments, capsys=capsys)
    assert not (run.parent / "new").exists()


# The average


def test_the_average_warms_up_and_counts(teacher, tmp_path):
    """docs/method.md: ema <- d ema + (1 - d) w with d = min(decay, (1 + n) / (10 + n)) at the n-th update."""
    assert [decay_at(n, 0.9999) for n in (1, 2, 90)] == [2 / 11, 3 / 12, 91 / 100]
    assert decay_at(10**6, 0.9) == 0.9
    run = run_cold_start(teacher, tmp_path / "run", *QUICK, "--ema-decay", 0.9999)
    average = load_file(teacher / "diffusion_pytorch_model.safetensors")
    for n in (1, 2, 3):
        folder = run / "checkpoints" / "accelerator_1" / f"step-{n}"
        weights, told = load_file(folder / "generator.safetensors"), load_file(folder / "ema.safetensors")
        d = (1 + n) / (10 + n)
        for name in told:
            average[name] = d * average[name] + (1 - d) * weights[name]
            torch.testing.assert_close(told[name], average[name], rtol=1e-5, atol=1e-7)
        assert max((told[name] - weights[name]).abs().max() for name in told) > 1e-5
        assert torch.load(units(run, n), weights_only=True)["ema_updates"] == n


def test_an_average_that_starts_or_ends_at_a_checkpoint_is_told(teacher, run, tmp_path):
    more = [*QUICK, "--resume-ckpt", units(run, 2), "--max-train-steps", 3]
    without = run_cold_start(teacher, tmp_path / "without", *more)
    assert "ema.safetensors ends here" in (without / "log.txt").read_text()
    assert torch.load(units(without, 3), weights_only=True)["ema_updates"] == 0
    more = [*QUICK, "--resume-ckpt", units(without, 3), "--max-train-steps", 4, "--ema-decay", 0.9]
    again = run_cold_start(teacher, tmp_path / "again", *more)
    assert "has no EMA: it starts here" in (again / "log.txt").read_text()
    assert torch.load(units(again, 4), weights_only=True)["ema_updates"] == 1
    start = load_file(without / "checkpoints/accelerator_1/step-3/generator.safetensors")
    end = load_file(again / "checkpoints/accelerator_1/step-4/generator.safetensors")
    for name, value in load_file(again / "checkpoints/accelerator_1/step-4/ema.safetensors").items():
        torch.testing.assert_close(value, 2 / 11 * start[name] + 9 / 11 * end[name], rtol=1e-5, atol=1e-7)
    carried = run_cold_start(teacher, tmp_path / "carried", *QUICK, "--resume-ckpt", units(run, 2), "--ema-decay", 0.9)
    assert "EMA carries over" in (carried / "log.txt").read_text()


# The export


def test_a_generator_says_how_it_is_sampled_and_where_it_comes_from(teacher, tmp_path):
    more = [*QUICK, "--num-steps", 2, "--timestep-shift", 1.5, "--max-train-steps", 1, "--ema-decay", 0.9]
    run = run_cold_start(teacher, tmp_path / "run", *more)
    assert GenerationConfig.read(run / "generator").sampling == (2, 1.5)
    told = json.loads((run / "generator" / "generation_config.json").read_text())
    assert told["step"] == 1 and told["weights"] == "ema" and told["run"] == str(run)
    assert told["teacher_sha256"] == sha256(teacher / "diffusion_pytorch_model.safetensors")


def test_a_teacher_that_has_changed_is_not_merged_into(tmp_path, capsys, monkeypatch):
    random_sit().save_pretrained(tmp_path / "teacher")
    export = loop.export

    def changed(run):
        random_sit(seed=5).save_pretrained(tmp_path / "teacher")
        export(run)

    monkeypatch.setattr(loop, "export", changed)
    arguments = flags(tmp_path / "teacher", tmp_path / "run", *QUICK, "--use-lora-gen", "--max-train-steps", 1)
    message = refused(cold_start.main, arguments, capsys=capsys)
    assert "has changed" in message and "step 1 is kept" in message


def test_an_export_that_was_killed_is_done_again(teacher, run):
    whole = contents(run / "generator")
    for how in ("none", "half", "temporary"):
        if how == "none":
            shutil.rmtree(run / "generator")
            (run / "generator.tmp").mkdir()
            (run / "generator.tmp" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
        elif how == "half":
            (run / "generator" / "generation_config.json").unlink()
        else:
            (run / "generator" / "export.tmp").mkdir()
            (run / "generator" / "export.tmp" / "config.json").write_text("{")
            (run / "generator" / "diffusion_pytorch_model.safetensors").write_bytes(b"older")
        cold_start.main(continued(teacher, run, "--max-train-steps", 2))
        assert contents(run / "generator").keys() == whole.keys(), how
        name = "diffusion_pytorch_model.safetensors"
        assert contents(run / "generator")[name] == whole[name]
        assert not list(run.rglob("*.tmp"))


# Whose folder it is


def dead_run(teacher, folder: Path) -> Path:
    """As a run that was killed before its first checkpoint leaves it."""
    args = cold_start.stage_parser().parse_args(flags(teacher, folder))
    root = folder / "checkpoints"
    for each in (folder / "loss_logs", folder / "samples/step-2", root / "accelerator_1/step-1.tmp"):
        each.mkdir(parents=True)
    (root / "accelerator_2/step-1").mkdir(parents=True)
    (folder / "loss_logs" / "loss_gen_log.jsonl").write_text('{"step": 1}\n')
    (folder / "samples" / "step-2" / "grid.png").write_bytes(b"old")
    (root / "accelerator_1/step-1.tmp/generator.safetensors").write_bytes(b"half")
    (root / "accelerator_1/step-1.tmp/.tmpAb12cd").write_bytes(b"half")
    (root / "accelerator_2/step-1/optimizer.pt").write_bytes(b"orphan")
    (folder / "log.txt").write_text("2026-01-01 00:00:00 generator: 1 parameters trained of 1\n")
    write_record(folder, record("cold_start", vars(args)))
    return folder


HALF = ".0123456789abcdef.tmp"  # ends the name of a file that a kill has left unfinished


@pytest.mark.parametrize("name", [".lock", f"args.json{HALF}", HALF])
def test_a_start_that_was_killed_in_its_first_writing_starts_again(teacher, tmp_path, name):
    for folder in ("run", "teacher"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("half")
    run_cold_start(teacher, tmp_path / "run", *QUICK, "--auto-resume")
    assert len(logged(tmp_path / "run")) == 3 and not (tmp_path / "run" / f"args.json{HALF}").exists()
    check_output_dir(tmp_path / "teacher")  # stage 0's, and that of all other commands


def test_what_a_kill_left_of_a_file_goes_with_its_next_writing(tmp_path):
    others = [f"b.json{HALF}", "a.json.tmp", "a.json.0123.tmp", HALF]
    for name in (f"a.json{HALF}", *others):
        (tmp_path / name).write_text("half")
    write_atomically(tmp_path / "a.json", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.json", *others])
    assert all((tmp_path / name).read_text() == "half" for name in others)


def test_looking_whether_a_folder_takes_files_leaves_nothing_where_it_is_killed(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Path, "touch", lambda self, **options: made.append(self))
    check_parent(tmp_path / "a.json")
    assert not made and not list(tmp_path.iterdir())


def test_overwriting_removes_unfinished_files_of_an_earlier_run(teacher, run):
    names = ["loss_logs/loss_gen_log.jsonl", "samples/step-1/grid.png", "generator/generation_config.json"]
    for name in names:
        (run / (name + HALF)).write_text("half")
    run_cold_start(teacher, run, *QUICK, "--overwrite", "--max-train-steps", 1)
    assert not [name for name in names if (run / (name + HALF)).exists()]


FOREIGN = [
    "nohup.out",
    "slurm-1.out",
    "report.html",
    ".DS_Store",
    "notes/mine.txt",
    "samples/mine.png",
    "samples/step-2/mine.png",
    "samples/step-best/grid.png",
    "loss_logs/mine.csv",
    "checkpoints/last.pt",
    "checkpoints/torch_units/best.pt",
    "checkpoints/accelerator_1/step-1/mine.txt",
    "checkpoints/accelerator_1/step-1.tmp/mine.txt",
    "checkpoints/accelerator_1/step-9/optimizer.bak",
]


def add_foreign(run: Path, names=FOREIGN) -> None:
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)


def assert_foreign_stays(run: Path, names=FOREIGN) -> None:
    assert [name for name in names if not (run / name).is_file() or (run / name).read_text() != name] == []


def test_a_dead_run_starts_again_among_foreign_files(teacher, tmp_path):
    run = dead_run(teacher, tmp_path / "run")
    add_foreign(run)
    run_cold_start(teacher, run, *QUICK, "--auto-resume")
    assert_foreign_stays(run)
    assert [row["step"] for row in logged(run)] == [1, 2, 3]
    assert checkpoints.open_checkpoint(units(run, 3)).step == 3
    assert not (run / "samples" / "step-2" / "grid.png").exists() and not list(run.rglob(".tmp*"))


@pytest.mark.parametrize("more", [["--overwrite"], ["--auto-resume", "--keep-checkpoints", 1, "--max-train-steps", 4]])
def test_overwriting_and_rotating_leave_foreign_files(teacher, run, more):
    names = [*FOREIGN, "generator/mine.txt"]
    add_foreign(run, names)
    run_cold_start(teacher, run, *QUICK, "--ema-decay", 0.9, *more)
    assert_foreign_stays(run, names)
    assert {path.name for path in (run / "generator").iterdir()} >= SAMPLING_FILES
    if "--overwrite" in more:
        assert checkpoints.complete_steps(run / "checkpoints") == [1, 2, 3]


SAMPLING_FILES = {"config.json", "generation_config.json", "diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize("held", ["nothing of ours", "a teacher", "another record", "half a record", "a list"])
def test_overwrite_empties_no_folder_that_never_held_a_run(teacher, tmp_path, capsys, held):
    folder = tmp_path / "folder"
    (folder / "samples").mkdir(parents=True)
    (folder / "samples" / "grid.png").write_text("mine")
    (folder / "checkpoints").mkdir()
    (folder / "log.txt").write_text("mine")
    if held == "a teacher":
        write_record(folder, record("teacher", {}))
    elif held == "another record":
        (folder / "args.json").write_text('{"stage": "cold_start", "lr": 3}')
    elif held == "half a record":
        (folder / "args.json").write_text('{"stage": "cold_st')
    elif held == "a list":
        (folder / "args.json").write_text("[1]")
    assert not is_run(folder)
    before = contents(tmp_path)
    for more in (["--overwrite"], ["--auto-resume"], []):
        assert "not empty" in refused(cold_start.main, flags(teacher, folder, *more), capsys=capsys)
        assert contents(tmp_path) == before and not (folder / ".lock").exists()


def test_links_to_folders_work_and_stay_links(teacher, tmp_path):
    """checkpoints/ and generator/ on another disk: first start, rotation, export, continuing, --overwrite."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("checkpoints", "generator"):
        (tmp_path / "disk" / name).mkdir(parents=True)
        (run / name).symlink_to(tmp_path / "disk" / name)
    straight = run_cold_start(teacher, tmp_path / "straight", *QUICK, "--max-train-steps", 4)
    run_cold_start(teacher, run, *QUICK, "--keep-checkpoints", 1, "--auto-resume")
    run_cold_start(teacher, run, *QUICK, "--keep-checkpoints", 1, "--auto-resume", "--max-train-steps", 4)
    assert checkpoints.complete_steps(tmp_path / "disk" / "checkpoints") == [4]
    assert_same_run(straight, run, 4)
    run_cold_start(teacher, run, *QUICK, "--overwrite", "--max-train-steps", 1)
    assert all((run / name).is_symlink() for name in ("checkpoints", "generator"))
    assert {path.name for path in (tmp_path / "disk" / "generator").iterdir()} == SAMPLING_FILES
    assert checkpoints.complete_steps(tmp_path / "disk" / "checkpoints") == [1]


def test_a_moved_run_continues(teacher, run, tmp_path):
    straight = run_cold_start(teacher, tmp_path / "straight", *QUICK, "--ema-decay", 0.9)
    again = run_cold_start(teacher, tmp_path / "again", *QUICK, "--ema-decay", 0.9, "--max-train-steps", 2)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    moved = again.rename(tmp_path / "deep" / "er" / "moved")
    cold_start.main(continued(teacher, moved))
    assert_same_run(straight, moved, 3)


def test_the_search_happens_behind_the_lock(teacher, run, capsys, monkeypatch):
    from train_cc.io.products import locked
    from train_cc.setup import stage

    def searched(*args):
        raise AssertionError("the folder was searched while another process writes to it")

    monkeypatch.setattr(stage, "_search", searched)
    with locked(run):
        for more in (["--auto-resume"], ["--overwrite"]):
            message = refused(cold_start.main, flags(teacher, run, "--max-train-steps", 4, *more), capsys=capsys)
            assert "another process writes" in message


BAD_OUTPUTS = {
    "too long": lambda folder: folder / ("x" * 300),
    "too long in all": lambda folder: folder.joinpath(*["x" * 200] * 30),
    "below a file": lambda folder: folder / "file" / "run",
    "a file": lambda folder: folder / "file",
    "dangling": lambda folder: folder / "dangling",
    "below dangling": lambda folder: folder / "dangling" / "run",
    "loop": lambda folder: folder / "loop",
    "below loop": lambda folder: folder / "loop" / "run",
    "linked checkpoints": lambda folder: folder / "dangling checkpoints",
    "linked generator": lambda folder: folder / "looping generator",
    "not a place": lambda folder: Path("/proc/nowhere/run"),
}


@pytest.mark.parametrize("how", BAD_OUTPUTS)
def test_output_folders_that_cannot_be_are_refused_before_weights_are_loaded(tmp_path, capsys, how):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, link in (("dangling checkpoints", "checkpoints"), ("looping generator", "generator")):
        (tmp_path / name).mkdir()
        (tmp_path / name / link).symlink_to(tmp_path / ("gone" if "dangling" in name else "loop"))
    before = sorted(tmp_path.rglob("*"))
    output = BAD_OUTPUTS[how](tmp_path)
    message = refused(cold_start.main, flags(tmp_path / "no teacher here", output), capsys=capsys)
    assert "no teacher here" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_whose_output_became_unwritable_is_told_at_once(teacher, run, capsys):
    damaged = shutil.copytree(teacher, run.parent / "damaged")  # what would be told of it comes later
    (damaged / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    for name in ("checkpoints/accelerator_2", "loss_logs/loss_gen_log.jsonl", "samples"):
        path, aside = run / name, run / "aside"
        path.rename(aside)
        path.symlink_to(run / "gone")
        arguments = continued(damaged, run, "--max-train-steps", 3)
        message = refused(cold_start.main, arguments, capsys=capsys)
        assert "link that leads nowhere" in message or "is missing" in message or "no whole" in message
        path.unlink()
        aside.rename(path)


# Records


@pytest.mark.parametrize("stage", [cold_start, dmdr_refl])
def test_a_finished_run_is_left_as_it_is_whatever_the_flags(teacher, run, capsys, stage):
    before = contents(run)
    more = ["--seed", 31, "--learning-rate-generator", 0.5, "--encoder-type", "none"]
    stage.main(continued(teacher, run, "--max-train-steps", 2, *more))
    told = capsys.readouterr().err
    assert "nothing is left to train" in told
    assert "--seed is 31, recorded 30" in told and "--learning-rate-generator is 0.5, recorded 0.001" in told
    assert contents(run) == before
    stage.main(continued(teacher, run, "--max-train-steps", 1))
    assert "--max-train-steps is 1, recorded 2" in capsys.readouterr().err
    assert contents(run) == before


def test_a_run_that_continues_keeps_its_earlier_commands(teacher, run):
    args = json.loads((run / "args.json").read_text())
    assert args["earlier"] == [] and args["from_step"] == 0
    cold_start.main(continued(teacher, run, "--max-train-steps", 3, "--seed", 31))
    told = json.loads((run / "args.json").read_text())
    assert told["arguments"]["seed"] == 31 and told["from_step"] == 2
    assert [each["arguments"]["seed"] for each in told["earlier"]] == [30]
    assert told["earlier"][0]["arguments"]["max_train_steps"] == 2


def test_fewer_steps_than_a_checkpoint_has_are_refused(teacher, run, tmp_path, capsys):
    arguments = flags(teacher, tmp_path / "new", "--resume-ckpt", units(run, 2), "--max-train-steps", 2)
    assert "is at step 2 already" in refused(cold_start.main, arguments, capsys=capsys)
    shutil.rmtree(run / "generator")
    arguments = continued(teacher, run, "--max-train-steps", 1)
    assert "is at step 2 already" in refused(cold_start.main, arguments, capsys=capsys)
    assert not (tmp_path / "new").exists()


# Logs and pictures

DAMAGED_LINES = [
    "null",
    "[1]",
    '{"no": "step"}',
    '{"step": "1"}',
    '{"step": true}',
    '{"step": 1',
    "\0\xff",
    "[" * 10**5,
]
DAMAGED_LINES += ['{"step": 1e99}', '{"step": ' + "9" * 5000 + "}", '{"step": NaN}', ""]


def test_damaged_lines_of_a_log_are_dropped_and_told(tmp_path, caplog, monkeypatch):
    from train_cc.run.logbook import logger

    monkeypatch.setattr(logger, "propagate", True)
    path = tmp_path / "loss_gen_log.jsonl"
    good = ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": 0.25}', '{"step": 3}']
    path.write_text("\n".join([good[0], *DAMAGED_LINES, *good[1:]]) + "\n", encoding="latin-1")
    JsonLines(path, 2)
    assert path.read_text().splitlines() == good[:2]
    assert f"{path}: {len(DAMAGED_LINES)} line(s)" in caplog.text


# Random damage


def damage(content: bytes, chance: random.Random) -> bytes:
    """One byte flipped, or some cut off, put in or doubled."""
    at = chance.randrange(len(content)) if content else 0
    length = chance.choice([1, 4, 64])
    how = chance.choice(["flip", "cut", "remove", "insert", "double"])
    if how == "flip":
        return (
            content[:at] + bytes(each ^ 1 << chance.randrange(8) for each in content[at : at + 1]) + content[at + 1 :]
        )
    if how == "cut":
        return content[:at]
    if how == "remove":
        return content[:at] + content[at + length :]
    if how == "insert":
        return content[:at] + chance.randbytes(length) + content[at:]
    return content[:at] + content[at : at + length] + content[at:]


def read_everything(parts, run: Path) -> None:
    """All that a run reads of its folder, as it does when it continues."""
    restore(parts, checkpoints.open_checkpoint(units(run, 2)))


def fuzz(teacher, run: Path, damages: int, seed: int) -> dict[str, int]:
    """Damage one file ``damages`` times. -> how many were refused, and how many read (what no longer counts).

    Half of the files of a checkpoint get a matching hash, so that their parsers see the damage as well.
    """
    args = build_parser("").parse_args(flags(teacher, run, "--ema-decay", 0.9))
    parts, chance = build(args, open_session("no")), random.Random(seed)
    files = [run / "checkpoints" / name for name in STEP_FILES] + [run / "args.json"]
    files += sorted((run / "loss_logs").iterdir())
    whole, counts = {path: path.read_bytes() for path in files}, {"refused": 0, "read": 0}
    for _ in range(damages):
        path = chance.choice(files)
        path.write_bytes(damage(whole[path], chance))
        try:
            if path.suffix == ".jsonl":
                JsonLines(path, 2)
            elif path.name == "args.json":
                is_run(run)
            else:
                if path.parent.name != "torch_units" and chance.random() < 0.5:
                    rewrite_units(units(run, 2))
                read_everything(parts, run)
            counts["read"] += 1
        except InputError:
            counts["refused"] += 1
        for each in {path, units(run, 2)}:
            each.write_bytes(whole[each])
    read_everything(parts, run)
    return counts


@pytest.mark.parametrize("damages", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_random_damage_never_escapes(teacher, run, damages):
    counts = fuzz(teacher, run, damages, seed=damages)
    assert sum(counts.values()) == damages and counts["refused"] > damages / 4, counts


# Several processes


@pytest.mark.slow
def test_an_error_of_the_main_process_ends_all(teacher, run):
    flip(run / "checkpoints/accelerator_1/step-2/optimizer.pt")
    began = time.monotonic()
    with pytest.raises(AssertionError, match="SHA-256"):
        torchrun(teacher, run.parent / "new", *QUICK, "--resume-ckpt", units(run, 2))
    assert time.monotonic() - began < 120 and not (run.parent / "new").exists()
