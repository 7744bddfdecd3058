"""Situations of public reports of this field, as one table: input, command, words of the answer.

A row's input is made in an empty folder, where these links lie beside it: ``teacher`` (a SiT of 8 x 8 pixels, 10
classes), ``vae`` and ``latent_teacher`` (4 x 8 x 8), ``classifier`` and ``real.npz`` (statistics of digits in its
features). The command runs there, in this process.
"""

import argparse
import importlib
import json
import os
import shlex
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from evaluation import generate as sampling
from evaluation import statistics as gather
from evaluation.standins import write_vae
from tests.conftest import ldm_names, random_sit, tree
from train_cc.io.class_names import KNOWN
from train_cc.io.products import record, write_record
from train_cc.io.weights import WEIGHTS_NAME
from train_cc.models.classifier import ImageClassifier
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


def saved(value: object) -> Callable[[Path], object]:
    """A torch_units file with ``value`` among the arguments."""
    return lambda folder: torch.save({"format_version": 3, "arguments": {"a": value}}, folder / "step-1.pt")


def a_run(folder: Path) -> None:
    """run: one update and its checkpoint, of Slurm's job 7."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", "7")
        importlib.import_module("train_cc.cold_start").main([*shlex.split(COLD_RUN)[1:], "--max-train-steps", "1"])


def elsewhere(folder: Path) -> None:
    os.symlink("/not/mounted", folder / "run/checkpoints")


UNITS = "run/checkpoints/torch_units"
COLD_RUN = (
    "train_cc.cold_start --teacher teacher --vae none --output-dir run --batch-size 4 --lora-rank 4 --ratio-update 1 "
    "--num-previews 0 --gradient-accumulation-steps 1 --max-train-steps 2"
)
BAD_VALUES = {
    "--lora-rank 0": "--lora-rank is 0",
    "--batch-size -3": "--batch-size is -3",
    "--ema-decay 1": "--ema-decay is 1;",
    "--max-grad-norm nan": "--max-grad-norm is nan",
    "--learning-rate-generator inf": "--learning-rate-generator is inf",
    f"--seed {2**64}": "--seed is 18446744073709551616",
    "--vae stabilityai/sd-vae-ft-ema": "--vae none is needed",
    "--real-guidance-interval 0.7 0.2": "--real-guidance-interval is 0.7 0.2",
    "--num-step 2": "--num-step",
    "--mixed-precision fp8": "fp8",
    "--num-classes 1000": "--num-classes is 1000",
    "--teacher nowhere": "nowhere",
    "--vae ./nowhere": "nowhere",
    "--resume-ckpt nowhere.pt": "nowhere.pt does not exist",
}
RESUMED = "train_cc.cold_start --teacher teacher --vae none --output-dir run --resume-ckpt step-1.pt"
DMDR = "train_cc.dmdr_refl --teacher teacher --vae none --reward classifier 1 classifier --output-dir run --dry-run"
RUNS = [
    Situation("a checkpoint with a numpy scalar inside", saved(np.float32(1)),
              RESUMED, ("step-1.pt holds numpy.", "multiarray.scalar", "was not run")),
    Situation("a checkpoint under another step's name",
              lambda folder: (a_run(folder), os.replace(folder / f"{UNITS}/step-1.pt", folder / f"{UNITS}/step-9.pt")),
              f"{COLD_RUN} --resume-ckpt {UNITS}/step-9.pt",
              ("step-9.pt is damaged or was renamed: it says step 1",)),
    Situation("checkpoints on storage that is not there",
              lambda folder: (a_run(folder), shutil.rmtree(folder / "run/checkpoints"), elsewhere(folder)),
              f"{COLD_RUN} --auto-resume", ("run/checkpoints is a link that leads nowhere",)),
    Situation("a checkpoint of another teacher",
              lambda folder: (a_run(folder), random_sit(seed=1).save_pretrained(folder / "other")),
              COLD_RUN.replace("teacher teacher", "teacher other") + " --auto-resume",
              ("other teacher weights: teacher, SHA-256", "but --teacher other has", "another --output-dir")),
    Situation("a job that Slurm queued again, and --overwrite",
              lambda folder: (a_run(folder), (folder / "run/log.txt").unlink()),
              f"SLURM_JOB_ID=7 SLURM_RESTART_COUNT=1 {COLD_RUN} --auto-resume --overwrite",
              ("continues from run/checkpoints", "at step 1", "Slurm queued this job again"), code=0),
    Situation("another job that Slurm queued again, and --overwrite", lambda folder: a_run(folder),
              f"SLURM_JOB_ID=8 SLURM_RESTART_COUNT=1 {COLD_RUN} --auto-resume --overwrite",
              ("--overwrite starts anew",), code=0),
    Situation("a plan on a pod that is not the first", nothing,
              f"WORLD_SIZE=2 RANK=1 {COLD_RUN} --dry-run", ("peak of the run",), code=0),
    Situation("a plan from a checkpoint that is missing elsewhere", nothing, f"{DMDR} --resume-ckpt step-07.pt",
              ("step-07.pt does not exist; a checkpoints/torch_units/step-N.pt is expected",)),
    Situation("a folder with files of others in place of a run's",
              lambda folder: (empty_folder(folder), (folder / "empty/precious.txt").touch()),
              COLD_RUN.replace("run", "empty"), ("the output folder empty is not empty",)),
    Situation("a bad teacher does not delete the run that --overwrite names", lambda folder: a_run(folder),
              f"{COLD_RUN} --teacher . --overwrite", ("config.json does not exist",)),
    Situation("a checkpoint of a teacher of another size",
              lambda folder: (a_run(folder), random_sit(hidden_size=64).save_pretrained(folder / "wide")),
              f"{COLD_RUN} --teacher wide --output-dir new --resume-ckpt {UNITS}/step-1.pt", ("does not fit",)),
    *(Situation(f"a bad value: {more}", nothing, f"{COLD_RUN} {more}", (words,)) for more, words in BAD_VALUES.items()),
    Situation("a teacher folder without files", empty_folder,
              "train_cc.cold_start --teacher empty --vae none --output-dir run", ("empty", "config.json")),
]  # fmt: skip

# Paths to write ---------------------------------------------------------------------------------------------------

OF_FILES = [  # command without the file that its last flag names
    "evaluation.generate --generator teacher --num-images 2 --output",
    "evaluation.sample --generator teacher --classes 1 --grid",
    "evaluation.statistics --images digits --space classifier:classifier --output",
    "evaluation.evaluate a.npz real.npz --space pixels --check --output",
    "evaluation.evaluate a.npz real.npz --space pixels --picture",
    "evaluation.report teacher --output",
    "evaluation.benchmark --output",
    "train_cc.pretrain.data --dataset digits --num-images 2 --output",
]
OF_FOLDERS = {
    "train_cc.cold_start --teacher teacher --vae none": "--output-dir",
    "train_cc.pretrain.teacher --dataset digits": "--output-dir",
    "evaluation.generate --generator teacher --output s.npz": "--png-dir",
    "evaluation.report teacher": "--curves",
    "convert_weight.sit_convert --input teacher": "--save-dir",
    "convert_weight.export_generator --checkpoint units.pt": "--pipeline",
}
ADDRESSES = {
    "train_cc.cold_start --teacher teacher --vae none --output-dir s3://bucket/run": "--output-dir is s3://bucket/run",
    "evaluation.generate --generator teacher --output gs://b/s.npz": "--output is gs://b/s.npz",
}
NO_NAMES = ("./", "/", "..", "a/", "a/.", "a/..", "''")


def a_file(folder: Path) -> None:
    (folder / "file").write_text("x")
    (folder / "units.pt").write_bytes(b"x")


def a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


PATHS = [
    *(
        Situation(f"{command} {text}", nothing, f"{command} {text}", (f"{command.split()[-1]} is ", "allowed: a path"))
        for command, text in [*((each, ".") for each in OF_FILES), *((OF_FILES[0], each) for each in NO_NAMES)]
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
    *(Situation(command, nothing, command, (told, "a path on this machine")) for command, told in ADDRESSES.items()),
    Situation("a home that the shell left as it is", nothing,
              "HOME=home evaluation.generate --generator teacher --num-steps 1 --num-images 2 --output=~/s.npz",
              ("2 images -> home/s.npz",), code=0),
    Situation("a file's path whose parent is a file", a_file,
              "evaluation.sample --generator teacher --classes 1 --grid file/grid.png",
              ("file/grid.png cannot be written", "file is a file; a folder is expected")),
    Situation("a folder in place of a file", empty_folder,
              "evaluation.sample --generator teacher --classes 1 --grid empty",
              ("--grid empty is a folder; a file is expected",)),
    Situation("a pipe in place of a file", a_pipe, "evaluation.sample --generator teacher --classes 1 --grid pipe",
              ("--grid pipe is a device or a pipe; a file is expected",)),
    Situation("an adapter over the current folder", a_file,
              "convert_weight.export_generator --checkpoint /proc/self/comm --adapter .",
              ("holds the current folder",)),
]  # fmt: skip

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
    Situation("a pod of Kubeflow where one node is started", nothing,
              f"PET_NNODES=2 PET_NPROC_PER_NODE=8 NUM_PROCESSES=2 {STARTED['launcher']}",
              ("PET_NNODES is 2, but NUM_NODES is 1", "unset PET_NNODES")),
    Situation("a job of Slurm without a GPU", nothing,
              f"CUDA_VISIBLE_DEVICES=NoDevFiles {TO_MEET['generate']} --num-images 1", ("1 images",), code=0),
    Situation("a batch script of Slurm is one task", nothing,
              f"SLURM_NTASKS=8 SLURM_PROCID=0 {TO_MEET['generate']} --num-images 1", ("1 images",), code=0),
]  # fmt: skip

# Half precision ---------------------------------------------------------------------------------------------------


def beyond(folder: Path) -> None:
    """A teacher whose second block leaves the range of fp16."""
    model = random_sit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias += 3e4
    model.save_pretrained(folder / "beyond")


def beyond_in_one_class(folder: Path) -> None:
    model = random_sit()
    with torch.no_grad():
        model.y_embedder.embedding_table.weight[3] *= 3e3
    model.save_pretrained(folder / "beyond")


def judge_beyond(folder: Path) -> None:
    judge = ImageClassifier.from_pretrained(folder / "classifier")
    with torch.no_grad():
        judge.network.fc.weight *= 1e6
    judge.save_pretrained(folder / "judge")


def nan_at_the_second_update(folder: Path) -> None:
    """A function of images is called once before the first update."""
    (folder / "mine.py").write_text(
        "calls = []\ndef f(images, y):\n    calls.append(0)\n"
        "    return images.flatten(1).mean(1) * (float('nan') if len(calls) == 3 else 1)\n"
    )


SMALL_RUN = (
    "--vae none --output-dir run --batch-size 4 --lora-rank 4 --ratio-update 1 --num-previews 0 --max-train-steps 3"
)
RANGE = f"evaluation.benchmark --fp16-range {SMALL_RUN}"
PRECISION = [
    Situation("fp16 without a GPU", nothing,
              f"train_cc.cold_start --teacher teacher {SMALL_RUN} --mixed-precision fp16",
              ("--mixed-precision fp16 needs a GPU", "bf16")),
    Situation("the range of no teacher", nothing, RANGE, ("--fp16-range", "--teacher")),
    Situation("the range of a good teacher", nothing, f"{RANGE} --teacher teacher",
              ("generator: fp16 bears it", "estimator: fp16 bears it", "gradient", "within a quarter"), code=0),
    Situation("the range of a teacher that overflows", beyond, f"{RANGE} --teacher beyond",
              ("estimator: fp16 does not bear block 1", "--mixed-precision bf16"), code=0),
    Situation("the range of a teacher that overflows in one class", beyond_in_one_class,
              f"{RANGE} --teacher beyond", ("on samples of several classes, overflows in block 0",), code=0),
    Situation("the range of a judge that overflows", judge_beyond,
              f"{RANGE} --teacher teacher --encoder-type classifier --reward-classifier judge",
              ("generator: fp16 bears it", "reward_classifier: fp16 does not bear network.fc"), code=0),
    Situation("a reward that is NaN at the second update", nan_at_the_second_update,
              f"train_cc.cold_start --teacher teacher {SMALL_RUN} --checkpoint-steps 100 --reward python 1 mine.py:f",
              ("step 2: loss_reward_f is nan", "Stopped; the checkpoint of step 2 is kept", "Is the reward finite")),
]  # fmt: skip

# Conversion and teachers ------------------------------------------------------------------------------------------

CONVERT = "convert_weight.sit_convert --input {} --save-dir out --num-heads 2 --no-check"


def names(*names: str, nest: str | None = None) -> Callable[[Path], object]:
    """A checkpoint in.pt whose tensors have these names."""
    state = {name: torch.zeros(2, 2) for name in names}
    return lambda folder: torch.save({nest: state} if nest else state, folder / "in.pt")


def content(file: str, data: bytes | str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(data.encode() if isinstance(data, str) else data)


def sit_with(**more) -> Callable[[Path], object]:
    """in.pt: a SiT under "model", and ``more`` beside it."""
    return lambda folder: torch.save({"model": random_sit().state_dict(), **more}, folder / "in.pt")


def with_rows(rows: int) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        torch.save(random_sit(num_classes=rows - 1).state_dict(), folder / "in.pt")

    return make


def accelerate_folder(folder: Path) -> None:
    (folder / "saved").mkdir()
    save_file(random_sit().state_dict(), folder / "saved" / "model.safetensors")
    (folder / "saved" / "scheduler.bin").touch()


def deepspeed(**more) -> dict:
    """As DeepSpeed writes beside "module"; in half precision."""
    state = {name: value.half() for name, value in random_sit().state_dict().items()}
    counters = {"global_steps": 20000, "skipped_steps": 3, "dp_world_size": 8, "mp_world_size": 1, "ds_version": "0.15"}
    shapes = [OrderedDict((name, value.shape) for name, value in state.items())]
    return {"module": state, "buffer_names": ["pos_embed"], "optimizer": None, "param_shapes": shapes} | {
        "lr_scheduler": None,
        "sparse_tensor_module_names": set(),
        "ds_config": {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}},
        **counters,
        **more,
    }


ARGUMENTS = argparse.Namespace(
    out=PosixPath("/runs/a"), lr=np.float64(1e-4), dtype=np.dtype("float32"), seed=np.int64(3)
)
BLOCK = "blocks.0.attn.qkv.weight"
ANCHOR = "x_embedder.proj.weight"
REFUSED = {
    "a SiT with qk-norm": (names(ANCHOR, BLOCK, "blocks.0.attn.q_norm.weight", nest="ema"), "qk-norm"),
    "a diffusers DiT": (names("pos_embed.proj.weight", "transformer_blocks.0.attn1.to_q.weight"), "a diffusers DiT"),
    "a U-Net": (names("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", nest="state_dict"), "a U-Net"),
    "a VAE": (names("encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"), "a VAE"),
    "a LoRA": (names("blocks.0.attn.qkv.lora_A.weight", "blocks.0.attn.qkv.lora_B.weight"), "a LoRA without"),
    "the authors' estimator": (names(ANCHOR, BLOCK, "blocks.0.attn.lora.lora_QA", nest="module"), "LoRA in it"),
    "a vision transformer": (names("cls_token", "patch_embed.proj.weight", BLOCK), "a vision transformer"),
    "an MMDiT": (names("joint_blocks.0.x_block.attn.qkv.weight"), "an MMDiT"),
    "a part of ZeRO-3": (
        lambda folder: torch.save(
            deepspeed(module={name: torch.empty(0) for name in random_sit().state_dict()}), folder / "in.pt"
        ),
        "zero_to_fp32.py",
    ),
    "an optimizer": (lambda folder: torch.save({"state": {}, "param_groups": []}, folder / "in.pt"), "an optimizer"),
    "a whole module": (lambda folder: torch.save(torch.nn.Linear(2, 2), folder / "in.pt"), "was not run"),
    "a web page": (content("in.pt", "<!DOCTYPE html><html></html>"), "a web page"),
    "a pointer of Git LFS": (content("in.pt", "version https://git-lfs.github.com/spec/v1\noid sha256:0"), "Git LFS"),
    "an empty file": (content("in.pt", ""), "an empty file"),
    "two prefixes of one tensor": (names(ANCHOR, f"module.{ANCHOR}"), "the same name"),
    "1000 rows": (with_rows(1000), "--num-classes"),
}
CONVERSION = [
    Situation(name, make, CONVERT.format("in.pt"), ("in.pt" if "LoRA" in words else "", words))
    for name, (make, words) in REFUSED.items()
]
CONVERSION += [
    Situation("a sharded index", content("model.safetensors.index.json", '{"weight_map": {}}'),
              CONVERT.format("model.safetensors.index.json"), ("index", "several files")),
    Situation("a folder of accelerate", accelerate_folder,
              CONVERT.format("saved"), ("saved/model.safetensors", "--input")),
    Situation("safetensors", accelerate_folder, CONVERT.format("saved/model.safetensors"), ("model folder: out",), 0),
    Situation("numpy and paths in the arguments", sit_with(args=ARGUMENTS, best=np.float32(0.5)),
              CONVERT.format("in.pt"), ('"model" of a checkpoint with args', "model folder: out"), 0),
    Situation("DeepSpeed", lambda folder: torch.save(deepspeed(args=ARGUMENTS), folder / "in.pt"),
              CONVERT.format("in.pt"), ('"module" of a checkpoint', "model folder: out"), 0),
    Situation("a direction of time that is guessed", sit_with(),
              CONVERT.format("in.pt"), ("guessed", "data-at-0", "--time-direction decides"), 0),
    Situation("a direction of time that is given", sit_with(),
              CONVERT.format("in.pt") + " --time-direction data-at-1", ("folded", "model folder: out"), 0),
    Situation("a null row that is guessed", with_rows(8),
              CONVERT.format("in.pt"), ("guessed", "7 classes and a null row", "--num-classes decides"), 0),
    Situation("a null row that is missing", with_rows(8),
              CONVERT.format("in.pt") + " --num-classes 8", ("8 rows", "null row is missing")),
    Situation("as many classes as it has", with_rows(8),
              CONVERT.format("in.pt") + " --num-classes 7", ("model folder",), 0),
    Situation("random weights under the check", sit_with(),
              "convert_weight.sit_convert --input in.pt --num-heads 2 --save-dir out --check", ("cannot tell",)),
    Situation("random weights, not asked", sit_with(),
              "convert_weight.sit_convert --input in.pt --num-heads 2 --save-dir out",
              ("warning: the check cannot tell", "model folder: out"), 0),
]  # fmt: skip

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


def images_of(folder: Path, number: int = 60, name: str = "s.npz", **more: object) -> dict[str, np.ndarray]:
    """Random images with balanced labels as ``name``; ``more`` arrays replace these, None leaves one out."""
    rng = np.random.default_rng(0)
    content = {"arr_0": rng.integers(0, 256, (number, 8, 8, 1), np.uint8), "arr_1": np.arange(number) % 10} | more
    content = {key: value for key, value in content.items() if value is not None}
    np.savez(folder / name, **content)
    return content


def classes_in_order(folder: Path) -> None:
    """Black images to white ones, a grey value per class, so that a random network tells them apart."""
    labels = np.arange(5200) // 520
    images_of(folder, 40, "r.npz")
    grey = (25 * labels).astype(np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2)
    images_of(folder, 5200, arr_0=grey, arr_1=labels)


def own_statistics(folder: Path) -> None:
    images_of(folder)
    images_of(folder, 200, "r.npz")
    gather.main(shlex.split(f"--images r.npz --space classifier:{folder / 'classifier'} --output mu.npz"))


def mu_and_sigma(folder: Path, size: int = 96, **more: object) -> None:
    """As pytorch-fid writes it."""
    images_of(folder)
    np.savez(folder / "mu.npz", mu=np.zeros(size), sigma=np.eye(size), **more)


def pngs(folder: Path, names: list[str], number: int = 10, mode: str = "L", side: int = 8, suffix: str = "png") -> None:
    """A reference, and ``number`` images in each of the folders ``names`` of ``png``; "" is ``png`` itself."""
    images_of(folder, name="r.npz")
    rng = np.random.default_rng(1)
    for name in names:
        (folder / "png" / name).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            pixels = rng.integers(0, 256, (side, side) + ((3,) if mode == "RGB" else ()), np.uint8)
            Image.fromarray(pixels).save(folder / "png" / name / f"{i}.{suffix}")


def arrays(**more: object) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        images_of(folder, name="r.npz")
        images_of(folder, **more)

    return make


def with_index(labels: object) -> Callable[[Path], object]:
    """Two folders of images that are no classes, and EDM's dataset.json."""

    def make(folder: Path) -> None:
        pngs(folder, ["00000", "00001"])
        (folder / "png" / "dataset.json").write_text(json.dumps({"labels": labels}))

    return make


def dangling(folder: Path) -> None:
    pngs(folder, [""])
    os.symlink("gone.png", folder / "png" / "9a.png")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
PIXELS = np.random.default_rng(0).random((60, 8, 8, 3))
EVALUATE = "evaluation.evaluate s.npz r.npz --space classifier:classifier"
AGAINST_MU = "evaluation.evaluate s.npz mu.npz --space classifier:classifier"
STATISTICS = "evaluation.statistics --images png --space classifier:classifier --output o.npz --workers 0"
INDEX = [[f"0000{k % 2}/{k // 2}.png", k % 10] for k in range(20)]
OF_PNG = "evaluation.evaluate png r.npz --space classifier:classifier"

EVALUATION = [
    Situation(
        "a reference that evaluation.statistics wrote",
        own_statistics,
        AGAINST_MU + " --held-out halves --adm --bootstrap 2",
        ("| FID-0.06k | IS-0.06k | accuracy |", "recall, precision, density", "need the reference's images", "ignored"),
        code=0,
    ),
    Situation("a reference of mu and sigma, as pytorch-fid writes it", mu_and_sigma, AGAINST_MU,
              ("| FID-0.06k | IS-0.06k |", "names no network", "a guess, of classifier:classifier"), code=0),
    Situation("the check of a reference of mu and sigma, before there are samples", mu_and_sigma,
              AGAINST_MU.replace("s.npz", "none.npz") + " --check",
              ("can be evaluated against: classifier:classifier", "FID and IS"), code=0),
    Situation("mu and sigma of one space for two", mu_and_sigma, AGAINST_MU + " pixels",
              ("mu.npz holds mu and sigma of classifier:classifier without images, and pixels needs images",)),
    Situation("mu and sigma that name another network", lambda folder: images_of(folder),
              "evaluation.evaluate s.npz real.npz --space classifier:classifier",
              ("real.npz stores statistics of classifier:", "none of the spaces here")),
    Situation("mu without sigma", lambda folder: (images_of(folder), np.savez(folder / "mu.npz", mu=np.zeros(96))),
              AGAINST_MU, ("mu.npz stores mu only",)),
    Situation(
        "samples of two sizes against a reference without images",
        lambda folder: (mu_and_sigma(folder), images_of(folder, name="t.npz", arr_0=np.ones((60, 8, 9, 1), "u1") * 7)),
        AGAINST_MU.replace("s.npz", "s.npz t.npz"),
        ("t.npz holds images (8, 9, 1), s.npz (8, 8, 1)",),
    ),
    Situation("samples stored class by class", classes_in_order,
              EVALUATE, ("warning: s", "class by class", "chunks of 5000", "in random order"), code=0),
    Situation("fewer samples than features", lambda folder: (images_of(folder), images_of(folder, 200, "r.npz")),
              EVALUATE,
              ("warning: s, classifier:classifier: 60 images in 96 features: the covariance is singular",), code=0),
    Situation("fewer reference images than features",
              lambda folder: (images_of(folder), images_of(folder, 50, "r.npz")), EVALUATE,
              ("from the reference's 50 images", "the covariance of so few is singular in 96 features"), code=0),
    Situation("a folder of PNG as samples, without classes", lambda folder: pngs(folder, [""], 60),
              OF_PNG, ("| png |", "Recall-0.06k"), code=0),
    Situation("a folder of PNG as samples, a folder per class",
              lambda folder: pngs(folder, [str(k) for k in range(10)]),
              OF_PNG, ("| png |", "accuracy"), code=0),
    Situation("a folder of JPEG as samples", lambda folder: pngs(folder, [""], suffix="JPEG"),
              OF_PNG, ("| png |", "warning: png holds JPEG files"), code=0),
    Situation("class folders that are not the classifier's classes", lambda folder: pngs(folder, ["3", "5"]),
              OF_PNG, ("png has 2 class folders, classifier:classifier 10 classes",)),
    Situation("PNG of another size than the reference", lambda folder: pngs(folder, [""], side=9),
              OF_PNG, ("png holds images (9, 9, 1), the reference (8, 8, 1)",)),
    Situation("PNG in colours against a greyscale reference", lambda folder: pngs(folder, [""], mode="RGB"),
              OF_PNG, ("png holds images (8, 8, 3), the reference (8, 8, 1)",)),
    Situation("a folder without images as samples",
              lambda folder: (empty_folder(folder), images_of(folder, name="r.npz")),
              OF_PNG.replace("png", "empty"), ("empty holds no images",)),
    Situation("samples as floats", arrays(arr_0=PIXELS),
              EVALUATE, ("s.npz has arr_0 float64 (60, 8, 8, 3)", "(255 * x).round().astype(numpy.uint8)")),
    Situation("samples with the channels first", arrays(arr_0=(255 * PIXELS).astype("u1").transpose(0, 3, 1, 2)),
              EVALUATE, ("s.npz has arr_0 uint8 (60, 3, 8, 8)", "arr_0.transpose(0, 2, 3, 1)")),
    Situation("samples in [0, 1], cast to whole numbers", arrays(arr_0=PIXELS.round().astype("u1")[..., :1]),
              EVALUATE, ("s.npz holds no value above 1; images in [0, 255] are expected",)),
    Situation("statistics of images in [0, 1], cast to whole numbers",
              arrays(arr_0=PIXELS.round().astype("u1")[..., :1]),
              "evaluation.statistics --images s.npz --space classifier:classifier --output o.npz",
              ("s.npz holds no value above 1; images in [0, 255] are expected",)),
    Situation("samples in [0, 1), cast to whole numbers", arrays(arr_0=np.zeros((60, 8, 8, 1), "u1")),
              EVALUATE, ("s.npz holds no value above 1; images in [0, 255] are expected",)),
    Situation("data of EDM's and REPA's preprocessing", with_index(INDEX),
              STATISTICS, ("20 images, 10 classes,",), code=0),
    Situation("samples with EDM's index", with_index(INDEX), OF_PNG, ("| png |", "accuracy"), code=0),
    Situation("samples that are a pointer of Git LFS",
              lambda folder: (images_of(folder, name="r.npz"), content("s.npz", LFS)(folder)),
              EVALUATE, ("s.npz is a pointer of Git LFS", "`git lfs pull`")),
    Situation("EDM's index without labels", with_index(None), STATISTICS, ("20 images, no labels,",), code=0),
    Situation("EDM's index of other images", with_index(INDEX[1:]),
              STATISTICS, ("png/dataset.json is damaged or something else", "EDM's dataset_tool", "'00000/0.png'")),
    Situation("EDM's index with labels below 0", with_index([[name, k - 1] for name, k in INDEX]),
              STATISTICS, ("png/dataset.json has labels -1 to 8; allowed: 0 to",)),
    Situation("the folder above ImageNet's train and val", lambda folder: pngs(folder, ["train/3", "val/3"]),
              STATISTICS, ("png holds train, val, which are no classes; give one of them: png/train",)),
    Situation("an image that is a link to nothing", dangling,
              STATISTICS, ("png/9a.png", "an image is expected", "FileNotFoundError")),
    Situation("class folders with a number and a name",
              lambda folder: pngs(folder, ["0_cat", "1_dog", "10_bird-2", "2_ant"]),
              STATISTICS, ("class 0 is 0_cat, 1 is 1_dog, 2 is 2_ant, 3 is 10_bird-2",), code=0),
    Situation("class folders that count from 1", lambda folder: pngs(folder, [f"{k:02d}" for k in range(1, 11)]),
              OF_PNG, ("png: the folder 01 is its class 0, but the model's class 1", "by the model's numbers")),
    Situation("samples under another name", arrays(arr_0=None, arr_1=None, images=(255 * PIXELS).astype("u1")),
              EVALUATE, ("s.npz has no arr_0 but images",)),
    Situation("labels that count from 1", arrays(arr_1=np.arange(60) % 10 + 1),
              EVALUATE, ("s.npz has labels from 1 to 10", "knows 0 to 9: do they count from 1?")),
    Situation("statistics of labels that count from 1", arrays(arr_1=np.arange(60) % 10 + 1),
              "evaluation.statistics --images s.npz --space classifier:classifier --output o.npz",
              ("WARNING: classes [0] have no image", "do the labels count from 1?"), code=0),
    Situation("a Frechet reward from class folders named as the teacher's classes, in another order",
              lambda folder: statistics_of(folder, *FASHION),
              FRECHET, ("s.npz", "folder ankle boot is its class 1, but the model's class 9")),
    Situation("a Frechet reward from class folders named by the teacher's numbers",
              lambda folder: statistics_of(folder, *map(str, range(10))),
              FRECHET, ("class 0 is 0, 1 is 1", "9 is 9, by the folders' names"), code=0),
    Situation("a Frechet reward from statistics of class folders without their names", without_names,
              FRECHET, ("WARNING: s.npz", "order of the alphabet, 10 before 2"), code=0),
]  # fmt: skip

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
    Situation("a distilled generator as the teacher", generator_folder, f"{COLD} --teacher distilled --vae none",
              ("--teacher distilled is a distilled generator", "4 step(s)", "--teacher-is-distilled")),
    Situation("a distilled generator as the teacher of a plan", generator_folder,
              f"{COLD} --teacher distilled --vae none --dry-run",
              ("--teacher distilled is a distilled generator", "--teacher-is-distilled")),
    Situation("a pipeline's generator as the teacher", generator_folder,
              f"{COLD} --teacher pipe/generator --vae pipe/vae",
              ("--teacher pipe/generator is a distilled generator", "1 step(s)")),
    Situation("a pipeline as the teacher", generator_folder, f"{COLD} --teacher pipe --vae pipe/vae",
              ("pipe is a diffusers pipeline", "pipe/generator", "a model folder")),
    Situation("a pipeline as the generator", generator_folder, f"{SAMPLES} --generator pipe --vae pipe/vae",
              ("pipe is a diffusers pipeline", "pipe/generator", "a model folder")),
    Situation("a pipeline as the VAE", generator_folder,
              f"{OF_LATENTS} --vae pipe", ("pipe is a diffusers pipeline", "pipe/vae", "AutoencoderKL")),
    Situation("a checkpoint as the teacher", run_checkpoint, f"{COLD} --teacher torch_units/step-3.pt --vae none",
              ("torch_units/step-3.pt is a run's checkpoint", "--resume-ckpt", "export_generator.py --checkpoint")),
    Situation("a classifier as the teacher", nothing, f"{COLD} --teacher classifier --vae none",
              ("classifier/config.json is of a test_", "a model folder of SiT, LightningDiT, DiT is expected")),
    Situation("a VAE in LDM's names as one file", vae_files, f"{OF_LATENTS} --vae ldm.safetensors",
              ("LDM's names", FROM_ONE_FILE.format("ldm.safetensors", "stabilityai/sd-vae-ft-ema"))),
    Situation(
        "a VAE inside a whole model's checkpoint",
        vae_files,
        f"{SAMPLES} --generator latent_teacher --vae whole.ckpt",
        ("whole.ckpt is one file", "LDM's names", FROM_ONE_FILE.format("whole.ckpt", "stabilityai/sd-vae-ft-ema")),
    ),
    Situation("a VAE folder with LDM's names", vae_files,
              f"{OF_LATENTS} --vae mixed", ("LDM's names", FROM_ONE_FILE.format(f"mixed/{WEIGHTS_NAME}", "mixed"))),
    Situation("a VAE in diffusers' names as one file", vae_files, f"{OF_LATENTS} --vae alone.safetensors",
              ("diffusers' names and no config.json", "from_single_file('alone.safetensors'")),
    Situation("the weights' file of a VAE folder", nothing,
              f"{OF_LATENTS} --vae vae/{WEIGHTS_NAME}", ("give the folder, vae",)),
    Situation("another file as the VAE", vae_files, f"{OF_LATENTS} --vae other.safetensors",
              ("other.safetensors is a file without a VAE's tensors", "AutoencoderKL folder is expected")),
    Situation("means per channel without deviations", vae_with(latents_mean=MEAN),
              f"{OF_LATENTS} --vae changed", ("changed/config.json: latents_mean is there without", "latents_std")),
    Situation("three deviations for four channels", vae_with(latents_mean=MEAN, latents_std=STD[:3]),
              f"{OF_LATENTS} --vae changed", ("latents_std is [1.0, 2.0, 3.0]", "a list of 4 numbers")),
    Situation("a deviation of 0", vae_with(latents_mean=MEAN, latents_std=[1.0, 2.0, 0.0, 1.0]),
              f"{OF_LATENTS} --vae changed", ("latents_std is 0.0", "allowed: from 1e-06 to 1e+06")),
    Situation("deviations without a scaling factor",
              vae_with(latents_mean=MEAN, latents_std=STD, scaling_factor="absent"),
              f"{OF_LATENTS} --vae changed", ("scaling_factor is missing", "1.0")),
    Situation("a mean of both kinds", vae_with(latents_mean=MEAN, latents_std=STD, shift_factor=0.5),
              f"{OF_LATENTS} --vae changed", ("shift_factor is 0.5 beside latents_mean",)),
]  # fmt: skip

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
    Situation("a picture of a multi-step teacher and no flags", nothing,
              "evaluation.sample --generator teacher --grid g.png --per-class 1 --classes 3",
              ("note: teacher does not record", "--sampler euler, heun or sde", '1 classes (["3"])'), code=0),
    Situation("an SDE of one step", nothing,
              f"{GENERATE} --sampler sde --num-steps 1", ("--num-steps is 1", "--sampler sde takes 2 at the least")),
    Situation("a shift for the SDE", nothing, f"{GENERATE} --sampler sde --timestep-shift 2",
              ("--timestep-shift is of the few-step sampler's grid; --sampler sde has none",)),
    Situation("more guided channels than there are", nothing,
              f"{GENERATE} --num-steps 1 --guidance-scale 2 --guidance-channels 3",
              ("--guidance-channels is 3; allowed: 1 to 1, the channels of teacher",)),
    Situation("more guided channels than there are, in a picture", nothing,
              f"{SAMPLE} --classes 1 --guidance-channels 2",
              ("--guidance-channels is 2; allowed: 1 to 1, the channels of teacher",)),
    Situation("no guided channel", nothing,
              f"{GENERATE} --guidance-channels 0", ("--guidance-channels is 0; allowed: 1 to 1024",)),
    Situation("times guided, and no scale", nothing, f"{GENERATE} --num-steps 1 --guidance-interval 0 0.7",
              ("note: --guidance-interval and --guidance-channels change nothing: --guidance-scale is 1",), code=0),
    Situation("samples that are there with other settings",
              lambda folder: sampling.main(shlex.split(GENERATE.partition(" ")[2])),
              f"{GENERATE} --num-steps 1 --seed 3",
              ("s.npz exists, made with --seed 0 (asked for: 3); choose another --output",)),
    Situation(
        "a generator whose weights are a pointer of Git LFS",
        lambda folder: (shutil.copytree(folder / "teacher", folder / "g"), content(f"g/{WEIGHTS_NAME}", LFS)(folder)),
        f"{GENERATE.replace('teacher', 'g')} --num-steps 1",
        (f"g/{WEIGHTS_NAME} is a pointer of Git LFS", "`git lfs pull`"),
    ),
    Situation("a class beyond the last", nothing,
              f"{GENERATE} --num-steps 1 --classes 3 10", ("--classes 10: the generator has the classes 0 to 9",)),
    Situation("a class twice", nothing, f"{GENERATE} --num-steps 1 --classes 3 5 3",
              ("--classes names class 3 more than once; give each class once",)),
    Situation("a name without names", nothing,
              f"{GENERATE} --num-steps 1 --classes seven", ("--classes 'seven'", "numbers from 0 to 9", "--names")),
    Situation("names of another number of classes", nine_names,
              f"{GENERATE} --num-steps 1 --classes a --names names.txt",
              ("--names", "names.txt has 9 names; 10 classes are expected")),
    Situation("names that are not there", nothing, f"{GENERATE} --num-steps 1 --classes a --names none.txt",
              ("none.txt does not exist; a text file with one class a line is expected",)),
    Situation("names and no classes", nine_names,
              f"{GENERATE} --num-steps 1 --names names.txt", ("--names is names.txt, but no --classes are given",)),
    Situation("a name that no repository can have", nothing,
              "convert_weight.export_generator --checkpoint step-1.pt --pipeline p --push-to-hub you/sit@main",
              ("--push-to-hub is 'you/sit@main'; a name such as you/dmdr-sit is expected",)),
]  # fmt: skip

# The table is run -------------------------------------------------------------------------------------------------

SITUATIONS = RUNS + PATHS + PROCESSES + PRECISION + CONVERSION + EVALUATION + LATENTS + SAMPLING
UNFINISHED = ("a reward that is NaN at the second update",)  # what was made until then stays


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
    code, before = 0, tree(tmp_path)
    try:
        importlib.import_module(module).main(arguments)
    except SystemExit as stopped:
        code = stopped.code or 0
    printed = "".join(capfd.readouterr())
    missing = [word for word in situation.words if word not in printed]
    assert not missing, f"{missing} not in: {printed}"
    assert code == situation.code, printed
    written = tree(tmp_path).items() ^ before.items()
    assert code == 0 or not written or situation.name in UNFINISHED, written
