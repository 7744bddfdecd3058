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

import numpy as np
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

TO_MEET = {
    "train": "train_cc.cold_start --teacher teacher --vae none --output-dir run",
    "generate": "evaluation.generate --generator teacher --output s.npz",
    "statistics": "evaluation.statistics --images digits --space classifier:classifier --output s.npz",
    "benchmark": "evaluation.benchmark --size SiT-S/2",
}
STARTED = TO_MEET | {"launcher": f"scripts.launch {TO_MEET['train']}"}
ALONE = {
    "sample": "evaluation.sample --generator teacher --classes 1 --grid g.png",
    "evaluate": "evaluation.evaluate samples.npz samples.npz --space classifier:classifier",
    "pretrain.teacher": "train_cc.pretrain.teacher --output-dir new",
    "pretrain.classifier": "train_cc.pretrain.classifier --output-dir new",
}
VARIABLES = {
    "OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=0": "OMPI_COMM_WORLD_SIZE is 4",
    "MV2_COMM_WORLD_SIZE=4": "MV2_COMM_WORLD_SIZE is 4",
    "SLURM_NTASKS=4 SLURM_PROCID=3": "SLURM_NTASKS is 4",
    "SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=0": "SLURM_STEP_NUM_TASKS is 4",
    "WORLD_SIZE=4 RANK=0": "MASTER_ADDR not set",
    "WORLD_SIZE=2 RANK=2 MASTER_ADDR=localhost": "RANK is 2; allowed: 0 to 1",
    "WORLD_SIZE=many": "WORLD_SIZE is many; allowed",
    "WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=ssh": "MASTER_PORT is ssh; allowed",
}
LISTED = ["0,1", "0", "1", "GPU-1", "MIG-1", "0,1,2,3", "0", "7"]  # one per command


def samples(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "samples.npz", arr_0=pixels, arr_1=np.arange(40) % 10)


def on_a_pod(name: str) -> Situation:
    words = ("NUM_PROCESSES is 1, but WORLD_SIZE is 8", "unset WORLD_SIZE", "docs/multi_gpu.md")
    command = f"WORLD_SIZE=8 RANK=0 MASTER_ADDR=localhost NUM_PROCESSES=1 {STARTED[name]}"
    return Situation(f"a pod of 8 where one process is started: {name}", nothing, command, words)


def by_mpi(name: str) -> Situation:
    words = ("PMI_SIZE is 2", "one task per node", "unset PMI_SIZE")
    return Situation(f"srun --mpi=pmi2: {name}", nothing, f"PMI_SIZE=2 PMI_RANK=1 {STARTED[name]}", words)


def without_gpus(name: str, listed: str) -> Situation:
    words = (f"CUDA_VISIBLE_DEVICES is {listed} ", "no GPU here that torch can use", "CUDA_VISIBLE_DEVICES= (empty)")
    command = f"CUDA_VISIBLE_DEVICES={listed} {(TO_MEET | ALONE)[name]}"
    return Situation(f"device {listed} on a machine without any: {name}", samples, command, words)


def two_gpus(folder: Path) -> None:
    """An nvidia-smi that shows two GPUs, which torch does not have."""
    samples(folder)
    (folder / "bin").mkdir()
    (folder / "bin" / "nvidia-smi").write_text('#!/bin/sh\necho "GPU 0: NVIDIA A100"\necho "GPU 1: NVIDIA A100"\n')
    (folder / "bin" / "nvidia-smi").chmod(0o755)


def unusable_gpus(name: str) -> Situation:
    words = ("nvidia-smi shows 2 GPU(s), but torch cannot use them", "CUDA_VISIBLE_DEVICES= (empty)")
    command = f"PATH=bin CUDA_VISIBLE_DEVICES=0,1 {(TO_MEET | ALONE)[name]}"
    return Situation(f"GPUs that torch cannot use: {name}", two_gpus, command, words)


PROCESSES = [
    *map(on_a_pod, STARTED),
    *map(by_mpi, STARTED),
    *(
        Situation(message, nothing, f"{setting} {TO_MEET['train']}", (message,))
        for setting, message in VARIABLES.items()
    ),
    *map(without_gpus, TO_MEET | ALONE, LISTED),
    *map(unusable_gpus, TO_MEET | ALONE),
    Situation(
        "a batch script of Slurm is one task",
        nothing,
        f"SLURM_NTASKS=8 SLURM_PROCID=0 {TO_MEET['generate']} --num-images 1",
        ("1 images",),
        code=0,
    ),
]

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
    while "=" in module:  # a variable of the environment, as in a shell
        monkeypatch.setenv(*module.split("=", 1))
        module, *arguments = arguments
    code = 0
    try:
        importlib.import_module(module).main(arguments)
    except SystemExit as stopped:
        code = stopped.code or 0
    printed = "".join(capfd.readouterr())
    missing = [word for word in situation.words if word not in printed]
    assert not missing, f"{missing} not in: {printed}"
    assert code == situation.code, printed
