"""evaluation/frontier.py and evaluation/study: the rows' file, what is kept and what is made again, what stops it."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from evaluation import frontier
from evaluation.figures.tables import HELD_OUT
from evaluation.study.rows import read_table
from scripts import jobs
from tests import ROOT
from tests.conftest import refused, tree, words
from train_cc.io.products import record, write_record

TABLE = """
seeds = [1, 2]
base_steps = 4
extra_steps = 2
reference = "$HERE/reference.npz"
train = "--batch-size 4"
generate = "--num-images 8"
evaluate = "--space pixels"
published = ["base"]

[teachers]
"teacher" = "--sampler euler --num-steps 2"

[cold_starts]
"base" = "--real-guidance-scale 1.5"

[additions]
"control" = "--encoder-type none"
"reward" = "--reward-weight 0.5"

[rows]
"base" = ["control", "reward"]
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The file of rows, in a folder of its own."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.setenv("HERE", str(folder))
    np.savez(folder / "reference.npz", arr_0=np.zeros((8, 4, 4, 1), np.uint8))
    (folder / "reward").mkdir()
    (folder / "reward" / "config.json").write_text("a")
    monkeypatch.setenv("REWARD_CLASSIFIER", str(folder / "reward"))
    (folder / "table.toml").write_text(TABLE)
    return folder / "table.toml"


def write(command, log, variables) -> None:
    """Write what a real command would have written."""
    output = Path(command[command.index("--output") + 1]) if "--output" in command else None
    if command[0] == "bash":
        folder = Path(variables["OUTPUT_DIR"]) / "generator"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps([command, sorted(map(str, variables.items()))]))
    elif "evaluation.generate" in command:
        output.parent.mkdir(parents=True, exist_ok=True)
        generator = Path(command[command.index("--generator") + 1]) / "config.json"
        output.write_text(str(command) + generator.read_text())
    elif "--check" not in command:
        output.parent.mkdir(parents=True, exist_ok=True)
        names = command[command.index("--names") + 1 : command.index("--output")]
        value = 0.1 * len(command[0]) + 0.01 * len(str(log))
        each = {
            name: {"figures": {"FID": value, "Recall": 0.5, "Precision": value / 10}, "images": 8} for name in names
        }
        content = {"rows": each, "features": "f", "more_spaces": [{"features": "g", "rows": each}], "set_size": 8}
        means = {name: {"figures": {"FDr": value, "SWr": value}, "images": 8} for name in [*names, HELD_OUT]}
        output.write_text(json.dumps(content | {"over_spaces": means}))


@pytest.fixture
def run(table, teacher, tmp_path, monkeypatch):
    """A frontier whose commands are `write`: a function of flags that returns the commands, also in `run.made`."""
    commands = []

    def start(job, environment, beside):
        commands.append(job.command.words)
        write(job.command.words, job.log, job.command.variables)
        job.command, job.process = None, SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr(jobs, "start", start)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    base = {"--recipe": "digits", "--output-dir": tmp_path / "f", "--teacher": teacher, "--table": table}

    def run_frontier(*more, **changed):
        commands.clear()
        pairs = base | {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
        frontier.main(words(*(word for pair in pairs.items() for word in pair), *more))
        return commands

    run_frontier.commands = commands
    return run_frontier


def kinds(commands) -> list[int]:
    """How many trainings, samplings, evaluations were started."""
    trained = sum(command[0] == "bash" for command in commands)
    sampled = sum("evaluation.generate" in command for command in commands)
    return [trained, sampled, sum("--names" in command for command in commands)]


def test_every_row_is_made_once_and_kept(run, tmp_path, capsys):
    commands = list(run())
    assert kinds(commands) == [6, 8, 4]
    assert "--check" in commands[0] and commands[0][0] != "bash"  # before anything is trained
    capsys.readouterr()
    assert kinds(run()) == [0, 0, 0]
    printed = capsys.readouterr().out
    assert "[12/12]" in printed and "base + control, seed 2: kept" in printed
    text = (tmp_path / "f" / "frontier.md").read_text()
    assert "| held-out real | 1 |" in text.split("## the mean over 2 spaces")[1]
    assert "| base + reward | 2 |" in text and "## g" in text and "| base + reward | base + control |" in text
    record = json.loads((tmp_path / "f" / "frontier.json").read_text())
    assert list(record["more_spaces"][-1]["rows"])[-1] == HELD_OUT
    assert record["rows"]["base"]["seeds"] == 2 and "standard_deviations" in record["rows"]["base"]
    assert (tmp_path / "f" / "frontier.png").exists()


def test_a_dmdr_row_has_its_cold_starts_flags_state_and_seed(run, teacher, tmp_path):
    commands = [command for command in run() if command[0] == "bash"]
    (resumed,) = [c for c in commands if "dmdr" in c[1] and "--reward-weight" in c and c[-1] == "2"]
    assert resumed[1] == "scripts/dmdr_digits_refl.sh"
    words = resumed[2:]
    assert words[:6] == ["--batch-size", "4", "--real-guidance-scale", "1.5", "--reward-weight", "0.5"]
    assert words[words.index("--max-train-steps") + 1] == "6" and words[words.index("--seed") + 1] == "2"
    config = (tmp_path / "f" / "runs" / "seed-2" / "base_and_reward" / "generator" / "config.json").read_text()
    assert f"{tmp_path}/f/runs/seed-2/base/checkpoints/torch_units/step-4.pt" in config and str(teacher) in config
    assert all(c[c.index("--max-train-steps") + 1] == "4" for c in commands if "cold" in c[1]) and len(commands) == 6


def test_a_choice_of_rows_and_seeds(run, capsys):
    assert kinds(run("--rows", "base + control", "--seeds", "7")) == [2, 2, 2]
    assert "--rows 'control' is not in the table" in refused(lambda: run("--rows", "control"), capsys=capsys)


def test_what_is_stale_is_made_again_and_moved(run, table, teacher, tmp_path, capsys):
    run()
    other = shutil.copytree(teacher, tmp_path / "other_teacher")
    state = load_file(other / "diffusion_pytorch_model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, other / "diffusion_pytorch_model.safetensors")

    def changed(before: str, after: str):
        return lambda: table.write_text(TABLE.replace(before, after))

    for change, expected, message in (
        (changed("--reward-weight 0.5", "--reward-weight 0.6"), [2, 2, 1], "--reward-weight 0.5 (asked for: 0.6)"),
        # The reward's weight goes back, too
        (changed("euler --num-steps 2", "euler --num-steps 3"), [2, 4, 2], "--num-steps 2 (asked for: 3)"),
        (changed("--space pixels", "--space pixels --bootstrap 5"), [0, 2, 4], "--bootstrap 0 (asked for: 5)"),
        # These come out alike
        (lambda: (table.parent / "reward" / "config.json").write_text("b"), [4, 0, 0], "/here/reward;"),
        (
            lambda: np.savez(table.parent / "reference.npz", arr_0=np.ones((8, 4, 4, 1), "u1")),
            [0, 0, 4],
            "another reference",
        ),
    ):
        change()
        commands = list(run())
        assert kinds(commands) == expected, message
        assert any("--check" in command for command in commands) == (expected[2] == 4)  # other spaces or reference
        printed = capsys.readouterr().out
        assert "stale: " in printed and message in printed
    assert run() == [] and kinds(run(teacher=other)) == [6, 8, 4]
    stale = tmp_path / "f" / "stale"
    assert {"base-1", "base-2", "base_and_reward-1", "teacher-1"} <= {path.name for path in stale.iterdir()}
    generators = [path / "generator" / "config.json" for path in stale.glob("base_and_reward*")]  # also of two seeds
    assert len({path.read_text() for path in generators if path.exists()}) >= 4


def test_the_launchers_processes_and_flags_decide_and_not_its_text(run, tmp_path, monkeypatch):
    copy = shutil.copytree(ROOT / "scripts", tmp_path / "root" / "scripts").parent
    monkeypatch.setattr("evaluation.study.jobs.ROOT", copy)
    assert kinds(run()) == [6, 8, 4]
    script = copy / "scripts" / "cold_start_digits.sh"
    script.write_text(script.read_text().replace("#!/usr/bin/env bash", "#!/usr/bin/env bash\n# a remark"))
    monkeypatch.setenv("NUM_PROCESSES", "1")
    assert kinds(run()) == [0, 0, 0]
    script.write_text(script.read_text().replace("--ratio-update 5", "--ratio-update 6"))
    assert kinds(run())[0] == 2  # the cold starts; they came out the same, so that the rest is kept
    monkeypatch.setenv("NUM_PROCESSES", "2")
    assert kinds(run())[0] == 6


def test_the_order_of_rewards_and_of_none_is_a_setting(run, table):
    """`--encoder-type none` drops the rewards before it."""
    reward, none = "--reward frechet 1 $HERE/reference.npz", "--encoder-type none"
    table.write_text(TABLE.replace("--reward-weight 0.5", f"{none} {reward}"))
    assert kinds(run())[0] == 6
    table.write_text(TABLE.replace("--reward-weight 0.5", f"{reward} {none}"))
    assert kinds(run())[0] == 2


def changed_figures(folder, change) -> None:
    """``change``: the name of a row's folder and its figures -> other figures."""
    for path in (folder / "rows").glob("*/figures.json"):
        path.write_text(json.dumps(change(path.parent.name, json.loads(path.read_text()))))


def test_a_space_that_rewarded_a_row_is_named(run, tmp_path):
    run()

    def change(name, content):
        rewards = {"rewards_sha256": ["judge"] if "reward" in name else []}
        content["rows"] = {each: row | {"generation": rewards} for each, row in content["rows"].items()}
        for each, row in content["over_spaces"].items():
            row |= {"rewarded_in": ["f"]} if "reward" in name and each != HELD_OUT else {}
        return content | {"features_sha256": "judge"}

    changed_figures(tmp_path / "f", change)
    run()
    text = (tmp_path / "f" / "frontier.md").read_text()
    assert "This space rewarded base + reward: judge it" in text.split("## g")[0]
    mean = text.split("## the mean")[1]
    assert text.count("This space rewarded") == 1
    assert mean.count("Spaces that rewarded it are in the mean of base + reward: f.") == 1


def test_a_reference_without_images_leaves_figures_out(run, tmp_path, capsys):
    run()

    def change(name, content):
        rows = {each: {"figures": {"FID": 2.5, "IS": 9}, "images": 8} for each in content["rows"]}
        return content | {"more_spaces": [], "over_spaces": {}, "missing": "no images", "rows": rows}

    changed_figures(tmp_path / "f", change)
    (tmp_path / "f" / "frontier.png").unlink()
    run()
    text = (tmp_path / "f" / "frontier.md").read_text()
    assert "| base | 2 | 2.50 +- 0.00 | 9.00 +- 0.00 |" in text and "Missing: no images." in text
    assert "no row has recall and precision" in capsys.readouterr().out
    assert not (tmp_path / "f" / "frontier.png").exists()
    assert json.loads((tmp_path / "f" / "frontier.json").read_text())["missing"] == "no images"


def test_a_file_counts_by_its_content_and_whole_path(run, table, tmp_path, monkeypatch):
    (tmp_path / "here" / "vae").mkdir()
    (tmp_path / "here" / "vae" / "config.json").write_text("1")
    spaces = TABLE.replace("--space pixels", "--space pixels classifier:$HERE/reward")
    table.write_text(spaces.replace("--num-images 8", "--num-images 8 --vae $HERE/vae"))
    assert kinds(run()) == [6, 8, 4]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HERE", "here")
    assert kinds(run()) == [0, 0, 0]
    (tmp_path / "here" / "vae" / "config.json").write_text("2")
    assert kinds(run())[:2] == [0, 8]
    shutil.copytree("here", "there")
    monkeypatch.setenv("HERE", "there")
    assert kinds(run())[2] == 4  # other files, though their contents are the same


@pytest.mark.parametrize("content", ["[]", "\0"])
def test_a_damaged_note_makes_its_product_stale(run, tmp_path, content):
    run()
    (tmp_path / "f" / "settings" / "rows" / "teacher" / "args.json").write_text(content)
    assert kinds(run()) == [0, 0, 1]


def test_damaged_figures_and_products_of_others_are_refused(run, tmp_path, capsys):
    run()
    figures = tmp_path / "f" / "rows" / "teacher" / "figures.json"
    kept = figures.read_text()
    for content in ("{}", '{"rows": {"s": {"figures": {"FID": NaN}}}}', "[" * 100_000, kept.replace('"f"', '"h"')):
        figures.write_text(content)
        assert "/figures.json" in refused(run, capsys=capsys)
    figures.write_text(kept)
    shutil.rmtree(tmp_path / "f" / "settings" / "runs" / "seed-1" / "base")
    before = tree(tmp_path / "f" / "runs")
    assert "which says how it was made, is not: move it away" in refused(run, capsys=capsys)
    assert tree(tmp_path / "f" / "runs") == before


WRONG = {
    "no TOML": ("seeds = [", "a TOML file"),
    "a folder twice": (
        '"teacher" =',
        '"base and control" = ""\n"teacher" =',
        "could not be told from those of 'base + con",
    ),
    "an unknown flag": ("--encoder-type none", "--encoder none", "unrecognized arguments: --encoder none"),
    "the frontier's flag": ("--encoder-type none", "--seed 3", "--seed is the frontier's to set"),
    "other counts": ("--num-steps 2", "--num-steps 2 --num-images 9", "rows of [8, 9] images do not compare"),
    "an unknown key": ("published =", "publish =", "it has unknown"),
    "a missing key": ("base_steps = 4", "", "it lacks ['base_steps']"),
    "an addition to nothing": ('"base" = ["control"', '"bass" = ["control"', "'bass' has no flags; there are base"),
    "an unknown addition": ('"reward"]', '"regard"]', "'regard' has no flags; there are base, control, reward"),
    "a teacher's flag": ("--sampler euler", "--sampler rk4", "--sampler"),
    "an evaluation's flag": ("--space pixels", "--spaces pixels", "evaluate: "),
    "no steps": ("extra_steps = 2", "extra_steps = 0", "extra_steps is 0; allowed"),
    "a seed below 0": ("seeds = [1, 2]", "seeds = [-1]", "seeds is -1; allowed"),
    "no seed": ("seeds = [1, 2]", "seeds = []", "a list of whole numbers"),
    "flags that are none": ('"--encoder-type none"', "3", "flags are one string"),
    "a variable": ("$HERE/reference", "$NOWHERE/reference", "the variable NOWHERE is not set"),
    "a reward's file": ("--reward-weight 0.5", "--reward python 1 no.py:f", "no.py does not exist"),
    "an odd name": ('"teacher" =', '"a, seed 3" =', "a name is one line"),
    "quotes": ("--encoder-type none", "--encoder-type 'none", "quoted as in a shell"),
    "published by name": ('["base"]', '"base"', "published is 'base'; allowed: a list"),
    "help": ("--encoder-type none", "--help", "ask for help"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_table_is_refused_before_anything_is_trained(what, run, table, tmp_path, capsys):
    *change, message = WRONG[what]
    table.write_text(TABLE.replace(*change) if len(change) == 2 else change[0])
    assert table.read_text() != TABLE
    assert message in refused(run, capsys=capsys)
    assert not run.commands and not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    "flag,message",
    [
        ("--train-flags=--nonsense 3", "--train-flags: "),
        ("--train-flags=--output-dir x", "--train-flags: --output-dir is the frontier's to set"),
        ("--evaluate-flags=--output x", "--evaluate-flags: --output is the frontier's to set"),
        ("--evaluate-flags=--bootstrap -1", "--evaluate-flags: "),
        ("--evaluate-flags='", "quoted as in a shell"),
        ("--seeds=-1", "--seeds is -1"),
        ("--jobs=0", "--jobs is 0"),
        ("--teacher=no", "no does not exist"),
        ("--output-dir=here/reward", "no command of this project wrote it"),
        ("--output-dir=run", "holds a cold_start, not a frontier"),
        ("--output-dir=here/table.toml", "is a file"),
    ],
)
def test_flags_are_refused_before_anything_is_trained(run, tmp_path, capsys, monkeypatch, flag, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    write_record(tmp_path / "run", record("cold_start", {}))
    before = tree(tmp_path)
    assert message in refused(lambda: run(flag), capsys=capsys)
    assert not run.commands and tree(tmp_path) == before


def test_the_tables_of_the_recipes_are_right(tmp_path, monkeypatch):
    """Every recipe's rows have flags that the stages take, and each reward its control."""
    for name in ("DIGITS", "FASHION"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("REFERENCE", "VAE", "TIMM_ENCODER"):
        monkeypatch.setenv(name, "x")
    (tmp_path / "statistics.npz").touch()
    monkeypatch.chdir(ROOT)
    for recipe in ("digits", "fashion", "sitxl"):
        table = read_table(ROOT / "scripts" / "frontier" / f"{recipe}.toml")
        assert {row.stage for row in table.rows} == {"teacher", "cold_start", "dmdr"}
        ours = ("guidance 1.5 on t <= 0.7", "early guidance", "early guidance + control")
        assert all(table.row(name).published for name in ("guidance off", "guidance 1.5 + control", "guidance 4"))
        assert not any(table.row(name).published for name in ours)
        for each in table.rows:
            if each.stage == "dmdr":
                control = each.name == f"{each.cold_start} + control"
                before = table.row(each.cold_start).flags
                assert (each.against is None) == control and each.flags[: len(before)] == before, each.name
                assert each.against is None or table.row(each.against).cold_start == each.cold_start
