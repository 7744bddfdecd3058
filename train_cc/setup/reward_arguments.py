"""The rewards on the command line of both stages."""

import argparse

from train_cc.io import flags
from train_cc.io.flags import Parser
from train_cc.rewards.spec import KINDS, TILT_KINDS, RewardSpec

DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/"
DINOV2_BACKBONE = DINOV2_URL + "dinov2_vitl14_pretrain.pth"
DINOV2_HEAD = DINOV2_URL + "dinov2_vitl14_linear4_head.pth"


class EncoderType(argparse.Action):
    """none sets aside every reward named before it, so that an override at the end of a launcher's flags rules."""

    def __call__(self, parser, namespace, value: str, option_string=None) -> None:
        namespace.encoder_type = value
        if value == "none":
            namespace.reward = []


class RewardFlag(argparse.Action):
    """KIND NUMBER [SOURCE], repeatable; the number is a weight or a tilt's beta."""

    def __init__(self, *args, kinds: tuple[str, ...] = tuple(KINDS), number=None, **kwargs):
        super().__init__(*args, nargs="+", **kwargs)
        self.kinds, self.number = kinds, number

    def __call__(self, parser, namespace, values: list[str], option_string=None) -> None:
        words = values if self.dest == "reward" else [*values[1:2], *values[:1], *values[2:]]
        kind, told = words[0] if words else "", " ".join(values)
        if kind not in self.kinds:
            parser.error(f"{option_string} {told}: the kind is {kind!r}; allowed: {', '.join(self.kinds)}")
        expected = [kind, "NUMBER", *(["SOURCE"] if KINDS[kind] else [])]
        if len(words) != len(expected):
            what = f", SOURCE being {KINDS[kind]}" if KINDS[kind] else ""
            parser.error(f"{option_string} {told}: expected are {' '.join(expected)}{what}")
        try:
            number = self.number(words[1])
        except argparse.ArgumentTypeError as error:
            parser.error(f"{option_string} {told}: the number {error}")
        if kind == "python" and not (words[2].rpartition(":")[0] and words[2].rpartition(":")[2].isidentifier()):
            parser.error(f"{option_string} {told}: the source is {words[2]}; {KINDS['python']} is expected")
        spec = RewardSpec(kind, number, *words[2:])
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), spec])


def add_reward_arguments(parser: Parser) -> None:
    reward = parser.add_argument_group("reward")
    reward.add_argument(
        "--encoder-type",
        action=EncoderType,
        default="none",
        type=lambda name: name.lower(),
        choices=["dinov2", "classifier", "none"],
        help="the classifier that rewards, at --reward-weight; none sets aside every reward given before it",
    )
    reward.add_argument(
        "--reward",
        action=RewardFlag,
        number=flags.number(0, 1e6),
        default=[],
        metavar="KIND WEIGHT [SOURCE]",
        help="repeatable: dinov2, classifier FOLDER_OR_TIMM_NAME, frechet STATISTICS.npz, python FILE.py:FUNCTION; "
        "of frechet, weight 1 begins as strong as matching",
    )
    reward.add_argument(
        "--tilt",
        action=RewardFlag,
        kinds=TILT_KINDS,
        number=flags.number(0, 1e3, low_open=True),
        default=[],
        metavar="BETA KIND [SOURCE]",
        help="experimental: a reward without gradient tilts the fake score by exp(-BETA r)",
    )
    reward.add_argument(
        "--frechet-window", type=flags.integer(1, 2**40), default=50_000, help="samples of the decayed statistics"
    )
    reward.add_argument(
        "--frechet-unconditional", action="store_true", help="one mean and covariance, though the file has class means"
    )
    reward.add_argument(
        "--frechet-observe", type=flags.integer(0, 10_000), default=0, help="estimator turns a cycle that enter; 0: all"
    )
    reward.add_argument(
        "--reward-weight", type=flags.number(0, 1e6), default=0.05, help="of the reward loss, beside the DMD loss"
    )
    reward.add_argument("--dinov2-backbone", default=DINOV2_BACKBONE, help="official .pth, file or URL")
    reward.add_argument("--dinov2-head", default=DINOV2_HEAD, help="official linear head .pth, file or URL")
    reward.add_argument(
        "--reward-classifier", help="for --encoder-type classifier: a folder of pretrain/classifier.py, or a timm name"
    )
    reward.add_argument(
        "--reward-micro-batch",
        type=flags.integer(0, 2**20),
        default=0,
        help="samples decoded at once; 0: the whole batch",
    )
    reward.add_argument(
        "--reward-checkpointing", action="store_true", help="recompute decoder and classifier activations in backward"
    )
    reward.add_argument(
        "--holdout-classifier", help="scores the previews and never rewards: shows reward hacking; folder or timm name"
    )
