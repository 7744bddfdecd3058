"""What of the documentation can be held to the code. `python -m tests.docs.test_docs` writes docs/flags.md."""

import argparse
import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from unittest.mock import patch

import pytest

from tests.pages import OF_LAUNCHERS, PAGES, REQUIRED, ROOT, Command, Parsed, blocks, commands, parsed
from train_cc import cold_start, dmdr_refl
from train_cc.io import fields

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
)

# The page of flags ------------------------------------------------------------------------------------------------


def flag_lines() -> list[str]:
    stages = cold_start.stage_parser(), dmdr_refl.stage_parser()
    lines = []
    for group in stages[0]._action_groups:
        actions = [action for action in group._group_actions if "--help" not in action.option_strings]
        if actions:
            lines += ["", f"## {group.title}", "", "| flag | cold start | DMDR | meaning |", "|---|---|---|---|"]
            lines += [line_of(action, [shown(parser, action) for parser in stages]) for action in actions]
    return lines


def lines_of_others() -> list[str]:
    lines = ["", "# Other commands"]
    for module in OTHERS:
        parser = parser_of(module)
        lines += ["", f"## `python -m {module}`", "", "| flag | default | meaning |", "|---|---|---|"]
        actions = [action for action in parser._actions if "--help" not in action.option_strings]
        lines += [line_of(action, [shown(parser, action)]) for action in actions]
    return lines


def parser_of(module: str) -> fields.Parser:
    def stop(parser, *_):
        raise Parsed(parser)

    main = importlib.import_module(module).main
    with patch.object(fields.Parser, "parse_known_args", stop), pytest.raises(Parsed) as found:
        main([])
    return found.value.args[0]


def line_of(action: argparse.Action, defaults: list[str]) -> str:
    choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
    meaning = (action.help or "").replace("|", "\\|").replace("%%", "%") + choices
    names = action.option_strings or [(action.metavar or action.dest).upper()]
    name = "`, `".join(names[-2:] if action.dest == "compile" else names[-1:])
    return f"| `{name}` | {' | '.join(defaults)} | {meaning.strip()} |"


def shown(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    value = parser.get_default(action.dest)
    if action.required:
        return "required"
    if value is None or value is False or value == argparse.SUPPRESS:
        return "off" if value is False else "-"
    told = " ".join(map(str, value)) if isinstance(value, list) else str(value).replace(f"{ROOT}/", "")
    return f"`{told}`" if told else "-"


def page_of_flags() -> str:
    return HEAD + "\n".join(flag_lines() + lines_of_others()) + "\n"


def test_the_page_of_flags_is_that_of_the_parsers():
    assert FLAGS.read_text() == page_of_flags(), "run python -m tests.docs.test_docs"


# Links, sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page}: {target}"


def prose(page: str) -> str:
    """A page without code, tables, pictures and comments."""
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith(("|", "!["))) + "\n"


def sentences(page: str) -> list[list[str]]:
    """The words of each sentence; a heading, an item of a list and a paragraph end one."""
    parts = re.split(r"\n\s*\n|\n(?=[-*#]|\d+\. )|:\n|(?<=[.!?:;])\s+(?=[A-Z`*\[])", prose(page))
    return [part.split() for part in parts if part.strip()]


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 220 and len(text.split()) <= 2000
    longest = max(sentences("README.md"), key=len)
    assert 5 < len(longest) <= 40, " ".join(longest)


def test_every_page_is_reached_from_the_readme():
    text = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"]({page})" in text, page


# Commands and code ------------------------------------------------------------------------------------------------

ALL = [command for page in PAGES for command in commands(page)]
OUTSIDE = ("git", "cd", "source", "python3", "pip", "uv", "conda", "tensorboard", "ruff", "cp", "hf")


def check(command: Command) -> None:
    """The script or module is there and its parser takes the flags."""
    words = command.words
    if words[0] in OUTSIDE:
        assert words[0] != "python3" or words[1:3] == ["-m", "venv"], command.text
        return
    if words[0] == "sbatch":
        at = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
        assert (ROOT / words[at]).is_file(), words[at]
        words = ["bash", *words[at + 1 :]]
    if words[0] == "bash":
        check_launcher(words[1], words[2:], command.variables)
    elif words[:2] == ["accelerate", "launch"] or words[0] == "torchrun":
        check_module(words[words.index("-m") + 1], words[words.index("-m") + 2 :])
    elif words[:2] == ["python", "-m"]:
        check_module(words[2], words[3:])
    else:
        assert words[0] == "python" and (ROOT / words[1]).is_file(), command.text
        check_module(words[1].removesuffix(".py").replace("/", "."), words[2:])


def check_module(module: str, words: list[str]) -> None:
    if module in ("pytest", "pip", "tests.docs.test_docs", "tests.kills", "tests.mutation.run"):
        return
    parsed(module, words)


def check_launcher(script: str, words: list[str], variables: dict[str, str]) -> None:
    text = (ROOT / script).read_text()
    sourced = "".join(path.read_text() for path in (ROOT / "scripts").rglob("*") if path.suffix in (".sh", ".py"))
    for name in variables:
        assert name.startswith(("OMP_", "CUDA_", "HF_")) or name in sourced, f"{script} reads no {name}"
    for pattern, module in OF_LAUNCHERS.items():
        if re.fullmatch(pattern, script):
            if module == "pytest":
                assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
                return
            positional = 2 if module == "evaluation.generate" else 0
            assert not any(word.startswith("-") for word in words[:positional]) and len(words) >= positional
            parsed(module, [*REQUIRED[module], *words[positional:]])
            return
    assert not words or "$@" in text, f"{script} takes no flags"


@pytest.mark.parametrize("command", ALL, ids=lambda command: f"{command.page}: {command.text[:60]}")
def test_every_command_parses(command, capsys):
    try:
        check(command)
    except SystemExit as end:
        if end.code:  # --help ends with 0
            pytest.fail(capsys.readouterr().err)


def test_commands_are_found_and_a_wrong_one_is_seen(tmp_path):
    assert len(ALL) > 50
    assert {"README.md", "docs/quickstart.md", "docs/rewards.md"} <= {command.page for command in ALL}
    for text in ("bash scripts/nothing.sh", "python -m evaluation.generate --no-such x", "python nothing.py"):
        with pytest.raises((SystemExit, AssertionError, OSError)):
            check(Command("page", text, {}, text.split()))
    wrong = Command("page", "", {"NO_SUCH": "1"}, ["bash", "scripts/cold_start_digits.sh"])
    with pytest.raises(AssertionError, match="NO_SUCH"):
        check(wrong)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_import_what_is_there(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
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
# Numbers of the digits recipe -> of its miniature, in scripts and commands alike.
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
    """The tracked files with launchers of a few updates, and the quickstart run there."""
    folder = tmp_path_factory.mktemp("clone") / "dmdr"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for script in (folder / "scripts").glob("*.sh"):
        script.write_text(smaller(script.read_text()))
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
@pytest.mark.parametrize("page", [page for page in HERE if (ROOT / page).exists()])
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
