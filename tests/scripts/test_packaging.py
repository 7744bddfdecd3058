"""What is installed: requirements.txt and pyproject.toml are one set, and hold every library that is imported."""

import ast
import re
import sys
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement

from tests import ROOT

tomllib = pytest.importorskip("tomllib")  # of Python 3.11

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PACKAGES = ("train_cc", "evaluation", "convert_weight")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def bounds(lines: list[str]) -> dict[str, str]:
    """Name -> version range."""
    wanted = [Requirement(line) for line in lines]
    return {normal(each.name): str(each.specifier) for each in wanted}


def listed() -> list[str]:
    lines = (re.sub("#.*", "", line).strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line]


def test_requirements_are_the_dependencies_and_the_extra_dev():
    assert bounds(listed()) == bounds(PROJECT["dependencies"]) | bounds(EXTRAS["dev"])


def test_the_extras_are_those_of_the_documentation_and_agree():
    assert set(EXTRAS) == {"tracking", "low-memory", "dev"}
    known = {}
    for lines in (PROJECT["dependencies"], *EXTRAS.values()):
        for name, bound in bounds(lines).items():
            assert bound and known.setdefault(name, bound) == bound, name


def test_every_library_that_is_imported_is_a_dependency():
    """An import of a library that another one happens to bring would end with that one.

    Triton is a part of torch for CUDA, and asked for where it is imported.
    """
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module:
                    names = [node.module]
                found |= {name.split(".")[0] for name in names}
    libraries = found - set(sys.stdlib_module_names) - {*PACKAGES, "scripts", "torchao", "triton", "__future__"}
    distributions = packages_distributions()
    assert "torch" in libraries
    declared = bounds(PROJECT["dependencies"]).keys()
    missing = {name for name in libraries if not declared & {normal(name), *map(normal, distributions.get(name, []))}}
    assert not missing
    assert "torchao" not in found or "torchao" in bounds(EXTRAS["low-memory"])


def test_the_packages_have_all_their_modules():
    """A folder without __init__.py is installed only by chance."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path
