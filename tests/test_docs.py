"""What of the documentation can be held to the code. `python -m tests.test_docs` writes docs/recipes.md."""

import argparse
import re
from pathlib import Path

import pytest

from train_cc import cold_start, dmdr_refl

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "docs" / "recipes.md"
HEAD = """# Every flag of both stages

Written from the parser by `python -m tests.test_docs`, and held to it by a test. The defaults are the paper's SiT-XL/2
recipes; the launchers in `scripts/` list what a recipe sets. Ranges are checked before anything is loaded.
"""


def flag_lines() -> list[str]:
    stages = cold_start.stage_parser(), dmdr_refl.stage_parser()
    lines = []
    for group in stages[0]._action_groups:
        actions = [action for action in group._group_actions if "--help" not in action.option_strings]
        if not actions:
            continue
        lines += ["", f"## {group.title}", "", "| flag | cold start | DMDR | meaning |", "|---|---|---|---|"]
        for action in actions:
            defaults = [shown(parser, action) for parser in stages]
            choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
            meaning = (action.help or "").replace("|", "\\|").replace("%%", "%") + choices
            name = "`, `".join(action.option_strings[-2:] if action.dest == "compile" else action.option_strings[-1:])
            lines.append(f"| `{name}` | {defaults[0]} | {defaults[1]} | {meaning.strip()} |")
    return lines


def shown(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    value = parser.get_default(action.dest)
    if action.required:
        return "required"
    if value is None or value is False:
        return "off" if value is False else "-"
    return f"`{' '.join(map(str, value)) if isinstance(value, list) else value}`"


def recipes() -> str:
    return HEAD + "\n".join(flag_lines()) + "\n"


def test_recipes_are_those_of_the_parser():
    assert RECIPES.read_text() == recipes(), "run python -m tests.test_docs"


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in RECIPES.parent.glob("*.md"))]
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page}: {target}"


if __name__ == "__main__":
    RECIPES.write_text(recipes())
