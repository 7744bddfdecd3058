"""One self-contained page about one run or several: a verdict, what was run, figures, previews, curves.

`python -m evaluation.report runs/digits/cold_start runs/digits/dmdr --output report.html`

No network, no server: open the file in a browser. Several runs are laid over one another. What cannot be read of a run
(a torn line, a missing file) is told on the page, and the rest shown. `results.{json,png}` and
`frontier/frontier.{json,png}` beside a run, and `figures.json` in its subfolders, are shown too.
"""

from train_cc.io import fields
from train_cc.io.errors import exits_on_input_error
from train_cc.io.read import require_folder


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = fields.Parser(description=__doc__)
    parser.add_argument("runs", type=fields.path, nargs="+", metavar="RUN", help="a run's --output-dir")
    parser.add_argument("--output", type=fields.output_file, help="default: report.html in the first run's folder")
    parser.add_argument("--curves", type=fields.path, metavar="FOLDER", help="also write every chart there, as SVG")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    args = parser.parse_args(argv)
    for folder in args.runs:
        require_folder(folder, "a run's --output-dir")
    from evaluation.report.page import write_report  # matplotlib takes a second to import

    write_report(args.runs, args.output, args.curves, args.overwrite)
