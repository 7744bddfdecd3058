"""Stop and resume equals never stopped, to the last bit; checkpoints survive kills, signals and bad files."""

import copy
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import ROOT
from tests.conftest import flags, logged, random_sit, refused, run_cold_start
from train_cc import cold_start, dmdr_refl
from train_cc.io.products import record, write_record
from train_cc.run import checkpoint as checkpoints
from train_cc.run.folder import exported_step

REWARD = "REWARD"  # stands for the reward's flags in a list of modes
MODES = {
    "plain": [],
    "everything": ["--ema-decay", 0.9, "--gradient-accumulation-steps", 2, REWARD, "--num-steps", 2],
    "ema": ["--ema-decay", 0.9],
    "lora": ["--use-lora-gen"],
    "lora with ema": ["--use-lora-gen", "--ema-decay", 0.9],
    "accumulation": ["--gradient-accumulation-steps", 2],
    "reward": [REWARD],
    "guidance": ["--real-guidance-scale", 1.5, "--real-guidance-interval", 0, 0.4],
}
EVERYDAY = {"plain", "everything", "lora"}


def mode_flags(mode, reward_folder):
    reward = ["--encoder-type", "classifier", "--reward-classifier", reward_folder, "--reward-weight", 0.5]
    return [word for item in MODES[mode] for word in (reward if item is REWARD else [item])]


def units(run, step):
    return run / "checkpoints" / "torch_units" / f"step-{step}.pt"


def tensors(content, prefix=""):
    """All tensors of a nested dict, by path."""
    found = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= tensors(value, f"{prefix}{key}/")
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value
    return found


def saved(run, step):
    found = {}
    for path in sorted((run / "checkpoints").glob(f"accelerator_*/step-{step}/*")):
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        found |= tensors(content, f"{path.parent.parent.name}/{path.name}/")
    return found


def assert_same_run(a, b, step):
    first, second = saved(a, step), saved(b, step)
    assert first.keys() == second.keys() and len(first) > 10
    assert any("exp_avg_sq" in name for name in first)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
    for name in ("gen", "gui"):
        assert logged(a, name) == logged(b, name)
    exported = [load_file(run / "generator" / "diffusion_pytorch_model.safetensors") for run in (a, b)]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


@pytest.mark.parametrize(
    "mode", [m if m in EVERYDAY else pytest.param(m, marks=pytest.mark.slow) for m in MODES], ids=str
)
def test_resume_equals_never_stopped(teacher, tmp_path, reward_folder, mode):
    more = mode_flags(mode, reward_folder)
    straight = run_cold_start(teacher, tmp_path / "straight", *more, "--max-train-steps", 4)
    stopped = run_cold_start(teacher, tmp_path / "stopped", *more, "--max-train-steps", 2)
    run_cold_start(teacher, stopped, *more, "--max-train-steps", 4, "--auto-resume")
    assert_same_run(straight, stopped, 4)


def torchrun(teacher, output, *more, processes=2, module="train_cc.cold_start"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["--module", module, *flags(teacher, output, *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUM_PROCESSES": str(processes)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.mark.parametrize(
    "mode", [m if m == "everything" else pytest.param(m, marks=pytest.mark.slow) for m in MODES], ids=str
)
def test_resume_equals_never_stopped_with_two_processes(teacher, tmp_path, reward_folder, mode):
    more = mode_flags(mode, reward_folder)
    straight = torchrun(teacher, tmp_path / "straight", *more, "--max-train-steps", 4)
    stopped = torchrun(teacher, tmp_path / "stopped", *more, "--max-train-steps", 2)
    torchrun(teacher, stopped, *more, "--max-train-steps", 4, "--auto-resume")
    assert_same_run(straight, stopped, 4)


def stage_two(teacher, reward_folder, output, source, *more):
    reward = mode_flags("reward", reward_folder)
    words = ["--resume-ckpt", source, "--learning-rate-generator", 5e-4, "--dynamic-steps", 0, "--auto-resume"]
    dmdr_refl.main(flags(teacher, output, *reward, *words, *more))
    return output


@pytest.mark.parametrize("ema", [0, 0.9])
def test_stage_change_and_resume_within_stage_two(teacher, tmp_path, reward_folder, ema):
    first = run_cold_start(teacher, tmp_path / "cold", "--ema-decay", ema)
    more = ("--ema-decay", ema)
    straight = stage_two(teacher, reward_folder, tmp_path / "a", units(first, 3), *more, "--max-train-steps", 7)
    stopped = stage_two(teacher, reward_folder, tmp_path / "b", units(first, 3), *more, "--max-train-steps", 5)
    stage_two(teacher, reward_folder, stopped, units(first, 3), *more, "--max-train-steps", 7)
    assert_same_run(straight, stopped, 7)
    rows = logged(straight)
    assert [row["step"] for row in rows] == [4, 5, 6, 7]
    assert rows[0]["samples_seen"] == 16 and rows[0]["lora_scale_real"] == 0
    assert "loss_reward_classifier" in rows[0]
    assert "generator 0.0005" in (straight / "log.txt").read_text()


def test_the_learning_rate_of_the_new_command_applies(teacher, tmp_path):
    run = run_cold_start(teacher, tmp_path / "run")
    start = load_file(run / "checkpoints/accelerator_1/step-3/generator.safetensors")
    moved = []
    for rate in (1e-3, 1e-6):
        other = tmp_path / f"{rate}"
        more = ("--resume-ckpt", units(run, 3), "--max-train-steps", 4, "--learning-rate-generator", rate)
        run_cold_start(teacher, other, *more)
        end = load_file(other / "checkpoints/accelerator_1/step-4/generator.safetensors")
        moved.append(max((end[name] - start[name]).abs().max().item() for name in start))
    assert moved[0] > 100 * moved[1] > 0


def test_a_finished_run_has_nothing_left(teacher, tmp_path, capsys):
    run = run_cold_start(teacher, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    run_cold_start(teacher, run, "--auto-resume")
    assert "nothing is left to train" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before


def test_resume_drops_later_rows_and_a_torn_line(teacher, tmp_path):
    straight = run_cold_start(teacher, tmp_path / "a")
    run = run_cold_start(teacher, tmp_path / "b", "--checkpoint-steps", 2)
    units(run, 3).unlink()  # as if killed after step 3's rows and before its checkpoint
    log = run / "loss_logs" / "loss_gen_log.jsonl"
    log.write_text(log.read_text() + '{"step": 4, "loss_')
    run_cold_start(teacher, run, "--checkpoint-steps", 2, "--auto-resume")
    assert logged(run) == logged(straight)


def test_auto_resume_wins_over_resume_ckpt(teacher, tmp_path):
    first = run_cold_start(teacher, tmp_path / "first")
    run = run_cold_start(teacher, tmp_path / "run")
    more = ("--resume-ckpt", units(first, 1), "--max-train-steps", 4, "--auto-resume")
    run_cold_start(teacher, run, *more)
    assert [row["step"] for row in logged(run)] == [1, 2, 3, 4]


def test_a_kill_before_the_first_checkpoint_starts_again(teacher, tmp_path):
    run = tmp_path / "run"
    (run / "loss_logs").mkdir(parents=True)
    write_record(run, record("cold_start", {}))
    (run / "checkpoints" / "accelerator_1" / "step-1.tmp").mkdir(parents=True)
    run_cold_start(teacher, run, "--auto-resume")
    assert len(logged(run)) == 3


# Retention


def test_rotation_keeps_the_newest_and_the_one_that_was_named(teacher, tmp_path):
    run = run_cold_start(teacher, tmp_path / "run", "--keep-checkpoints", 2)
    root = run / "checkpoints"
    assert checkpoints.complete_steps(root) == [2, 3]
    assert sorted(path.name for path in (root / "accelerator_1").iterdir()) == ["step-2", "step-3"]
    more = ("--resume-ckpt", units(run, 2), "--max-train-steps", 6, "--keep-checkpoints", 1)
    units(run, 3).unlink()
    run_cold_start(teacher, run, *more)
    assert checkpoints.complete_steps(root) == [2, 6]


def test_a_kill_between_a_checkpoint_and_the_rotation_leaves_none_too_many(teacher, tmp_path, monkeypatch):
    more = ("--keep-checkpoints", 2, "--auto-resume")
    rotate = checkpoints.rotate_checkpoints

    def dies(root, *rest):
        if checkpoints.complete_steps(root)[-1] == 3:
            raise RuntimeError("killed")
        rotate(root, *rest)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(checkpoints, "rotate_checkpoints", dies)
        run_cold_start(teacher, tmp_path / "run", *more)
    assert checkpoints.complete_steps(tmp_path / "run" / "checkpoints") == [1, 2, 3]
    run_cold_start(teacher, tmp_path / "run", *more)
    assert checkpoints.complete_steps(tmp_path / "run" / "checkpoints") == [2, 3]
    assert exported_step(tmp_path / "run") == 3


# Signals and kills


def start(teacher, output, *more):
    command = [sys.executable, "-m", "train_cc.cold_start", *flags(teacher, output, *more)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )


def wait_for(path, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=str)
def test_a_signal_ends_the_run_with_a_checkpoint(teacher, tmp_path, number):
    more = ("--max-train-steps", 400, "--checkpoint-steps", 1000, "--num-previews", 0)
    process = start(teacher, tmp_path / "run", *more)
    wait_for(tmp_path / "run" / "loss_logs" / "loss_gui_log.jsonl", process)
    time.sleep(0.5)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told[-2000:]
    (step,) = checkpoints.complete_steps(tmp_path / "run" / "checkpoints")
    assert 1 <= step < 400 and f"stopped at step {step}" in told and "--auto-resume" in told
    assert [row["step"] for row in logged(tmp_path / "run")] == list(range(1, step + 1))
    assert not (tmp_path / "run" / "generator").exists()


def kill_and_resume(teacher, tmp_path, kills, steps=60, keep=2):
    """-> how many updates each killed process had done, None where it died before its first."""
    more = ("--max-train-steps", steps, "--checkpoint-steps", 1, "--ema-decay", 0.9, "--sample-steps", 5)
    straight = tmp_path / "straight"
    assert start(teacher, straight, *more).wait() == 0
    generator, run, moments = random.Random(0), tmp_path / "run", []
    while len(moments) < kills:
        began = time.time()
        process = start(teacher, run, *more, "--auto-resume", "--keep-checkpoints", keep)
        if generator.random() < 0.8:  # while it trains and writes; else anywhere, start-up included
            while process.poll() is None and not (run / "log.txt").exists():
                time.sleep(0.005)
            while process.poll() is None and (run / "args.json").stat().st_mtime < began:
                time.sleep(0.005)
            if generator.random() < 0.3:  # while it rotates, or exports
                waiting = generator.choice(["checkpoints/torch_units/*.tmp", "checkpoints/*/*.tmp/*", "generator*/*"])
                while process.poll() is None and not list(run.glob(waiting)):
                    time.sleep(0.001)
                time.sleep(generator.uniform(0, 0.02))
            else:
                time.sleep(generator.uniform(0, 1.0))
        else:
            time.sleep(generator.uniform(0, 6))
        process.kill()
        process.communicate()
        done = checkpoints.complete_steps(run / "checkpoints")
        moments.append(done[-1] if done else None)
        assert not done or checkpoints.open_checkpoint(units(run, done[-1]))
        if exported_step(run) is not None:  # it had finished: once more from the beginning
            assert_same_run(straight, run, steps)
            shutil.rmtree(run)
    process = start(teacher, run, *more, "--auto-resume", "--keep-checkpoints", keep)
    _, told = process.communicate()
    assert process.returncode == 0, told[-2000:]
    assert_same_run(straight, run, steps)
    assert not list(run.rglob("*.tmp*"))
    left = {path.name for path in (run / "checkpoints").glob("accelerator_*/*")}
    assert left == {f"step-{step}" for step in checkpoints.complete_steps(run / "checkpoints")}
    return moments


def test_a_killed_run_resumes(teacher, tmp_path):
    kill_and_resume(teacher, tmp_path, kills=1, steps=10)


@pytest.mark.slow
@pytest.mark.parametrize("steps,keep", [(60, 2), (4, 1)], ids=["long", "rotation and export"])
def test_twenty_kills(teacher, tmp_path, steps, keep):
    print(kill_and_resume(teacher, tmp_path, kills=20, steps=steps, keep=keep))


# Bad checkpoints


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def spoil(run, how, tmp_path):
    path = units(run, 3)
    if how == "missing":
        return tmp_path / "nowhere.pt"
    if how == "truncated units":
        path.write_bytes(path.read_bytes()[:200])
    elif how == "truncated weights":
        weights = run / "checkpoints/accelerator_1/step-3/generator.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])
    elif how == "incomplete":
        shutil.rmtree(run / "checkpoints/accelerator_2/step-3")
    elif how == "pickle with code":
        path.write_bytes(pickle.dumps(Code(tmp_path / "code-ran")))
    elif how == "torch file with code":
        torch.save({"format_version": 1, "code": Code(tmp_path / "code-ran")}, path)
    elif how == "newer format":
        content = copy.deepcopy(torch.load(path, weights_only=True))
        torch.save(content | {"format_version": 99}, path)
    elif how == "a key missing":
        content = torch.load(path, weights_only=True)
        torch.save({name: value for name, value in content.items() if name != "teacher_sha256"}, path)
    elif how == "another file":
        torch.save({"weight": torch.zeros(2)}, path)
    elif how == "a folder":
        return run / "checkpoints" / "torch_units"
    return path


BAD_CHECKPOINTS = {
    "missing": "does not exist",
    "truncated units": "truncated|damaged",
    "truncated weights": "incomplete",
    "incomplete": "incomplete",
    "pickle with code": "not run",
    "torch file with code": "not run",
    "newer format": "format version 99",
    "a key missing": "it lacks .'teacher_sha256'.",
    "another file": "not a checkpoint",
    "a folder": "torch_units",
}


@pytest.mark.parametrize("how", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_and_nothing_is_touched(teacher, tmp_path, capsys, how):
    import re

    run = run_cold_start(teacher, tmp_path / "run")
    path = spoil(run, how, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    arguments = flags(teacher, tmp_path / "new", "--resume-ckpt", path, "--max-train-steps", 5)
    message = refused(cold_start.main, arguments, capsys=capsys)
    assert re.search(BAD_CHECKPOINTS[how], message), message
    assert not (tmp_path / "new").exists() and not (tmp_path / "code-ran").exists()
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


@pytest.mark.parametrize("other", [{"hidden_size": 64}, {"num_classes": 7}, {"depth": 3}], ids=str)
def test_a_checkpoint_of_another_model_is_refused(teacher, tmp_path, capsys, other):
    run = run_cold_start(teacher, tmp_path / "run")
    random_sit(**other).save_pretrained(tmp_path / "other")
    arguments = flags(tmp_path / "other", tmp_path / "new", "--resume-ckpt", units(run, 3), "--max-train-steps", 5)
    assert "does not fit" in refused(cold_start.main, arguments, capsys=capsys)
    assert not (tmp_path / "new").exists()


def test_a_lora_checkpoint_does_not_fit_a_whole_generator(teacher, tmp_path, capsys):
    run = run_cold_start(teacher, tmp_path / "run", "--use-lora-gen")
    arguments = flags(teacher, tmp_path / "new", "--resume-ckpt", units(run, 3), "--max-train-steps", 5)
    assert "--use-lora-gen" in refused(cold_start.main, arguments, capsys=capsys)


# Folders that are shared, moved, linked, or not ours


def test_going_back_in_a_folder_ends_what_came_after(teacher, tmp_path):
    straight = run_cold_start(teacher, tmp_path / "a", "--max-train-steps", 4)
    run = run_cold_start(teacher, tmp_path / "b", "--max-train-steps", 6)
    more = ("--resume-ckpt", units(run, 2), "--keep-checkpoints", 1, "--max-train-steps", 4)
    run_cold_start(teacher, run, *more)
    assert checkpoints.complete_steps(run / "checkpoints") == [2, 4]  # 2 was named, and is kept
    assert_same_run(straight, run, 4)


@pytest.mark.parametrize("how", ["strange checkpoints", "checkpoints moved away", "no record"])
def test_auto_resume_deletes_no_folder_that_is_not_a_killed_run(teacher, tmp_path, capsys, how):
    run = tmp_path / "run"
    if how == "strange checkpoints":
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints" / "last.pt").write_bytes(b"mine")
    else:
        run_cold_start(teacher, run)
        shutil.rmtree(run / "generator")
        shutil.rmtree(run / "checkpoints")
        if how == "no record":
            (run / "log.txt").unlink()
            (run / "args.json").write_text("{}")
    before = sorted(run.rglob("*"))
    assert "not empty" in refused(cold_start.main, flags(teacher, run, "--auto-resume"), capsys=capsys)
    assert sorted(run.rglob("*")) == before


def test_two_runs_do_not_write_one_folder(teacher, tmp_path, capsys):
    from train_cc.io.products import locked

    run = run_cold_start(teacher, tmp_path / "run")
    arguments = flags(teacher, run, "--auto-resume", "--max-train-steps", 4)
    with locked(run):
        assert "another process writes" in refused(cold_start.main, arguments, capsys=capsys)
    cold_start.main(arguments)
    assert len(logged(run)) == 4


def test_overwrite_does_not_delete_its_own_inputs(teacher, tmp_path, capsys):
    run = run_cold_start(teacher, tmp_path / "run")
    for more in (["--teacher", run / "generator"], ["--resume-ckpt", units(run, 1)]):
        assert "would delete" in refused(cold_start.main, flags(teacher, run, "--overwrite", *more), capsys=capsys)
    assert (run / "generator" / "config.json").exists() and units(run, 1).exists()


def test_a_lora_generator_is_merged_into_its_own_teacher_alone(teacher, tmp_path, capsys):
    from convert_weight import export_generator

    run = run_cold_start(teacher, tmp_path / "run", "--use-lora-gen")
    random_sit(seed=9).save_pretrained(tmp_path / "other")
    words = ["--checkpoint", units(run, 3), "--output-dir", tmp_path / "out", "--teacher", tmp_path / "other"]
    assert "is not the teacher" in refused(export_generator.main, [str(word) for word in words], capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_a_launcher_hands_signals_to_the_run(teacher, tmp_path):
    environment = os.environ | {"TEACHER": str(teacher), "OUTPUT_DIR": str(tmp_path / "run"), "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"VIRTUAL_ENV": str(Path(sys.executable).parents[1])}
    command = ["bash", str(ROOT / "scripts" / "cold_start_digits.sh"), "--lora-rank", "4", "--num-previews", "0"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "loss_logs" / "loss_gui_log.jsonl", process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped at step" in told, told[-2000:]
