"""The rows of a frontier, read from a file such as scripts/frontier/digits.toml, checked before anything is trained.

At the top of the file: `seeds`; `base_steps`, generator updates of a cold start, and `extra_steps`, those of DMDR;
`reference`, the .npz of real images; `generate`, `evaluate` and `train`, flags of every sampling, evaluation and
training; `inputs`, files and folders that the launchers read, whose contents decide whether a row is still valid.

A [[row]] has a `name` and a `stage`: `teacher` (its `flags` are of evaluation.generate), `cold_start`, or `dmdr` (its
`flags` are of the training). A dmdr row starts `from` a cold start's row: with its flags, and then its own; `against`
names the control that it is compared with; `published` marks a row of the published frontier; `seeds` are its own.
Flags are one string, quoted as in a shell; $NAME is a variable of the environment.
"""

import argparse
import dataclasses
import os
import shlex
import string
import sys
from dataclasses import dataclass, field
from pathlib import Path

from evaluation import evaluate, generate
from evaluation.figures.tables import HELD_OUT
from train_cc.io.errors import InputError
from train_cc.io.read import parsing, printable, require_file
from train_cc.setup.arguments import build_parser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STAGES = ("teacher", "cold_start", "dmdr")
# What the frontier gives every training and sampling itself.
OWN = {"--output-dir", "--output", "--teacher", "--generator", "--seed", "--resume-ckpt", "--max-train-steps"}
OWN |= {"--names", "--over-seeds", "--auto-resume", "--overwrite", "--dry-run"}
SAMPLING = ["--generator", "g", "--output", "o"]  # what evaluation.generate asks for, while its flags are checked
TRAINING = ["--teacher", "t", "--output-dir", "o"]  # and a stage
JUDGING = ["s.npz", "r.npz"]  # and evaluation.evaluate
NEEDED = ("seeds", "base_steps", "extra_steps", "reference", "evaluate", "row")
OPTIONAL = ("generate", "train", "inputs")
MOST_STEPS, MOST_SEED = 10**9, 2**63 - 1


@dataclass(frozen=True)
class Row:
    name: str
    stage: str
    flags: list[str] = field(default_factory=list)
    cold_start: str | None = None  # the row that a dmdr row starts from; "from" in the file
    against: str | None = None
    published: bool = False
    seeds: list[int] = field(default_factory=list)

    @property
    def folder(self) -> str:
        """Its name as a folder's."""
        words = self.name.replace("<=", "upto").replace("+", "and")
        return "".join(c if c.isalnum() or c == "." else "_" for c in words)

    def named(self, seed: int) -> str:
        return f"{self.name}, seed {seed}"


@dataclass(frozen=True)
class Table:
    rows: list[Row]
    base_steps: int
    extra_steps: int
    reference: Path
    generate: list[str]
    evaluate: list[str]
    train: list[str]
    inputs: list[Path]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def only(self, names: list[str], seeds: list[int] | None) -> "Table":
        """Those rows and the cold starts that they need, in the file's order. Raises `InputError`."""
        known = [row.name for row in self.rows]
        for name in names:
            if name not in known:
                raise InputError(f"--rows {name!r} is not in the table; its rows are {', '.join(known)}")
        kept = set(names or known)
        kept |= {row.cold_start for row in self.rows if row.name in kept}
        rows = [row for row in self.rows if row.name in kept]
        return dataclasses.replace(self, rows=[dataclasses.replace(row, seeds=seeds or row.seeds) for row in rows])


def read_table(path: Path) -> Table:
    """Raises `InputError`, with the row's name, for whatever cannot be trained as it is written."""
    require_file(path, "a table of rows, such as scripts/frontier/digits.toml")
    with parsing(path, "a TOML file"):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    top = f"{path}"
    flags_of = ("generate", "evaluate", "train")
    check_keys(content, NEEDED, OPTIONAL, top)
    words = {name: split(content.get(name, ""), f"{top}: {name}") for name in flags_of}
    steps = {name: whole(content[name], 1, MOST_STEPS, f"{top}: {name}") for name in ("base_steps", "extra_steps")}
    seeds = seeds_of(content["seeds"], f"{top}: seeds")
    if not isinstance(content["row"], list) or not all(isinstance(row, dict) for row in content["row"]):
        raise InputError(f"{top}: row is {str(content['row'])[:80]!r}; [[row]] tables are expected")
    rows = [read_row(each, number, seeds, top) for number, each in enumerate(content["row"], 1)]
    check_names(rows, top)
    inputs = content.get("inputs", [])
    if not isinstance(inputs, list):
        raise InputError(f"{top}: inputs is {str(inputs)[:80]!r}; a list of paths is expected")
    table = Table(
        rows,
        reference=Path(filled(content["reference"], f"{top}: reference")),
        inputs=[Path(filled(each, f"{top}: inputs")) for each in inputs],
        **words,
        **steps,
    )
    sampling = parse(generate.build_parser(), SAMPLING + table.generate, table.generate, f"{top}: generate")
    counts = {sampling.num_images}
    for row in rows:
        args = check_flags(table, row, f"{top}, row {row.name!r}")
        counts |= {args.num_images} if row.stage == "teacher" else set()
    if len(counts) > 1:
        raise InputError(f"{top}: rows of {sorted(counts)} images do not compare; give --num-images to all or none")
    parse(evaluate.build_parser(), JUDGING + table.evaluate, table.evaluate, f"{top}: evaluate")
    return table


def read_row(content: dict, number: int, seeds: list[int], top: str) -> Row:
    where = f"{top}, row {content.get('name', number)!r}"
    check_keys(content, ("name", "stage"), ("flags", "from", "against", "published", "seeds"), where)
    for key in ("name", "stage", "from", "against"):
        if not isinstance(content.get(key, ""), str):
            raise InputError(f"{where}: {key} is {content[key]!r}; a string is expected")
    name, stage = content["name"], content["stage"]
    if not name.strip(" .") or len(name) > 100 or name != printable(name) or ", seed " in name or name == HELD_OUT:
        raise InputError(f"{where}: a name is one line of at most 100 characters, without ', seed ', not {HELD_OUT!r}")
    if stage not in STAGES:
        raise InputError(f"{where}: stage is {stage!r}; allowed: {', '.join(STAGES)}")
    if ("from" in content) != (stage == "dmdr"):
        raise InputError(f"{where}: a dmdr row, and no other, starts from a cold start: from = NAME")
    if not isinstance(content.get("published", False), bool):
        raise InputError(f"{where}: published is {content['published']!r}; true or false is expected")
    own = seeds_of(content["seeds"], f"{where}: seeds") if "seeds" in content else seeds
    words = split(content.get("flags", ""), f"{where}: flags")
    return Row(name, stage, words, content.get("from"), content.get("against"), content.get("published", False), own)


def check_names(rows: list[Row], top: str) -> None:
    """Every name is there once, and whatever a row names is there. Raises `InputError`."""
    seen: dict[str, str] = {}
    for row in rows:
        if row.folder in seen:
            raise InputError(
                f"{top}: two rows are named {seen[row.folder]!r} and {row.name!r}: they cannot be told apart"
            )
        seen[row.folder] = row.name
    stages = {row.name: row.stage for row in rows}
    for row in rows:
        if row.cold_start is not None and stages.get(row.cold_start) != "cold_start":
            raise InputError(f"{top}, row {row.name!r}: from is {row.cold_start!r}, which is no cold_start row")
        if row.against is not None and row.against not in stages:
            raise InputError(f"{top}, row {row.name!r}: against is {row.against!r}, which is no row")
        if row.cold_start is not None:
            lacking = set(row.seeds) - {seed for each in rows if each.name == row.cold_start for seed in each.seeds}
            if lacking:
                raise InputError(f"{top}, row {row.name!r}: its cold start has no seed {sorted(lacking)}")


def words_of(table: Table, row: Row) -> list[str]:
    """The flags of a row's training, or of a teacher's sampling."""
    if row.stage == "teacher":
        return [*table.generate, *row.flags]
    inherited = table.row(row.cold_start).flags if row.cold_start else []
    return [*table.train, *inherited, *row.flags]


def check_flags(table: Table, row: Row, where: str) -> argparse.Namespace:
    """The stage's own parser takes them, and the files that rewards read are there. Raises `InputError`."""
    words = words_of(table, row)
    if row.stage == "teacher":
        return parse(generate.build_parser(), SAMPLING + words, words, where)
    args = parse(build_parser(""), TRAINING + words, words, where)
    for spec in [*args.reward, *args.tilt]:
        if spec.kind in ("frechet", "python"):
            require_file(Path(spec.source.rpartition(":")[0] or spec.source), f"{where}: the source of its reward")
    return args


def check_more_flags(table: Table, training: list[str], judging: list[str]) -> None:
    """What a command line adds to every training and every evaluation. Raises `InputError`."""
    parse(build_parser(""), TRAINING + training, training, "--train-flags")
    parse(evaluate.build_parser(), JUDGING + table.evaluate + judging, judging, "--evaluate-flags")


def parse(parser: argparse.ArgumentParser, words: list[str], own: list[str], where: str) -> argparse.Namespace:
    for word in own:
        if (flag := word.partition("=")[0]) in OWN:
            raise InputError(f"{where}: {flag} is the frontier's to set; leave it out")
    try:
        return parser.parse_args(words)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except SystemExit as error:  # --help among the flags
        raise InputError(f"{where}: its flags ask for help, not for a run") from error


# Values -----------------------------------------------------------------------------------------------------------


def check_keys(content: dict, needed: tuple[str, ...], optional: tuple[str, ...], where: str) -> None:
    missing = [key for key in needed if key not in content]
    unknown = [printable(key)[:40] for key in content if key not in (*needed, *optional)]
    for told, keys in (("lacks", missing), ("has unknown", unknown)):
        if keys:
            raise InputError(f"{where} {told} {', '.join(keys)}; allowed: {', '.join((*needed, *optional))}")


def whole(value: object, low: int, high: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{where} is {str(value)[:80]}; a whole number from {low} to {high} is expected")
    return value


def seeds_of(value: object, where: str) -> list[int]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} is {str(value)[:80]!r}; a list of whole numbers is expected")
    seeds = [whole(each, 0, MOST_SEED, where) for each in value]
    if len(set(seeds)) != len(seeds):
        raise InputError(f"{where} is {seeds}: each seed once")
    return seeds


def filled(text: object, where: str) -> str:
    """``text`` with the variables of the environment that it names."""
    if not isinstance(text, str) or not text or "\0" in text:
        raise InputError(f"{where} is {text!r}; a string is expected")
    try:
        return string.Template(text).substitute(os.environ)
    except KeyError as error:
        raise InputError(
            f"{where} is {text!r}, but the variable {error.args[0]} is not set: set it, or start the "
            "frontier by its script in scripts/"
        ) from error
    except ValueError as error:
        raise InputError(f"{where} is {text!r}: $ begins the name of a variable; write $$ for a plain one") from error


def split(text: object, where: str) -> list[str]:
    if not isinstance(text, str):
        raise InputError(f"{where} is {str(text)[:80]!r}; flags are one string")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"{where} is {text[:80]!r}; flags quoted as in a shell are expected ({error})") from error
    return [filled(word, where) for word in words if word]


def train_flags(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is {text!r}; allowed: flags, quoted as in a shell ({error})") from error
