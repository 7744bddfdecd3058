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

# Paths to write ---------------------------------------------------------------------------------------------------

OF_FILES = {  # command without its output -> the flag of a file that it writes
    "evaluation.generate --generator teacher --num-images 2": "--output",
    "evaluation.sample --generator teacher --classes 1": "--grid",
    "evaluation.statistics --images digits --space classifier:classifier": "--output",
    "evaluation.evaluate a.npz real.npz --space pixels --check": "--output",
    "evaluation.evaluate a.npz real.npz --space pixels": "--picture",
    "evaluation.report.page teacher": "--output",
    "evaluation.benchmark --roofline h100": "--output",
    "train_cc.pretrain.data --dataset digits --num-images 2": "--output",
}
OF_FOLDERS = {
    "train_cc.cold_start --teacher teacher --vae none": "--output-dir",
    "train_cc.pretrain.teacher --dataset digits": "--output-dir",
    "evaluation.generate --generator teacher --output s.npz": "--png-dir",
    "evaluation.report.page teacher": "--curves",
    "convert_weight.sit_convert --input teacher": "--save-dir",
    "convert_weight.export_generator --checkpoint units.pt": "--pipeline",
}
NO_NAMES = (".", "./", "/", "..", "a/", "a/.", "a/..", "''")


def a_file(folder: Path) -> None:
    (folder / "file").write_text("x")
    (folder / "units.pt").write_bytes(b"x")


def a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


PATHS = [
    *(
        Situation(f"{command} {flag} {text}", nothing, f"{command} {flag} {text}", (f"{flag} is ", "allowed: a path"))
        for command, flag in OF_FILES.items()
        for text in NO_NAMES
    ),
    *(
        Situation(f"{command} {flag} {text}", a_file, f"{command} {flag} {text}", words)
        for command, flag in OF_FOLDERS.items()
        for text, words in {
            "file": ("file is a file; a folder is expected",),
            "file/in/it": ("file is a file; a folder is expected",),
            "n" * 300: ("nnn", "File name too long"),
        }.items()
    ),
    *(
        Situation(f"a generator at {text}", a_file, f"{command} {text}", ("holds the current folder", "name a folder"))
        for command in ("convert_weight.export_generator --checkpoint units.pt --output-dir",)
        for text in ("/", "//", "/.")
    ),
    Situation(
        "a file's path whose parent is a file",
        a_file,
        "evaluation.sample --generator teacher --classes 1 --grid file/grid.png",
        ("file/grid.png cannot be written", "file is a file; a folder is expected"),
    ),
    Situation(
        "a folder in place of a file",
        empty_folder,
        "evaluation.sample --generator teacher --classes 1 --grid empty",
        ("--grid empty is a folder; a file is expected",),
    ),
    Situation(
        "a pipe in place of a file",
        a_pipe,
        "evaluation.sample --generator teacher --classes 1 --grid pipe",
        ("--grid pipe exists and is not a file of this project",),
    ),
    Situation(
        "an adapter over the current folder",
        a_file,
        "convert_weight.export_generator --checkpoint /proc/self/comm --adapter .",
        ("holds the current folder",),
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

SITUATIONS = RUNS + PATHS + PROCESSES + PRECISION + CONVERSION + EVALUATION + SAMPLING


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
