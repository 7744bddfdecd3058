"""Figures of sample files against a reference in feature spaces: a table each, and a JSON file with their provenance.

`python -m evaluation.evaluate s.npz VIRTUAL_imagenet256_labeled.npz --inception --held-out halves`
`python -m evaluation.evaluate a.npz b.npz reference.npz --space classifier:FOLDER classifier:OTHER pixels`

ADM's protocol for FID (against the reference's stored mu and sigma where it has them, else against its images) and
Inception Score (of the samples only, in consecutive chunks of 5000, unshuffled). Precision, recall, density, coverage
(k = 3) and sliced Wasserstein (SW) are means over disjoint sets of one size on both sides: that of the smallest file.
A figure of fewer than 50 000 images says so: FID-5k. KID has no bias from the count, and a standard error.
A reference of mu and sigma without images (of pytorch-fid, or of evaluation.statistics) gives FID and IS.

`--held-out`: other real images, or `halves`: one half of the reference, the other is measured against. They are the
last row, the ceiling; FDr and SWr are the Frechet and the sliced Wasserstein distance of sets, over that of the
held-out images, the mean over all spaces: a fresh real draw scores 1. Several sample files may stand before the
reference, each a row; `--picture` draws the first images of each, a row a file, the same noise and label a column.
"""

import argparse
import os
import sys
from pathlib import Path

from evaluation.figures.tables import HELD_OUT, over_seeds, print_tables, warning_lines
from evaluation.samples.files import content_sha256, image_shape, provenance_of, read_images, reference_shape
from train_cc.io import fields
from train_cc.io.errors import InputError, exits_on_input_error, saying
from train_cc.io.figures import write_figures
from train_cc.io.products import apart, check_output_file, library_versions
from train_cc.io.read import printable


def row_name(text: str) -> str:
    if not text.strip() or len(text) > 200 or text != printable(text):
        fields.refuse(repr(text), "one line of printable characters, at most 200")
    return text


def build_parser() -> fields.Parser:
    parser = fields.Parser(description=__doc__)
    parser.add_argument("samples", type=fields.path, nargs="+", help="sample .npz files, or folders of images")
    parser.add_argument("reference", type=fields.path, help="reference .npz: images, or mu and sigma; or a folder")
    space = parser.add_mutually_exclusive_group(required=True)
    space.add_argument("--space", nargs="+", help=fields.JUDGING_SPACES)
    space.add_argument("--classifier", type=fields.path, help="the same as --space classifier:FOLDER")
    space.add_argument(
        "--inception",
        nargs="?",
        type=fields.path,
        default=argparse.SUPPRESS,
        help="the same as --space inception; [weights file]",
    )
    parser.add_argument("--inception-weights", type=fields.path, help="torch-fidelity's file; without it, downloaded")
    parser.add_argument("--dinov2-backbone", help="official file or URL, for the space dinov2")
    parser.add_argument("--held-out", help="real images for the ceiling's row; halves: of the reference")
    parser.add_argument(
        "--names", type=row_name, nargs="+", help="a name for each sample file; without it, the file's own"
    )
    parser.add_argument(
        "--over-seeds", action="store_true", help="rows named 'NAME, seed N': also their means and standard deviations"
    )
    parser.add_argument(
        "--adm", action="store_true", help="also precision and recall as ADM has them: of all images, not of equal sets"
    )
    parser.add_argument("--batch-size", type=fields.BATCH, default=250, help="images through the features at once")
    parser.add_argument(
        "--bootstrap",
        type=fields.integer(0, 100_000),
        default=0,
        metavar="N",
        help="95 %% intervals from N resamplings",
    )
    parser.add_argument("--output", type=fields.output_file, help="the JSON file to write")
    parser.add_argument("--picture", type=fields.output_file, help="the PNG to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    parser.add_argument("--picture-columns", type=fields.integer(1, 1000), default=20, help="images a row of --picture")
    parser.add_argument(
        "--check", action="store_true", help="check the reference, the features and the outputs; samples need not exist"
    )
    return parser


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def judging_settings(args: fields.Arguments) -> fields.Arguments:
    """``args`` with all spaces under ``space``, and without what a reference of mu and sigma ignores."""
    changes = {}
    if args.classifier is not None:
        changes["space"] = [f"classifier:{args.classifier}"]
    elif "inception" in args:
        changes = {"space": ["inception"], "inception_weights": args.inception or args.inception_weights}
    elif repeated := {text for text in args.space if args.space.count(text) > 1}:
        raise InputError(f"--space names {', '.join(sorted(repeated))} twice; each space once")
    if args.held_out not in (None, "halves"):
        image_shape(Path(args.held_out), "held-out")
    if (args.held_out or args.adm) and reference_shape(args.reference) is None:
        warn("--held-out and --adm are ignored: the reference holds no images")
        changes |= {"held_out": None, "adm": False}
    return fields.replaced(args, **changes)


def named_samples(args: fields.Arguments) -> dict[str, Path]:
    """The rows' names and their files. Raises `InputError`."""
    names = args.names or [printable(path.stem) for path in args.samples]
    if len(names) != len(args.samples):
        raise InputError(f"--names gives {len(names)} names for {len(args.samples)} sample files")
    if len(set(names)) != len(names):
        raise InputError(f"two rows have one name in {', '.join(names)}; tell them apart by --names")
    if HELD_OUT in names:
        raise InputError(f"no row of samples can be named {HELD_OUT}: that is the ceiling's")
    if args.over_seeds:
        over_seeds(dict.fromkeys(names))
    return dict(zip(names, args.samples, strict=True))


def check_samples(samples: list[Path], reference: Path) -> tuple[int, ...]:
    """Return (N, H, W, C), the same for all files, and but for N for a reference of images. Raises `InputError`."""
    real = reference_shape(reference)
    shapes = {path: image_shape(path) for path in samples}
    first, expected = ("the reference", real) if real else (samples[0], shapes[samples[0]])
    for path, shape in shapes.items():
        if shape[1:] != expected[1:]:
            raise InputError(f"{path} holds images {shape[1:]}, {first} {expected[1:]}")
        if os.path.samefile(path, reference) or content_sha256(path) == content_sha256(reference):
            warn(f"{path} is the reference itself, not samples")
        if path.is_dir() and any(each.suffix.lower() in (".jpg", ".jpeg") for each in path.rglob("*")):
            warn(f"{path} holds JPEG files: their compression is in all figures")
    counts = sorted({shape[0] for shape in shapes.values()})
    if len(counts) > 1:
        raise InputError(f"the sample files hold {counts} images: figures of different counts do not compare")
    return shapes[samples[0]]


def draw_samples(settings: argparse.Namespace, samples: dict[str, Path]) -> None:
    """The first images of each file; real ones are left out beside generated ones, whose columns they do not share."""
    from train_cc.io.class_names import KNOWN, dataset_of
    from train_cc.run.pictures import save_grid

    files = {name: read_images(path) for name, path in samples.items()}
    made_by = {name: provenance_of(file, samples[name]) or {} for name, file in files.items()}
    names = [name for name in samples if "generator_sha256" in made_by[name]] or list(samples)
    labels = [tuple(files[name].get("arr_1", [])[: settings.picture_columns]) for name in names]
    kind, _, folder = settings.space[0].partition(":")
    data = dataset_of(Path(folder)) if kind == "classifier" else None
    comparable = data in KNOWN and len(set(labels)) == 1
    columns = [KNOWN[data][k].split(",")[0] for k in labels[0]] if comparable else None
    save_grid([files[name]["arr_0"][: settings.picture_columns] for name in names], settings.picture, names, columns)
    print(f"picture: {settings.picture}")


def write_json(settings: argparse.Namespace, judged: list[dict], means: dict[str, dict], size: int) -> None:
    """The JSON file: the first space's rows, the others' under "more_spaces" in the same form."""
    for row in (row for each in (*judged, {"rows": means}) for row in each["rows"].values()):
        row.pop("draws", None)
    first, *more = judged
    content = {name: value for name, value in first.items() if name != "rows"}
    content |= {"more_spaces": more, "over_spaces": means, "set_size": size}
    if settings.held_out not in (None, "halves"):
        content["held_out_sha256"] = content_sha256(Path(settings.held_out))
    write_figures(
        settings.output,
        first["rows"],
        **content,
        reference=str(settings.reference),
        reference_sha256=content_sha256(settings.reference),
        arguments=vars(settings),
        versions=library_versions(),
    )


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    samples, settings = named_samples(args), judging_settings(args)
    outputs = [(flag, path) for flag, path in (("--output", args.output), ("--picture", args.picture)) if path]
    for flag, path in outputs:
        check_output_file(path, args.overwrite, flag)
    apart(outputs)
    shape = reference_shape(args.reference) if args.check else check_samples(args.samples, args.reference)
    # Networks take seconds to import: what is wrong with the command line has been said.
    with saying("loading libraries"):
        from evaluation.figures.spaces import check_inputs, judge_all

    if args.check:
        check_inputs(settings, shape)
        return
    judged, means, size = judge_all(settings, samples, shape)
    for line in warning_lines(judged):
        warn(line)
    print_tables(judged, means, size, settings.over_seeds)  # before a write that a full disk stops
    if settings.output:
        write_json(settings, judged, means, size)
    if settings.picture:
        draw_samples(settings, samples)


if __name__ == "__main__":
    main()
