"""scripts/env.sh: python3, .venv's python and uv are replaced by scripts that note what they are asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

PYTHON = """#!/bin/bash
prefix=$(dirname "$(dirname "$0")")
case "$1 $2 $3" in
    "- "*) [ -e "$prefix/installed" ] ;;
    "-m pip --version") [ ! -e "$prefix/no-pip" ] ;;
    "-m pip install") echo "pip $*" >> "$NOTED"; touch "$prefix/installed"; [ -z "$DIES_IN_PIP" ] || kill -9 $PPID ;;
    *) echo "run by $prefix" >> "$NOTED" ;;
esac
"""
STUBS = {
    "python": PYTHON,
    "python3": """#!/bin/bash
echo "python3 $*" >> "$NOTED"
[ "$1" = -c ] && exit 0
[ "$1 $2" = "-m venv" ] || exit 1
[ "$3" = --clear ] && rm -rf "$4"
mkdir -p "$4/bin"; cp "$STUBS/python" "$4/bin/python"; touch "$4/pyvenv.cfg"
[ -n "$DIES_IN_VENV" ] && kill -9 $PPID
echo 'VIRTUAL_ENV="$PWD/.venv"; PATH="$PWD/.venv/bin:$PATH"' > "$4/bin/activate"
""",
    "uv": """#!/bin/bash
echo "uv $*" >> "$NOTED"; touch "$VIRTUAL_ENV/installed"
""",
}
INSTALL = "pip -m pip install --quiet --disable-pip-version-check -r requirements.txt"
AGAIN = INSTALL.replace("-r ", "--ignore-installed -r ")


@pytest.fixture
def start(tmp_path):
    """Start a script in a checkout of two files: returns the exit code, and what was asked of the stubs."""
    root, stubs, noted = tmp_path / "checkout", tmp_path / "stubs", tmp_path / "noted"
    (root / "scripts").mkdir(parents=True)
    (root / "scripts" / "env.sh").write_text((ROOT / "scripts" / "env.sh").read_text())
    (root / "requirements.txt").write_text("torch\n")
    for name, content in STUBS.items():
        write_program(stubs / name, content)

    def start(**variables: str) -> tuple[int, list[str]]:
        noted.write_text("")
        environment = {"PATH": f"{stubs}:{os.environ['PATH']}", "NOTED": str(noted), "STUBS": str(stubs)} | variables
        done = subprocess.run(["bash", "-c", "source scripts/env.sh; python x"], cwd=root, env=environment)
        return done.returncode, noted.read_text().replace(f"{tmp_path}/", "").splitlines()

    return start


def write_program(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)


@pytest.fixture
def of_uv(tmp_path) -> dict[str, str]:
    """The variables of an active environment that uv made."""
    prefix = tmp_path / "active"
    write_program(prefix / "bin" / "python", PYTHON)
    (prefix / "pyvenv.cfg").write_text("home = /usr/bin\nuv = 0.9.1\n")
    (prefix / "no-pip").touch()
    return {"VIRTUAL_ENV": str(prefix), "PATH": f"{prefix}/bin:{tmp_path}/stubs:{os.environ['PATH']}"}


def test_an_environment_is_made_once(start):
    code, noted = start()
    assert code == 0 and noted[1:] == ["python3 -m venv --clear .venv", INSTALL, "run by checkout/.venv"]
    assert start() == (0, ["run by checkout/.venv"])


@pytest.mark.parametrize("where,again", [("DIES_IN_VENV", INSTALL), ("DIES_IN_PIP", AGAIN)])
def test_an_interrupted_making_is_repaired_by_the_next_start(start, where, again):
    assert start(**{where: "1"})[0] != 0
    code, noted = start()
    assert code == 0 and again in noted and noted[-1] == "run by checkout/.venv"
    assert start() == (0, noted[-1:])


def test_an_environment_of_uv_is_filled_by_uv_and_then_used(start, of_uv):
    install = "uv pip install --quiet --python active/bin/python -r requirements.txt"
    assert start(**of_uv) == (0, [install, "run by active"])
    assert start(**of_uv) == (0, ["run by active"])


def test_a_folder_that_is_no_environment_is_left_alone(start, tmp_path):
    thesis = tmp_path / "checkout" / ".venv" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    assert start()[0] == 2 and list(thesis.parent.iterdir()) == [thesis]


def test_this_environment_satisfies_without_pip(tmp_path):
    (tmp_path / "pip.py").write_text("raise ImportError('as in an environment that uv made')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "VIRTUAL_ENV": sys.prefix}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", "-c", "source scripts/env.sh; command -v python"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(Path(sys.executable).parent / "python"), done.stderr
