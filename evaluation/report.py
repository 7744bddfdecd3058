"""One self-contained page about one run or several: what was run, warnings, curves, pictures, results.

`python -m evaluation.report runs/digits/cold_start runs/digits/dmdr --output report.html`

No network, no server: open the file in a browser. Several runs are laid over one another. What cannot be read of a run
(a torn line, a missing file) is told on the page, and the rest shown. `results.json` and `frontier/frontier.{json,png}`
beside a run are shown too.
"""

import argparse
import base64
import html
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_hex
from PIL import Image

from evaluation.charts import CHARTS, Chart
from evaluation.evaluate import METRICS
from evaluation.rules import RULES, Series
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.write import write_atomically
from train_cc.run.logbook import parse_json_lines

POINTS = 400  # of a curve: more rows are averaged
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


@dataclass
class RunLog:
    """What could be read of a run's folder; ``problems`` tells the rest."""

    name: str
    folder: Path
    record: dict = field(default_factory=dict)  # args.json
    series: Series = field(default_factory=Series)
    pictures: dict[int, Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_rows(path: Path, problems: list[str]) -> list[dict]:
    """The whole rows of a jsonl file; what is torn or missing goes to ``problems``."""
    if not path.is_file():
        problems.append(f"{path.name} is missing")
        return []
    found, torn = parse_json_lines(path.read_text(errors="replace"))
    rows = [row for row in found if isinstance(row, dict) and "step" in row]
    torn += len(found) - len(rows)
    if torn:
        problems.append(f"{path.name}: {torn} line(s) cannot be read and are left out")
    if not rows:
        problems.append(f"{path.name} has no rows yet")
    return rows


def read_run(folder: Path) -> RunLog:
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; a run's --output-dir is expected")
    run = RunLog(folder.resolve().name, folder)
    try:
        run.record = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError):
        run.problems.append("args.json is missing or cannot be read")
    rows = read_rows(folder / "loss_logs" / "loss_gen_log.jsonl", run.problems)
    turns = read_rows(folder / "loss_logs" / "loss_gui_log.jsonl", run.problems)
    run.series = Series.of(rows, turns)
    for path in (folder / "samples").glob("step-*/grid.png"):
        number = path.parent.name.removeprefix("step-")
        if number.isdigit():
            run.pictures[int(number)] = path
    if not (folder / "generator" / "config.json").is_file():
        run.problems.append("there is no generator/: the run is not finished (still running, stopped or killed)")
    return run


def name_apart(runs: list[RunLog]) -> None:
    """Runs whose folders have one name are told apart by their parents'."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.folder.resolve().parent.name}/{run.folder.resolve().name}"


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """-> steps, means, minima, maxima of at most `POINTS` groups of rows; rows without a value are left out."""
    there = np.isfinite(values)
    steps, values = steps[there], values[there]
    groups = np.array_split(np.arange(len(values)), min(POINTS, len(values))) if len(values) else []
    columns = [[function(of[group]) for group in groups] for function, of in (
        (np.mean, steps), (np.mean, values), (np.min, values), (np.max, values)
    )]  # fmt: skip
    return tuple(np.array(column) for column in columns)


def draw(chart: Chart, runs: list[RunLog]) -> str | None:
    """The chart as inline SVG; None where no run has any of its columns."""
    panels = [columns for columns in chart.panels if any(run.series.has(name) for run in runs for name in columns)]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * max(2, len(panels)), 2.6), squeeze=False)
    for axis, columns in zip(axes[0], panels, strict=True):
        for number, run in enumerate(runs):
            for name in columns:
                steps, mean, low, high = thin(run.series.steps, run.series.of_column(name))
                if not len(steps):
                    continue
                colour = f"C{number % 10}"
                axis.plot(steps, mean, color=colour, linewidth=1.2, marker="." if len(steps) < 40 else None)
                axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axis.set_title(columns[0], fontsize=9)
        axis.set_xlabel("generator updates", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if chart.logarithmic:
            axis.set_yscale("log")
    if len(runs) > 1:
        lines = [plt.Line2D([], [], color=f"C{number % 10}") for number in range(len(runs))]
        axes[0][0].legend(lines, [run.name for run in runs], fontsize=7)
    figure.tight_layout()
    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def embed(path: Path, budget: int) -> str:
    """An image of at most ``budget`` bytes as a data URL; smaller and coarser until it fits."""
    data, kind = path.read_bytes(), "png"
    if len(data) > budget:
        picture, kind = Image.open(io.BytesIO(data)).convert("RGB"), "webp"
        for quality, width in ((85, 1600), (75, 1400), (65, 1200), (50, 1000), (40, 800), (30, 600)):
            shrunk = picture.copy()
            shrunk.thumbnail((width, 10 * width))
            buffer = io.BytesIO()
            shrunk.save(buffer, "WEBP", quality=quality)
            data = buffer.getvalue()
            if len(data) <= budget:
                break
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def chosen_steps(steps: list[int]) -> list[int]:
    """At most `PICTURES` of ``steps``, evenly, the first and the last among them."""
    if len(steps) <= PICTURES:
        return steps
    return [steps[round(i)] for i in np.linspace(0, len(steps) - 1, PICTURES)]


def row_of(cells: list[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def what_was_run(runs: list[RunLog]) -> str:
    names = [html.escape(run.name) for run in runs]
    rows = [row_of(["", *names], "th")]
    rows.append(row_of(["stage", *(html.escape(str(run.record.get("stage", "?"))) for run in runs)]))
    rows.append(row_of(["updates logged", *(str(len(run.series.steps)) for run in runs)]))
    for name in TOLD:
        values = [run.record.get("arguments", {}).get(name, "") for run in runs]
        rows.append(row_of([f"--{name.replace('_', '-')}", *(html.escape(str(value)) for value in values)]))
    return f"<table>{''.join(rows)}</table>"


def find_results(runs: list[RunLog]) -> dict[str, dict]:
    """Title -> row name -> figures, of the results and frontier beside the runs."""
    found = {}
    for parent in dict.fromkeys(run.folder.resolve().parent for run in runs):
        for title, path in (("Results", parent / "results.json"), ("Frontier", parent / "frontier" / "frontier.json")):
            try:
                record = json.loads(path.read_text())
                rows = {name: row["figures"] for name, row in record.get("rows", record).items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
            found[f"{title} ({path})"] = rows
    return found


def results_table(rows: dict[str, dict]) -> str:
    lines = [row_of(["", *METRICS], "th")]
    for name, figures in rows.items():
        cells = [f"{figures[metric]:.3f}" if metric in figures else "" for metric in METRICS]
        lines.append(row_of([html.escape(name), *cells]))
    return f"<table>{''.join(lines)}</table>"


def warnings_of(runs: list[RunLog], results: dict[str, dict]) -> list[str]:
    told = [f"{run.name}: {text}" for run in runs for rule in RULES for text in rule(run.series)]
    return told + [text for rows in results.values() for text in collapsed_recall(rows)]


def collapsed_recall(rows: dict[str, dict]) -> list[str]:
    """Precision up while recall collapses: a trained row against the row that it started from or is controlled by."""
    told = []
    for name, figures in rows.items():
        for base in [base for base in rows if base != name and is_base(base, name)]:
            before = rows[base]
            if figures["Precision"] > before["Precision"] and figures["Recall"] < 0.5 * before["Recall"]:
                told.append(
                    f"{name}: recall {figures['Recall']:.2f} is less than half of {before['Recall']:.2f} ({base}), "
                    "while precision rose: diversity has collapsed; lower --reward-weight or the guidance scale"
                )
    return told


def is_base(base: str, name: str) -> bool:
    return (base.startswith(("control", "cold start")) and name.startswith("DMDR")) or name == f"{base} + RL"


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1.5em; color: #222; }
h1 { font-size: 1.6em } h2 { margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .2em .8em; border: 1px solid #ddd; text-align: left }
.curve { margin: 1.5em 0; max-width: 1000px } .curve svg { max-width: 100%; height: auto } .curve p { margin: .2em 0 }
.warning { background: #fff1e0; border-left: 4px solid #d60; padding: .5em 1em; margin: .5em 0 }
.good { background: #eaf6ea; border-left: 4px solid #393; padding: .5em 1em }
.problem { color: #555; font-style: italic } .panels { display: flex; flex-wrap: wrap; gap: 1em }
figure { margin: 0 } figure img { max-width: 100%; image-rendering: pixelated } figcaption { font-size: .85em }
.key span { display: inline-block; width: 1em; height: 1em; vertical-align: -.15em; margin: 0 .3em 0 1em }
"""


def page(runs: list[RunLog], results: dict[str, dict], warnings: list[str], charts: dict[Chart, str]) -> str:
    """``charts``: those that there is something to draw for, as inline SVG."""
    key = "".join(
        f'<span style="background:{to_hex(f"C{i % 10}")}"></span>{html.escape(run.name)}' for i, run in enumerate(runs)
    )
    out = ["<h1>" + html.escape(", ".join(run.name for run in runs)) + "</h1>", "<h2>Did it work?</h2>"]
    out += [f'<div class="warning">{html.escape(text)}</div>' for text in warnings]
    if not warnings:
        out.append(
            '<div class="good">No rule found anything wrong. Look at the pictures: the generator\'s row should be as '
            "clean and as varied as the teacher's, and the real and fake x0 alike.</div>"
        )
    out += [f'<p class="problem">{html.escape(f"{run.name}: {text}")}</p>' for run in runs for text in run.problems]
    out += ["<h2>What was run</h2>", what_was_run(runs)]
    for title, rows in results.items():
        out += [f"<h2>{html.escape(title)}</h2>", results_table(rows)]
    for parent in dict.fromkeys(run.folder.resolve().parent for run in runs):
        picture = parent / "frontier" / "frontier.png"
        if picture.is_file():
            out.append(f'<figure><img alt="recall against precision" src="{embed(picture, 300_000)}"></figure>')
    out += ["<h2>Samples</h2>", "<p>The same noise and labels at every step; rows as named in the picture.</p>"]
    shown = [(run, step) for run in runs for step in chosen_steps(sorted(run.pictures))]
    out.append('<div class="panels">')
    for run, step in shown:
        source = embed(run.pictures[step], PICTURE_BYTES // len(shown))
        caption = f"{html.escape(run.name)}, step {step}"
        out.append(f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>')
    out += ["</div>", "<h2>Curves</h2>", f'<p class="key">{key}</p>']
    for chart, svg in charts.items():
        out.append(f'<div class="curve"><h3>{chart.title}</h3><p>{html.escape(chart.told)}</p>{svg}</div>')
    body = "\n".join(out)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>DMDR report</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's --output-dir")
    parser.add_argument("--output", type=Path, help="default: report.html in the first run's folder")
    parser.add_argument("--curves", type=Path, metavar="FOLDER", help="also write every chart there, as SVG files")
    args = parser.parse_args(argv)
    runs = [read_run(folder) for folder in args.runs]
    name_apart(runs)
    target = args.output or args.runs[0] / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    results = find_results(runs)
    warnings = warnings_of(runs, results)
    charts = {chart: svg for chart in CHARTS if (svg := draw(chart, runs))}
    write_atomically(target, page(runs, results, warnings, charts))
    if args.curves:
        args.curves.mkdir(parents=True, exist_ok=True)
        for chart, svg in charts.items():
            name = chart.title.lower().replace(":", "").replace(" ", "_")
            write_atomically(args.curves / f"{name}.svg", svg)
    for run in runs:
        for text in run.problems:
            print(f"{run.name}: {text}")
    for text in warnings:
        print(f"WARNING {text}")
    print(f"report: {target}")


if __name__ == "__main__":
    main()
