"""The quality-diversity table: what guidance and a reward each trade, from one command.

Trains every row by the recipe's launchers, samples and evaluates all in one feature space, and writes `frontier.md`,
`frontier.json` and `frontier.png`. Finished rows are kept when it is run again; an interrupted one continues.

`python -m evaluation.frontier --recipe digits --output-dir runs/digits/frontier --base-steps 400`
"""

import argparse
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from evaluation.evaluate import METRICS, table
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.write import write_atomically

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Guidance:
    """Of the real score while training; of the sampler for the teacher."""

    name: str
    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def flags(self, scale: str, interval: str) -> list[str]:
        return [scale, str(self.scale), interval, str(self.low), str(self.high)]


OFF, ON, STRONG = Guidance("off"), Guidance("1.5", 1.5), Guidance("4", 4.0)
ON_07, ON_04, STRONG_04 = (
    Guidance("1.5 on t <= 0.7", 1.5, 0.0, 0.7),
    Guidance("1.5 on t <= 0.4", 1.5, 0.0, 0.4),
    Guidance("3 on t <= 0.4", 3.0, 0.0, 0.4),
)
# Each setting is trained by the cold start, then, as listed, with the reward and without (the control).
SETTINGS = {
    OFF: ("RL", "control"),
    ON: ("RL", "control"),
    STRONG: (),
    ON_07: (),
    ON_04: ("RL", "control"),
    STRONG_04: (),
}
TEACHERS = (OFF, ON)
# Published 1-step results, ImageNet 256, 50 000 samples (DMDR, arXiv 2511.13649).
PUBLISHED = {
    "guidance off": (2.13, 0.64, 232.15, 0.77),
    "guidance 1.5": (5.20, 0.48, 387.24, 0.88),
    "guidance 4": (15.70, 0.11, 453.65, 0.86),
    "guidance off + RL": (6.95, 0.40, 416.01, 0.90),
    "guidance 1.5 + RL": (13.43, 0.24, 494.43, 0.93),
}
LAUNCHERS = {
    "cold_start": "scripts/cold_start_{}.sh",
    "dmdr": "scripts/dmdr_{}_refl.sh",
    "evaluate": "scripts/evaluate_{}.sh",
}
# The kind of a row by a word in its name, and the colour of its point.
COLOURS = {"teacher": "tab:green", "RL": "tab:red", "control": "tab:gray", "": "tab:blue"}


def row_name(guidance: Guidance, stage: str) -> str:
    if stage == "teacher":
        return "teacher" if guidance == OFF else f"teacher, guidance {guidance.name}"
    return f"guidance {guidance.name}" + {"cold start": "", "RL": " + RL", "control": " + control"}[stage]


def folder_name(name: str) -> str:
    return "".join(c if c.isalnum() or c == "." else "_" for c in name.replace("<=", "upto").replace("+", "and"))


class Frontier:
    """Runs the recipe's launchers; every product has its place under ``folder``, and is not made twice."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, args.output_dir

    def launch(self, script: str, log: Path, words: list[str], **variables: object) -> None:
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            command = ["bash", LAUNCHERS[script].format(self.args.recipe), *words]
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file).returncode
        if code:
            told = "".join(log.read_text().splitlines(keepends=True)[-3:]).strip()
            raise InputError(f"{' '.join(command)} failed with exit code {code}; its log is {log}:\n{told}")

    def evaluate(self, name: str, generator: Path, words: list[str]) -> None:
        row = self.folder / "rows" / folder_name(name)
        if not (row / "figures.json").exists():
            self.launch("evaluate", row / "log.txt", [str(generator), str(row), *words])
        print(f"row: {name}", flush=True)

    def teacher(self, guidance: Guidance) -> None:
        words = ["--sampler", self.args.teacher_sampler, "--num-steps", str(self.args.teacher_steps)]
        words += guidance.flags("--guidance-scale", "--guidance-interval")
        self.evaluate(row_name(guidance, "teacher"), self.args.teacher, words)

    def setting(self, guidance: Guidance) -> None:
        flags = guidance.flags("--real-guidance-scale", "--real-guidance-interval")
        cold = self.folder / "runs" / folder_name(row_name(guidance, "cold start"))
        self.train("cold_start", cold, [*flags, "--max-train-steps", str(self.args.base_steps)])
        self.evaluate(row_name(guidance, "cold start"), cold / "generator", [])
        for stage in SETTINGS[guidance]:
            run = self.folder / "runs" / folder_name(row_name(guidance, stage))
            steps = str(self.args.base_steps + self.args.extra_steps)
            words = [*flags, "--max-train-steps", steps, *(["--encoder-type", "none"] if stage == "control" else [])]
            units = cold / "checkpoints" / "torch_units" / f"step-{self.args.base_steps}.pt"
            self.train("dmdr", run, words, RESUME_CKPT=units)
            self.evaluate(row_name(guidance, stage), run / "generator", [])

    def train(self, script: str, run: Path, words: list[str], **variables: object) -> None:
        if not (run / "generator" / "config.json").exists():
            flags = [*words, "--keep-checkpoints", "1", *self.args.train_flags.split()]
            log = self.folder / "logs" / f"{run.name}.txt"
            self.launch(script, log, flags, OUTPUT_DIR=run.resolve(), TEACHER=self.args.teacher, **variables)

    def rows(self) -> dict[str, dict]:
        """All rows in the table's order, each as evaluate.py wrote it."""
        names = [row_name(guidance, "teacher") for guidance in TEACHERS]
        names += [row_name(g, stage) for g, stages in SETTINGS.items() for stage in ("cold start", *stages)]
        found = {}
        for name in names:
            record = json.loads((self.folder / "rows" / folder_name(name) / "figures.json").read_text())
            (row,) = record["rows"].values()
            found[name] = row | {"features": record["features"], "reference_sha256": record["reference_sha256"]}
        spaces = {(row["features"], row["reference_sha256"], row["images"]) for row in found.values()}
        if len(spaces) > 1:
            raise InputError(f"the rows of {self.folder} are not of one feature space, reference and count: {spaces}")
        return found


def picture(rows: dict[str, dict], path: Path) -> None:
    """Recall against precision, one labelled point a row, an arrow where RL moved it."""
    figure, axes = plt.subplots(figsize=(10, 7))
    points = {name: (row["figures"]["Precision"], row["figures"]["Recall"]) for name, row in rows.items()}
    for name, (precision, recall) in points.items():
        kind = next(kind for kind in COLOURS if kind in name)
        axes.scatter(precision, recall, s=45, color=COLOURS[kind], marker="s" if kind == "teacher" else "o", zorder=3)
    for name, start in points.items():
        if f"{name} + RL" in points:
            arrow = {"arrowstyle": "->", "color": COLOURS["RL"], "shrinkA": 6, "shrinkB": 6}
            axes.annotate("", points[f"{name} + RL"], start, arrowprops=arrow)
    axes.set_xlabel("precision (quality)")
    axes.set_ylabel("recall (diversity)")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    label_points(figure, axes, points)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def label_points(figure: plt.Figure, axes: plt.Axes, points: dict[str, tuple[float, float]]) -> None:
    """Each name at the nearest place beside its point where it covers no other name, no point and no border."""
    figure.canvas.draw()
    frame = axes.get_window_extent()
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform(list(points.values()))]
    places = sorted(
        ((side * 9, step * 6, "left" if side > 0 else "right") for side in (1, -1) for step in range(-20, 21)),
        key=lambda place: abs(place[1]),
    )
    for name, point in points.items():
        colour = COLOURS[next(kind for kind in COLOURS if kind in name)]
        for dx, dy, alignment in places:
            style = {"textcoords": "offset points", "ha": alignment, "va": "center", "fontsize": 8, "color": colour}
            leader = {"arrowstyle": "-", "color": "lightgray", "shrinkA": 0, "shrinkB": 3} if abs(dy) > 12 else None
            text = axes.annotate(name, point, xytext=(dx, dy), arrowprops=leader, **style)
            text.update_positions(figure.canvas.get_renderer())
            words = Text.get_window_extent(text)  # without its leader
            if frame.containsx(words.x0) and frame.containsx(words.x1) and words.count_overlaps(taken) == 0:
                taken.append(words)
                break
            text.remove()


def published_table() -> str:
    lines = ["| | " + " | ".join(METRICS[:4]) + " |", "|---" * 5 + "|"]
    lines += [f"| {name} | " + " | ".join(map(str, row)) + " |" for name, row in PUBLISHED.items()]
    return "\n".join(lines)


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", choices=["digits", "sitxl"], required=True, help="whose launchers in scripts/")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True, help="model folder")
    parser.add_argument("--base-steps", type=int, required=True, help="generator updates of the cold start")
    parser.add_argument("--extra-steps", type=int, required=True, help="more updates, with the reward or without")
    parser.add_argument("--teacher-sampler", choices=["euler", "heun"], default="euler")
    parser.add_argument("--teacher-steps", type=int, default=32)
    parser.add_argument("--train-flags", default="", help="more flags for every training, in one string")
    parser.add_argument("--jobs", type=int, default=1, help="settings trained at once")
    args = parser.parse_args(argv)
    args.output_dir, args.teacher = args.output_dir.resolve(), args.teacher.resolve()
    frontier = Frontier(args)
    with ThreadPoolExecutor(args.jobs) as pool:
        work = [pool.submit(frontier.setting, guidance) for guidance in SETTINGS]
        work += [pool.submit(frontier.teacher, guidance) for guidance in TEACHERS]
        for future in work:
            future.result()
    rows = frontier.rows()
    count = next(iter(rows.values()))["images"]
    text = f"{args.recipe}, {count} images a row:\n\n{table(rows, count)}\n"
    text += f"\nPublished, ImageNet 256, 50 000 images (arXiv 2511.13649):\n\n{published_table()}\n"
    write_atomically(args.output_dir / "frontier.md", text)
    write_atomically(args.output_dir / "frontier.json", json.dumps(rows, indent=2) + "\n")
    picture(rows, args.output_dir / "frontier.png")
    print(text)
    print(f"written: {args.output_dir}/frontier.{{md,json,png}}")


if __name__ == "__main__":
    main()
