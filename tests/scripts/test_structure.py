"""The rooms: a module imports only from lower levels, and rooms of one level do not know each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

LEVELS = [
    (9, "train_cc.dmdr_refl"),
    (8, "train_cc.cold_start"),
    (7, "train_cc.planning"),
    (6, "train_cc.setup"),
    (6, "train_cc.pretrain"),
    (5, "train_cc.distillation"),
    (4, "train_cc.rewards"),
    (3, "train_cc.models"),
    (3, "train_cc.run"),
    (2, "train_cc.objectives"),
    (2, "train_cc.samplers"),
    (1, "train_cc.settings"),
    (1, "train_cc.images"),
    (1, "train_cc.flow"),
    (1, "train_cc.schedules"),
    (1, "train_cc.draws"),
    (0, "train_cc.io"),
]
FILES = sorted(
    path for folder in ("train_cc", "evaluation", "convert_weight") for path in (ROOT / folder).rglob("*.py")
)


def room(module: str) -> tuple[float, str]:
    for level, name in LEVELS:
        if module == name or module.startswith(name + "."):
            return level, name
    return (10, module.split(".")[0])


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("train_cc", "evaluation", "convert_weight", "tests")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_levels(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if module == "train_cc":
        return
    level, own = room(module)
    for name in imported(path):
        other_level, other = room(name)
        if own in ("evaluation", "convert_weight"):
            assert other == own or other_level <= 6, f"{module} imports {name}"  # neither folder imports the other
        else:
            assert other == own or other_level < level, f"{module} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_door_sees_the_command_line(path):
    """Below `setup`, the training code has no parsed arguments: what it needs are settings and numbers."""
    module = path.relative_to(ROOT).parts
    if module[0] == "train_cc" and module[1] in ("distillation", "rewards", "models", "run") and module[2] != "spec.py":
        assert "argparse" not in path.read_text(), f"{path} takes the command line's arguments"


COMMANDS = [
    "train_cc.cold_start",
    "train_cc.dmdr_refl",
    "train_cc.pretrain.data",
    "train_cc.pretrain.teacher",
    "train_cc.pretrain.classifier",
    "convert_weight.sit_convert",
    "convert_weight.export_generator",
    "evaluation.generate",
    "evaluation.evaluate",
    "evaluation.statistics",
    "evaluation.frontier",
    "evaluation.sample",
    "evaluation.report",
]


def test_commands_answer_before_they_import_networks():
    """Help and what is wrong with a command line: torch and its like take seconds."""
    code = f"""
import runpy, sys
for name in {COMMANDS}:
    for flag, expected in (("--help", 0), ("--no-such-flag", 2)):
        sys.argv = [name, flag]
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert end.code == expected, (name, flag, end.code)
        heavy = {{"torch", "timm", "accelerate", "matplotlib"}} & sys.modules.keys()
        assert not heavy, (name, flag, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("usage:") == len(COMMANDS)


def test_a_run_imports_nothing_of_the_plan():
    code = "import train_cc.setup.stage, sys; assert not any('train_cc.planning' in name for name in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_who_samples_or_evaluates_imports_no_peft():
    """With what it brings it takes a second of every command."""
    code = "import evaluation.samples.sampling, evaluation.figures.spaces, sys; assert 'peft' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
