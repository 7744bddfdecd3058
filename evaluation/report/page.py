"""One self-contained page about one run or several: a verdict, what was run, figures, previews, curves.

`python -m evaluation.report runs/digits/cold_start runs/digits/dmdr --output report.html`

No network, no server: open the file in a browser. Several runs are laid over one another. What cannot be read of a run
(a torn line, a missing file) is told on the page, and the rest shown. `results.{json,png}` and
`frontier/frontier.{json,png}` beside a run, and `figures.json` in its subfolders, are shown too.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import jinja2

from evaluation.files import apart, heads_of, rewarded_here, shown
from evaluation.report.charts import CHARTS, Chart, curve_path
from evaluation.report.previews import all_previews, strip_of
from evaluation.report.rules import collapsed_recall
from evaluation.report.runs import RunLog, Table, find_tables, name_apart, read_run
from evaluation.report.tables import what_differs, what_was_run
from evaluation.report.verdict import Verdict, verdict
from train_cc.io import flags
from train_cc.io.errors import exits_on_input_error
from train_cc.io.figures import columns_of, with_arrow
from train_cc.io.products import check_output_file, check_parent, write_atomically
from train_cc.io.read import printable, require_folder


def pictures_beside(runs: list[RunLog]) -> list:
    """The results' picture and the frontier's, where they are there."""
    parents = dict.fromkeys(run.folder.resolve().parent for run in runs)
    named = (("results.png", "the same noise and label in each column"), ("frontier/frontier.png", "the frontier"))
    paths = [(parent / name, told) for parent in parents for name, told in named]
    return [
        strip_of(path, f"{path.parent.name}/{path.name}: {told}", 400_000) for path, told in paths if path.is_file()
    ]


def shown_table(table: Table) -> dict:
    """A table as the page shows it: heads with counts and arrows, cells as text."""
    own = [{"figures": figures} for figures in table.rows.values()]
    metrics = columns_of(own)
    heads = heads_of(metrics, table.count, table.set_size) if table.count else metrics
    heads = [with_arrow(metric, head) for head, metric in zip(heads, metrics, strict=True)]
    rows = {
        name: [shown(metric, figures[metric]) if metric in figures else "" for metric in metrics]
        for name, figures in table.rows.items()
    }
    space = table.space or "a feature space that the file does not name"
    images = f"{table.count:,} images for each row" if table.count else "number of images not recorded"
    warnings = [f"{text[0].upper()}{text[1:]}." for text in collapsed_recall(table.rows)]
    warnings += rewarded_here(table.made_by.items(), table.space_sha256)
    return {"title": table.title, "heads": heads, "rows": rows, "told": f"{images}, {space}", "warnings": warnings}


def page(
    runs: list[RunLog],
    tables: list[Table],
    said: Verdict,
    charts: dict[Chart, list[str]],
    problems: list[str],
) -> str:
    """``charts``: those that something can be drawn of, as inline SVG. ``problems``: of what is beside the runs."""
    from evaluation.report.curves import colour_of

    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    groups = [(group, list(each)) for group, each in groupby(charts.items(), lambda item: item[0].group)]
    return templates.get_template("page.html.j2").render(
        names=[run.name for run in runs],
        colours=[colour_of(number) for number in range(len(runs))],
        verdict=said,
        problems=all_problems(runs, problems),
        facts=what_was_run(runs),
        differs=what_differs(runs),
        tables=[shown_table(table) for table in tables],
        beside=pictures_beside(runs),
        previews=all_previews(runs),
        groups=groups,
    )


def all_problems(runs: list[RunLog], problems: list[str]) -> list[str]:
    return [f"{run.name}: {text}" for run in runs for text in run.problems] + problems


def lines_of(said: Verdict) -> Iterator[str]:
    yield said.title
    for run in said.runs:
        yield from (f"  {run.name}: {sentence}" for sentence in run.sentences)


def check_outputs(target: Path, curves: Path | None, own: bool, overwrite: bool) -> None:
    """The page and every curve can be written, and replace files only if ``overwrite``. Raises `InputError`.

    ``own``: the page has its own name in a run's folder, and is always replaced.
    """
    check_output_file(target, own or overwrite)
    if curves is None:
        return
    apart((("--output", target), ("--curves", curves)))
    check_parent(curves / "x.svg")
    for chart in CHARTS:
        check_output_file(curve_path(curves, chart), overwrite, "--curves:")


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser(description=__doc__)
    parser.add_argument("runs", type=flags.path, nargs="+", metavar="RUN", help="a run's --output-dir")
    parser.add_argument("--output", type=flags.output_file, help="default: report.html in the first run's folder")
    parser.add_argument("--curves", type=flags.path, metavar="FOLDER", help="also write every chart there, as SVG")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    args = parser.parse_args(argv)
    for folder in args.runs:
        require_folder(folder, "a run's --output-dir")
    target = args.output or args.runs[0] / "report.html"
    check_outputs(target, args.curves, args.output is None, args.overwrite)
    runs = [read_run(folder) for folder in args.runs]
    name_apart(runs)
    tables, problems = find_tables(runs)
    said = verdict(runs, tables)
    from evaluation.report.curves import draw, draw_together  # matplotlib takes a second: what is wrong was said before

    charts = {chart: panels for chart in CHARTS if (panels := draw(chart, runs))}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, page(runs, tables, said, charts, problems))
    if args.curves:
        args.curves.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            write_atomically(curve_path(args.curves, chart), draw_together(chart, runs))
    print("\n".join([*all_problems(runs, problems), *lines_of(said)]))
    print(f"report: {printable(str(target))}")
