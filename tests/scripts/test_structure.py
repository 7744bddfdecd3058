"""The rooms, what an import costs, and what is installed."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts.jobs import tomllib
from tests.pages import COMMANDS, PACKAGES, ROOT

# Rooms of one level do not know each other.
LEVELS = {
    "train_cc.dmdr_refl": 9,
    "train_cc.cold_start": 8,
    "train_cc.planning": 7,
    "train_cc.setup": 6,
    "train_cc.pretrain": 6,
    "train_cc.distillation": 5,
    "train_cc.rewards": 4,
    "train_cc.models": 3,
    "train_cc.run": 3,
    "train_cc.objectives": 2,
    "train_cc.samplers": 2,
    "train_cc.settings": 1,
    "train_cc.images": 1,
    "train_cc.flow": 1,
    "train_cc.schedules": 1,
    "train_cc.draws": 1,
    "train_cc.io": 0,
}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def room(module: str) -> tuple[int, str]:
    for name, level in LEVELS.items():
        if module == name or module.startswith(name + "."):
            return level, name
    return 10, module.split(".")[0]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_lower_levels(path):
    level, own = room(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    for name in imports(path):
        if name.split(".")[0] in (*PACKAGES, "tests"):
            other_level, other = room(name)
            below = 7 if level == 10 else level  # evaluation and convert_weight stand on what makes networks and images
            assert other == own or other_level < below, name


@pytest.mark.parametrize("room", ["distillation", "rewards", "models", "run"])
def test_only_the_door_sees_the_command_line(room):
    """Below `setup`, the training code has no parsed arguments: what it needs are settings and numbers."""
    for path in (ROOT / "train_cc" / room).glob("*.py"):
        assert "argparse" not in path.read_text() or path.name == "spec.py", path


def test_commands_answer_before_they_import_networks():
    """Help and what is wrong with a command line: torch and its like take seconds."""
    commands = [command for command in COMMANDS if command != "evaluation.benchmark"]  # takes a minute in any case
    code = f"""
import runpy, sys
for name in {commands}:
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
    assert done.stdout.count("usage:") == len(commands)


def test_what_costs_seconds_is_not_imported_for_nothing():
    """A run imports nothing of the plan; sampling and evaluating no peft."""
    code = """
import sys, evaluation.samples.sampling, evaluation.figures.spaces
assert "peft" not in sys.modules
import train_cc.setup.stage
assert not any("train_cc.planning" in name for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# What is installed: requirements.txt and pyproject.toml -----------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def bounds(lines: list[str]) -> dict[str, str]:
    """Name -> version range."""
    return {normal(each.name): str(each.specifier) for each in map(Requirement, lines)}


def test_requirements_are_the_dependencies_and_the_extra_dev_and_all_agree():
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    ranges = bounds(PROJECT["dependencies"]) | bounds(EXTRAS["dev"])
    assert bounds([line for line in lines if line]) == ranges and all(ranges.values())
    for extra in EXTRAS.values():
        assert all(ranges.setdefault(name, bound) == bound for name, bound in bounds(extra).items())


def test_every_library_that_is_imported_is_a_dependency():
    """An import of a library that another one happens to bring would end with that one."""
    libraries = {name.split(".")[0] for path in FILES for name in imports(path)} - set(sys.stdlib_module_names)
    libraries -= {*PACKAGES, "scripts", "torchao", "triton"}  # an extra; a part of torch for CUDA
    declared, distributions = bounds(PROJECT["dependencies"]).keys(), packages_distributions()
    missing = {name for name in libraries if not declared & {normal(name), *map(normal, distributions.get(name, []))}}
    assert "torch" in libraries and not missing


def test_the_packages_have_all_their_modules():
    """A folder without __init__.py is installed only by chance."""
    assert all((path.parent / "__init__.py").exists() for path in FILES)
