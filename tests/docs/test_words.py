"""The house's English, as far as a test can hold it: first words of docstrings, words that are read twice, names."""

import ast
import re

import pytest

from tests import ROOT
from tests.pages import PACKAGES

FILES = sorted(path for folder in (*PACKAGES, "scripts") for path in (ROOT / folder).rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FIRST = {"As", "How", "Of", "What", "When", "Where", "Whether", "Which", "Who", "Why", "->"}
TWICE = re.compile(r"\b(?:alone|sets? aside)\b|\bno path\b")  # only, ignored, not a path
PARTICIPLES = re.compile("asked|drawn|found|given|held|kept|known|made|named|seen|shown|taken|told|wanted")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_and_names_are_read_once(path):
    text = path.read_text()
    assert not [line for line in text.splitlines() if TWICE.search(line)]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            assert (ast.get_docstring(node) or ".").split()[0] not in FIRST, ast.get_docstring(node)
        name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
        assert not PARTICIPLES.fullmatch(name), f"line {node.lineno}: {name} is not a noun"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_are_read_once(path):
    assert not [line for line in path.read_text().splitlines() if TWICE.search(line)]


def test_the_readme_is_read_in_three_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160
    prose = re.sub(r"^```.*?^```$|^\|.*?$|`[^`]*`|\]\([^)]*\)", "", text, flags=re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"\d[\d.,]*", prose)) <= 40
