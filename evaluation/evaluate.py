"""Figures of sample files against a reference in feature spaces: a table each, and a JSON file with their provenance.

`python -m evaluation.evaluate s.npz VIRTUAL_imagenet256_labeled.npz --inception --held-out halves`
`python -m evaluation.evaluate a.npz b.npz reference.npz --space classifier:FOLDER classifier:OTHER pixels`

ADM's protocol for FID (against the reference's stored mu and sigma where it has them, else against its images) and
Inception Score (of the samples alone, in consecutive chunks of 5000, unshuffled). Precision, recall, density, coverage
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

from evaluation.files import (
    HELD_OUT,
    apart,
    content_sha256,
    image_shape,
    over_seeds,
    provenance_of,
    read_images,
    reference_shape,
    rewarded_here,
    rewarded_within,
    suffered,
    table,
    table_over_seeds,
    write_figures,
)
from train_cc.io import flags
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.products import check_output_file, library_versions
from train_cc.io.read import printable
from train_cc.io.saying import saying


def row_name(text: str) -> str:
    if not text.strip() or len(text) > 200 or text != printable(text):
        flags.refuse(repr(text), "one line of printable characters, at most 200")
    return text


def build_parser() -> flags.Parser:
    parser = flags.Parser(description=__doc__)
    parser.add_argument("samples", type=flags.path, nargs="+", help="sample .npz files, or folders of images")
    parser.add_argument("reference", type=flags.path, help="reference .npz: images, or mu and sigma; or a folder")
    space = parser.add_mutually_exclusive_group(required=True)
    space.add_argument("--space", nargs="+", help=flags.JUDGING_SPACES)
    space.add_argument("--classifier", type=flags.path, help="the same as --space classifier:FOLDER")
    space.add_argument(
        "--inception",
        nargs="?",
        type=flags.path,
        const=None,
        default=argparse.SUPPRESS,
        help="the same as --space inception; [weights file]",
    )
    parser.add_argument("--inception-weights", type=flags.path, help="torch-fidelity's file; without it, downloaded")
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
    parser.add_argument("--batch-size", type=flags.BATCH, default=250, help="images through the features at once")
    parser.add_argument(
        "--bootstrap", type=flags.integer(0, 100_000), default=0, metavar="N", help="95 %% intervals from N resamplings"
    )
    parser.add_argument("--output", type=flags.output_file, help="the JSON file to write")
    parser.add_argument("--picture", type=flags.output_file, help="the PNG to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    parser.add_argument("--picture-columns", type=flags.integer(1, 1000), default=20, help="images a row of --picture")
    parser.add_argument(
        "--check", action="store_true", help="check the reference, the features and the outputs; samples need not exist"
    )
    return parser


def check_arguments(args: argparse.Namespace) -> list[str]:
    """What can be refused before a network is loaded. -> the rows' names."""
    names = args.names or [printable(path.stem) for path in args.samples]
    if len(names) != len(args.samples):
        raise InputError(f"--names gives {len(names)} names for {len(args.samples)} sample files")
    if len(set(names)) != len(names):
        raise InputError(f"two rows have one name in {', '.join(names)}; tell them apart by --names")
    if HELD_OUT in names:
        raise InputError(f"no row of samples can be named {HELD_OUT}: that is the ceiling's")
    if args.over_seeds:
        over_seeds({name: {} for name in names})
    check_spaces(args)
    for flag, path in (("--output", args.output), ("--picture", args.picture)):
        if path is not None:
            check_output_file(path, args.overwrite, flag)
    apart((("--output", args.output), ("--picture", args.picture)))
    real = reference_shape(args.reference)
    if real is None and (args.held_out or args.adm):
        print("warning: --held-out and --adm are ignored: the reference holds no images", file=sys.stderr)
        args.held_out, args.adm = None, False
    shapes = {path: image_shape(path) for path in args.samples if not args.check}
    for path, (_, *shape) in shapes.items():
        first = "the reference" if real else args.samples[0]
        expected = (real or shapes[args.samples[0]])[1:]
        if tuple(shape) != expected:
            raise InputError(f"{path} holds images {tuple(shape)}, {first} {expected}")
        if os.path.samefile(path, args.reference) or content_sha256(path) == content_sha256(args.reference):
            print(f"warning: {path} is the reference itself, not samples", file=sys.stderr)
        if path.is_dir() and any(each.suffix.lower() in (".jpg", ".jpeg") for each in path.rglob("*")):
            print(f"warning: {path} holds JPEG files: their compression is in all figures", file=sys.stderr)
    counts = sorted({shape[0] for shape in shapes.values()})
    if len(counts) > 1:
        raise InputError(f"the sample files hold {counts} images: figures of different counts do not compare")
    return names


def check_spaces(args: argparse.Namespace) -> None:
    """``args.space`` lists the spaces, however they were asked for, each once."""
    if args.classifier is not None:
        args.space = [f"classifier:{args.classifier}"]
    elif "inception" in args:
        args.space, args.inception_weights = ["inception"], args.inception or args.inception_weights
    repeated = {text for text in args.space if args.space.count(text) > 1}
    if repeated:
        raise InputError(f"--space names {', '.join(sorted(repeated))} twice; each space once")
    if args.held_out not in (None, "halves"):
        image_shape(Path(args.held_out), "held-out")


def show(args: argparse.Namespace, judged: list[dict], means: dict[str, dict], size: int) -> None:
    """The tables: of each space, and where there are several and something is held out, of all."""
    count = next(iter(judged[0]["rows"].values()))["images"]
    for each in judged:
        print(table(each["rows"], count, size))
        if args.over_seeds:
            print(table_over_seeds(each["rows"], count, size))
        sets = each.get("missing", f"sets of {size} images")
        print(f"features: {each['features']}; FID reference: {each['fid_reference']}; {sets}")
        print("".join(f"{line}\n" for line in suffered(each["rows"], args.over_seeds)))
    if means and len(judged) > 1:
        shown = table_over_seeds if args.over_seeds else table
        print(f"the mean over {len(judged)} spaces:\n{shown(means, count)}")
        print("".join(f"{line}\n" for line in rewarded_within(means)))


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    names = check_arguments(args)
    # Networks take seconds to import: what is wrong with the command line has been said.
    with saying("loading libraries"):
        from evaluation.spaces import check_reference, judge, load_spaces, over_spaces, set_size, statistics_for
        from evaluation.split import hold_out
        from train_cc.run.devices import device

    shape = reference_shape(args.reference) or (None if args.check else image_shape(args.samples[0]))
    spaces = load_spaces(args, shape and shape[1:], device())
    if args.check:
        check_reference(args.reference, spaces)
        hold_out(args.reference, args.held_out)
        return
    held = hold_out(args.reference, args.held_out)
    stored = statistics_for(held.reference, args.reference, spaces)
    judged = [judge(args, names, space, held, stored) for space in spaces]
    for each in judged:
        made_by = [(name, each["rows"][name]["generation"]) for name in names]
        for line in rewarded_here(made_by, each["features_sha256"]):
            print(f"warning: {each['features']}: {line}", file=sys.stderr)
        for name, note in ((name, note) for name, row in each["rows"].items() for note in row["notes"]):
            print(f"warning: {name}, {each['features']}: {note}", file=sys.stderr)
    means = over_spaces(judged) if held.out is not None else {}
    show(args, judged, means, set_size(args, held))  # before a write that a full disk stops
    if args.output:
        write(args, judged, means, set_size(args, held))
    if args.picture:
        draw(args, names)


def draw(args: argparse.Namespace, names: list[str]) -> None:
    """The first images of each file; real ones are left out beside generated ones, whose columns they do not share."""
    from train_cc.io.class_names import KNOWN, dataset_of
    from train_cc.run.pictures import save_grid

    files = {name: read_images(path) for name, path in zip(names, args.samples, strict=True)}
    paths = dict(zip(names, args.samples, strict=True))
    shown = [name for name in names if "generator_sha256" in (provenance_of(files[name], paths[name]) or {})] or names
    labels = [tuple(files[name].get("arr_1", [])[: args.picture_columns]) for name in shown]
    kind, _, folder = args.space[0].partition(":")
    data = dataset_of(Path(folder)) if kind == "classifier" else None
    known = data in KNOWN and len(set(labels)) == 1
    columns = [KNOWN[data][k].split(",")[0] for k in labels[0]] if known else None
    save_grid([files[name]["arr_0"][: args.picture_columns] for name in shown], args.picture, shown, columns)
    print(f"picture: {args.picture}")


def write(args: argparse.Namespace, judged: list[dict], means: dict[str, dict], size: int) -> None:
    """The JSON file: the first space's rows, the others' under "more_spaces" in the same form."""
    for row in (row for each in (*judged, {"rows": means}) for row in each["rows"].values()):
        row.pop("draws", None)
    first, *more = judged
    content = {name: value for name, value in first.items() if name != "rows"}
    content |= {"more_spaces": more, "over_spaces": means, "set_size": size}
    if args.held_out not in (None, "halves"):
        content["held_out_sha256"] = content_sha256(Path(args.held_out))
    write_figures(
        args.output,
        first["rows"],
        **content,
        reference=str(args.reference),
        reference_sha256=content_sha256(args.reference),
        arguments=vars(args),
        versions=library_versions(),
    )


if __name__ == "__main__":
    main()
