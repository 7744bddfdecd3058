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

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation.standins import write_vae
from tests.conftest import ldm_names, random_sit
from train_cc.io.weights import WEIGHTS_NAME
from train_cc.models.generator import save_generator


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

# Teachers and VAEs: what a folder or file is ------------------------------------------------------------------------


def generator_folder(folder: Path) -> None:
    """Four steps, as a run exports them; and that folder inside a pipeline, whose vae/ is of 4 channels."""
    save_generator(random_sit(), folder / "distilled", 4, 1.5, teacher_sha256="0" * 64)
    save_generator(random_sit(in_channels=4), folder / "pipe" / "generator", 1, 1.0)
    shutil.copytree(folder / "vae", folder / "pipe" / "vae")
    (folder / "pipe" / "model_index.json").write_text("{}")


def run_checkpoint(folder: Path) -> None:
    (folder / "torch_units").mkdir()
    torch.save({}, folder / "torch_units" / "step-3.pt")


def vae_files(folder: Path) -> None:
    """LDM's names: as one file, in a whole model's checkpoint, in a diffusers folder; and diffusers' names alone."""
    state = ldm_names(load_file(folder / "vae" / WEIGHTS_NAME), stages=4)
    save_file(state, folder / "ldm.safetensors")
    whole = {f"first_stage_model.{name}": value for name, value in state.items()}
    torch.save({"state_dict": whole | {"model.diffusion_model.out.0.bias": torch.zeros(1)}}, folder / "whole.ckpt")
    shutil.copytree(folder / "vae", folder / "mixed")
    save_file(state, folder / "mixed" / WEIGHTS_NAME)
    shutil.copyfile(folder / "vae" / WEIGHTS_NAME, folder / "alone.safetensors")
    save_file({"a.weight": torch.zeros(1)}, folder / "other.safetensors")


def vae_with(**changes: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        shutil.copytree(folder / "vae", folder / "changed")
        config = folder / "changed" / "config.json"
        content = json.loads(config.read_text()) | changes
        config.write_text(json.dumps({name: value for name, value in content.items() if value != "absent"}))

    return make


COLD = (
    "train_cc.cold_start --output-dir run --max-train-steps 1 --batch-size 2 --num-previews 2"  # if not refused, short
)
OF_LATENTS = f"{COLD} --teacher latent_teacher"
SAMPLES = "evaluation.generate --num-images 2 --output samples.npz"
FROM_ONE_FILE = "AutoencoderKL.from_single_file('{}', config='{}')"
MEAN, STD = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]

LATENTS = [
    Situation(
        "a distilled generator as the teacher",
        generator_folder,
        f"{COLD} --teacher distilled --vae none",
        ("--teacher distilled is a distilled generator", "4 step(s)", "--teacher-is-distilled"),
    ),
    Situation(
        "a distilled generator as the teacher of a plan",
        generator_folder,
        f"{COLD} --teacher distilled --vae none --dry-run",
        ("--teacher distilled is a distilled generator", "--teacher-is-distilled"),
    ),
    Situation(
        "a pipeline's generator as the teacher",
        generator_folder,
        f"{COLD} --teacher pipe/generator --vae pipe/vae",
        ("--teacher pipe/generator is a distilled generator", "1 step(s)"),
    ),
    Situation(
        "a pipeline as the teacher",
        generator_folder,
        f"{COLD} --teacher pipe --vae pipe/vae",
        ("pipe is a diffusers pipeline", "pipe/generator", "a model folder"),
    ),
    Situation(
        "a pipeline as the generator",
        generator_folder,
        f"{SAMPLES} --generator pipe --vae pipe/vae",
        ("pipe is a diffusers pipeline", "pipe/generator", "a model folder"),
    ),
    Situation(
        "a pipeline as the VAE",
        generator_folder,
        f"{OF_LATENTS} --vae pipe",
        ("pipe is a diffusers pipeline", "pipe/vae", "AutoencoderKL"),
    ),
    Situation(
        "a checkpoint as the teacher",
        run_checkpoint,
        f"{COLD} --teacher torch_units/step-3.pt --vae none",
        ("torch_units/step-3.pt is a run's checkpoint", "--resume-ckpt", "export_generator.py --checkpoint"),
    ),
    Situation(
        "a classifier as the teacher",
        nothing,
        f"{COLD} --teacher classifier --vae none",
        ("classifier/config.json is of a test_", "a SiT's model folder is expected"),
    ),
    Situation(
        "a VAE in LDM's names as one file",
        vae_files,
        f"{OF_LATENTS} --vae ldm.safetensors",
        ("LDM's names", FROM_ONE_FILE.format("ldm.safetensors", "stabilityai/sd-vae-ft-ema")),
    ),
    Situation(
        "a VAE inside a whole model's checkpoint",
        vae_files,
        f"{SAMPLES} --generator latent_teacher --vae whole.ckpt",
        ("whole.ckpt is one file", "LDM's names", FROM_ONE_FILE.format("whole.ckpt", "stabilityai/sd-vae-ft-ema")),
    ),
    Situation(
        "a VAE folder with LDM's names",
        vae_files,
        f"{OF_LATENTS} --vae mixed",
        ("LDM's names", FROM_ONE_FILE.format(f"mixed/{WEIGHTS_NAME}", "mixed")),
    ),
    Situation(
        "a VAE in diffusers' names as one file",
        vae_files,
        f"{OF_LATENTS} --vae alone.safetensors",
        ("diffusers' names and no config.json", "from_single_file('alone.safetensors'"),
    ),
    Situation(
        "the weights' file of a VAE folder",
        nothing,
        f"{OF_LATENTS} --vae vae/{WEIGHTS_NAME}",
        ("give the folder, vae",),
    ),
    Situation(
        "another file as the VAE",
        vae_files,
        f"{OF_LATENTS} --vae other.safetensors",
        ("other.safetensors is a file without a VAE's tensors", "AutoencoderKL folder is expected"),
    ),
    Situation(
        "means per channel without deviations",
        vae_with(latents_mean=MEAN),
        f"{OF_LATENTS} --vae changed",
        ("changed/config.json: latents_mean is there alone", "latents_std"),
    ),
    Situation(
        "three deviations for four channels",
        vae_with(latents_mean=MEAN, latents_std=STD[:3]),
        f"{OF_LATENTS} --vae changed",
        ("latents_std is [1.0, 2.0, 3.0]", "a list of 4 numbers"),
    ),
    Situation(
        "a deviation of 0",
        vae_with(latents_mean=MEAN, latents_std=[1.0, 2.0, 0.0, 1.0]),
        f"{OF_LATENTS} --vae changed",
        ("latents_std is 0.0", "allowed: 1e-06 to 1e+06"),
    ),
    Situation(
        "deviations without a scaling factor",
        vae_with(latents_mean=MEAN, latents_std=STD, scaling_factor="absent"),
        f"{OF_LATENTS} --vae changed",
        ("scaling_factor is missing", "1.0"),
    ),
    Situation(
        "a mean of both kinds",
        vae_with(latents_mean=MEAN, latents_std=STD, shift_factor=0.5),
        f"{OF_LATENTS} --vae changed",
        ("shift_factor is 0.5 beside latents_mean",),
    ),
]

# Sampling, pipelines, sharing -------------------------------------------------------------------------------------

SAMPLING: list[Situation] = []

# The table is run -------------------------------------------------------------------------------------------------

SITUATIONS = RUNS + PROCESSES + PRECISION + CONVERSION + EVALUATION + LATENTS + SAMPLING


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
