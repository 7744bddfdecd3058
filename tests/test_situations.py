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

GENERATE = "evaluation.generate --generator teacher --output s.npz --num-images 2"
SAMPLE = "evaluation.sample --generator teacher --grid g.png --per-class 1 --num-steps 1"


def nine_names(folder: Path) -> None:
    """Names of classes, of which there are ten."""
    (folder / "names.txt").write_text("\n".join("abcdefghi"))


SAMPLING = [
    Situation(
        "a multi-step teacher and no flags",
        nothing,
        GENERATE,
        ("note: teacher does not record", "--sampler euler, heun or sde", "--num-steps 1", "2 images ->"),
        code=0,
    ),
    Situation(
        "a picture of a multi-step teacher and no flags",
        nothing,
        "evaluation.sample --generator teacher --grid g.png --per-class 1 --classes 3",
        ("note: teacher does not record", "--sampler euler, heun or sde", '1 classes (["3"])'),
        code=0,
    ),
    Situation(
        "an SDE of one step",
        nothing,
        f"{GENERATE} --sampler sde --num-steps 1",
        ("--num-steps is 1", "--sampler sde takes 2 at the least"),
    ),
    Situation(
        "a shift for the SDE",
        nothing,
        f"{GENERATE} --sampler sde --timestep-shift 2",
        ("--timestep-shift is of the few-step sampler's grid; --sampler sde has none",),
    ),
    Situation(
        "more guided channels than there are",
        nothing,
        f"{GENERATE} --num-steps 1 --guidance-scale 2 --guidance-channels 3",
        ("--guidance-channels is 3; allowed: 1 to 1, the channels of teacher",),
    ),
    Situation(
        "more guided channels than there are, in a picture",
        nothing,
        f"{SAMPLE} --classes 1 --guidance-channels 2",
        ("--guidance-channels is 2; allowed: 1 to 1, the channels of teacher",),
    ),
    Situation(
        "no guided channel",
        nothing,
        f"{GENERATE} --guidance-channels 0",
        ("--guidance-channels is 0; allowed: 1 to 1024",),
    ),
    Situation(
        "a class beyond the last",
        nothing,
        f"{GENERATE} --num-steps 1 --classes 3 10",
        ("--classes 10: the generator has the classes 0 to 9",),
    ),
    Situation(
        "a class twice",
        nothing,
        f"{GENERATE} --num-steps 1 --classes 3 5 3",
        ("--classes names class 3 more than once; give each class once",),
    ),
    Situation(
        "a name without names",
        nothing,
        f"{GENERATE} --num-steps 1 --classes seven",
        ("--classes 'seven'", "numbers from 0 to 9", "--names"),
    ),
    Situation(
        "names of another number of classes",
        nine_names,
        f"{GENERATE} --num-steps 1 --classes a --names names.txt",
        ("--names", "names.txt has 9 names; 10 classes are expected"),
    ),
    Situation(
        "names and no classes",
        nine_names,
        f"{GENERATE} --num-steps 1 --names names.txt",
        ("--names is names.txt, but no --classes are given",),
    ),
    Situation(
        "a name that no repository can have",
        nothing,
        "convert_weight.export_generator --checkpoint step-1.pt --pipeline p --push-to-hub you/sit@main",
        ("--push-to-hub is 'you/sit@main'; a name such as you/dmdr-sit is expected",),
    ),
]

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
