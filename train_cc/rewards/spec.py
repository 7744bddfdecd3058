"""The rewards on the command line of both stages: kind, weight and source of each. Needs no torch."""

import argparse
from dataclasses import dataclass
from typing import NamedTuple

from train_cc.io.errors import InputError
from train_cc.io.fields import number, setting

DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/"
DINOV2_BACKBONE = DINOV2_URL + "dinov2_vitl14_pretrain.pth"
DINOV2_HEAD = DINOV2_URL + "dinov2_vitl14_linear4_head.pth"
# Kind -> its source; None: it takes none.
KINDS = {
    "dinov2": None,
    "classifier": "a folder of pretrain/classifier.py, or a timm name",
    "frechet": "a statistics file of evaluation/statistics.py",
    "kl": "a statistics file of evaluation/statistics.py",
    "python": "FILE.py:FUNCTION",
}
TILT_KINDS = ("dinov2", "classifier", "python")


class RewardSpec(NamedTuple):
    """``weight`` of a reward, or beta of a tilt."""

    kind: str
    weight: float
    source: str | None = None

    @property
    def name(self) -> str:
        """The name in the log's columns: the function's own, or the kind."""
        return self.source.rpartition(":")[2] if self.kind == "python" else self.kind


class EncoderType(argparse.Action):
    """none drops every reward named before it, so that an override at the end of a launcher's flags decides."""

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
        kind, text = words[0] if words else "", " ".join(values)
        if kind not in self.kinds:
            parser.error(f"{option_string} {text}: the kind is {kind!r}; allowed: {', '.join(self.kinds)}")
        expected = [kind, "NUMBER", *(["SOURCE"] if KINDS[kind] else [])]
        if len(words) != len(expected):
            what = f", SOURCE being {KINDS[kind]}" if KINDS[kind] else ""
            parser.error(f"{option_string} {text}: expected are {' '.join(expected)}{what}")
        try:
            weight = self.number(words[1])
        except argparse.ArgumentTypeError as error:
            parser.error(f"{option_string} {text}: the number {error}")
        if kind == "python" and not (words[2].rpartition(":")[0] and words[2].rpartition(":")[2].isidentifier()):
            parser.error(f"{option_string} {text}: the source is {words[2]}; {KINDS['python']} is expected")
        spec = RewardSpec(kind, weight, *words[2:])
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), spec])


@dataclass(frozen=True)
class Rewards:
    """The rewards, and how they are computed."""

    encoder_type: str = setting(
        "none",
        "the classifier that rewards, at --reward-weight; none drops every reward given before it",
        choices=("dinov2", "classifier", "none"),
        options={"action": EncoderType, "type": str.lower},
        recipe=True,
    )
    reward: tuple[RewardSpec, ...] = setting(
        (),
        "repeatable: dinov2, classifier FOLDER_OR_TIMM_NAME, frechet STATISTICS.npz, kl STATISTICS.npz, "
        "python FILE.py:FUNCTION; of frechet and kl, weight 1 begins as strong as matching",
        options={"action": RewardFlag, "number": number(0, 1e6), "metavar": "KIND WEIGHT [SOURCE]"},
        recipe=True,
    )
    tilt: tuple[RewardSpec, ...] = setting(
        (),
        "experimental: a reward without gradient tilts the fake score by exp(-BETA r)",
        options={
            "action": RewardFlag,
            "kinds": TILT_KINDS,
            "number": number(0, 1e3, low_open=True),
            "metavar": "BETA KIND [SOURCE]",
        },
        recipe=True,
    )
    frechet_window: int = setting(50_000, "samples of the decayed statistics", high=2**40)
    frechet_unconditional: bool = setting(False, "one mean and covariance, though the file has class means")
    reward_weight: float = setting(0.05, "of the reward loss, beside the DMD loss", low=0, high=1e6, recipe=True)
    dinov2_backbone: str = setting(DINOV2_BACKBONE, "official .pth, file or URL", reads=True)
    dinov2_head: str = setting(DINOV2_HEAD, "official linear head .pth, file or URL", reads=True)
    reward_classifier: str | None = setting(
        None, "for --encoder-type classifier: a folder of pretrain/classifier.py, or a timm name", reads=True
    )
    reward_micro_batch: int = setting(0, "samples decoded at once; 0: the whole batch", low=0, high=2**20)
    reward_checkpointing: bool = setting(False, "recompute decoder and classifier activations in backward")
    holdout_classifier: str | None = setting(
        None, "scores the previews and never rewards: shows reward hacking; folder or timm name", reads=True
    )


def rewards_of(args: argparse.Namespace) -> list[RewardSpec]:
    """All rewards of a command: that of --encoder-type with --reward-weight, and each --reward."""
    if args.encoder_type == "none":
        return list(args.reward)
    source = args.reward_classifier if args.encoder_type == "classifier" else None
    return [RewardSpec(args.encoder_type, args.reward_weight, source), *args.reward]


def named_apart(specs: list[RewardSpec]) -> list[str]:
    """A name for each: a second one of a kind is classifier_2."""
    names: list[str] = []
    for spec in specs:
        name, count = spec.name, 1
        while name in names:
            count += 1
            name = f"{spec.name}_{count}"
        names.append(name)
    return names


def require_sense(rewards: list[RewardSpec], tilts: list[RewardSpec]) -> None:
    """No reward stands twice, nor as a reward and a tilt. Raises `InputError`."""
    keys: set[tuple[str, str | None]] = set()
    for spec in [*rewards, *tilts]:
        key = spec.kind, spec.source
        if key in keys:
            raise InputError(f"{' '.join(filter(None, key))} is given twice as a reward or a tilt; once is expected")
        keys.add(key)
