"""Stage 0 of the small recipes: a classifier, to be the reward or, another one, the feature space of an evaluation.

`python -m train_cc.pretrain.classifier --dataset digits --output-dir runs/digits/classifier_reward`
"""

from train_cc.io.errors import exits_on_input_error
from train_cc.io.fields import Parser, integer, number
from train_cc.pretrain.data import PURPOSES, add_data_arguments, add_training_arguments


def command_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_data_arguments(parser)
    add_training_arguments(parser, max_train_steps=400)
    parser.add_argument(
        "--purpose", default="reward", choices=PURPOSES, help="the two share no random numbers at one seed"
    )
    parser.add_argument("--architecture", default="test_resnet", help="any classifier of timm.list_models()")
    parser.add_argument(
        "--image-size", type=integer(1, 1024), default=32, help="images are resized to it inside the classifier"
    )
    parser.add_argument(
        "--noise-augmentation", type=number(0, 1), default=0.0, help="largest standard deviation of the noise"
    )
    return parser


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = command_parser().parse_args(argv)
    from train_cc.pretrain.networks import train_classifier  # torch takes seconds

    train_classifier(args)


if __name__ == "__main__":
    main()
