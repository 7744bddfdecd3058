"""A picture of what a generator makes: a column a class, its name above.

`python -m evaluation.sample --generator runs/sitxl/dmdr/generator --vae stabilityai/sd-vae-ft-ema \\
    --classes 207 "golden retriever" tench --grid classes.png`

A class is its number or its name, as timm's ImageNetInfo has it for 1000 classes (one of its words is enough, if it is
no other class's), and as the data set of the generator's teacher has it for digits and Fashion-MNIST; or by a file of
`--names`, a name a line. Row r of a column is a function of the seed, r and the class only: the r-th image of that
class of `evaluation.generate` with the same seed and all classes.
"""

from evaluation.generate import add_sampling_arguments, check_sampling
from train_cc.io import fields
from train_cc.io.errors import exits_on_input_error
from train_cc.io.products import check_output_file


def build_parser() -> fields.Parser:
    parser = fields.Parser(description=__doc__)
    parser.add_argument(
        "--generator",
        type=fields.path,
        required=True,
        help="a run's generator/, a teacher folder, or a torch_units/step-N.pt",
    )
    parser.add_argument("--classes", nargs="+", required=True, help="numbers or names")
    parser.add_argument("--grid", type=fields.output_file, required=True, help="the PNG to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    parser.add_argument("--per-class", type=fields.integer(1, 1000), default=4, help="images of each class")
    parser.add_argument("--names", type=fields.path, help="a file with the classes' names, a line each")
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=fields.SEED, default=0, help="of the noise")
    return parser


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = check_sampling(build_parser().parse_args(argv))
    check_output_file(args.grid, args.overwrite, "--grid")
    from evaluation.samples.sampling import draw_classes  # torch takes seconds

    draw_classes(args)


if __name__ == "__main__":
    main()
