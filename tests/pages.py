"""The documentation as its tests read it: pages, their code blocks, and the commands in these."""

import importlib
import re
import shlex
from dataclasses import dataclass, field
from unittest.mock import patch

from tests import ROOT
from train_cc.io import fields

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# Launcher -> the command that reads the flags after it.
OF_LAUNCHERS = {
    r"scripts/cold_start_\w+\.sh": "train_cc.cold_start",
    r"scripts/dmdr_\w+\.sh": "train_cc.dmdr_refl",
    r"scripts/evaluate_\w+\.sh": "evaluation.generate",  # after two folders
    r"scripts/frontier_\w+\.sh": "evaluation.frontier",
    r"scripts/test\.sh": "pytest",
}
REQUIRED = {
    "train_cc.cold_start": ["--teacher", "t", "--output-dir", "o"],
    "train_cc.dmdr_refl": ["--teacher", "t", "--output-dir", "o"],
    "evaluation.generate": ["--generator", "g", "--output", "s.npz"],
    "evaluation.frontier": ["--recipe", "digits", "--output-dir", "o", "--teacher", "t"],
}


@dataclass
class Command:
    page: str
    text: str
    variables: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def indented(page: str) -> list[str]:
    """Blocks of lines that are indented by four spaces and look like commands."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"(?<=\n\n)((?:    .*\n)+)", text)
    return [
        block for block in found if re.match(r"    ([A-Z_]+=\S+ )*(bash|python3?|sbatch|accelerate|pip|uv|hf) ", block)
    ]


def commands(page: str) -> list[Command]:
    """The commands of all ```bash and indented blocks, one for each line; a backslash at its end joins the next."""
    found = []
    for block in blocks(page, "bash") + indented(page):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            variables = {}
            while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
                name, _, value = words.pop(0).partition("=")
                variables[name] = value
            if words:
                found.append(Command(page, re.sub(r"\s+", " ", line).strip(), variables, expanded(words)))
    return found


def expanded(words: list[str]) -> list[str]:
    """{a,b} in a word as the shell expands it, once."""
    found = []
    for word in words:
        match = re.fullmatch(r"(.*?)\{([^{}]*,[^{}]*)\}(.*)", word)
        found += [f"{match[1]}{each}{match[3]}" for each in match[2].split(",")] if match else [word]
    return found


class Parsed(Exception):
    pass


def parsed(module: str, words: list[str]) -> fields.Parser:
    """The parser of a command, which has read ``words``. Raises `SystemExit` where it refuses them."""
    reading = fields.Parser.parse_known_args

    def stop(parser, arguments=None, namespace=None):
        _, rest = reading(parser, arguments, namespace)
        if module == "evaluation.benchmark":  # the rest are flags of a stage
            from train_cc.setup.arguments import build_parser

            shapes = ["--teacher", "t", "--output-dir", "o"]
            _, rest = reading(build_parser("stage"), [*shapes, *rest], None)
        if rest:
            parser.error(f"unknown: {' '.join(rest)}")
        raise Parsed(parser)

    with patch.object(fields.Parser, "parse_known_args", stop):
        main = importlib.import_module(module).main
        try:
            main(words)
        except Parsed as found:
            return found.args[0]
    raise AssertionError(f"{module} has read no command line")
