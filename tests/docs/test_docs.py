"""What of the documentation can be held to the code. `python -m tests.docs.test_docs` writes docs/flags.md."""

import argparse
import ast
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.pages import COMMANDS, PACKAGES, PAGES, ROOT, Command, blocks, commands, parser_of, quoted_commands
from train_cc import cold_start, dmdr_refl

FLAGS = ROOT / "docs" / "flags.md"
HEAD = """# Every flag of a stage and of the other commands

Written from the parsers by `python -m tests.docs.test_docs`, and held to them by a test. Ranges are checked before
anything is loaded; `--help` of a command says the same.

# Both stages

`python -m train_cc.cold_start` and `python -m train_cc.dmdr_refl`. The defaults are the paper's SiT-XL/2 recipes; the
launchers in `scripts/` list what a recipe sets.
"""
OTHERS = (
    "evaluation.sample",
    "evaluation.generate",
    "evaluation.evaluate",
    "evaluation.statistics",
    "evaluation.frontier",
    "evaluation.report",
    "convert_weight.sit_convert",
    "convert_weight.export_generator",
    "train_cc.pretrain.data",
    "train_cc.pretrain.vae",
    "train_cc.pretrain.teacher",
    "train_cc.pretrain.classifier",
    "evaluation.checkpoints",
)

# The page of flags ------------------------------------------------------------------------------------------------


def page_of_flags() -> str:
    stages, lines = (cold_start.stage_parser(), dmdr_refl.stage_parser()), []
    for group in stages[0]._action_groups:
        if actions := without_help(group._group_actions):
            lines += ["", f"## {group.title}", "", "| flag | cold start | DMDR | meaning |", "|---|---|---|---|"]
            lines += [line_of(action, *(default_of(parser, action) for parser in stages)) for action in actions]
    lines += ["", "# Other commands"]
    for module in OTHERS:
        parser = parser_of(module)
        lines += ["", f"## `python -m {module}`", "", "| flag | default | meaning |", "|---|---|---|"]
        lines += [line_of(action, default_of(parser, action)) for action in without_help(parser._actions)]
    return HEAD + "\n".join(lines) + "\n"


def without_help(actions: list[argparse.Action]) -> list[argparse.Action]:
    return [action for action in actions if "--help" not in action.option_strings]


def line_of(action: argparse.Action, *defaults: str) -> str:
    choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
    meaning = (action.help or "").replace("|", "\\|").replace("%%", "%") + choices
    names = action.option_strings or [(action.metavar or action.dest).upper()]
    name = "`, `".join(names[-2:] if action.dest == "compile" else names[-1:])
    return f"| `{name}` | {' | '.join(defaults)} | {meaning.strip()} |"


def default_of(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    value = parser.get_default(action.dest)
    if action.required:
        return "required"
    if value is None or value is False or value == argparse.SUPPRESS:
        return "off" if value is False else "-"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value).replace(f"{ROOT}/", "")
    return f"`{text}`" if text else "-"


def test_the_page_of_flags_is_that_of_the_parsers():
    assert FLAGS.read_text() == page_of_flags(), "run python -m tests.docs.test_docs"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_help_and_shows_its_default(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    parser = parser_of(command)
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help and len(action.help) > 4, f"{command}: {action.dest} has no help"
        value = action.default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if action.option_strings and (number or isinstance(value, str)) and value != argparse.SUPPRESS:
            assert f"default: {value}" in text, f"{command}: the default of {action.dest}, {value}, is not shown"
    assert "default: None" not in text and "default: []" not in text


# Links, commands and code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_the_readme_leads_to_every_page(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert "://" in target or ((ROOT / page).parent / target).exists(), target
    assert page == "README.md" or f"]({page})" in (ROOT / "README.md").read_text()


SOURCES = [str(path.relative_to(ROOT)) for folder in (*PACKAGES, "scripts") for path in (ROOT / folder).rglob("*.py")]
LOG = "docs/results.md"  # its sentences have the commands of their time
ALL = [command for page in [*PAGES, *sorted(SOURCES)] for command in commands(page)]
ALL += [command for page in [*PAGES, *sorted(SOURCES)] if page != LOG for command in quoted_commands(page)]
OUTSIDE = ("git", "cd", "source", "pip", "uv", "conda", "tensorboard", "ruff", "cp", "hf")
# Launcher -> the command that reads the flags after it, what it needs, the folders before its flags.
OF_LAUNCHERS = {
    r"scripts/cold_start_\w+\.sh": ("train_cc.cold_start", ["--teacher", "t", "--output-dir", "o"], 0),
    r"scripts/dmdr_\w+\.sh": ("train_cc.dmdr_refl", ["--teacher", "t", "--output-dir", "o"], 0),
    r"scripts/evaluate_\w+\.sh": ("evaluation.generate", ["--generator", "g", "--output", "s.npz"], 2),
    r"scripts/frontier_\w+\.sh": (
        "evaluation.frontier",
        ["--recipe", "digits", "--output-dir", "o", "--teacher", "t"],
        0,
    ),
}


@pytest.mark.parametrize("command", ALL, ids=lambda command: f"{command.page}: {command.text[:60]}")
def test_every_command_parses(command, capsys):
    try:
        check(command)
    except SystemExit as end:
        if end.code:  # --help ends with 0
            pytest.fail(capsys.readouterr().err)


def check(command: Command) -> None:
    """The script or module is there and its parser takes the flags. FLAGS, N and [...] are a person's to fill in."""
    words = [word for word in command.words if word not in ("...", "FLAGS")]
    words = ["3" if word == "N" else word for word in words if word[0] != "[" and word[-1] != "]"]
    if words[0] in OUTSIDE or words[:3] == ["python3", "-m", "venv"]:
        return
    if len(words) == 1 or words == ["accelerate", "launch"]:  # a command's name in a sentence
        assert command.quoted
        return
    if words[0] == "sbatch":
        at = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
        assert (ROOT / words[at]).is_file()
        words = ["bash", *words[at + 1 :]]
    if words[0] == "bash":
        check_script(words[1], words[2:], command)
    elif "-m" in words:
        at = words.index("-m")
        check_module(words[at + 1], words[at + 2 :], command)
    else:
        assert words[0] == "python" and (ROOT / words[1]).is_file()
        check_module(words[1].removesuffix(".py").replace("/", "."), words[2:], command)


def check_module(module: str, words: list[str], command: Command) -> None:
    if module not in COMMANDS:
        assert importlib.util.find_spec(module)
    elif words or not command.quoted:
        parser_of(module, words)


def check_script(script: str, words: list[str], command: Command) -> None:
    if command.quoted and ("*" in script or shutil.which(script)):
        return
    text = (ROOT / script).read_text()
    sources = text + "".join((ROOT / "scripts" / name).read_text() for name in ("env.sh", "launch.py"))
    for name in command.variables:
        assert name.startswith(("OMP_", "CUDA_", "HF_")) or re.search(rf"\b{name}\b", sources), f"{script}: {name}"
    for pattern, (module, needed, folders) in OF_LAUNCHERS.items():
        if re.fullmatch(pattern, script) and (words or not command.quoted):
            assert len(words) >= folders and not any(word.startswith("-") for word in words[:folders])
            parser_of(module, [*needed, *words[folders:]])
            return
    assert not words or "$@" in text, f"{script} takes no flags"
    assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_import_what_is_there(page):
    for node in (node for block in blocks(page, "python") for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


# In miniature -----------------------------------------------------------------------------------------------------

# What makes a command another machine's, or another test's.
NOT_HERE = re.compile(
    r"sitxl|sit_convert|sbatch|fashion|ACCELERATE_CONFIG|NUM_PROCESSES|NUM_NODES|venv|pip |uv |conda |git |\bcd\b|ruff|"
    r"test\.sh|tests\.|tensorboard --|rewards_digits|frontier_digits|benchmark|SEED=31|you/|hf auth|RUN/|dry-run|"
    r"sit_weights|\bmine\b"
)
# Numbers of the digits recipe -> of its miniature, in scripts, jobs and commands alike.
SMALLER = (
    (r"--max-train-steps (2000|800)\b", "--max-train-steps 8"),
    (r"--max-train-steps 400\b", "--max-train-steps 4"),
    (r"--max-train-steps 500\b", "--max-train-steps 6"),
    (r"step-400\b", "step-4"),
    (r"step-500\b", "step-6"),
    (r"--(checkpoint|sample)-steps \d+", r"--\1-steps 2"),
    (r"--dynamic-steps 200\b", "--dynamic-steps 2"),
    (r"--num-images 1800\b", "--num-images 40"),
    (r"--teacher-preview-steps \d+", "--teacher-preview-steps 2"),
)


def smaller(text: str) -> str:
    for pattern, small in SMALLER:
        text = re.sub(pattern, small, text)
    return text


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The tracked files with recipes of a few updates, and the quickstart run there."""
    folder = tmp_path_factory.mktemp("clone") / "dmdr"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for recipe in (*(folder / "scripts").glob("*.sh"), folder / "scripts" / "recipes" / "digits.toml"):
        recipe.write_text(smaller(recipe.read_text()))
    run_in(folder, "bash scripts/quickstart.sh")
    return folder


def run_in(folder, line: str) -> None:
    active = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}  # as the pages assume
    environment = os.environ | active | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "-c", smaller(line)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


HERE = ["README.md", "docs/quickstart.md", "docs/use_a_generator.md", "docs/rewards.md", "docs/evaluation.md"]
HERE += ["docs/logs_and_report.md", "docs/troubleshooting.md"]


@pytest.mark.slow
@pytest.mark.parametrize("page", HERE)
def test_commands_of_a_page_run_as_pasted_in_miniature(page, miniature):
    """Each page after the quickstart, in order. What needs a GPU, a network or hours is left to the parsers above."""
    lines = [command.text for command in commands(page) if not NOT_HERE.search(command.text)]
    assert lines
    for line in lines:
        run_in(miniature, line)
    for block in blocks(page, "python"):
        if "runs/" in block and not re.search("sitxl|TEACHER|you/", block):
            (miniature / "pasted.py").write_text(block)
            run_in(miniature, "python pasted.py")


if __name__ == "__main__":
    FLAGS.write_text(page_of_flags())
