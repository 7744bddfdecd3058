"""The jobs of a frontier: every row trained, sampled and evaluated. What the same settings and files made is kept."""

import argparse
import functools
import importlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from evaluation import evaluate, generate
from evaluation.samples.files import content_sha256
from evaluation.study.rows import JUDGING, SAMPLING, Row, Table
from scripts.jobs import ROOT, Command, Job, finished
from scripts.launch import make_plan
from train_cc.io.errors import InputError
from train_cc.io.fields import marked
from train_cc.io.products import differences, record, record_of, write_record
from train_cc.io.read import sha256
from train_cc.settings import Output

LAUNCHERS = {"cold_start": "scripts/cold_start_{}.sh", "dmdr": "scripts/dmdr_{}_refl.sh"}
# Settings that change nothing of what is made; teacher and samples are compared by their contents only.
ASIDE = {*marked("start", Output), "teacher", "holdout_classifier", "generator", "output", "samples", "reference"}


class Frontier:
    """Every product has its place under the output folder; it is made once."""

    def __init__(self, args: argparse.Namespace, table: Table):
        self.args, self.table, self.folder = args, table, args.output_dir.resolve()
        self.teacher = Path(os.path.abspath(args.teacher))
        self.teacher_sha256 = content_sha256(self.teacher)
        self.launched = {stage: self.launch(stage) for stage in {row.stage for row in table.rows} & LAUNCHERS.keys()}

    def launch(self, stage: str) -> tuple[dict[str, str], str, list[str]]:
        """The processes that a stage's launcher would start here, their module and its flags: it prints them."""
        environment = os.environ | {"SHOW_LAUNCH": "yes"}
        command = ["bash", ROOT / LAUNCHERS[stage].format(self.args.recipe)]
        process = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        processes, module, *words = process.stdout.split("\0")[:-1]
        plan = make_plan(os.environ | ({"NUM_PROCESSES": processes} if processes else {}), dry=True)
        return plan.environment, module, words

    def jobs(self) -> list[Job]:
        jobs = []
        for row in self.table.rows:
            for seed in self.table.seeds:
                needs = [self.table.row(row.cold_start).named(seed)] if row.cold_start else []
                log = self.place("logs", row, seed, ".txt")
                jobs.append(Job(row.named(seed), self.make(row, seed), log, needs))
        for row in self.table.rows:
            log = self.place("logs/figures", row, suffix=".txt")
            needs = [row.named(seed) for seed in self.table.seeds]
            jobs.append(Job(f"figures of {row.name}", self.evaluate(row), log, needs))
        return jobs

    def place(self, kind: str, row: Row, seed: int | None = None, suffix: str = "") -> Path:
        return self.folder / (kind if seed is None else f"{kind}/seed-{seed}") / f"{row.folder}{suffix}"

    # What is made ---------------------------------------------------------------------------------------------------

    def make(self, row: Row, seed: int) -> Iterator[Command]:
        """The row's generator, where it has one of its own, and its samples."""
        generator = self.teacher
        if row.stage != "teacher":
            yield from self.train(row, seed)
            generator = self.place("runs", row, seed) / "generator"
        output = self.place("samples", row, seed, ".npz")
        words = [*(row.flags if row.stage == "teacher" else self.table.generate), "--seed", str(seed)]
        args = generate.build_parser().parse_args(SAMPLING + words)
        if not self.kept(output, settings_of(args, generator=content_sha256(generator))):
            command = [sys.executable, "-m", "scripts.launch", "evaluation.generate", *words]
            yield Command([*command, "--generator", str(generator), "--output", str(output)])

    def train(self, row: Row, seed: int) -> Iterator[Command]:
        run, steps = self.place("runs", row, seed), self.table.base_steps
        environment, module, launched = self.launched[row.stage]
        variables, more = {"OUTPUT_DIR": str(run), "TEACHER": str(self.teacher)}, {"teacher": self.teacher_sha256}
        if row.cold_start is not None:
            cold = self.place("runs", self.table.row(row.cold_start), seed)
            more["cold start"] = content_sha256(cold / "generator")
            variables["RESUME_CKPT"] = str(cold / "checkpoints" / "torch_units" / f"step-{steps}.pt")
            steps += self.table.extra_steps
        words = [*row.flags, "--keep-checkpoints", "1", *self.args.train_flags]
        words += ["--max-train-steps", str(steps), "--seed", str(seed)]
        args = importlib.import_module(module).stage_parser().parse_args([*launched, *words])
        if not self.kept(run, settings_of(args, **environment, **more)) or not finished(run):
            yield Command(["bash", LAUNCHERS[row.stage].format(self.args.recipe), *words], variables)
            if not finished(run):
                raise InputError(f"{run} is not finished: its training was stopped; the same command continues")

    def judge(self, samples: list[Path], *more: str) -> Command:
        command = [sys.executable, "-m", "evaluation.evaluate", *map(str, samples), str(self.table.reference)]
        return Command([*command, *self.table.evaluate, *self.args.evaluate_flags, *more])

    @functools.cached_property
    def judging(self) -> dict:
        """All that decides a row's figures, but for its samples."""
        words = [*JUDGING, *self.table.evaluate, *self.args.evaluate_flags]
        return settings_of(evaluate.build_parser().parse_args(words), reference=sha256(self.table.reference))

    def check(self) -> Iterator[Command]:
        """Spaces and reference are what evaluation can use, before anything is trained for it."""
        places = [self.place("rows", row) for row in self.table.rows]
        records = [record_of(self.note_of(at)) if (at / "figures.json").exists() else {} for at in places]
        if any(differences(each, self.judging) for each in records):
            yield self.judge([Path("none.npz")], "--check")

    def evaluate(self, row: Row) -> Iterator[Command]:
        folder, names = self.place("rows", row), [row.named(seed) for seed in self.table.seeds]
        samples = [self.place("samples", row, seed, ".npz") for seed in self.table.seeds]
        made_of = {f"samples of {name}": sha256(path) for name, path in zip(names, samples, strict=True)}
        if not self.kept(folder, self.judging | {"samples": made_of}) or not (folder / "figures.json").exists():
            yield self.judge(samples, "--names", *names, "--output", str(folder / "figures.json"))

    # What is kept ---------------------------------------------------------------------------------------------------

    def note_of(self, product: Path) -> Path:
        """The folder of the record of ``product``."""
        return self.folder / "settings" / product.relative_to(self.folder)

    def kept(self, product: Path, settings: dict) -> bool:
        """True if ``product`` is there, made with ``settings``; they are recorded. A stale one is moved, never deleted.

        Raises `InputError` for a product without a record: nobody knows whose it is.
        """
        note = self.note_of(product)
        if product.exists() and (product.is_file() or any(product.iterdir())):
            if not note.is_dir():
                raise InputError(f"{product} is there, but {note}, which says how it was made, is not: move it away")
            words = differences(record_of(note), settings)
            if not words:
                return True
            names = (self.folder / "stale" / f"{product.name}-{number}" for number in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            aside.parent.mkdir(exist_ok=True)
            os.replace(product, aside)
            print(f"stale: {product} was made with {'; '.join(words[:6])}; now in stale/{aside.name}", flush=True)
        note.mkdir(parents=True, exist_ok=True)
        write_record(note, settings)
        return False


def settings_of(args: argparse.Namespace, **contents: str) -> dict:
    """The record of the flags that decide what a command makes, paths in full, and of the contents of files in them.

    ``contents``: of other files, and what else decides.
    """
    words = {name: list(words_in(value)) for name, value in vars(args).items() if name not in ASIDE}
    for word in itertools.chain(*words.values()):
        for part in word.rpartition(":"):
            if os.path.isabs(part) and os.path.exists(part):
                contents[f"content of {word}"] = content_sha256(Path(part))
    return record("frontier", {name: " ".join(each) for name, each in words.items() if each}, contents=contents)


def words_in(value: object) -> Iterator[str]:
    """The words of a flag's value. A path, also of SPACE:PATH or FILE:FUNCTION, is in full if it exists."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from words_in(each)
    elif isinstance(value, str | Path):
        parts = re.split("(:)", str(value))
        yield "".join(os.path.realpath(part) if part.strip(":.") and os.path.exists(part) else part for part in parts)
    elif value is not None:
        yield str(value)
