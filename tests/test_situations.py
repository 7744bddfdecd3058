"""Situations of public reports of this field, as one table: input, command, words of the answer.

A row's input is made in an empty folder, where these links lie beside it: ``teacher`` (a SiT of 8 x 8 pixels, 10
classes), ``vae`` and ``latent_teacher`` (4 x 8 x 8), ``classifier`` and ``real.npz`` (statistics of digits in its
features). The command runs there, in this process.
"""

import importlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from evaluation import statistics as gather
from evaluation.standins import write_vae
from tests.conftest import random_sit
from train_cc.io.class_names import KNOWN
from train_cc.io.write import record, write_record


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

FASHION = KNOWN["fashion-mnist"]
FRECHET = (
    "train_cc.cold_start --teacher fashion --vae none --mixed-precision no --num-previews 0 --max-train-steps 1 "
    "--batch-size 2 --dynamic-steps 2 --lora-rank 4 --frechet-window 16 --reward frechet 1 s.npz --output-dir run"
)


def statistics_of(folder: Path, *names: str) -> None:
    """Statistics of class folders ``names``, and a teacher of Fashion-MNIST, whose classes have other numbers."""
    for k, name in enumerate(names):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (8, 8), 20 * k + i).save(folder / "images" / name / f"{i}.png")
    gather.main(shlex.split(f"--images images --space classifier:{folder / 'classifier'} --output s.npz --workers 0"))
    shutil.copytree(folder / "teacher", folder / "fashion")
    write_record(folder / "fashion", record("pretrain.teacher", {"dataset": "fashion-mnist"}))


def without_names(folder: Path) -> None:
    """As statistics of class folders were written before the file named them."""
    statistics_of(folder, *map(str, range(10)))
    with np.load(folder / "s.npz") as file:
        content = dict(file)
    about = json.loads(str(content["space"]))
    del about["source"]["classes"]
    np.savez(folder / "s.npz", **content | {"space": np.array(json.dumps(about))})


EVALUATION = [
    Situation(
        "a Frechet reward from class folders named as the teacher's classes, in another order",
        lambda folder: statistics_of(folder, *FASHION),
        FRECHET,
        ("s.npz", "folder ankle boot is its class 1, but the model's class 9"),
    ),
    Situation(
        "a Frechet reward from class folders named by the teacher's numbers",
        lambda folder: statistics_of(folder, *map(str, range(10))),
        FRECHET,
        ("class 0 is 0, 1 is 1", "9 is 9, by the folders' names"),
        code=0,
    ),
    Situation(
        "a Frechet reward from statistics of class folders without their names",
        without_names,
        FRECHET,
        ("WARNING: s.npz", "order of the alphabet, 10 before 2"),
        code=0,
    ),
]

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
