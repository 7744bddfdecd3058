"""Values from outside: dataclass fields that carry default, range and help, and the command line made of them.

A parser, its checks, a config's checks and docs/flags.md are made of the same fields.
"""

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from train_cc.io.errors import InputError
from train_cc.io.read import value_text

FEATURE_SPACES = "classifier:FOLDER, dinov2, inception, timm:NAME"  # the notation of models/features.py
# These only judge: the FID in inception-spatial is sFID, and the size of pixels is that of the images.
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
        """The words for the range, such as "at least 1" or "from 0 to below 1"."""
        low, high = self.low, self.high
        if self.kind is int and low is not None:
            return f"at least {low}" if high in (None, 2**31 - 1) else f"{low} to {high}"
        if high is None:
            return "any" if low is None else f"{'above' if self.low_open else 'at least'} {low:g}"
        if low is None:
            return f"{'below' if self.high_open else 'at most'} {high:g}"
        return f"{'above' if self.low_open else 'from'} {low:g} to {'below ' if self.high_open else ''}{high:g}"

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
DECAY = number(0, 1, high_open=True)  # of an average
SHIFT = number(1e-3, 1e3)
GUIDANCE = number(-1e3, 1e3)


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
    """Parsed flags, which do not change; `replaced` makes others."""

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
            text = " ".join(map(str, values))
            parser.error(f"{option_string} is {text}; allowed: two times LOW HIGH with 0 <= LOW < HIGH <= 1")
        setattr(namespace, self.dest, [low, high])


# Settings ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A flag with its field's name. ``limits``: of `Number`; a whole number is at least 1 unless they say another."""

    help: str
    limits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choices: tuple[str, ...] | None = None
    group: str = ""  # of --help, if not its dataclass's
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further arguments of `add_argument`
    start: bool = False  # how a command starts: nothing of the run depends on it
    recipe: bool = False  # a number of the recipe: model card and report show it
    reads: bool = False  # an input path: --overwrite must not delete it
    lasting: bool = False  # a checkpoint depends on it: another one cannot continue it

    def number(self, kind: type) -> Number:
        """The range, for a field of ``kind`` int or float."""
        usual = {"low": 1, "high": 2**31 - 1} if kind is int else {}
        return Number(kind, **usual | self.limits)

    def problem(self, value: object, kind: Any) -> str | None:
        """The words for what is allowed, if ``value``, read from a file, is none for a field of ``kind``."""
        kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        if self.choices is not None:
            return None if value in self.choices else ", ".join(self.choices)
        problems = [self._problem(value, get_origin(each) or each) for each in kinds]
        return None if None in problems else problems[0]

    def _problem(self, value: object, kind: type) -> str | None:
        if kind in (int, float):
            return self.number(kind).problem(value)
        plain = {Path: str, tuple: list}.get(kind, kind)  # in a file
        return None if isinstance(value, plain) else WORDS[plain]


WORDS = {str: "text", bool: "true or false", list: "a list", dict: "names with values", NoneType: "nothing"}


def setting(default: object = MISSING, help: str = "", **more: Any) -> Any:
    """A dataclass field with a `Setting`; ``more``: of it and of `Number`. Without ``default`` the flag is required."""
    limits = {field.name: more.pop(field.name) for field in dataclasses.fields(Number) if field.name in more}
    return dataclasses.field(default=default, metadata={"setting": Setting(help, limits, **more)}, kw_only=True)


def marked(mark: str, *kinds: type) -> dict[str, object]:
    """Name -> default of the settings of ``kinds`` whose ``mark`` ("start", "recipe", "reads", "lasting") is set."""
    every = (field for kind in kinds for field in dataclasses.fields(kind))
    return {field.name: field.default for field in every if getattr(field.metadata["setting"], mark)}


def flag_of(name: str) -> str:
    """The flag of the setting ``name``."""
    return f"--{name.replace('_', '-')}"


def add_flags(parser: argparse.ArgumentParser, **groups: type) -> None:
    """Add a flag for every setting; ``groups``: title -> dataclass. One of another's group comes last in it."""
    sections = {title: parser.add_argument_group(title) for title in groups}
    every = [(title, kind, field) for title, kind in groups.items() for field in dataclasses.fields(kind)]
    for title, kind, field in sorted(every, key=lambda each: bool(each[2].metadata["setting"].group)):
        each: Setting = field.metadata["setting"]
        how = arguments_of(each, field, get_type_hints(kind)[field.name])
        sections[each.group or title].add_argument(flag_of(field.name), **how)


def arguments_of(each: Setting, field: dataclasses.Field, kind: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for one field."""
    if field.default is MISSING:
        default: dict[str, Any] = {"required": True}
    else:
        default = {"default": list(field.default) if isinstance(field.default, tuple) else field.default}
    if kind is bool:
        return {"action": "store_true", "help": each.help}
    plain = next((one for one in (int, float, Path) if kind in (one, one | None)), str)
    parse = path if plain is Path else each.number(plain)
    how = {} if "action" in each.options or plain is str else {"type": parse}
    choices = {"choices": list(each.choices)} if each.choices else {}
    return {"help": each.help, **default, **how, **choices, **each.options}


def of(kind: type, args: argparse.Namespace, **more: object) -> Any:
    """The dataclass ``kind``: each field from ``more``, else from the flag of its name."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(kind) if field.name not in more}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}, **more)


def check(kind: type, content: Mapping, source: Path | str, others: bool = False) -> dict[str, Any]:
    """The fields of the dataclass ``kind`` in ``content``, which was read from ``source``; else their defaults.

    Private keys (``_name``) are ignored, and with ``others`` all that are no fields. Raises `InputError` that names
    what is missing, unknown, of another type or outside its range.
    """
    fields, hints = {field.name: field for field in dataclasses.fields(kind)}, get_type_hints(kind)
    missing = [name for name, field in fields.items() if field.default is MISSING and name not in content]
    unknown = [value_text(name) for name in content if name not in fields and str(name)[:1] != "_" and not others]
    if missing or unknown:
        problem = f"it lacks {missing[:8]}" if missing else f"it has unknown {unknown[:8]}"
        raise InputError(f"{source}: {problem}; allowed: {', '.join(fields)}")
    for name in fields.keys() & content.keys():
        if allowed := fields[name].metadata["setting"].problem(content[name], hints[name]):
            raise InputError(f"{source}: {name} is {value_text(content[name])}; allowed: {allowed}")
    return {name: content.get(name, field.default) for name, field in fields.items()}


def check_numbers(config: Mapping, allowed: Mapping[str, Number], source: Path | str) -> None:
    """Every key of ``allowed`` that is in ``config`` has such a number. Raises `InputError`."""
    for name, number in allowed.items():
        if name in config and (words := number.problem(config[name])):
            raise InputError(f"{source}: {name} is {value_text(config[name])}; allowed: {words}")
