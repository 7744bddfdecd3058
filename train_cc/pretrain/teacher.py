"""Stage 0 of the small recipes: a multi-step SiT teacher by flow matching, with label dropout and EMA.

`python -m train_cc.pretrain.teacher --dataset digits --output-dir runs/digits/teacher`
`python -m train_cc.pretrain.teacher --dataset fashion-mnist --vae runs/fashion/vae --output-dir runs/fashion/teacher`
"""

from train_cc.io.errors import exits_on_input_error
from train_cc.io.fields import COUNT_OR_0, DECAY, Parser, integer, number
from train_cc.pretrain.data import add_data_arguments, add_training_arguments


def command_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_data_arguments(parser)
    add_training_arguments(parser, max_train_steps=2000)
    parser.add_argument("--vae", default="none", help="VAE folder whose latents are learnt; none: pixels")
    parser.add_argument("--hidden-size", type=integer(4, 8192), default=64, help="width of the network")
    parser.add_argument("--depth", type=integer(1, 128), default=4, help="blocks of the network")
    parser.add_argument("--num-heads", type=integer(1, 1024), default=2, help="attention heads per block")
    parser.add_argument("--patch-size", type=integer(1, 1024), default=2, help="side of a token, in pixels or latents")
    parser.add_argument(
        "--label-dropout",
        type=number(0, 1, high_open=True),
        default=0.1,
        help="share of labels that become the null class",
    )
    parser.add_argument("--ema-decay", type=DECAY, default=0.999, help="of the average that is saved")
    parser.add_argument("--warmup-steps", type=COUNT_OR_0, default=0, help="over which the learning rate rises")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no", help="of the network's products")
    return parser


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = command_parser().parse_args(argv)
    from train_cc.pretrain.networks import train_teacher  # torch takes seconds

    train_teacher(args)


if __name__ == "__main__":
    main()
