"""One self-contained page about one run or several: what was run, warnings, curves, pictures, results.

`python -m evaluation.report runs/digits/cold_start runs/digits/dmdr --output report.html`

No network, no server: open the file in a browser. Several runs are laid over one another. What cannot be read of a run
(a torn line, a missing file) is told on the page, and the rest shown. `results.json` and `frontier/frontier.{json,png}`
beside a run are shown too.
"""

import base64
import io
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from evaluation.files import METRICS, apart, printable
from evaluation.report.charts import CHARTS, Chart, curve_path
from evaluation.report.rules import warnings_of
from evaluation.report.runs import RunLog, find_results, name_apart, read_run
from train_cc.io import flags
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.read import first_line, parsing, require_folder
from train_cc.io.write import check_output_file, check_parent, mark_of, write_atomically

PICTURES = 8  # steps shown of a run
PICTURE_BYTES = 3_000_000  # of all pictures together
# Arguments that say what was run, in the page's table.
TOLD = (
    "max_train_steps",
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate_generator",
    "learning_rate_estimator",
    "ratio_update",
    "lora_rank",
    "use_lora_gen",
    "num_steps",
    "dynamic_steps",
    "real_guidance_scale",
    "real_guidance_interval",
    "encoder_type",
    "reward_weight",
    "ema_decay",
    "seed",
)


def embed(path: Path, budget: int) -> str:
    """A PNG as a data URL of at most ``budget`` bytes; smaller and coarser until it fits. Raises `InputError`."""
    data, kind = path.read_bytes(), "png"
    with parsing(path, "a PNG picture"):
        picture = Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGB")
    if len(data) > budget:
        kind = "webp"
        for quality, width in ((85, 1600), (75, 1400), (65, 1200), (50, 1000), (40, 800), (30, 600)):
            shrunk = picture.copy()
            shrunk.thumbnail((width, 10 * width))
            buffer = io.BytesIO()
            shrunk.save(buffer, "WEBP", quality=quality)
            data = buffer.getvalue()
            if len(data) <= budget:
                break
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def figure_of(path: Path, caption: str, budget: int) -> dict[str, str]:
    """A picture with its caption, or ``problem``: what is wrong with it."""
    try:
        return {"caption": caption, "source": embed(path, budget)}
    except (InputError, OSError) as error:
        problem = str(error) if isinstance(error, InputError) else f"{path}: {first_line(error)}"
        return {"caption": caption, "problem": printable(problem)}


def chosen_steps(steps: list[int]) -> list[int]:
    """At most `PICTURES` of ``steps``, evenly, the first and the last among them."""
    if len(steps) <= PICTURES:
        return steps
    return [steps[round(i)] for i in np.linspace(0, len(steps) - 1, PICTURES)]


def shown(value: object) -> str:
    """An argument as the page shows it: a value, or a short list of values; whatever else there is, its type."""
    if isinstance(value, list):
        simple = len(value) <= 8 and not any(isinstance(each, list | dict) for each in value)
        return f"[{', '.join(map(shown, value))}]" if simple else "a list"
    return "an object" if isinstance(value, dict) else printable(str(value)[:200])


def what_was_run(runs: list[RunLog]) -> list[list[str]]:
    """The rows of the table of arguments, a column a run."""
    rows = [
        ["stage", *(shown(run.record.get("stage", "?")) for run in runs)],
        ["updates logged", *(str(len(run.series.steps)) for run in runs)],
    ]
    for name in TOLD:
        values = (run.record.get("arguments", {}).get(name, "") for run in runs)
        rows.append([f"--{name.replace('_', '-')}", *map(shown, values)])
    return rows


def pictures_of(runs: list[RunLog]) -> tuple[list[dict], list[dict]]:
    """-> the frontiers beside the runs, and the runs' previews."""
    frontiers = [parent / "frontier" / "frontier.png" for parent in parents_of(runs)]
    chosen = [(run, step) for run in runs for step in chosen_steps(sorted(run.pictures))]
    return (
        [figure_of(path, "recall against precision", 300_000) for path in frontiers if path.is_file()],
        [
            figure_of(run.pictures[step], f"{run.name}, step {step}", PICTURE_BYTES // len(chosen))
            for run, step in chosen
        ],
    )


def parents_of(runs: list[RunLog]) -> list[Path]:
    return list(dict.fromkeys(run.folder.resolve().parent for run in runs))


def page(
    runs: list[RunLog],
    results: dict[str, dict],
    warnings: list[str],
    charts: dict[Chart, str],
    problems: list[str],
) -> str:
    """``charts``: those that something can be drawn of, as inline SVG. ``problems``: of what is beside the runs."""
    from evaluation.report.curves import colour_of

    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    frontiers, samples = pictures_of(runs)
    return templates.get_template("page.html.j2").render(
        mark=mark_of("a report"),
        names=[run.name for run in runs],
        colours=[colour_of(number) for number in range(len(runs))],
        warnings=warnings,
        problems=[f"{run.name}: {text}" for run in runs for text in run.problems] + problems,
        arguments=what_was_run(runs),
        metrics=METRICS,
        results=results,
        frontiers=frontiers,
        samples=samples,
        charts=charts,
    )


def check_outputs(target: Path, curves: Path | None) -> None:
    """The page and every curve can be written, and replace only what this command wrote. Raises `InputError`."""
    check_output_file(target, kind="a report")
    if curves is None:
        return
    apart((("--output", target), ("--curves", curves)))
    check_parent(curves / "x.svg")
    if curves.exists() and not curves.is_dir():
        raise InputError(f"--curves {curves} is a file; a folder is expected")
    for chart in CHARTS:
        check_output_file(curve_path(curves, chart), flag="--curves:", kind="a curve")


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser(description=__doc__)
    parser.add_argument("runs", type=flags.path, nargs="+", metavar="RUN", help="a run's --output-dir")
    parser.add_argument("--output", type=flags.path, help="default: report.html in the first run's folder")
    parser.add_argument("--curves", type=flags.path, metavar="FOLDER", help="also write every chart there, as SVG")
    args = parser.parse_args(argv)
    for folder in args.runs:
        require_folder(folder, "a run's --output-dir")
    target = args.output or args.runs[0] / "report.html"
    check_outputs(target, args.curves)
    runs = [read_run(folder) for folder in args.runs]
    name_apart(runs)
    results, problems = find_results(runs)
    warnings = warnings_of({run.name: run.series for run in runs}, results)
    from evaluation.report.curves import draw  # matplotlib takes a second: what is wrong was said before

    charts = {chart: svg for chart in CHARTS if (svg := draw(chart, runs))}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, page(runs, results, warnings, charts, problems))
    if args.curves:
        args.curves.mkdir(parents=True, exist_ok=True)
        for chart, svg in charts.items():
            write_atomically(curve_path(args.curves, chart), f'<?xml version="1.0" encoding="utf-8"?>\n{svg}')
    for text in [f"{run.name}: {text}" for run in runs for text in run.problems] + problems:
        print(text)
    for text in warnings:
        print(f"WARNING {text}")
    print(f"report: {printable(str(target))}")
