"""The rows of a frontier, read from a file such as scripts/frontier/digits.toml, checked before anything is trained.

At the top of the file: `seeds`; `base_steps`, generator updates of a cold start, and `extra_steps`, those of DMDR;
`reference`, the .npz of real images; `generate`, `evaluate` and `train`, flags of every sampling, evaluation and
training. Its tables are of names and flags: [teachers], flags of evaluation.generate; [cold_starts], flags of the
training; [additions], flags of the updates after a cold start, among them `control`, with which others are compared.
[rows] has the additions to each cold start: a row is named "COLD START", or "COLD START + ADDITION", and has the flags
of both. `published` names cold starts and additions whose rows are of the published frontier.
Flags are one string, quoted as in a shell; $NAME is a variable of the environment.
"""

import argparse
import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path

from evaluation import evaluate, generate
from evaluation.figures.tables import HELD_OUT
from scripts.jobs import tomllib, words_of
from train_cc.io import fields
from train_cc.io.errors import InputError
from train_cc.io.fields import setting
from train_cc.io.read import parsing, printable, require_file
from train_cc.setup.arguments import build_parser

# What the frontier gives every training and sampling itself.
OWN = {"--output-dir", "--output", "--teacher", "--generator", "--seed", "--resume-ckpt", "--max-train-steps"}
OWN |= {"--names", "--over-seeds", "--auto-resume", "--overwrite", "--dry-run"}
SAMPLING = ["--generator", "g", "--output", "o"]  # what evaluation.generate asks for, while its flags are checked
TRAINING = ["--teacher", "t", "--output-dir", "o"]  # and a stage
JUDGING = ["s.npz", "r.npz"]  # and evaluation.evaluate
CONTROL = "control"


@dataclass(frozen=True)
class TableFile:
    """The keys of a file of rows."""

    seeds: tuple = setting()
    base_steps: int = setting()
    extra_steps: int = setting()
    reference: str = setting()
    evaluate: str = setting()
    cold_starts: dict = setting()
    generate: str = setting("")
    train: str = setting("")
    teachers: dict | None = setting(None)
    additions: dict | None = setting(None)
    rows: dict | None = setting(None)
    published: tuple = setting(())


@dataclass(frozen=True)
class Row:
    """``flags`` are of its training, or of a teacher's sampling."""

    name: str
    flags: list[str]
    stage: str = "cold_start"
    cold_start: str | None = None  # the row that a dmdr row starts from
    against: str | None = None
    published: bool = False

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
    seeds: list[int]
    base_steps: int
    extra_steps: int
    reference: Path
    generate: list[str]
    evaluate: list[str]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def only(self, names: list[str], seeds: list[int] | None) -> "Table":
        """The rows of those names and the cold starts that they need, in the file's order. Raises `InputError`."""
        every = [row.name for row in self.rows]
        for name in names:
            if name not in every:
                raise InputError(f"--rows {name!r} is not in the table; its rows are {', '.join(every)}")
        chosen = set(names or every)
        chosen |= {row.cold_start for row in self.rows if row.name in chosen}
        return dataclasses.replace(
            self, rows=[row for row in self.rows if row.name in chosen], seeds=seeds or self.seeds
        )


def read_table(path: Path) -> Table:
    """Raises `InputError`, with the row's name, for whatever cannot be trained as it is written."""
    require_file(path, "a table of rows, such as scripts/frontier/digits.toml")
    with parsing(path, "a TOML file"):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    content = TableFile(**fields.check(TableFile, content, path))
    for seed in content.seeds:
        fields.check_numbers({"seeds": seed}, {"seeds": fields.SEED}, path)
    if not content.seeds:
        raise InputError(f"{path}: seeds is []; a list of whole numbers is expected")
    texts = ("generate", "evaluate", "train", "reference")
    sampling, judging, training, reference = (words_of(getattr(content, name), f"{path}: {name}") for name in texts)
    rows = read_rows(content, training, sampling, path)
    counts = {parse(generate.build_parser(), SAMPLING, sampling, f"{path}: generate").num_images}
    for row in rows:
        counts |= check_flags(row, f"{path}, row {row.name!r}")
    if len(counts) > 1:
        raise InputError(f"{path}: rows of {sorted(counts)} images do not compare; give --num-images to all or none")
    parse(evaluate.build_parser(), JUDGING, judging, f"{path}: evaluate")
    seeds, steps = list(dict.fromkeys(content.seeds)), (content.base_steps, content.extra_steps)
    return Table(rows, seeds, *steps, Path(" ".join(reference)), sampling, judging)


def read_rows(content: TableFile, train: list[str], sampling: list[str], path: Path) -> list[Row]:
    """All rows in their order: teachers, then each cold start and what is added to it. Raises `InputError`."""
    teachers, cold_starts, additions = (
        {name: words_of(text, f"{path}, {key}, {name!r}") for name, text in (getattr(content, key) or {}).items()}
        for key in ("teachers", "cold_starts", "additions")
    )
    with parsing(path, "a list of additions to each cold start in [rows]"):
        added = {cold: [str(name) for name in names] for cold, names in (content.rows or {}).items()}
    published = set(map(str, content.published))
    wrong = [*(added.keys() - cold_starts.keys()), *(published - cold_starts.keys() - additions.keys())]
    wrong += [name for names in added.values() for name in names if name not in additions]
    if wrong:
        raise InputError(f"{path}: {wrong[0]!r} has no flags; there are {', '.join([*cold_starts, *additions])}")
    rows = [Row(name, [*sampling, *words], "teacher") for name, words in teachers.items()]
    for cold, words in cold_starts.items():
        rows.append(Row(cold, [*train, *words], published=cold in published))
        for name in added.get(cold, ()):
            against = f"{cold} + {CONTROL}" if name != CONTROL and CONTROL in added[cold] else None
            own = [*train, *words, *additions[name]]
            rows.append(Row(f"{cold} + {name}", own, "dmdr", cold, against, {cold, name} <= published))
    for row in rows:
        where, lone = f"{path}, row {row.name!r}", row.name.strip(" .") and row.name == printable(row.name)
        if not lone or len(row.name) > 100 or ", seed " in row.name or row.name == HELD_OUT:
            raise InputError(
                f"{where}: a name is one line of at most 100 characters, without ', seed ', not {HELD_OUT!r}"
            )
        same = [other.name for other in rows if other.folder == row.folder]
        if len(same) > 1:
            raise InputError(f"{where}: its files could not be told from those of {same[1]!r}")
    return rows


def check_flags(row: Row, where: str) -> set[int]:
    """Raises `InputError` for wrong flags and for a reward without its file. Returns a teacher's number of images."""
    if row.stage == "teacher":
        return {parse(generate.build_parser(), SAMPLING, row.flags, where).num_images}
    args = parse(build_parser(""), TRAINING, row.flags, where)
    for spec in [*args.reward, *args.tilt]:
        if spec.kind in ("frechet", "kl", "python"):
            require_file(Path(spec.source.rpartition(":")[0] or spec.source), f"{where}: the source of its reward")
    return set()


def check_more_flags(table: Table, training: list[str], judging: list[str]) -> None:
    """Check the flags that a command line adds to every training and evaluation. Raises `InputError`."""
    parse(build_parser(""), TRAINING, training, "--train-flags")
    parse(evaluate.build_parser(), JUDGING + table.evaluate, judging, "--evaluate-flags")


def parse(parser: argparse.ArgumentParser, before: list[str], own: list[str], where: str) -> argparse.Namespace:
    for word in own:
        if (flag := word.partition("=")[0]) in OWN:
            raise InputError(f"{where}: {flag} is the frontier's to set; leave it out")
    try:
        return parser.parse_args(before + own)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except SystemExit as error:  # --help among the flags
        raise InputError(f"{where}: its flags ask for help, not for a run") from error


def flags_in(text: str) -> list[str]:
    """The flags in the one word of --train-flags or --evaluate-flags."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is {text!r}; allowed: flags, quoted as in a shell ({error})") from error
