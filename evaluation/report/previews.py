"""Pictures of the page: previews cut into rows, so that the teacher's stands once, and pictures beside the runs."""

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.report.runs import RunLog
from train_cc.io.class_names import class_names
from train_cc.io.errors import InputError
from train_cc.io.read import first_line, parsing, printable, read_json

PICTURES = 8  # steps shown of a run
PICTURE_BYTES = 3_000_000  # of all previews together
GAP = 4  # pixels between the cells of a preview: run/pictures.py


@dataclass
class Strip:
    """A row of images with what it is, or a whole picture; ``problem``: what is wrong with it."""

    caption: str
    source: str = ""
    problem: str = ""


@dataclass
class Previews:
    """Of one run: ``classes`` are the columns' names; empty where the strips are whole pictures."""

    name: str
    classes: list[str] = field(default_factory=list)
    strips: list[Strip] = field(default_factory=list)


def read_picture(path: Path) -> Image.Image:
    with parsing(path, "a PNG picture"):
        return Image.open(io.BytesIO(path.read_bytes()), formats=["PNG"]).convert("RGB")


def embed(picture: Image.Image, budget: int) -> str:
    """A picture as a data URL of at most ``budget`` bytes; smaller and coarser until it fits."""
    buffer, kind = io.BytesIO(), "png"
    picture.save(buffer, "PNG")
    if buffer.tell() > budget:
        kind = "webp"
        for quality, width in ((85, 1600), (75, 1400), (65, 1200), (50, 1000), (40, 800), (30, 600)):
            shrunk, buffer = picture.copy(), io.BytesIO()
            shrunk.thumbnail((width, 10 * width))
            shrunk.save(buffer, "WEBP", quality=quality)
            if buffer.tell() <= budget:
                break
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def strip_of(path: Path, caption: str, budget: int) -> Strip:
    """The whole picture of ``path``."""
    try:
        return Strip(caption, embed(read_picture(path), budget))
    except (InputError, OSError) as error:
        problem = str(error) if isinstance(error, InputError) else f"{path}: {first_line(error)}"
        return Strip(caption, problem=printable(problem))


def chosen_steps(steps: list[int]) -> list[int]:
    """At most `PICTURES` of ``steps``, evenly, the first and the last among them."""
    if len(steps) <= PICTURES:
        return steps
    return [steps[round(i)] for i in np.linspace(0, len(steps) - 1, PICTURES)]


def all_previews(runs: list[RunLog]) -> list[Previews]:
    """Of every run that has pictures; a teacher's row that an earlier run has is not repeated."""
    found, teachers = [], set()
    with_pictures = [run for run in runs if run.pictures]
    for run in with_pictures:
        made = previews_of(run, PICTURE_BYTES // len(with_pictures))
        if made.classes and made.strips[0].caption.startswith("teacher"):
            if made.strips[0].source in teachers:
                del made.strips[0]
            else:
                teachers.add(made.strips[0].source)
        found.append(made)
    return found


def previews_of(run: RunLog, budget: int) -> Previews:
    """The teacher's row once, the generator's over the steps, real and fake x0 of the last step."""
    steps = chosen_steps(sorted(run.pictures))
    try:
        rows = {step: rows_of(read_picture(run.pictures[step]), run) for step in steps}
    except (InputError, OSError):
        rows = {}
    if not rows or not all(rows.values()):
        of_one = budget // len(steps)
        strips = [strip_of(run.pictures[step], f"{run.name}, step {step}", of_one) for step in steps]
        return Previews(run.name, [], strips)
    *first, _, real, fake = rows[steps[-1]]
    shown = [(f"teacher, {run.arguments['teacher_preview_steps']} steps", each) for each in first]
    shown += [(f"generator, update {step}", rows[step][-3]) for step in steps]
    shown += [(f"real x0, update {steps[-1]}", real), (f"fake x0, update {steps[-1]}", fake)]
    of_one = budget // len(shown)
    return Previews(run.name, classes_of(run), [Strip(name, embed(row, of_one)) for name, row in shown])


def rows_of(picture: Image.Image, run: RunLog) -> list[Image.Image]:
    """The rows of a preview without their names: teacher (if drawn), generator, real x0, fake x0; [] if unlike one."""
    columns, drawn = run.arguments.get("num_previews"), run.arguments.get("teacher_preview_steps")
    if not all(type(value) is int and value >= 0 for value in (columns, drawn)) or not columns:
        return []
    count = 3 + bool(drawn)
    pitch, rest = divmod(picture.height - GAP, count)
    left = picture.width - GAP - columns * pitch
    if rest or pitch <= GAP or left < 0:
        return []
    return [picture.crop((left, i * pitch, picture.width, (i + 1) * pitch + GAP)) for i in range(count)]


def classes_of(run: RunLog) -> list[str]:
    """The names of the columns: of the data set where it is a known one, else numbers."""
    columns = run.arguments["num_previews"]
    count = run.arguments.get("num_classes")
    for folder in (run.folder / "generator", Path(str(run.arguments.get("teacher", "")))):
        try:
            count = read_json(folder / "config.json", "a model's config")["num_classes"]
            break
        except (InputError, OSError, KeyError):
            continue
    if type(count) is not int or count < 1:
        return [""] * columns
    names = names_of(run, count)
    return [names[i * max(1, count // columns) % count] for i in range(columns)]


def names_of(run: RunLog, count: int) -> list[str]:
    """A word for each class: of the data set that the teacher was trained on, of ImageNet for 1000, else its number."""
    teacher = Path(str(run.arguments.get("teacher", "")))
    try:
        dataset = read_json(teacher / "args.json", "a teacher's record")["arguments"]["dataset"]
    except (InputError, OSError, KeyError, TypeError):
        dataset = None
    names = class_names("auto", count, dataset if isinstance(dataset, str) else None)
    return [name.partition(",")[0] for name in names] if names else list(map(str, range(count)))
