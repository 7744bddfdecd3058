"""The report's page: tables of what was run and of figures, previews cut into rows, curves, in one HTML file."""

import base64
import io
import re
from contextlib import suppress
from datetime import timedelta
from itertools import groupby
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from evaluation.figures.tables import figure_text, heads_of, rewarded_here
from evaluation.report.charts import CHARTS, curve_path, draw_panels, draw_together, run_colour
from evaluation.report.run_log import FigureTable, RunLog, find_tables, read_runs
from evaluation.report.verdict import Verdict, collapsed_recall, verdict
from train_cc.io.class_names import class_names, dataset_of
from train_cc.io.errors import InputError
from train_cc.io.fields import flag_of, marked
from train_cc.io.figures import columns_of, with_arrow
from train_cc.io.products import apart, check_output_file, write_atomically
from train_cc.io.read import parsing, printable, read_json
from train_cc.run.folder import BEST
from train_cc.run.pictures import GAP
from train_cc.setup.arguments import GROUPS

MACHINE = re.compile(r"on (\d+) x (\w+)(.*?), precision (\w+)")  # in log.txt, as setup/stage.py writes it
PICTURES = 8  # steps of a run's previews
PNG_BYTES, MAX_WIDTH = 300_000, 1400  # a larger picture is a WEBP of at most so many pixels in width


# What was run -----------------------------------------------------------------------------------------------------


def argument_text(value: object) -> str:
    """An argument as the page prints it: a value, or a short list of values; else its type."""
    if isinstance(value, list):
        simple = len(value) <= 8 and not any(isinstance(each, dict) for each in value)
        return f"[{', '.join(map(argument_text, value))}]" if simple else "a list"
    return "an object" if isinstance(value, dict) else printable(str(value)[:200])


def facts_of(run: RunLog) -> dict[str, str]:
    """When, where, how long, and with what."""
    seconds = run.series.of_column("seconds")
    seconds = seconds[np.isfinite(seconds)]
    machine = next((match for _, line in run.lines if (match := MACHINE.search(line))), None)
    took = f"{timedelta(seconds=round(float(seconds.sum())))}" if len(seconds) and seconds.sum() < 1e9 else "?"
    versions = run.recorded("versions")
    versions = [f"{name} {argument_text(versions[name])}" for name in ("python", "torch") if name in versions]
    return {
        "stage": argument_text(run.record.get("stage", "?")),
        "began": run.lines[0][0] if run.lines else "?",
        "training took": took + (f" ({np.median(seconds):.3g} s an update)" if len(seconds) else ""),
        "device": f"{machine[1]} x {machine[2]}{machine[3]}, precision {machine[4]}" if machine else "?",
        "updates in the log": f"{run.updates:,}",
        "commit": argument_text(run.record.get("commit") or "not recorded"),
        "versions": ", ".join(versions),
    }


def argument_rows(runs: list[RunLog]) -> dict[str, list[list[str]]]:
    """Flags by ``same`` and ``other``: those that all runs share, and those that differ, a cell per run."""
    recipe, start = (marked(mark, *GROUPS.values()) for mark in ("recipe", "start"))
    names = dict.fromkeys([*recipe, *sorted({name for run in runs for name in run.arguments if isinstance(name, str)})])
    rows: dict[str, list[list[str]]] = {"other": [], "same": []}
    for name in names:
        values = [argument_text(run.arguments.get(name, "")) for run in runs]
        differ = len(set(values)) > 1
        if name not in start and (differ or name in recipe):
            rows["other" if differ else "same"].append([flag_of(printable(name)), *values])
    return rows


# Figures ----------------------------------------------------------------------------------------------------------


def table_text(table: FigureTable) -> dict:
    """A table as the page prints it: heads with counts and arrows, cells as text."""
    metrics = columns_of([{"figures": figures} for figures in table.rows.values()])
    heads = heads_of(metrics, table.count, table.set_size) if table.count else metrics
    rows = {
        name: [figure_text(metric, figures[metric]) if metric in figures else "" for metric in metrics]
        for name, figures in table.rows.items()
    }
    space = table.space or "a feature space that the file does not name"
    images = f"{table.count:,} images for each row" if table.count else "number of images not recorded"
    warnings = [f"{text[0].upper()}{text[1:]}." for text in collapsed_recall(table.rows)]
    return {
        "title": table.title,
        "heads": [with_arrow(metric, head) for head, metric in zip(heads, metrics, strict=True)],
        "rows": rows,
        "note": f"{images}, {space}",
        "warnings": warnings + rewarded_here(table.made_by.items(), table.space_sha256),
    }


# Pictures ---------------------------------------------------------------------------------------------------------


def read_picture(path: Path) -> Image.Image:
    with parsing(path, "a PNG picture"):
        return Image.open(io.BytesIO(path.read_bytes()), formats=["PNG"]).convert("RGB")


def embedded(caption: str, picture: Image.Image) -> dict[str, str]:
    """A picture as a data URL."""
    buffer, kind = io.BytesIO(), "png"
    picture.save(buffer, "PNG")
    if buffer.tell() > PNG_BYTES:
        picture, buffer, kind = picture.copy(), io.BytesIO(), "webp"
        picture.thumbnail((MAX_WIDTH, 10 * MAX_WIDTH))
        picture.save(buffer, "WEBP", quality=75)
    return {"caption": caption, "source": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"}


def whole_picture(path: Path, caption: str) -> dict[str, str]:
    """The picture of ``path``, or the problem with it."""
    try:
        return embedded(caption, read_picture(path))
    except (InputError, OSError) as error:
        return {"caption": caption, "problem": printable(str(error))}


def pictures_beside(runs: list[RunLog]) -> list[dict[str, str]]:
    """The results' picture, the frontier's, and each run's curve over its checkpoints, if they exist."""
    parents = dict.fromkeys(run.folder.resolve().parent for run in runs)
    captions = (("results.png", "the same noise and label in each column"), ("frontier/frontier.png", "the frontier"))
    paths = [(parent / name, words) for parent in parents for name, words in captions]
    for run in runs:
        judged = run.folder.resolve().with_name(f"{run.folder.resolve().name}_checkpoints")
        with suppress(InputError):
            words = printable(str(read_json(judged / BEST, "a run's best step").get("verdict")))
            paths.append((judged / "checkpoints.png", words))
    return [whole_picture(path, f"{path.parent.name}/{path.name}: {words}") for path, words in paths if path.is_file()]


def previews_of(run: RunLog) -> dict:
    """The teacher's row once, the generator's over at most `PICTURES` steps, real and fake x0 of the last step."""
    steps = sorted(run.pictures)
    if len(steps) > PICTURES:
        steps = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, PICTURES)]
    try:
        rows = {step: preview_rows(read_picture(run.pictures[step]), run) for step in steps}
    except (InputError, OSError):
        rows = {}
    if not rows or not all(rows.values()):
        strips = [whole_picture(run.pictures[step], f"{run.name}, step {step}") for step in steps]
        return {"name": run.name, "classes": [], "strips": strips}
    *teacher, _, real, fake = rows[steps[-1]]
    strips = [(f"teacher, {run.arguments['teacher_preview_steps']} steps", row) for row in teacher]
    strips += [(f"generator, update {step}", rows[step][-3]) for step in steps]
    strips += [(f"real x0, update {steps[-1]}", real), (f"fake x0, update {steps[-1]}", fake)]
    return {"name": run.name, "classes": column_names(run), "strips": [embedded(*strip) for strip in strips]}


def preview_rows(picture: Image.Image, run: RunLog) -> list[Image.Image]:
    """The rows of a preview without their names: teacher (if drawn), generator, real x0, fake x0; [] if unlike one."""
    columns, teacher_steps = run.arguments.get("num_previews"), run.arguments.get("teacher_preview_steps")
    if not all(type(value) is int and value >= 0 for value in (columns, teacher_steps)) or not columns:
        return []
    count = 3 + bool(teacher_steps)
    pitch, rest = divmod(picture.height - GAP, count)
    left = picture.width - GAP - columns * pitch
    if rest or pitch <= GAP or left < 0:
        return []
    return [picture.crop((left, i * pitch, picture.width, (i + 1) * pitch + GAP)) for i in range(count)]


def column_names(run: RunLog) -> list[str]:
    """A word for each column: its class in the teacher's data set, or in ImageNet for 1000 classes, else its number."""
    columns, count = run.arguments["num_previews"], run.arguments.get("num_classes")
    teacher = Path(str(run.arguments.get("teacher", "")))
    for folder in (run.folder / "generator", teacher):
        try:
            count = read_json(folder / "config.json", "a model's config")["num_classes"]
            break
        except (InputError, OSError, KeyError):
            continue
    if type(count) is not int or count < 1:
        return [""] * columns
    names = class_names("auto", count, dataset_of(teacher)) or list(map(str, range(count)))
    return [names[i * max(1, count // columns) % count].partition(",")[0] for i in range(columns)]


# The page ---------------------------------------------------------------------------------------------------------


def page(runs: list[RunLog], tables: list[FigureTable], outcome: Verdict, charts: dict, problems: list[str]) -> str:
    """``charts``: chart -> its panels as inline SVG, of those that have some."""
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    facts = [facts_of(run) for run in runs]
    return templates.get_template("page.html.j2").render(
        names=[run.name for run in runs],
        colours=[run_colour(number) for number in range(len(runs))],
        verdict=outcome,
        problems=problems,
        facts=[[name, *(fact[name] for fact in facts)] for name in facts[0]],
        differs=argument_rows(runs),
        tables=[table_text(table) for table in tables],
        beside=pictures_beside(runs),
        previews=[previews_of(run) for run in runs if run.pictures],
        groups=[(group, list(each)) for group, each in groupby(charts.items(), lambda item: item[0].group)],
    )


def write_report(folders: list[Path], output: Path | None, curves: Path | None, overwrite: bool) -> None:
    """The command, its flags checked; the first run's own report is always replaced. Raises `InputError`."""
    target = output or folders[0] / "report.html"
    check_output_file(target, overwrite or output is None)
    if curves is not None:
        apart((("--output", target), ("--curves", curves)))
        for chart in CHARTS:
            check_output_file(curve_path(curves, chart), overwrite, "--curves:")
    runs = read_runs(folders)
    tables, problems = find_tables(runs)
    problems = [f"{run.name}: {text}" for run in runs for text in run.problems] + problems
    outcome = verdict(runs, tables)
    charts = {chart: panels for chart in CHARTS if (panels := draw_panels(chart, runs))}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, page(runs, tables, outcome, charts, problems))
    if curves:
        curves.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            write_atomically(curve_path(curves, chart), draw_together(chart, runs))
    sentences = [f"  {run.name}: {sentence}" for run in outcome.runs for sentence in run.sentences]
    print("\n".join([*problems, outcome.title, *sentences]))
    print(f"report: {printable(str(target))}")
