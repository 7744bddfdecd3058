"""The quality-diversity table: what guidance and rewards each trade, over seeds and in several spaces, by one command.

The rows are those of scripts/frontier/RECIPE.toml (evaluation/study/rows.py says how) or of `--table`. Every row is
trained by the recipe's launchers, sampled and evaluated; `frontier.md`, `frontier.json` and `frontier.png` are written.
Run again, it keeps what was made with the same settings from the same files, continues what was interrupted, and makes
again what is stale, which is moved to `stale/`. The first failure stops all.

`bash scripts/frontier_digits.sh --rows "guidance off" "guidance off + control" --seeds 30`
"""

import argparse
import os
from pathlib import Path

from evaluation.figures import tables
from evaluation.study.comparison import against_controls, domination, picture
from evaluation.study.jobs import Frontier
from evaluation.study.rows import Table, check_more_flags, flags_in, read_table
from scripts.jobs import ROOT, Job, run_all
from train_cc.io import fields
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.figures import read_figures, write_figures
from train_cc.io.products import check_output_dir, locked, record, record_of, write_atomically, write_record
from train_cc.io.read import require_file, require_folder
from train_cc.io.threads import share_cores
from train_cc.io.weights import WEIGHTS_NAME


def build_parser() -> fields.Parser:
    parser = fields.Parser(description=__doc__)
    parser.add_argument("--recipe", choices=["digits", "fashion", "sitxl"], required=True, help="whose launchers")
    parser.add_argument("--table", type=fields.path, help="the rows' file; without it scripts/frontier/RECIPE.toml")
    parser.add_argument("--output-dir", type=fields.path, required=True, help="folder of all rows and of the tables")
    parser.add_argument("--teacher", type=fields.path, required=True, help="model folder")
    parser.add_argument("--rows", nargs="+", default=[], help="only these, and the cold starts that they need")
    parser.add_argument("--seeds", nargs="+", type=fields.SEED, help="in place of the file's")
    parser.add_argument(
        "--train-flags", type=flags_in, default=[], help="more for every training, as --train-flags='--a 1 --b 2'"
    )
    parser.add_argument("--evaluate-flags", type=flags_in, default=[], help="more for every evaluation, likewise")
    parser.add_argument("--jobs", type=fields.integer(1, 64), default=1, help="rows made at once")
    parser.add_argument("--check", action="store_true", help="check the table and end")
    return parser


def check_arguments(args: argparse.Namespace) -> Table:
    """Refuse what can be refused before anything is trained. -> the rows that are asked for."""
    rows = read_table(args.table or ROOT / "scripts" / "frontier" / f"{args.recipe}.toml")
    rows = rows.only(args.rows, args.seeds and list(dict.fromkeys(args.seeds)))
    require_folder(args.teacher, f"a model folder, with config.json and {WEIGHTS_NAME},", "config.json", WEIGHTS_NAME)
    check_more_flags(rows, args.train_flags, args.evaluate_flags)
    require_file(rows.reference, "the reference, an .npz of real images,")
    stage = record_of(args.output_dir).get("stage", "frontier")
    if stage != "frontier":
        raise InputError(f"--output-dir {args.output_dir} holds a {stage}, not a frontier; choose another")
    check_output_dir(args.output_dir, overwrite=True)
    return rows


def spaces_of(places: list[Path]) -> list[dict]:
    """All rows of each space, as evaluation.evaluate wrote them; last those over all spaces, if any."""
    spaces: list[dict] = []
    for path in places:
        content = read_figures(path)
        judged = [content, *content.get("more_spaces", [])]
        if content.get("over_spaces") and len(judged) > 1:
            judged.append({"features": f"the mean over {len(judged)} spaces", "rows": content["over_spaces"]})
        spaces = spaces or [each | {"rows": {}, "set_size": content.get("set_size")} for each in judged]
        for space, each in zip(spaces, judged, strict=True):
            if space["features"] != each["features"]:
                raise InputError(f"{path} is of {each['features']}, other rows of {space['features']}; move it away")
            space["rows"].pop(tables.HELD_OUT, None)  # it is the last row of every file
            space["rows"] |= each["rows"]
    return spaces


def text_of(rows: Table, spaces: list[dict], means: list[dict], title: str) -> str:
    """The Markdown page: per space a table over seeds, the differences from the controls, and who dominates."""
    against = {row.name: row.against for row in rows.rows if row.against}
    published = [row.name for row in rows.rows if row.published]
    parts = [f"# {title}", "Means over seeds +- the standard deviation of one seed."]
    for space, mean in zip(spaces, means, strict=True):
        count, size = next(iter(space["rows"].values()))["images"], space.get("set_size")
        rows_of_seeds = [(name, row) for name, group in tables.over_seeds(space["rows"]).items() for row in group]
        made_by = [(name, row.get("generation")) for name, row in rows_of_seeds]
        parts += [
            f"## {tables.named_space(space['features'])}",
            *tables.rewarded_here(made_by, space.get("features_sha256", "")),
        ]
        parts += tables.rewarded_within(dict(rows_of_seeds))
        one_seed = all(row["seeds"] == 1 for row in mean["rows"].values())
        parts += [tables.table((space if one_seed else mean)["rows"], count, size)]
        parts += [f"Missing: {space['missing']}."] if "missing" in space else []
        parts.append(against_controls(mean["rows"], against))
        parts.append("\n".join(f"- {line}" for line in domination(mean["rows"], published)))
        parts.append("\n".join(f"- {line}" for line in tables.suffered(space["rows"], together=True)))
    return "\n\n".join(part for part in parts if part) + "\n"


def write_results(args: argparse.Namespace, rows: Table, spaces: list[dict]) -> str:
    means = [space | {"rows": tables.means_of(space["rows"])} for space in spaces]
    text = text_of(rows, spaces, means, f"Frontier of {args.recipe}")
    write_atomically(args.output_dir / "frontier.md", text)
    first, *more = means
    content = {"more_spaces": more, "set_size": first.get("set_size"), "table": str(args.table or args.recipe)}
    content |= {"missing": first["missing"]} if "missing" in first else {}
    write_figures(args.output_dir / "frontier.json", first["rows"], features=first["features"], **content)
    pictures = [each for each in means if "Precision" in next(iter(each["rows"].values()))["figures"]]
    if pictures:
        picture(pictures, rows.rows, args.output_dir / "frontier.png")
    else:
        print("no picture: no row has recall and precision")
    return text


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    rows = check_arguments(args)
    if args.check:
        count = len(rows.rows)
        print(f"{count} rows, {count * len(rows.seeds)} with their seeds: the table is right")
        return
    share_cores(args.jobs)
    with locked(args.output_dir):
        if not record_of(args.output_dir):
            write_record(args.output_dir, record("frontier", vars(args)))
        frontier = Frontier(args, rows)
        log = args.output_dir / "logs" / "check.txt"
        run_all([Job("evaluation can begin", frontier.check(), log)], 1, os.environ)
        run_all(frontier.jobs(), args.jobs, os.environ)
        places = [frontier.place("rows", row) / "figures.json" for row in rows.rows]
        print(write_results(args, rows, spaces_of(places)))
    print(f"written: {', '.join(str(path) for path in sorted(args.output_dir.glob('frontier.*')))}")


if __name__ == "__main__":
    main()
