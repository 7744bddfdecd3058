"""evaluation/frontier.py: its file of rows, what is kept and what is made again, and what stops it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from evaluation import frontier, scatter, work
from evaluation.asked import ROOT, keep_or_put_aside, plain_settings, processes_of
from evaluation.figures.tables import HELD_OUT
from evaluation.rows import read_table, words_of
from tests.conftest import refused, tree, words
from tests.test_launchers import as_in_a_terminal
from train_cc.io.errors import InputError

TABLE = """
seeds = [1, 2]
base_steps = 4
extra_steps = 2
reference = "$HERE/reference.npz"
inputs = ["$HERE/input"]
train = "--batch-size 4"
generate = "--num-images 8"
evaluate = "--space pixels"

[[row]]
name = "teacher"
stage = "teacher"
flags = "--sampler euler --num-steps 2"

[[row]]
name = "base"
stage = "cold_start"
published = true
flags = "--real-guidance-scale 1.5"

[[row]]
name = "base + control"
stage = "dmdr"
from = "base"
flags = "--encoder-type none"

[[row]]
name = "base + reward"
stage = "dmdr"
from = "base"
against = "base + control"
flags = "--reward-weight 0.5"
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The file of rows, in a folder of its own."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.setenv("HERE", str(folder))
    np.savez(folder / "reference.npz", arr_0=np.zeros((8, 4, 4, 1), np.uint8))
    (folder / "input").write_text("a")
    (folder / "table.toml").write_text(TABLE)
    return folder / "table.toml"


@pytest.fixture
def run(table, teacher, tmp_path, monkeypatch):
    """A frontier whose commands write what the real ones would. -> a function of flags; `run.made`: commands."""
    made, lock = [], threading.Lock()

    def launch(self, command, log, **variables):
        with lock:
            made.append(command)
        value = 0.1 * len(command[0]) + 0.01 * len(str(log))
        if command[0] == "bash":
            folder = Path(variables["OUTPUT_DIR"]) / "generator"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps([command, sorted(map(str, variables.items()))]))
        elif "evaluation.generate" in command:
            output = Path(command[command.index("--output") + 1])
            output.parent.mkdir(parents=True, exist_ok=True)
            generator = Path(command[command.index("--generator") + 1]) / "config.json"
            output.write_text(str(command) + generator.read_text())
        elif "--check" not in command:
            output = Path(command[command.index("--output") + 1])
            output.parent.mkdir(parents=True, exist_ok=True)
            names = command[command.index("--names") + 1 : command.index("--output")]
            figures = {"FID": value, "Recall": 0.5, "Precision": value / 10}
            each = {name: {"figures": figures, "images": 8} for name in names}
            content = {"rows": each, "features": "f", "more_spaces": [{"features": "g", "rows": each}], "set_size": 8}
            means = {name: {"figures": {"FDr": value, "SWr": value}, "images": 8} for name in [*names, HELD_OUT]}
            content["over_spaces"] = means
            output.write_text(json.dumps(content))

    monkeypatch.setattr(work.Processes, "run", launch)
    monkeypatch.setattr(scatter, "picture", lambda *given: given[-1].write_bytes(b"made by DMDR: a picture"))
    base = {"--recipe": "digits", "--output-dir": tmp_path / "f", "--teacher": teacher, "--table": table}

    def start(*more, **changed):
        made.clear()
        given = base | {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
        frontier.main(words(*(word for pair in given.items() for word in pair), *more))
        return made

    start.made = made
    return start


def kinds(made) -> list[int]:
    """How many trainings, samplings, evaluations were started."""
    trained = sum(command[0] == "bash" for command in made)
    sampled = sum("evaluation.generate" in command for command in made)
    return [trained, sampled, sum("--names" in command for command in made)]


def test_every_row_is_made_once_and_kept(run, tmp_path, capsys):
    made = list(run())
    assert kinds(made) == [6, 8, 4]
    assert "--check" in made[0] and made[0][0] != "bash"  # before anything is trained
    capsys.readouterr()
    assert kinds(run()) == [0, 0, 0]
    printed = capsys.readouterr().out
    assert "[13/13]" in printed and "base + control, seed 2: kept" in printed
    text = (tmp_path / "f" / "frontier.md").read_text()
    assert "| held-out real | 1 |" in text.split("## the mean over 2 spaces")[1]
    assert "| base + reward | 2 |" in text and "## g" in text and "| base + reward | base + control |" in text
    record = json.loads((tmp_path / "f" / "frontier.json").read_text())
    assert record["rows"]["base"]["seeds"] == 2 and "standard_deviations" in record["rows"]["base"]
    assert (tmp_path / "f" / "frontier.png").exists()


def test_a_dmdr_row_has_its_cold_starts_flags_state_and_seed(run, teacher, tmp_path):
    made = [command for command in run() if command[0] == "bash"]
    (found,) = [c for c in made if "dmdr" in c[1] and "--reward-weight" in c and c[-1] == "2"]
    assert found[1] == "scripts/dmdr_digits_refl.sh"
    words = found[2:]
    assert words[:6] == ["--batch-size", "4", "--real-guidance-scale", "1.5", "--reward-weight", "0.5"]
    assert words[words.index("--max-train-steps") + 1] == "6" and words[words.index("--seed") + 1] == "2"
    config = (tmp_path / "f" / "runs" / "seed-2" / "base_and_reward" / "generator" / "config.json").read_text()
    assert f"{tmp_path}/f/runs/seed-2/base/checkpoints/torch_units/step-4.pt" in config and str(teacher) in config
    assert all(c[c.index("--max-train-steps") + 1] == "4" for c in made if "cold" in c[1]) and len(made) == 6


def test_a_choice_of_rows_and_seeds(run, capsys):
    assert kinds(run("--rows", "base + control", "--seeds", "7")) == [2, 2, 2]
    assert "--rows 'control' is not in the table" in refused(lambda: run("--rows", "control"), capsys=capsys)


def test_what_is_stale_is_made_again_and_put_aside(run, table, teacher, tmp_path, capsys):
    run()
    other = shutil.copytree(teacher, tmp_path / "other_teacher")
    state = load_file(other / "diffusion_pytorch_model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, other / "diffusion_pytorch_model.safetensors")
    for change, expected, told in (
        (lambda: table.write_text(TABLE.replace('"--reward-weight 0.5"', '"--reward-weight 0.6"')), [2, 2, 1],
         "--reward-weight 0.5, asked 0.6"),
        (lambda: table.write_text(TABLE.replace("euler --num-steps 2", "euler --num-steps 3")), [2, 4, 2],
         "--num-steps 2, asked 3"),  # the reward's weight goes back, too
        (lambda: table.write_text(TABLE.replace("--space pixels", "--space pixels --bootstrap 5")), [0, 2, 4],
         "--bootstrap not given, asked 5"),
        (lambda: (table.parent / "input").write_text("b"), [6, 0, 4], "input "),  # the same generators came of it
        (lambda: np.savez(table.parent / "reference.npz", arr_0=np.ones((8, 4, 4, 1), np.uint8)), [0, 0, 4],
         "reference "),
    ):  # fmt: skip
        change()
        capsys.readouterr()
        assert kinds(run()) == expected, told
        printed = capsys.readouterr().out
        assert "stale: " in printed and told in printed
        assert kinds(run()) == [0, 0, 0]
    capsys.readouterr()
    assert kinds(run(teacher=other)) == [6, 8, 4]
    aside = sorted(path.name for path in (tmp_path / "f" / "stale").iterdir())
    assert {"base-1", "base-2", "base_and_reward-1", "teacher-1"} <= set(aside)


def test_a_decoder_in_a_samplings_flags_makes_its_samples_stale(run, table, tmp_path):
    (tmp_path / "here" / "vae").mkdir()
    (tmp_path / "here" / "vae" / "config.json").write_text("1")
    table.write_text(TABLE.replace("--num-images 8", "--num-images 8 --vae $HERE/vae"))
    assert kinds(run()) == [6, 8, 4] and kinds(run()) == [0, 0, 0]
    (tmp_path / "here" / "vae" / "config.json").write_text("2")
    assert kinds(run())[:2] == [0, 8]


def test_several_processes_make_another_row(run, monkeypatch):
    run()
    monkeypatch.setenv("NUM_PROCESSES", "1")
    assert kinds(run()) == [0, 0, 0]
    monkeypatch.setenv("NUM_PROCESSES", "2")
    assert kinds(run())[0] == 6


def test_what_decides_the_number_of_processes(tmp_path, monkeypatch):
    """A small recipe takes one GPU of several unless asked; the others take all."""
    for name in ("NUM_PROCESSES", "NUM_NODES", "ACCELERATE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert processes_of("launch x") == {"GPUs": "8"} and processes_of("one_process_unless_asked") == {}
    monkeypatch.setenv("ACCELERATE_CONFIG", str(tmp_path / "c.yaml"))
    with pytest.raises(InputError, match=r"c\.yaml does not exist"):
        processes_of("launch x")
    (tmp_path / "c.yaml").write_text("a: 1")
    assert processes_of("one_process_unless_asked").keys() == {"ACCELERATE_CONFIG", "GPUs"}
    monkeypatch.setenv("NUM_PROCESSES", "2")
    assert processes_of("launch x").keys() == {"ACCELERATE_CONFIG", "NUM_PROCESSES"}


def test_the_order_of_rewards_and_of_none_is_a_setting():
    rewarded = plain_settings(["--encoder-type", "none", "--reward", "frechet", "1"])
    assert rewarded["--reward"] == "frechet 1"
    assert plain_settings(["--reward", "frechet", "1", "--encoder-type", "none"]) != rewarded


def test_a_space_that_rewarded_a_row_is_named(run, tmp_path):
    run()
    for path in (tmp_path / "f" / "rows").glob("*/figures.json"):
        content = json.loads(path.read_text()) | {"features_sha256": "judge"}
        rewards = {"rewards_sha256": ["judge"] if "reward" in str(path.parent.name) else []}
        content["rows"] = {name: row | {"generation": rewards} for name, row in content["rows"].items()}
        path.write_text(json.dumps(content))
    run()
    text = (tmp_path / "f" / "frontier.md").read_text()
    assert text.count("This space rewarded") == 1
    assert "This space rewarded base + reward: judge it" in text.split("## g")[0]
    for path in (tmp_path / "f" / "rows").glob("*reward/figures.json"):
        content = json.loads(path.read_text())
        content["over_spaces"] = {
            name: row | ({} if name == HELD_OUT else {"rewarded_in": ["f"]})
            for name, row in content["over_spaces"].items()
        }
        path.write_text(json.dumps(content))
    run()
    mean = (tmp_path / "f" / "frontier.md").read_text().split("## the mean")[1]
    assert mean.count("Spaces that rewarded it are in the mean of base + reward: f.") == 1


def test_a_reference_without_images_leaves_figures_out(run, tmp_path, capsys):
    run()
    for path in (tmp_path / "f" / "rows").glob("*/figures.json"):
        content = json.loads(path.read_text()) | {"more_spaces": [], "over_spaces": {}, "missing": "no images"}
        content["rows"] = {name: {"figures": {"FID": 2.5, "IS": 9}, "images": 8} for name in content["rows"]}
        path.write_text(json.dumps(content))
    (tmp_path / "f" / "frontier.png").unlink()
    capsys.readouterr()
    run()
    text = (tmp_path / "f" / "frontier.md").read_text()
    assert "| base | 2 | 2.50 +- 0.00 | 9.00 +- 0.00 |" in text and "Missing: no images." in text
    assert "no row has recall and precision" in capsys.readouterr().out
    assert not (tmp_path / "f" / "frontier.png").exists()
    assert json.loads((tmp_path / "f" / "frontier.json").read_text())["missing"] == "no images"


def test_a_comment_in_a_launcher_makes_nothing_stale(run, tmp_path, monkeypatch):
    copy = shutil.copytree(ROOT / "scripts", tmp_path / "root" / "scripts").parent
    monkeypatch.setattr(frontier, "ROOT", copy)
    assert kinds(run()) == [6, 8, 4]
    script = copy / "scripts" / "cold_start_digits.sh"
    script.write_text(script.read_text() + "\n# a remark\n")
    assert kinds(run()) == [0, 0, 0]
    script.write_text(script.read_text().replace("--ratio-update 5", "--ratio-update 6"))
    assert kinds(run())[0] == 2  # the cold starts; they came out the same, so that the rest is kept


def test_a_file_named_by_another_path_makes_nothing_stale(run, table, tmp_path, monkeypatch):
    evaluation = '"--space pixels classifier:$HERE/input"'
    table.write_text(TABLE.replace('"--space pixels"', evaluation))
    assert kinds(run()) == [6, 8, 4]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HERE", "here")
    assert kinds(run()) == [0, 0, 0]
    shutil.copytree("here", "there")
    monkeypatch.setenv("HERE", "there")
    assert kinds(run())[2] == 4  # other files, though their contents are the same


@pytest.mark.parametrize("content", ["{}", "[]", "\0", "[" * 100_000])
def test_a_damaged_note_makes_its_product_stale(run, tmp_path, content):
    run()
    (tmp_path / "f" / "asked" / "rows" / "teacher.json").write_text(content)
    assert kinds(run()) == [0, 0, 1]


def test_damaged_figures_and_products_of_others_are_refused(run, tmp_path, capsys):
    run()
    figures = tmp_path / "f" / "rows" / "teacher" / "figures.json"
    kept = figures.read_text()
    for content in ("{}", '{"rows": {"s": {"figures": {"FID": NaN}}}}', "[" * 100_000, kept.replace('"f"', '"h"')):
        figures.write_text(content)
        assert "/figures.json" in refused(run, capsys=capsys)
    figures.write_text(kept)
    (tmp_path / "f" / "asked" / "runs" / "seed-1" / "base.json").unlink()
    before = tree(tmp_path / "f" / "runs")
    assert "which says how it was made, is not: move it away" in refused(run, capsys=capsys)
    assert tree(tmp_path / "f" / "runs") == before


WRONG = {
    "no TOML": ("seeds = [", "a TOML file"),
    "a twice": ('name = "base + control"', 'name = "base"', "two rows are named 'base' and 'base'"),
    "a folder twice": ('name = "base + control"', 'name = "base and reward"', "they cannot be told apart"),
    "an unknown flag": ("--encoder-type none", "--encoder none", "unrecognized arguments: --encoder none"),
    "a wrong value": ("--real-guidance-scale 1.5", "--real-guidance-scale much", "--real-guidance-scale is much"),
    "the frontier's flag": ("--encoder-type none", "--seed 3", "--seed is the frontier's to set"),
    "its flag with =": ("--encoder-type none", "--teacher=x", "--teacher is the frontier's to set"),
    "other counts": ("--num-steps 2", "--num-steps 2 --num-images 9", "rows of [8, 9] images do not compare"),
    "an unknown key": ("published = true", "publish = true", "has unknown publish"),
    "a missing key": ("base_steps = 4", "", "lacks base_steps"),
    "an unknown stage": ('stage = "cold_start"', 'stage = "warm"', "stage is 'warm'"),
    "from nowhere": ('from = "base"', 'from = "bass"', "from is 'bass', which is no cold_start row"),
    "no from": ('from = "base"\n', "", "starts from a cold start: from = NAME"),
    "against nothing": ('against = "base + control"', 'against = "x"', "against is 'x', which is no row"),
    "a teacher's flag": ("--sampler euler", "--sampler rk4", "--sampler"),
    "an evaluation's flag": ("--space pixels", "--spaces pixels", "evaluate: "),
    "no steps": ("extra_steps = 2", "extra_steps = 0", "extra_steps is 0"),
    "a seed twice": ("seeds = [1, 2]", "seeds = [1, 1]", "each seed once"),
    "no seed": ("seeds = [1, 2]", "seeds = []", "a list of whole numbers"),
    "a variable": ("$HERE/input", "$NOWHERE/input", "the variable NOWHERE is not set"),
    "an input": ("$HERE/input", "$HERE/no", "does not exist"),
    "a reward's file": ("--reward-weight 0.5", "--reward python 1 no.py:f", "no.py does not exist"),
    "an odd name": ('name = "teacher"', 'name = "a, seed 3"', "a name is one line"),
    "a name of dots": ('name = "teacher"', 'name = ".."', "a name is one line"),
    "quotes": ("--encoder-type none", "--encoder-type 'none", "quoted as in a shell"),
    "rows that are none": ('\n[[row]]\nname = "teacher"', '\n[row]\nname = "teacher"', "TOML"),
    "more seeds": ('name = "base + control"', 'name = "base + control"\nseeds = [5]', "cold start has no seed [5]"),
    "help": ("--encoder-type none", "--help", "ask for help"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_table_is_refused_before_anything_is_trained(what, run, table, tmp_path, capsys):
    *change, told = WRONG[what]
    table.write_text(TABLE.replace(*change) if len(change) == 2 else change[0])
    assert table.read_text() != TABLE
    assert told in refused(run, capsys=capsys)
    assert not run.made and not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    "flag,told",
    [
        ("--train-flags=--nonsense 3", "--train-flags: "),
        ("--train-flags=--output-dir x", "--train-flags: --output-dir is the frontier's to set"),
        ("--evaluate-flags=--output x", "--evaluate-flags: --output is the frontier's to set"),
        ("--evaluate-flags=--bootstrap -1", "--evaluate-flags: "),
    ],
)
def test_flags_for_all_rows_are_checked_like_a_rows_own(run, tmp_path, capsys, flag, told):
    assert told in refused(lambda: run(flag), capsys=capsys)
    assert not run.made and not (tmp_path / "f").exists()


def test_spaces_are_checked_again_where_other_ones_are_asked_for(run):
    run()
    made = run("--evaluate-flags=--bootstrap 5")
    assert "--check" in made[0] and kinds(made) == [0, 0, 4]
    assert not any("--check" in command for command in run("--evaluate-flags=--bootstrap 5"))


def test_stale_products_of_one_name_are_all_kept(tmp_path):
    """The seeds of a row are made side by side, and have one name."""
    barrier = threading.Barrier(8)

    def put_aside(seed, k):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir(exist_ok=True)
        (folder / "a.npz").write_text(f"{seed} {k}")
        (folder / "a.json").write_text("{}")
        barrier.wait()
        keep_or_put_aside(folder / "a.json", {"x": "1"}, folder / "a.npz", tmp_path / "stale")

    for k in range(20):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put_aside, range(8), [k] * 8))
    contents = {path.read_text() for path in (tmp_path / "stale").iterdir()}
    assert contents == {f"{seed} {k}" for seed in range(8) for k in range(20)}


def test_a_teacher_that_is_not_there_is_refused(run, tmp_path, capsys):
    assert "does not exist" in refused(lambda: run(teacher=tmp_path / "no"), capsys=capsys)
    assert not run.made


def test_the_frontier_stops_at_the_first_failure(table, teacher, tmp_path, capsys, monkeypatch):
    """One launcher fails while another sleeps: the message comes at once, and nothing is left running."""
    fails = tmp_path / "fails.sh"
    fails.write_text(
        f'echo $$ >> {tmp_path}/pids\necho "the reason" >&2\n'
        'case "$*" in *"--seed 2"*) sleep 1; exit 3;; esac\nsleep 60\n'
    )
    monkeypatch.setattr(frontier, "LAUNCHERS", dict.fromkeys(("cold_start", "dmdr"), str(fails)))
    monkeypatch.setattr(frontier.Frontier, "check", lambda self: False)
    monkeypatch.setattr(frontier.Frontier, "sample", lambda self, row, seed: False)
    arguments = words("--recipe", "digits", "--output-dir", tmp_path / "f", "--teacher", teacher, "--table", table)
    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        frontier.main([*arguments, "--jobs", "3", "--rows", "base"])
    assert stopped.value.code == 2 and time.monotonic() - began < 30
    message = capsys.readouterr().err
    assert "exit code 3" in message and "the reason" in message
    for pid in (tmp_path / "pids").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    assert "--jobs is 0" in refused(frontier.main, [*arguments, "--jobs", "0"], capsys=capsys)


# Jobs

SLEEPS = """
import sys
from pathlib import Path
from evaluation.work import Job, Processes, run_all
processes = Processes()
told = Path(sys.argv[1])
sleep = lambda: processes.run(["sh", "-c", "echo $$ > pid.new; mv pid.new pid; exec sleep 60"], told / "log.txt")
run_all([Job("a", sleep)], processes, 1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=str)
def test_a_signal_leaves_nothing_running(tmp_path, number, monkeypatch):
    code = SLEEPS.replace("pid", str(tmp_path / "pid"))
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, stderr=subprocess.DEVNULL, preexec_fn=as_in_a_terminal
    )
    while not (tmp_path / "pid").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_jobs_wait_for_what_they_need():
    done = []
    jobs = [
        work.Job("c", lambda: done.append("c") or True, ["a", "b"]),
        work.Job("a", lambda: time.sleep(0.1) or done.append("a") or True),
        work.Job("b", lambda: done.append("b") or False),
    ]
    work.run_all(jobs, work.Processes(), 3)
    assert done == ["b", "a", "c"]
    with pytest.raises(InputError, match="waits for x, which nobody makes"):
        work.run_all([work.Job("d", lambda: True, ["x"])], work.Processes(), 1)


def test_the_time_left_is_that_of_what_had_to_be_made():
    assert work.remaining([], 5, 1) == "" == work.remaining([60.0], 0, 1)
    assert work.remaining([60.0, 180.0], 6, 2) == "; about 6 min left"
    assert work.remaining([3600.0], 10, 2) == "; about 5.0 h left"
    assert work.remaining([120.0], 1, 4) == "; about 2 min left"


def test_a_job_of_another_kind_says_nothing_of_the_time_left(capsys):
    jobs = [work.Job("check", lambda: True, typical=False), work.Job("a", lambda: True), work.Job("b", lambda: True)]
    work.run_all(jobs, work.Processes(), 1)
    assert ["left" in line for line in capsys.readouterr().out.splitlines()] == [False, True, False]


def test_the_tables_of_the_recipes_are_right(tmp_path, monkeypatch):
    """Every recipe's rows have flags that the stages take, and each reward its control."""
    for name in ("DIGITS", "FASHION"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("REFERENCE", "VAE", "TIMM_ENCODER"):
        monkeypatch.setenv(name, "x")
    (tmp_path / "statistics.npz").touch()
    monkeypatch.chdir(ROOT)
    for recipe, count in (("digits", 27), ("fashion", 27), ("sitxl", 13)):
        found = read_table(ROOT / "scripts" / "frontier" / f"{recipe}.toml")
        assert len(found.rows) == count
        for each in found.rows:
            if each.stage == "dmdr":
                control = "--encoder-type none" in " ".join(each.flags) and "--reward " not in " ".join(each.flags)
                control &= "--tilt" not in each.flags
                assert (each.against is None) == control, each.name
                assert each.against is None or found.row(each.against).cold_start == each.cold_start
                assert words_of(found, each)[-len(each.flags) :] == each.flags
