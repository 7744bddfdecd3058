"""The documentation as its tests read it: pages, their code blocks, commands, and the parsers that read these."""

import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from tests import ROOT
from train_cc.io import fields

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PACKAGES = ("train_cc", "evaluation", "convert_weight")
BEGIN = r"(?:[A-Z_0-9]+=\S+ )*(?:bash|python3?|sbatch|accelerate|torchrun|pip|uv|hf)"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")


# The modules of the packages that are commands.
COMMANDS = sorted(
    module_of(path)
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if '\nif __name__ == "__main__":\n    main()' in path.read_text() or path.name == "__main__.py"
)


@dataclass(frozen=True)
class Command:
    page: str
    text: str
    variables: dict[str, str]
    words: list[str]
    quoted: bool = False  # in a sentence, where it may lack its flags


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[Command]:
    """The commands in a page's ```bash and indented blocks, or in a module's docstrings."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(rf"^ {{4}}({BEGIN} .+)$", re.sub(r"\\+\n\s*", " ", text), re.MULTILINE)
    return [command for line in lines if (command := read(page, line))]


def quoted_commands(page: str) -> list[Command]:
    """The commands that stand in sentences, as `python -m MODULE FLAGS`."""
    text = re.sub(r"\\+\n\s*", " ", (ROOT / page).read_text())
    return [read(page, line, quoted=True) for line in re.findall(rf"`({BEGIN} [^`\n]+)`", text)]


def read(page: str, line: str, quoted: bool = False) -> Command | None:
    words, variables = shlex.split(line, comments=True), {}
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    return Command(page, " ".join(line.split()), variables, expanded(words), quoted) if words else None


def expanded(words: list[str]) -> list[str]:
    """{a,b} in a word as the shell expands it, once."""
    matches = [(word, re.fullmatch(r"(.*?)\{([^{}]*,[^{}]*)\}(.*)", word)) for word in words]
    return [
        one
        for word, match in matches
        for one in ([match[1] + each + match[3] for each in match[2].split(",")] if match else [word])
    ]


class Parsed(Exception):
    """Ends a command when its parser has read the words."""


def parser_of(module: str, words: list[str] | None = None) -> fields.Parser:
    """The parser of a command, which has read ``words`` if there are any. Raises `SystemExit` if it refuses them."""
    reading = fields.Parser.parse_known_args

    def stop(parser, arguments=None, namespace=None):
        _, rest = reading(parser, arguments, namespace) if words is not None else (None, [])
        if rest and module == "evaluation.benchmark":  # the rest are flags of a stage
            from train_cc.setup.arguments import build_parser

            _, rest = reading(build_parser("stage"), ["--teacher", "t", "--output-dir", "o", *rest], None)
        if rest:
            parser.error(f"unknown: {' '.join(rest)}")
        raise Parsed(parser)

    with patch.object(fields.Parser, "parse_known_args", stop):
        try:
            importlib.import_module(module).main(words or [])
        except Parsed as parsed:
            return parsed.args[0]
    raise AssertionError(f"{module} has read no command line")
