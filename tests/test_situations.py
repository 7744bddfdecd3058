"""Situations of public reports of this field, as one table: input, command, words of the answer.

A row's input is made in an empty folder, where these links lie beside it: ``teacher`` (a SiT of 8 x 8 pixels, 10
classes), ``vae`` and ``latent_teacher`` (4 x 8 x 8), ``classifier`` and ``real.npz`` (statistics of digits in its
features). The command runs there, in this process.
"""

import importlib
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from evaluation.standins import write_vae
from tests.conftest import random_sit


class Situation(NamedTuple):
    """``words`` are in what the command prints; it ends with ``code``, 2 if it refuses the input."""

    name: str
    make: Callable[[Path], object]  # writes the input into the folder
    command: str
    words: tuple[str, ...]
    code: int = 2


def nothing(folder: Path) -> None:
    """No input but the links."""


def empty_folder(folder: Path) -> None:
    (folder / "empty").mkdir()


# Runs and their checkpoints ---------------------------------------------------------------------------------------

RUNS = [
    Situation(
        "a teacher folder without files",
        empty_folder,
        "train_cc.cold_start --teacher empty --vae none --output-dir run",
        ("empty", "config.json"),
    ),
]

# Devices and processes --------------------------------------------------------------------------------------------

PROCESSES: list[Situation] = []

# Half precision ---------------------------------------------------------------------------------------------------

PRECISION: list[Situation] = []

# Conversion and teachers ------------------------------------------------------------------------------------------

CONVERSION: list[Situation] = []

# Evaluation -------------------------------------------------------------------------------------------------------

EVALUATION: list[Situation] = []

# Sampling, pipelines, sharing -------------------------------------------------------------------------------------

SAMPLING: list[Situation] = []

# The table is run -------------------------------------------------------------------------------------------------

SITUATIONS = RUNS + PROCESSES + PRECISION + CONVERSION + EVALUATION + SAMPLING


@pytest.fixture(scope="module")
def links(tmp_path_factory, teacher, classifier, real) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("made")
    write_vae(made / "vae")
    random_sit(in_channels=4).save_pretrained(made / "latent_teacher")
    inputs = {"vae": made / "vae", "latent_teacher": made / "latent_teacher"}
    return inputs | {"teacher": teacher, "classifier": classifier, "real.npz": real}


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_situation(situation, links, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name, target in links.items():
        os.symlink(target, tmp_path / name)
    situation.make(tmp_path)
    module, *arguments = shlex.split(situation.command)
    code = 0
    try:
        importlib.import_module(module).main(arguments)
    except SystemExit as stopped:
        code = stopped.code or 0
    printed = "".join(capfd.readouterr())
    missing = [word for word in situation.words if word not in printed]
    assert not missing, f"{missing} not in: {printed}"
    assert code == situation.code, printed
