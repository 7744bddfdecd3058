"""Command lines: every flag carries its range, and a value outside it is refused with the range in the message."""

import argparse
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from train_cc.io.errors import InputError

FEATURE_SPACES = "classifier:FOLDER, dinov2, inception, timm:NAME"  # the notation of models/features.py
# These judge alone: the FID in inception-spatial is sFID, and the size of pixels is that of the images.
JUDGING_SPACES = f"{FEATURE_SPACES}, inception-spatial, pixels"


class Parser(argparse.ArgumentParser):
    """No abbreviations; what is wrong with a command line is an `InputError`. Help shows defaults."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> "Arguments":
        return Arguments(**vars(super().parse_args(args, namespace)))

    def error(self, message: str) -> NoReturn:
        raise InputError(re.sub(r"^argument ([^:]+): is ", r"\1 is ", message) + "; see --help")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        """With the default, where it is a value: that a switch is off, or that nothing is given, needs no words."""
        empty = action.default is None or action.default is False or action.default == []
        return action.help if empty else super()._get_help_string(action)


def refuse(value: object, allowed: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"is {value}; allowed: {allowed}")


def between(low: float | None, high: float | None, low_open: bool = False, high_open: bool = False) -> str:
    """The words for a range, such as "at least 1" or "in [0, 1)"."""
    if low is not None and high is not None:
        return f"{'above' if low_open else 'from'} {low:g} to {'below ' if high_open else ''}{high:g}"
    if low is not None:
        return f"{'above' if low_open else 'at least'} {low:g}"
    return f"{'below' if high_open else 'at most'} {high:g}"


@dataclass(frozen=True)
class Number:
    """A finite number of a range, its ends included unless open: the type of a flag, and the check of a file's value.

    ``kind``: int, or float, which takes whole numbers too. ``why`` ends a refusal.
    """

    kind: type
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False
    why: str = ""

    @property
    def range(self) -> str:
        """The words for the range."""
        if self.low is None and self.high is None:
            return "any"
        if self.kind is float or self.low is None:
            return between(self.low, self.high, self.low_open, self.high_open)
        return f"at least {self.low}" if self.high in (None, 2**31 - 1) else f"{self.low} to {self.high}"

    def problem(self, value: object) -> str | None:
        """The words for what is allowed, if ``value`` is not."""
        words = self.range + (f": {self.why}" if self.why else "")
        if isinstance(value, bool) or not isinstance(value, (int, float) if self.kind is float else int):
            return f"a {'whole ' if self.kind is int else ''}number, {words}"
        if isinstance(value, float) and not math.isfinite(value):  # a larger integer is no float
            return f"a finite number, {words}"
        below = self.low is not None and (value < self.low or (self.low_open and value == self.low))
        above = self.high is not None and (value > self.high or (self.high_open and value == self.high))
        return words if below or above else None

    def __call__(self, text: str) -> float:
        """The number that ``text`` is, for argparse."""
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if allowed := self.problem(value):
            refuse(text, allowed)
        return value


def integer(low: int = 1, high: int = 2**31 - 1, why: str = "") -> Number:
    """A whole number from ``low`` to ``high``."""
    return Number(int, low, high, why=why)


def number(low: float | None = None, high: float | None = None, **more: Any) -> Number:
    """A finite number of a range; ``more``: of `Number`."""
    return Number(float, low, high, **more)


# The ranges that several commands share. Upper ends keep a slip of the finger from asking for more than a machine has.
COUNT = integer(1)
COUNT_OR_0 = integer(0)
BATCH = integer(1, 2**20)
STEPS = integer(1, 10_000)  # of a solver
SEED = integer(0, 2**63 - 1)
LEARNING_RATE = number(0, 1e3, low_open=True)
WEIGHT_DECAY = number(0, 1e3)
DECAY = number(0, 1, high_open=True)  # of an average
SHIFT = number(1e-3, 1e3)
GUIDANCE = number(-1e3, 1e3)
PEAK = number(0, 1e6, low_open=True)  # TFLOP/s
BETA_PARAMETER = number(1e-2, 1e3)


def path(text: str) -> Path:
    if not text or "\0" in text:
        refuse(repr(text), "a path")
    if re.match(r"\w+://", text):
        refuse(text, "a path on this machine, not an address")
    return Path(text).expanduser() if text.startswith("~/") else Path(text)  # the shell leaves --flag=~/... as it is


def output_file(text: str) -> Path:
    """The path of a file to write. Whatever ends in "/", "." or ".." is a folder, though `Path` may drop that end."""
    if os.path.basename(text) in ("", ".", ".."):
        refuse(repr(text), "a path that ends in the name of a file")
    return path(text)


class Arguments(argparse.Namespace):
    """What a command line asks for. It does not change; `replaced` makes another."""

    def __init__(self, **values: Any):
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{name} was parsed, and is not assigned to")


def replaced(args: argparse.Namespace, **values: Any) -> Arguments:
    """``args`` with other ``values``."""
    return Arguments(**vars(args) | values)


class TimeInterval(argparse.Action):
    """Two times LOW HIGH with 0 <= LOW < HIGH <= 1."""

    def __call__(self, parser, namespace, values: Sequence[str], option_string=None) -> None:
        try:
            low, high = (float(value) for value in values)
        except ValueError:
            low, high = 1.0, 0.0
        if not 0 <= low < high <= 1:
            told = " ".join(map(str, values))
            parser.error(f"{option_string} is {told}; allowed: two times LOW HIGH with 0 <= LOW < HIGH <= 1")
        setattr(namespace, self.dest, [low, high])
