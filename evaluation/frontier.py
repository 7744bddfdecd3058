"""The quality-diversity table: what guidance and rewards each trade, over seeds and in several spaces, by one command.

The rows stand in scripts/frontier/RECIPE.toml (evaluation/rows.py says how), or in the file of `--table`. Every row is
trained by the recipe's launchers, sampled and evaluated; `frontier.md`, `frontier.json` and `frontier.png` are written.
Run again, it keeps what was made with the same settings from the same files, continues what was interrupted, and makes
again what is stale, which is moved to `stale/`. The first failure stops all.

`bash scripts/frontier_digits.sh --rows "guidance off" "guidance off + control" --seeds 30`
"""

import argparse
import functools
import os
import sys
from pathlib import Path

from evaluation.asked import (
    ROOT,
    content_sha256,
    contents_of,
    folder_sha256,
    keep_or_put_aside,
    plain_settings,
    recorded_in,
    settings_of,
)
from evaluation.comparison import against_controls, domination, means_of
from evaluation.figures.tables import (
    HELD_OUT,
    named_space,
    over_seeds,
    rewarded_here,
    rewarded_within,
    suffered,
    table,
    table_over_seeds,
)
from evaluation.rows import Row, Table, check_more_flags, read_table, train_flags, words_of
from evaluation.work import Job, Processes, run_all
from train_cc.io import flags
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.figures import read_figures, write_figures
from train_cc.io.products import (
    check_output_dir,
    check_output_file,
    locked,
    record,
    record_of,
    write_atomically,
    write_record,
)
from train_cc.io.read import require_file, require_folder, sha256
from train_cc.io.threads import share_cores
from train_cc.io.weights import WEIGHTS_NAME

LAUNCHERS = {"cold_start": "scripts/cold_start_{}.sh", "dmdr": "scripts/dmdr_{}_refl.sh"}
OUTPUTS = ("frontier.md", "frontier.json", "frontier.png")


class Frontier:
    """Every product has its place under ``folder``; it is made once."""

    def __init__(self, args: argparse.Namespace, rows: Table):
        self.args, self.table, self.folder = args, rows, args.output_dir
        self.processes = Processes()
        self.inputs = {f"input {path}": content_sha256(path) for path in rows.inputs}
        self.teacher_sha256 = folder_sha256(args.teacher)

    def jobs(self) -> list[Job]:
        jobs = [Job("evaluation can begin", self.check, typical=False)]
        for row in self.table.rows:
            for seed in row.seeds:
                needs = [self.table.row(row.cold_start).named(seed)] if row.cold_start else []
                needs.append("evaluation can begin")
                jobs.append(Job(row.named(seed), functools.partial(self.make, row, seed), needs))
        for row in self.table.rows:
            needs = [row.named(seed) for seed in row.seeds]
            jobs.append(Job(f"figures of {row.name}", functools.partial(self.evaluate, row), needs))
        return jobs

    def place(self, kind: str, row: Row, seed: int | None = None) -> Path:
        return self.folder / (kind if seed is None else f"{kind}/seed-{seed}") / row.folder

    def note_of(self, product: Path) -> Path:
        return self.folder / "asked" / product.relative_to(self.folder).with_name(f"{product.name}.json")

    def fresh(self, product: Path, settings: dict[str, str]) -> None:
        """``product`` is not there, or was asked for with ``settings``."""
        keep_or_put_aside(self.note_of(product), settings, product, self.folder / "stale")

    # What is made ---------------------------------------------------------------------------------------------------

    def make(self, row: Row, seed: int) -> bool:
        """The row's generator, where it has one of its own, and its samples."""
        made = row.stage != "teacher" and self.train(row, seed)
        return self.sample(row, seed) or made

    def train(self, row: Row, seed: int) -> bool:
        run = self.place("runs", row, seed)
        made_of, variables = dict(self.inputs), {"OUTPUT_DIR": run.resolve(), "TEACHER": self.args.teacher}
        steps = self.table.base_steps
        if row.cold_start is not None:
            cold = self.place("runs", self.table.row(row.cold_start), seed)
            made_of["cold start"] = folder_sha256(cold / "generator")
            variables["RESUME_CKPT"] = cold.resolve() / "checkpoints" / "torch_units" / f"step-{steps}.pt"
            steps += self.table.extra_steps
        words = [*words_of(self.table, row), "--keep-checkpoints", "1", *self.args.train_flags]
        words += ["--max-train-steps", str(steps), "--seed", str(seed)]
        made_of |= contents_of(words)
        script = LAUNCHERS[row.stage].format(self.args.recipe)
        self.fresh(run, settings_of(ROOT / script, words, teacher=self.teacher_sha256, **made_of))
        done = run / "generator" / "config.json"
        if done.exists():
            return False
        log = self.folder / "logs" / f"seed-{seed}" / f"{row.folder}.txt"
        self.processes.run(["bash", script, *words], log, **variables)
        if not done.exists():
            raise InputError(f"{run} is not finished: its training was stopped; the same command continues")
        return True

    def generator(self, row: Row, seed: int) -> Path:
        return self.args.teacher if row.stage == "teacher" else self.place("runs", row, seed) / "generator"

    def samples(self, row: Row, seed: int) -> Path:
        path = self.place("samples", row, seed)
        return path.with_name(f"{path.name}.npz")

    def sample(self, row: Row, seed: int) -> bool:
        generator, output = self.generator(row, seed), self.samples(row, seed)
        words = words_of(self.table, row) if row.stage == "teacher" else self.table.generate
        words = [*words, "--seed", str(seed)]
        self.fresh(output, plain_settings(words, generator=folder_sha256(generator), **contents_of(words)))
        if output.exists():
            return False
        command = [sys.executable, "-m", "scripts.launch", "evaluation.generate", *words]
        log = self.folder / "logs" / f"seed-{seed}" / f"{row.folder}.txt"
        self.processes.run([*command, "--generator", str(generator), "--output", str(output)], log)
        return True

    def judge(self, samples: list[Path], *more: str) -> list[str]:
        command = [sys.executable, "-m", "evaluation.evaluate", *map(str, samples), str(self.table.reference)]
        return [*command, *self.table.evaluate, *self.args.evaluate_flags, *more]

    def judging(self) -> dict[str, str]:
        """What decides a row's figures, but for its samples."""
        words = [*self.table.evaluate, *self.args.evaluate_flags]
        made_of = self.inputs | {"reference": sha256(self.table.reference)}
        return plain_settings(words, **made_of, **contents_of(words))

    def check(self) -> bool:
        """Spaces and reference are what evaluation can use, before anything is trained for it."""
        judging, places = self.judging().items(), [self.place("rows", row) for row in self.table.rows]
        if all((at / "figures.json").exists() and judging <= recorded_in(self.note_of(at)).items() for at in places):
            return False
        self.processes.run(self.judge([Path("none.npz")], "--check"), self.folder / "logs" / "check.txt")
        return True

    def evaluate(self, row: Row) -> bool:
        folder, samples = self.place("rows", row), [self.samples(row, seed) for seed in row.seeds]
        made_of = {f"samples of seed {seed}": sha256(path) for seed, path in zip(row.seeds, samples, strict=True)}
        self.fresh(folder, self.judging() | made_of)
        output = folder / "figures.json"
        if output.exists():
            return False
        names = [row.named(seed) for seed in row.seeds]
        command = self.judge(samples, "--names", *names, "--output", str(output))
        self.processes.run(command, self.folder / "logs" / "figures" / f"{row.folder}.txt")
        return True

    # What comes of it -----------------------------------------------------------------------------------------------

    def spaces(self) -> list[dict]:
        """All rows of each space, as evaluation.evaluate wrote them; last those over all spaces, if any."""
        found: list[dict] = []
        for row in self.table.rows:
            path = self.place("rows", row) / "figures.json"
            content = read_figures(path)
            judged = [content, *content.get("more_spaces", [])]
            if content.get("over_spaces") and len(judged) > 1:
                judged.append({"features": f"the mean over {len(judged)} spaces", "rows": content["over_spaces"]})
            if not found:
                found = [each | {"rows": {}, "set_size": content.get("set_size")} for each in judged]
            for space, each in zip(found, judged, strict=True):
                if space["features"] != each["features"]:
                    raise InputError(
                        f"{path} is of {each['features']}, other rows of {space['features']}; move it away"
                    )
                space["rows"] |= {name: figures for name, figures in each["rows"].items() if name != HELD_OUT}
                space["real"] = each["rows"].get(HELD_OUT)
        counts = {r["images"] for space in found for r in space["rows"].values()}
        if len(counts) > 1:
            raise InputError(f"the rows of {self.folder} are of {sorted(counts)} images, which do not compare")
        for space in found:
            space["rows"] |= {HELD_OUT: space.pop("real")} if space["real"] else {}
        return found


def build_parser() -> flags.Parser:
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--recipe", choices=["digits", "fashion", "sitxl"], required=True, help="whose launchers")
    parser.add_argument("--table", type=flags.path, help="the rows' file; without it scripts/frontier/RECIPE.toml")
    parser.add_argument("--output-dir", type=flags.path, required=True, help="folder of all rows and of the tables")
    parser.add_argument("--teacher", type=flags.path, required=True, help="model folder")
    parser.add_argument("--rows", nargs="+", default=[], help="only these, and the cold starts that they need")
    parser.add_argument("--seeds", nargs="+", type=flags.SEED, help="in place of the file's")
    parser.add_argument(
        "--train-flags", type=train_flags, default=[], help="more for every training, as --train-flags='--a 1 --b 2'"
    )
    parser.add_argument("--evaluate-flags", type=train_flags, default=[], help="more for every evaluation, likewise")
    parser.add_argument("--jobs", type=flags.integer(1, 64), default=1, help="rows made at once")
    parser.add_argument("--check", action="store_true", help="check the table and end")
    return parser


def check_arguments(args: argparse.Namespace) -> Table:
    """What can be refused before anything is trained. -> the rows that are asked for."""
    args.output_dir, args.teacher = (Path(os.path.abspath(path)) for path in (args.output_dir, args.teacher))
    rows = read_table(args.table or ROOT / "scripts" / "frontier" / f"{args.recipe}.toml")
    rows = rows.only(args.rows, args.seeds and list(dict.fromkeys(args.seeds)))
    require_folder(args.teacher, f"a model folder, with config.json and {WEIGHTS_NAME},", "config.json", WEIGHTS_NAME)
    check_more_flags(rows, args.train_flags, args.evaluate_flags)
    require_file(rows.reference, "the reference, an .npz of real images,")
    for path in rows.inputs:
        if not path.exists():
            raise InputError(f"{path}, one of the table's inputs, does not exist")
    made = record_of(args.output_dir)
    if made and made["stage"] != "frontier":
        raise InputError(f"--output-dir {args.output_dir} holds a {made['stage']}, not a frontier; choose another")
    check_output_dir(args.output_dir, overwrite=True)
    for name in OUTPUTS:
        check_output_file(args.output_dir / name, True, "the output")
    return rows


def text_of(rows: Table, spaces: list[dict], means: list[dict], title: str) -> str:
    """The Markdown page: per space a table over seeds, the differences from the controls, and who dominates."""
    against = {row.name: row.against for row in rows.rows if row.against}
    published = [row.name for row in rows.rows if row.published]
    parts = [f"# {title}", "Means over seeds +- the standard deviation of one seed."]
    for space, mean in zip(spaces, means, strict=True):
        count, size = next(iter(space["rows"].values()))["images"], space.get("set_size")
        named = [(name, row) for name, group in over_seeds(space["rows"]).items() for row in group]
        made_by = [(name, row.get("generation")) for name, row in named]
        parts += [f"## {named_space(space['features'])}", *rewarded_here(made_by, space.get("features_sha256", ""))]
        parts += rewarded_within(dict(named))
        parts += [table_over_seeds(space["rows"], count, size)]
        if all(row["seeds"] == 1 for row in mean["rows"].values()):
            parts[-1] = table(space["rows"], count, size)
        parts += [f"Missing: {space['missing']}."] if "missing" in space else []
        parts.append(against_controls(mean["rows"], against))
        parts.append("\n".join(f"- {line}" for line in domination(mean["rows"], published)))
        parts.append("\n".join(f"- {line}" for line in suffered(space["rows"], together=True)))
    return "\n\n".join(part for part in parts if part) + "\n"


def colour_of(row: Row) -> str:
    from evaluation import scatter

    if row.stage != "dmdr":
        return scatter.TEACHER if row.stage == "teacher" else scatter.COLD_START
    return scatter.REWARD if row.against else scatter.CONTROL


def write_results(args: argparse.Namespace, rows: Table, spaces: list[dict]) -> str:
    means = [space | {"rows": means_of(space["rows"])} for space in spaces]
    text = text_of(rows, spaces, means, f"Frontier of {args.recipe}")
    write_atomically(args.output_dir / "frontier.md", text)
    first, *more = means
    named = {"more_spaces": more, "set_size": first.get("set_size"), "table": str(args.table or args.recipe)}
    named |= {"missing": first["missing"]} if "missing" in first else {}
    write_figures(args.output_dir / "frontier.json", first["rows"], features=first["features"], **named)
    from evaluation.scatter import picture  # matplotlib takes a second

    drawn = [each for each in means if "Precision" in next(iter(each["rows"].values()))["figures"]]
    colours = {row.name: colour_of(row) for row in rows.rows}
    against = {row.name: row.against for row in rows.rows if row.against}
    if drawn:
        picture(drawn, colours, against, args.output_dir / "frontier.png")
    else:
        print("no picture: no row has recall and precision")
    return text


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    rows = check_arguments(args)
    if args.check:
        print(f"{len(rows.rows)} rows, {sum(len(row.seeds) for row in rows.rows)} with their seeds: the table is right")
        return
    share_cores(args.jobs)
    with locked(args.output_dir):
        if not record_of(args.output_dir):
            write_record(args.output_dir, record("frontier", vars(args)))
        frontier = Frontier(args, rows)
        run_all(frontier.jobs(), frontier.processes, args.jobs)
        print(write_results(args, rows, frontier.spaces()))
    print(f"written: {', '.join(str(path) for path in sorted(args.output_dir.glob('frontier.*')))}")


if __name__ == "__main__":
    main()
