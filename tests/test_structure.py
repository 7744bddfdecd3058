"""The rooms: a module imports only from lower levels, and the groups of level 3 do not know each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVELS = [
    (5, "train_cc.cold_start"),
    (5, "train_cc.dmdr_refl"),
    (5, "train_cc.pretrain"),
    (4.2, "train_cc.distill"),
    (4.1, "train_cc.saving"),
    (4.1, "train_cc.dry_run"),
    (4.1, "train_cc.panel"),
    (4.0, "train_cc.parts"),
    (3, "train_cc.arguments"),
    (3, "train_cc.models"),
    (3, "train_cc.run"),
    (2, "train_cc.objectives"),
    (2, "train_cc.samplers"),
    (1, "train_cc.diagnostics"),
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
    return (6, module.split(".")[0])


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
            limit = 4.2 if module == "evaluation.benchmark" else 3
            assert other in ("evaluation", "convert_weight") or other_level <= limit, f"{module} imports {name}"
        else:
            assert other == own or other_level < level, f"{module} imports {name}"
