"""When was a run best? Each of its checkpoints judged by spaces that did not train it: a table, a curve, and words.

`python -m evaluation.checkpoints runs/digits/cold_start --reference runs/digits/reference.npz --held-out halves \\
    --space classifier:runs/digits/classifier_evaluation pixels`

Every checkpoint makes images of the same noise and labels, few of them, by its EMA weights if it has some
(`evaluation.generate`); all are judged together (`evaluation.evaluate`): by FDr, the mean over the spaces, with
`--held-out`, else by FID in the first space. A standard error is of the images that were drawn. Between checkpoints it
is an upper bound, since they share their noise. `checkpoints.md`, `.png` and `.json` are written; samples are kept,
so that the same command goes on where it stopped, and with checkpoints that have come since.
"""

import argparse
import math
from pathlib import Path

from evaluation import evaluate, generate
from evaluation.figures.tables import rewarded_by
from train_cc.io import fields
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.figures import markdown_table, read_figures
from train_cc.io.products import check_output_dir, locked, record, record_of, write_atomically, write_record
from train_cc.io.read import require_file, require_folder
from train_cc.run.logbook import read_json_lines

SURE = 2  # standard errors from which on a difference counts


def build_parser() -> fields.Parser:
    parser = fields.Parser(description=__doc__)
    parser.add_argument("run", type=fields.path, help="a run's folder, finished or not")
    parser.add_argument("--reference", type=fields.path, required=True, help="real images, as evaluation.evaluate's")
    parser.add_argument("--space", nargs="+", required=True, help=fields.JUDGING_SPACES)
    parser.add_argument("--held-out", help="real images for the ratio FDr; halves: of the reference")
    parser.add_argument("--dinov2-backbone", help="official file or URL, for the space dinov2")
    parser.add_argument("--inception-weights", type=fields.path, help="torch-fidelity's file, for the space inception")
    parser.add_argument("--num-images", type=fields.COUNT, default=2_000, help="of each checkpoint")
    parser.add_argument("--bootstrap", type=fields.integer(2, 100_000), default=50, help="resamplings, for the errors")
    parser.add_argument("--batch-size", type=fields.BATCH, default=250, help="images at once")
    parser.add_argument("--output-dir", type=fields.path, help="without it RUN_checkpoints, beside the run")
    return parser


def judged(args: argparse.Namespace, steps: list[int], folder: Path) -> tuple[str, list[tuple[float, float]]]:
    """The figure's name, and (value, standard error) of each step. Raises `InputError` for a space that rewarded."""
    vae = str(record_of(args.run)["arguments"].get("vae", "none"))
    files = [folder / "samples" / f"step-{step}.npz" for step in steps]
    for step, file in zip(steps, files, strict=True):
        words = ["--generator", args.run / f"checkpoints/torch_units/step-{step}.pt", "--output", file, "--vae", vae]
        words += ["--num-images", args.num_images, "--batch-size", args.batch_size]
        generate.main([str(word) for word in words])
    words = [*files, args.reference, "--space", *args.space, "--bootstrap", args.bootstrap, "--overwrite"]
    words += ["--names", *(f"step {step}" for step in steps), "--output", folder / "checkpoints.json"]
    for name in ("held_out", "dinov2_backbone", "inception_weights"):
        words += [fields.flag_of(name), getattr(args, name)] if getattr(args, name) else []
    evaluate.main([str(word) for word in words])
    content = read_figures(folder / "checkpoints.json")
    for space in (content, *content["more_spaces"]):
        if any(rewarded_by(row["generation"], space["features_sha256"]) for row in space["rows"].values()):
            raise InputError(f"{space['features']} rewarded {args.run}: a judge must not; leave it out of --space")
    rows, figure = (content["over_spaces"], "FDr") if content["over_spaces"] else (content["rows"], "FID")
    rows = [rows[f"step {step}"] for step in steps]
    return figure, [
        (row["figures"][figure], (row["intervals"][figure][1] - row["intervals"][figure][0]) / 2 / 1.96) for row in rows
    ]


def verdict(steps: list[int], values: list[tuple[float, float]]) -> str:
    """Whether the run still improves, is level, or has become worse, in words."""
    if len(steps) == 1:
        return f"one checkpoint, of step {steps[0]}: there is nothing to compare it with (--checkpoint-steps)"
    best = min(range(len(steps)), key=lambda i: values[i][0])

    def behind(i: int) -> float:
        """In standard errors of the difference from the best."""
        return (values[i][0] - values[best][0]) / (math.hypot(values[i][1], values[best][1]) or math.inf)

    level = [steps[i] for i in range(len(steps)) if i == best or behind(i) < SURE]
    if steps[-1] not in level:
        return f"best at step {steps[best]}; worse since, by {behind(-1):.1f} standard errors at step {steps[-1]}"
    if level[0] == steps[-1]:
        return f"still improving: step {steps[-1]}, the last, is the best"
    if best == len(steps) - 1:
        near = f"within {SURE} standard errors of it since step {level[0]}: more --num-images would tell them apart"
        return f"the last, step {steps[-1]}, is the best; {near}"
    return f"best at step {steps[best]}; level since step {level[0]}: all within {SURE} standard errors of the best"


def draw(run: Path, steps: list[int], figure: str, values: list[tuple[float, float]], path: Path) -> None:
    """The figure over the steps, and the score gap of the run's log below it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log, _ = read_json_lines(run / "loss_logs/loss_gen_log.jsonl")
    rows = [row for row in log if row.get("score_gap") is not None]
    drawing, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    above.errorbar(steps, [value for value, _ in values], [error for _, error in values], marker="o", capsize=3)
    above.set_ylabel(f"{figure}, one standard error")
    below.plot([row["step"] for row in rows], [row["score_gap"] for row in rows], linewidth=0.8)
    below.set(ylabel="score gap (velocity)", xlabel="generator updates")
    drawing.savefig(path, dpi=120)
    plt.close(drawing)


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    units = require_folder(args.run / "checkpoints/torch_units", "a run's checkpoints")
    require_file(args.reference, "the reference, an .npz of real images,")
    steps = sorted(int(path.stem.removeprefix("step-")) for path in units.glob("step-*.pt"))
    if not steps or "teacher" not in record_of(args.run).get("arguments", {}):
        raise InputError(f"{args.run} holds no checkpoint of a cold start or of DMDR")
    folder = args.output_dir or args.run.with_name(f"{args.run.name}_checkpoints")
    if (stage := record_of(folder).get("stage", "checkpoints")) != "checkpoints":
        raise InputError(f"--output-dir {folder} holds a {stage}; choose another")
    check_output_dir(folder, overwrite=True)
    with locked(folder):
        write_record(folder, record("checkpoints", vars(args)))
        (folder / "samples").mkdir(exist_ok=True)
        figure, values = judged(args, steps, folder)
        rows = [[step, f"{value:.3f} +- {error:.3f}"] for step, (value, error) in zip(steps, values, strict=True)]
        words = verdict(steps, values)
        write_atomically(folder / "checkpoints.md", f"{words}\n\n{markdown_table(['step', figure], rows)}\n")
        draw(args.run, steps, figure, values, folder / "checkpoints.png")
    print(f"{words} ({folder / 'checkpoints.md'}, .png, .json)")


if __name__ == "__main__":
    main()
