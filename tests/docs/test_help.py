"""What a person reads of the commands: help of every flag, and examples that are commands."""

import argparse
import contextlib
import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests import ROOT
from train_cc.io import fields

FOLDERS = ("train_cc", "evaluation", "convert_weight")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")


COMMANDS = sorted(
    module_of(path)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if '\nif __name__ == "__main__":\n    main()' in path.read_text() or path.name == "__main__.py"
)


class Asked(Exception):
    pass


def parsers(command: str, words: list[str], monkeypatch, parse: bool) -> list[argparse.ArgumentParser]:
    """The parsers that ``command`` hands ``words`` to; each parses them, if asked. Nothing else of it runs."""
    found, whole, known = [], fields.Parser.parse_args, fields.Parser.parse_known_args

    def recorded(self, args=None, namespace=None):
        found.append(self)
        if parse:
            whole(self, args, namespace)
        raise Asked

    def recorded_in_part(self, args=None, namespace=None):  # the rest is a stage's
        if namespace is not None or found:  # argparse's own call
            return known(self, args, namespace)
        found.append(self)
        own, rest = known(self, args, namespace)
        if rest and parse:
            return own, rest
        raise Asked

    with monkeypatch.context() as patched, contextlib.suppress(Asked):
        patched.setattr(fields.Parser, "parse_args", recorded)
        if command == "evaluation.benchmark":
            patched.setattr(fields.Parser, "parse_known_args", recorded_in_part)
        importlib.import_module(command).main(words)
    return found


def test_the_list_of_commands_is_whole():
    assert {"train_cc.cold_start", "evaluation.generate", "convert_weight.export_generator"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_help_and_shows_its_default(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    (parser,) = parsers(command, [], monkeypatch, parse=False)
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        name = (action.option_strings or [action.dest])[-1]
        assert action.help and len(action.help) > 4, f"{command} {name} has no help"
        value = action.default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if action.option_strings and (number or isinstance(value, str)) and value != argparse.SUPPRESS:
            shown = f"default: {value}" in text
            assert shown, f"{command} {name}: its default, {value}, is not shown"
    assert "default: None" not in text and "default: []" not in text


# Examples ----------------------------------------------------------------------------------------------------------

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs" / "results.md")  # a log: its commands are those of their time
SOURCES = [path for folder in (*FOLDERS, "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]


def commands_in(path: Path) -> list[str]:
    """The lines of a page's code blocks, or of a module's docstrings, and what stands in a line as `...`."""
    text = re.sub(r"\\+\n\s*", " ", path.read_text())
    begin = r"(?:\w+=\S+ )*(?:python|bash|accelerate launch)"
    quoted = re.findall(rf"`({begin} [^`\n]+)`", text)
    lines = re.findall(rf"^ {{4}}({begin} .+)$", text, re.MULTILINE)
    return [re.sub(r"\s+#.*$", "", each).strip() for each in [*quoted, *lines]]


EXAMPLES = [(path, each) for path in [*PAGES, *SOURCES] for each in commands_in(path)]


@pytest.mark.parametrize("path,example", EXAMPLES, ids=lambda value: str(value)[-60:])
def test_every_example_is_a_command(path, example, monkeypatch):
    """The file is there, and its parser takes the flags. Capitals such as FOLDER stand for what a person fills in."""
    words = [word for word in shlex.split(example) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    words = [word for word in words if word not in ("...", "FLAGS")]  # "any flags"
    if len(words) == 1 or "--help" in words:
        return
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file() or "*" in words[1] or shutil.which(words[1]), f"{path}: {example}"
        return
    if words[:2] == ["python", "-m"] or words[1].endswith(".py"):
        command = words[2] if words[1] == "-m" else module_of(ROOT / words[1])
        rest = words[3:] if words[1] == "-m" else words[2:]
        if command not in COMMANDS:
            assert importlib.util.find_spec(command), f"{path}: {example}"
            return
        if not rest:
            return
        filled = ["3" if word == "N" else word for word in rest if word[0] != "[" and word[-1] != "]"]
        parsers(command, filled, monkeypatch, parse=True)
