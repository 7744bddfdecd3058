"""train_cc/setup/stage.py: the folders that a run may write, its start, records and export; full disks and damage."""

import contextlib
import json
import math
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert_weight import export_generator
from evaluation import generate
from tests.conftest import flags, logged, random_sit, refused, run_cold_start, tree, words
from tests.run.test_resume import assert_same_run, units
from train_cc import cold_start
from train_cc.distillation import loop
from train_cc.distillation.state import restore
from train_cc.io.errors import InputError
from train_cc.io.products import check_output_dir, record, write_record
from train_cc.io.read import sha256
from train_cc.run import checkpoint as checkpoints
from train_cc.run.folder import is_run
from train_cc.run.logbook import JsonLines
from train_cc.run.session import open_session
from train_cc.setup.build import build

QUICK = ("--num-previews", 0, "--ratio-update", 1)
EMA = (*QUICK, "--ema-decay", 0.9)
STEP_FILES = ["accelerator_1/step-2/generator.safetensors", "accelerator_1/step-2/ema.safetensors"]
STEP_FILES += ["accelerator_1/step-2/optimizer.pt", "accelerator_2/step-2/estimator_lora.safetensors"]
STEP_FILES += ["accelerator_2/step-2/optimizer.pt", "torch_units/step-2.pt"]
SAMPLING_FILES = {"config.json", "generation_config.json", "diffusion_pytorch_model.safetensors"}
HALF = ".0123456789abcdef.tmp"  # ends the name of a file that a kill has left unfinished


@pytest.fixture(scope="module")
def straight(teacher, tmp_path_factory):
    return run_cold_start(teacher, tmp_path_factory.mktemp("straight") / "run", *EMA)


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    """A run of two updates with an EMA, to be copied."""
    return run_cold_start(teacher, tmp_path_factory.mktemp("finished") / "run", *EMA, "--max-train-steps", 2)


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` but the lock, which a refused command may touch."""
    return {name: content for name, content in tree(folder).items() if content is not None and name != ".lock"}


def continued(teacher, run, *more):
    return flags(teacher, run, *EMA, "--auto-resume", *more)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rehash(path: Path) -> None:
    """The torch_units file ``path`` with the hashes of the files as they are now."""
    content = torch.load(path, weights_only=True)
    for name, entry in content["files"].items():
        file = checkpoints.Checkpoint(path, content).file(name)
        entry |= {"size": file.stat().st_size, "sha256": sha256(file)}
    torch.save(content, path)


# Damaged checkpoints


def test_auto_resume_goes_around_a_damaged_checkpoint_and_names_it(teacher, straight, run, tmp_path, capsys):
    flip(run / "checkpoints/accelerator_2/step-2/optimizer.pt")
    other = shutil.copytree(run, tmp_path / "other")
    arguments = flags(teacher, tmp_path / "new", "--resume-ckpt", units(run, 2))
    assert "step-2" in refused(cold_start.main, arguments, capsys=capsys)
    cold_start.main(continued(teacher, run))
    shown = capsys.readouterr().err
    assert "WARNING" in shown and "accelerator_2/step-2/optimizer.pt" in shown and "continues from step 1" in shown
    assert_same_run(straight, run, 3)
    assert not list(run.rglob("*.damaged"))  # step 2 was written anew
    cold_start.main(continued(teacher, other, "--checkpoint-steps", 3, "--keep-checkpoints", 2))
    assert checkpoints.complete_steps(other / "checkpoints") == [1, 3]  # it does not count, and is not lost
    assert (other / "checkpoints/torch_units/step-2.pt.damaged").exists()
    assert (other / "checkpoints/accelerator_2/step-2/optimizer.pt").exists()


@pytest.mark.parametrize("name", ["generator", "ema"])
def test_a_checkpoint_of_nan_is_refused(teacher, run, capsys, name):
    path = run / f"checkpoints/accelerator_1/step-2/{name}.safetensors"
    content = load_file(path)
    content["final_layer.linear.bias"][0] = math.nan
    save_file(content, path)
    rehash(units(run, 2))
    arguments = flags(teacher, run.parent / "new", *EMA, "--resume-ckpt", units(run, 2))
    assert "NaN or infinity" in refused(cold_start.main, arguments, capsys=capsys)
    assert not (run.parent / "new").exists()


def test_a_checkpoint_of_format_1_is_read_by_its_sizes(teacher, run, capsys):
    content = torch.load(units(run, 2), weights_only=True)
    content["files"] = {name: entry["size"] for name, entry in content["files"].items()}
    content.pop("ema_updates")
    torch.save(content | {"format_version": 1}, units(run, 2))
    cold_start.main(continued(teacher, run))
    assert "older format, without hashes" in capsys.readouterr().err
    assert torch.load(units(run, 3), weights_only=True)["ema_updates"] == 3


@pytest.mark.parametrize("odd", ["/dev/zero", "x" * 5000, "loop", "dangling", "fifo"])
def test_odd_paths_of_a_checkpoint_are_refused(teacher, tmp_path, capsys, odd):
    path = tmp_path / odd
    if odd in ("loop", "dangling"):
        path.symlink_to(path if odd == "loop" else tmp_path / "gone")
    elif odd == "fifo":
        os.mkfifo(path)
    arguments = flags(teacher, tmp_path / "new", "--resume-ckpt", path)
    assert "checkpoints/torch_units/step-N.pt is expected" in refused(cold_start.main, arguments, capsys=capsys)
    assert not (tmp_path / "new").exists()


def damage(content: bytes, chance: random.Random) -> bytes:
    """One byte flipped, or some cut off, put in or doubled."""
    at, length = chance.randrange(len(content)), chance.choice([1, 4, 64])
    head, piece, tail = content[:at], content[at : at + length], content[at + length :]
    flipped = bytes([piece[0] ^ 1 << chance.randrange(8)]) + piece[1:]
    middles = [flipped + tail, b"", tail, chance.randbytes(length) + piece + tail, piece + piece + tail]
    return head + chance.choice(middles)


@pytest.mark.parametrize("damages", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_random_damage_never_escapes(teacher, run, damages):
    """Half of the damaged files of a checkpoint get a matching hash, so that their parsers see the damage as well."""
    args = cold_start.stage_parser().parse_args(flags(teacher, run, "--ema-decay", 0.9))
    parts, chance, refusals = build(args, open_session("no")), random.Random(damages), 0
    files = [run / "checkpoints" / name for name in STEP_FILES] + [run / "args.json", *(run / "loss_logs").iterdir()]
    whole = {path: path.read_bytes() for path in sorted(files)}
    for _ in range(damages):
        path = chance.choice(list(whole))
        path.write_bytes(damage(whole[path], chance))
        try:
            if path.suffix == ".jsonl":
                JsonLines(path, 2)
            elif path.name == "args.json":
                is_run(run)
            else:
                if path.parent.name != "torch_units" and chance.random() < 0.5:
                    rehash(units(run, 2))
                restore(parts, checkpoints.open_checkpoint(units(run, 2)))
        except InputError:
            refusals += 1
        for each in {path, units(run, 2)}:
            each.write_bytes(whole[each])
    restore(parts, checkpoints.open_checkpoint(units(run, 2)))
    assert refusals > damages / 4


# A disk that takes no more, and weights that are not finite


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
    """Errors of safetensors and of torch. The same command goes on from the last checkpoint."""
    limit = (run / "checkpoints/accelerator_1/step-2" / file).stat().st_size - 1000
    before = contents(run / "checkpoints")
    with files_of_at_most(limit):
        message = refused(cold_start.main, continued(teacher, run), capsys=capsys)
    assert "step-3.pt is not written, the checkpoint of step 2 is kept" in message and "free some space" in message
    assert contents(run / "checkpoints") == before
    cold_start.main(continued(teacher, run))
    assert checkpoints.complete_steps(run / "checkpoints")[-1] == 3


def test_a_full_disks_message_names_what_is_not_written(teacher, run, tmp_path, capsys):
    samples = words("--generator", teacher, "--num-steps", 1, "--num-images", 200, "--output", tmp_path / "s.npz")
    exported = words("--checkpoint", units(run, 2), "--output-dir", tmp_path / "new")
    with files_of_at_most(9000):
        message = refused(generate.main, samples, capsys=capsys)
        assert "s.npz.tmp/00000000.npz is not written: File too large" in message
        message = refused(export_generator.main, exported, capsys=capsys)
        assert f"{tmp_path / 'new'} is not written: File too large" in message and not (tmp_path / "new").exists()


def test_files_can_be_read_by_all_who_may_read_the_folder(teacher, tmp_path):
    before = os.umask(0o027)
    try:
        run = run_cold_start(teacher, tmp_path / "run", *EMA, "--max-train-steps", 1)
    finally:
        os.umask(before)
    files = [path for path in run.rglob("*") if path.suffix in (".safetensors", ".pt", ".json")]
    assert len(files) > 8 and {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}


def test_weights_that_are_not_finite_are_never_written(teacher, tmp_path, capsys, monkeypatch):
    """An update's losses are those before it: what it breaks shows in the weights only, outside the middle block."""
    turn = loop.generator_turn

    def breaking(run, step):
        figures = turn(run, step)
        if step == 1:
            run.plain_generator.final_layer.linear.bias.data[0] = math.inf
        return figures

    monkeypatch.setattr(loop, "generator_turn", breaking)
    message = refused(cold_start.main, flags(teacher, tmp_path / "run", *QUICK), capsys=capsys)
    assert "step 2" in message and "generator's weights" in message and "checkpoint of step 1 is kept" in message
    assert checkpoints.complete_steps(tmp_path / "run/checkpoints") == [1]
    assert not (tmp_path / "run/generator").exists()
    arguments = flags(teacher, tmp_path / "other", *QUICK, "--checkpoint-steps", 2)
    assert "there is no checkpoint yet" in refused(cold_start.main, arguments, capsys=capsys)


# The export


def test_a_generator_says_how_it_is_sampled_and_where_it_comes_from(teacher, tmp_path):
    more = [*EMA, "--num-steps", 2, "--timestep-shift", 1.5, "--max-train-steps", 1]
    run = run_cold_start(teacher, tmp_path / "run", *more)
    expected = {"num_inference_steps": 2, "timestep_shift": 1.5, "step": 1, "weights": "ema", "run": str(run)}
    expected["teacher_sha256"] = sha256(teacher / "diffusion_pytorch_model.safetensors")
    assert json.loads((run / "generator/generation_config.json").read_text()).items() >= expected.items()


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


@pytest.mark.parametrize("how", ["none", "half", "temporary"])
def test_an_export_that_was_killed_is_done_again(teacher, run, how):
    generator, weights = run / "generator", "diffusion_pytorch_model.safetensors"
    whole = contents(generator)
    if how == "none":
        generator.rename(run / "generator.tmp")
        (run / "generator.tmp" / weights).write_bytes(b"half")
    elif how == "half":
        (generator / "generation_config.json").unlink()
    else:
        (generator / "export.tmp").mkdir()
        (generator / "export.tmp" / "config.json").write_text("{")
        (generator / weights).write_bytes(b"older")
    cold_start.main(continued(teacher, run, "--max-train-steps", 2))
    assert contents(generator).keys() == whole.keys() and contents(generator)[weights] == whole[weights]
    assert not list(run.rglob("*.tmp"))


# The folder

FOREIGN = ["nohup.out", ".DS_Store", "notes/mine.txt", "samples/mine.png", "samples/step-2/mine.png"]
FOREIGN += [
    "samples/step-best/grid.png",
    "loss_logs/mine.csv",
    "checkpoints/last.pt",
    "checkpoints/torch_units/best.pt",
]
FOREIGN += [f"checkpoints/accelerator_1/{name}" for name in ("step-1/mine.txt", "step-1.tmp/mine", "step-9/a.bak")]


def write_all(run: Path, names: list[str]) -> None:
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)


def test_a_dead_run_starts_again_among_foreign_files(teacher, tmp_path):
    """As a run that was killed before its first checkpoint leaves it."""
    run = tmp_path / "run"
    ours = [f"checkpoints/accelerator_1/step-1.tmp/{name}" for name in ("generator.safetensors", ".tmpAb12cd")]
    ours += ["checkpoints/accelerator_2/step-1/optimizer.pt", "samples/step-2/grid.png", "log.txt"]
    write_all(run, [*FOREIGN, *ours])
    (run / "loss_logs/loss_gen_log.jsonl").write_text('{"step": 1}\n')
    write_record(run, record("cold_start", vars(cold_start.stage_parser().parse_args(flags(teacher, run)))))
    run_cold_start(teacher, run, *QUICK, "--auto-resume")
    assert all((run / name).read_text() == name for name in FOREIGN)
    assert [row["step"] for row in logged(run)] == [1, 2, 3]
    assert checkpoints.open_checkpoint(units(run, 3)).step == 3
    assert not (run / "samples/step-2/grid.png").exists() and not list(run.rglob(".tmp*"))


@pytest.mark.parametrize("name", [".lock", f"args.json{HALF}", HALF])
def test_a_start_that_was_killed_in_its_first_writing_starts_again(teacher, tmp_path, name):
    write_all(tmp_path, [f"run/{name}", f"teacher/{name}"])
    run_cold_start(teacher, tmp_path / "run", *QUICK, "--auto-resume")
    assert len(logged(tmp_path / "run")) == 3 and not (tmp_path / "run" / f"args.json{HALF}").exists()
    check_output_dir(tmp_path / "teacher")  # of all other commands


@pytest.mark.parametrize("more", [["--overwrite"], ["--auto-resume", "--keep-checkpoints", 1, "--max-train-steps", 4]])
def test_overwriting_and_rotating_leave_foreign_files(teacher, run, more):
    unfinished = [f"loss_logs/loss_gen_log.jsonl{HALF}", f"generator/generation_config.json{HALF}"]
    names = [*FOREIGN, "generator/mine.txt"]
    write_all(run, [*names, *unfinished])
    run_cold_start(teacher, run, *EMA, *more)
    assert all((run / name).read_text() == name for name in names)
    assert {path.name for path in (run / "generator").iterdir()} >= SAMPLING_FILES
    if "--overwrite" in more:
        assert checkpoints.complete_steps(run / "checkpoints") == [1, 2, 3]
        assert not any((run / name).exists() for name in unfinished)


OTHERS = ["", json.dumps(record("teacher", {})), '{"stage": "cold_start", "lr": 3}', '{"stage": "cold_st', "[1]"]


@pytest.mark.parametrize("text", OTHERS)
def test_overwrite_empties_no_folder_that_never_held_a_run(teacher, tmp_path, capsys, text):
    folder = tmp_path / "folder"
    write_all(folder, ["samples/grid.png", "checkpoints/mine.txt", "log.txt"])
    if text:
        (folder / "args.json").write_text(text)
    before = contents(tmp_path)
    for more in (["--overwrite"], ["--auto-resume"], []):
        assert "not empty" in refused(cold_start.main, flags(teacher, folder, *more), capsys=capsys)
        assert contents(tmp_path) == before and not (folder / ".lock").exists()


def test_links_to_folders_work_and_stay_links(teacher, tmp_path):
    """checkpoints/ and generator/ on another disk: first start, rotation, export, continuing, --overwrite."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    run.mkdir()
    for name in ("checkpoints", "generator"):
        (disk / name).mkdir(parents=True)
        (run / name).symlink_to(disk / name)
    straight = run_cold_start(teacher, tmp_path / "straight", *QUICK, "--max-train-steps", 4)
    for steps in (3, 4):
        more = ("--keep-checkpoints", 1, "--auto-resume", "--max-train-steps", steps)
        run_cold_start(teacher, run, *QUICK, *more)
    assert checkpoints.complete_steps(disk / "checkpoints") == [4]
    assert_same_run(straight, run, 4)
    run_cold_start(teacher, run, *QUICK, "--overwrite", "--max-train-steps", 1)
    assert all((run / name).is_symlink() for name in ("checkpoints", "generator"))
    assert {path.name for path in (disk / "generator").iterdir()} == SAMPLING_FILES
    assert checkpoints.complete_steps(disk / "checkpoints") == [1]


def test_a_moved_run_continues(teacher, straight, run, tmp_path):
    moved = run.rename(tmp_path / "moved")
    cold_start.main(continued(teacher, moved))
    assert_same_run(straight, moved, 3)


@pytest.mark.parametrize(
    "output", ["x" * 300, "file/run", "file", "dangling/run", "loop", "linked", "looping", "/proc/nowhere/run"]
)
def test_output_folders_that_cannot_be_are_refused_before_weights_are_loaded(tmp_path, capsys, output):
    (tmp_path / "file").write_text("mine")
    for name, target in (("dangling", "gone"), ("loop", "loop"), ("linked/checkpoints", "gone")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / target)
    (tmp_path / "looping").mkdir()
    (tmp_path / "looping/generator").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.rglob("*"))
    message = refused(cold_start.main, flags(tmp_path / "no teacher here", tmp_path / output), capsys=capsys)
    assert "no teacher here" not in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["checkpoints/accelerator_2", "loss_logs/loss_gen_log.jsonl", "samples"])
def test_a_run_whose_output_became_unwritable_is_told_at_once(teacher, run, capsys, name):
    damaged = shutil.copytree(teacher, run.parent / "damaged")  # its message would come later
    (damaged / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    if (run / name).exists():
        (run / name).rename(run / "aside")
    (run / name).symlink_to(run / "gone")
    message = refused(cold_start.main, continued(damaged, run), capsys=capsys)
    assert "link that leads nowhere" in message or "is missing" in message or "no whole" in message


# Records


def test_a_finished_run_is_left_as_it_is_whatever_the_flags(teacher, run, capsys):
    before = contents(run)
    more = ["--seed", 31, "--learning-rate-generator", 0.5]
    cold_start.main(continued(teacher, run, "--max-train-steps", 2, *more))
    shown = capsys.readouterr().err
    assert "nothing is left to train" in shown
    assert "--seed is 31, recorded 30" in shown and "--learning-rate-generator is 0.5, recorded 0.001" in shown
    cold_start.main(continued(teacher, run, "--max-train-steps", 1))
    assert "--max-train-steps is 1, recorded 2" in capsys.readouterr().err
    assert contents(run) == before


def test_a_run_that_continues_keeps_its_earlier_commands(teacher, run):
    content = json.loads((run / "args.json").read_text())
    assert content["earlier"] == [] and content["from_step"] == 0
    cold_start.main(continued(teacher, run, "--seed", 31))
    content = json.loads((run / "args.json").read_text())
    assert content["arguments"]["seed"] == 31 and content["from_step"] == 2
    assert [(each["arguments"]["seed"], each["arguments"]["max_train_steps"]) for each in content["earlier"]] == [
        (30, 2)
    ]


def test_fewer_steps_than_a_checkpoint_has_are_refused(teacher, run, tmp_path, capsys):
    arguments = flags(teacher, tmp_path / "new", "--resume-ckpt", units(run, 2), "--max-train-steps", 2)
    assert "is at step 2 already" in refused(cold_start.main, arguments, capsys=capsys)
    shutil.rmtree(run / "generator")
    arguments = continued(teacher, run, "--max-train-steps", 1)
    assert "is at step 2 already" in refused(cold_start.main, arguments, capsys=capsys)
    assert not (tmp_path / "new").exists()


def test_an_average_that_starts_or_ends_at_a_checkpoint_is_told(teacher, run, tmp_path):
    more = [*QUICK, "--resume-ckpt", units(run, 2)]
    without = run_cold_start(teacher, tmp_path / "without", *more)
    assert "ema.safetensors ends here" in (without / "log.txt").read_text()
    assert torch.load(units(without, 3), weights_only=True)["ema_updates"] == 0
    again = run_cold_start(
        teacher, tmp_path / "again", *EMA, "--resume-ckpt", units(without, 3), "--max-train-steps", 4
    )
    assert "has no EMA: it starts here" in (again / "log.txt").read_text()
    assert torch.load(units(again, 4), weights_only=True)["ema_updates"] == 1
    start = load_file(without / "checkpoints/accelerator_1/step-3/generator.safetensors")
    end = load_file(again / "checkpoints/accelerator_1/step-4/generator.safetensors")
    for name, value in load_file(again / "checkpoints/accelerator_1/step-4/ema.safetensors").items():
        torch.testing.assert_close(value, 2 / 11 * start[name] + 9 / 11 * end[name], rtol=1e-5, atol=1e-7)
    cold_start.main(continued(teacher, run))
    assert "EMA carries over" in (run / "log.txt").read_text()
