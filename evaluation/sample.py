"""A picture of what a generator makes: a column a class, its name above.

`python -m evaluation.sample --generator runs/sitxl/dmdr/generator --vae stabilityai/sd-vae-ft-ema \\
    --classes 207 "golden retriever" tench --grid classes.png`

A class is its number or its name, as timm's ImageNetInfo has it for 1000 classes (one of its words is enough, if it is
no other class's), and as the data set of the generator's teacher has it for digits and Fashion-MNIST; or by a file of
`--names`, a name a line. Row r of a column is a function of the seed, r and the class alone: the r-th image of that
class of `evaluation.generate` with the same seed and all classes.
"""

import argparse
from pathlib import Path

from evaluation.generate import add_sampling_arguments, check_sampling
from train_cc.io import flags
from train_cc.io.class_names import class_names
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.products import check_output_file, record_of


def build_parser() -> flags.Parser:
    parser = flags.Parser(description=__doc__)
    parser.add_argument(
        "--generator",
        type=flags.path,
        required=True,
        help="a run's generator/, a teacher folder, or a torch_units/step-N.pt",
    )
    parser.add_argument("--classes", nargs="+", required=True, help="numbers or names")
    parser.add_argument("--grid", type=flags.output_file, required=True, help="the PNG to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    parser.add_argument("--per-class", type=flags.integer(1, 1000), default=4, help="images of each class")
    parser.add_argument("--names", type=flags.path, help="a file with the classes' names, a line each")
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=flags.SEED, default=0, help="of the noise")
    return parser


def class_of(text: str, names: list[str] | None, count: int) -> int:
    """The class that ``text`` names: by its number, its name, or one of its name's parts. Raises `InputError`."""
    if text.isdecimal() and text.isascii() and (names is None or text not in names):
        if len(text) > 9 or int(text) >= count:
            raise InputError(f"--classes {text[:80]}: the generator has the classes 0 to {count - 1}")
        return int(text)
    if names is None:
        raise InputError(
            f"--classes {text[:80]!r}: nobody told the names of this generator's {count} classes; give "
            f"numbers from 0 to {count - 1}, or their names in a file by --names"
        )
    wanted = text.casefold().strip()
    whole = [k for k, name in enumerate(names) if wanted == name.casefold()]
    parts = [k for k, name in enumerate(names) if wanted in [part.strip() for part in name.casefold().split(",")]]
    within = [k for k, name in enumerate(names) if wanted and wanted in name.casefold()]
    found = whole or parts
    if len(found) == 1:
        return found[0]
    near = ", ".join(f"{k} ({names[k]})" for k in (found or within)[:8])
    told = "several classes have that name" if found else "no class has that name"
    told += f", such as {near}" if near else ""
    raise InputError(f"--classes {text[:80]!r}: {told}; give a number from 0 to {count - 1} or another name")


def data_of(source) -> str | None:
    """The data set that the teacher of ``source.path`` was trained on, as far as records lead there."""
    # A file is a run's checkpoints/torch_units/step-N.pt.
    folder = source.path if source.path.is_dir() else source.path.resolve().parents[2]
    for _ in range(3):  # the generator's folder, its run's, its teacher's
        arguments = record_of(folder).get("arguments", {})
        if isinstance(arguments.get("dataset"), str):
            return arguments["dataset"]
        folder = Path(str(arguments["teacher"])) if arguments.get("teacher") else folder.parent
    return None


def classes_of(args: argparse.Namespace, source) -> tuple[list[int], list[str] | None]:
    """``args.classes`` as numbers, and the names of all classes if there are any. Raises `InputError`."""
    given = str(args.names.absolute()) if args.names else "auto"  # a file, though it be named like a data set
    names = class_names(given, source.num_classes, data_of(source), "--names")
    return [class_of(text, names, source.num_classes) for text in args.classes], names


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_sampling(args)
    check_output_file(args.grid, args.overwrite, "--grid")
    from evaluation.columns import sample  # networks take seconds to import: what is wrong has been said

    sample(args)


if __name__ == "__main__":
    main()
