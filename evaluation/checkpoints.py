"""The best checkpoint of a run, by spaces that did not train it: a table, a curve, and a verdict in words.

`python -m evaluation.checkpoints runs/digits/cold_start --reference runs/digits/reference.npz --held-out halves \\
    --space classifier:runs/digits/classifier_evaluation pixels`

Every checkpoint makes images of the same noise and labels, few of them, by its EMA weights if it has some
(`evaluation.generate`), and with `--raw` by the others too; all are judged together (`evaluation.evaluate`): by FDr,
the mean over the spaces, with `--held-out`, else by FID in the first space. A standard error is of the images that were
drawn. Between checkpoints it is an upper bound, since they share their noise. `checkpoints.md`, `.png` and `.json` are
written; samples are kept, also of checkpoints that are gone, so that the same command goes on where it stopped, and
with checkpoints that have come since. A run whose `--keep-checkpoints` deletes old ones keeps the best that was found.
"""

import argparse
import json
import math
from pathlib import Path

from evaluation import evaluate, generate
from evaluation.figures.tables import rewarded_by
from train_cc.io import fields
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.figures import markdown_table, read_figures
from train_cc.io.products import check_output_dir, locked, record, record_of, write_atomically, write_record
from train_cc.io.read import require_file, require_folder
from train_cc.run.folder import BEST
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
    parser.add_argument("--raw", action="store_true", help="judge the weights that are no EMA, too")
    parser.add_argument("--bootstrap", type=fields.integer(2, 100_000), default=50, help="resamplings, for the errors")
    parser.add_argument("--batch-size", type=fields.BATCH, default=250, help="images at once")
    parser.add_argument("--output-dir", type=fields.path, help="without it RUN_checkpoints, beside the run")
    return parser


def steps_in(folder: Path, pattern: str) -> set[int]:
    """N of each step-N in ``folder``."""
    return {int(path.name.removesuffix(path.suffix).removeprefix("step-")) for path in folder.glob(pattern)}


def judged(args: argparse.Namespace, folder: Path, kind: str) -> dict[str, dict[int, tuple[float, float]]]:
    """FDr or FID -> its value and standard error of each step. Raises `InputError` for a space that rewarded.

    ``kind``: auto, the EMA weights if there are some, or raw.
    """
    vae, end = str(record_of(args.run)["arguments"].get("vae", "none")), "-raw" * (kind == "raw")
    units, samples = args.run / "checkpoints/torch_units", folder / f"samples{end}"
    samples.mkdir(exist_ok=True)
    for step in sorted(steps_in(units, "step-*.pt")):
        words = ["--generator", units / f"step-{step}.pt", "--output", samples / f"step-{step}.npz", "--vae", vae]
        words += ["--num-images", args.num_images, "--batch-size", args.batch_size, "--weights", kind]
        generate.main([str(word) for word in words])
    steps, figures = sorted(steps_in(samples, "step-*.npz")), folder / f"checkpoints{end}.json"
    files = [samples / f"step-{step}.npz" for step in steps]
    words = [*files, args.reference, "--space", *args.space, "--bootstrap", args.bootstrap, "--overwrite"]
    words += ["--names", *(f"step {step}" for step in steps), "--output", figures]
    for name in ("held_out", "dinov2_backbone", "inception_weights"):
        words += [fields.flag_of(name), getattr(args, name)] if getattr(args, name) else []
    evaluate.main([str(word) for word in words])
    content = read_figures(figures)
    for space in (content, *content["more_spaces"]):
        if any(rewarded_by(row["generation"], space["features_sha256"]) for row in space["rows"].values()):
            raise InputError(f"{space['features']} rewarded {args.run}: a judge must not; leave it out of --space")
    rows, figure = (content["over_spaces"], "FDr") if content["over_spaces"] else (content["rows"], "FID")
    values = {}
    for step in steps:
        row = rows[f"step {step}"]
        low, high = row["intervals"][figure]
        values[step] = (row["figures"][figure], (high - low) / 2 / 1.96)
    return {figure: values}


def verdict(steps: list[int], values: list[tuple[float, float]]) -> str:
    """The verdict in words: the run still improves, is level, or has become worse."""
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


def draw(run: Path, figure: str, curves: dict[str, dict[int, tuple[float, float]]], path: Path) -> None:
    """The figure over the steps, by name of the weights, and the score gap of the run's log below it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log, _ = read_json_lines(run / "loss_logs/loss_gen_log.jsonl")
    rows = [row for row in log if row.get("score_gap") is not None]
    drawing, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    for name, values in curves.items():
        above.errorbar(list(values), *zip(*values.values(), strict=True), marker="o", capsize=3, label=name)
    above.set_ylabel(f"{figure}, one standard error")
    above.legend()
    below.plot([row["step"] for row in rows], [row["score_gap"] for row in rows], linewidth=0.8)
    below.set(ylabel="score gap (velocity)", xlabel="generator updates")
    drawing.savefig(path, dpi=120)
    plt.close(drawing)


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    units = require_folder(args.run / "checkpoints/torch_units", "a run's checkpoints")
    require_file(args.reference, "the reference, an .npz of real images,")
    if not steps_in(units, "step-*.pt") or "teacher" not in record_of(args.run).get("arguments", {}):
        raise InputError(f"{args.run} holds no checkpoint of a cold start or of DMDR")
    folder = args.output_dir or args.run.with_name(f"{args.run.name}_checkpoints")
    if (stage := record_of(folder).get("stage", "checkpoints")) != "checkpoints":
        raise InputError(f"--output-dir {folder} holds a {stage}; choose another")
    check_output_dir(folder, overwrite=True)
    with locked(folder):
        write_record(folder, record("checkpoints", vars(args)))
        ((figure, values),) = judged(args, folder, "auto").items()
        curves = {"EMA": values}
        if args.raw:
            (curves["raw"],) = judged(args, folder, "raw").values()
        words, heads = verdict(list(values), list(values.values())), ["step", *(f"{figure}, {name}" for name in curves)]
        text = {name: {step: f"{v:.3f} +- {e:.3f}" for step, (v, e) in of.items()} for name, of in curves.items()}
        table = markdown_table(heads, [[step, *(column.get(step, "") for column in text.values())] for step in values])
        write_atomically(folder / "checkpoints.md", f"{words}\n\n{table}\n")
        write_atomically(folder / BEST, json.dumps({"step": min(values, key=values.get), "verdict": words}))
        draw(args.run, figure, curves, folder / "checkpoints.png")
    print(f"{words} ({folder / 'checkpoints.md'}, .png, .json)")


if __name__ == "__main__":
    main()
