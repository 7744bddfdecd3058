"""Stage 0 of the latent recipe: a small diffusers `AutoencoderKL`, f = 4, 4 latent channels.

`python -m train_cc.pretrain.vae --output-dir runs/fashion/vae_first` trains all of it. Then the decoder only, so that
the latents, and a teacher of them, stay:
`python -m train_cc.pretrain.vae --decoder-of runs/fashion/vae_first --classifier runs/fashion/classifier_reward
--output-dir runs/fashion/vae`
"""

from train_cc.io.errors import exits_on_input_error
from train_cc.io.fields import DECAY, Parser, integer, number, path
from train_cc.pretrain.data import DATASETS, add_data_arguments, add_training_arguments


def command_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_data_arguments(parser)
    add_training_arguments(parser, max_train_steps=2400)
    parser.set_defaults(dataset=DATASETS[1], batch_size=16)
    parser.add_argument(
        "--channels", type=integer(8, 1024), nargs="+", default=[16, 32, 64], help="widths of the stages, of which "
        "each but the first halves the sides"
    )  # fmt: skip
    parser.add_argument("--layers", type=integer(1, 8), default=1, help="residual blocks per stage of the encoder")
    parser.add_argument("--groups", type=integer(1, 64), default=8, help="groups of the normalisation")
    parser.add_argument(
        "--kl-weight", type=number(0, 1e3), default=1e-4, help="of the KL per latent number, against the L1 per pixel"
    )
    parser.add_argument("--ema-decay", type=DECAY, default=0.995, help="of the average that is saved")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no", help="of the convolutions")
    parser.add_argument("--decoder-of", type=path, help="a VAE folder whose decoder only is trained further")
    parser.add_argument("--classifier", type=path, help="with --decoder-of: the folder of pretrain/classifier.py")
    parser.add_argument(
        "--feature-weight", type=number(0, 1e3), default=0.1, help="with --decoder-of: of the features' distance"
    )
    return parser


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = command_parser().parse_args(argv)
    from train_cc.pretrain.networks import train_vae  # torch takes seconds

    train_vae(args)


if __name__ == "__main__":
    main()
