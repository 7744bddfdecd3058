"""Settings: dataclass fields that carry default, range and help. Parsers, checks and docs/flags.md are made of them."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from train_cc.io import flags


@dataclass(frozen=True)
class Setting:
    """A flag with its field's name. A whole number is at least 1 unless ``low`` is set; ``why`` ends a refusal."""

    help: str
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False
    why: str = ""
    choices: tuple[str, ...] | None = None
    group: str = ""  # of --help, if not its dataclass's
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further arguments of `add_argument`
    start: bool = False  # how a command starts: nothing of the run depends on it
    recipe: bool = False  # a number of the recipe: model card and report show it
    reads: bool = False  # an input path: --overwrite must not delete it
    lasting: bool = False  # a checkpoint depends on it: another one cannot continue it

    def parser_of(self, kind: type) -> Callable[[str], object]:
        """The function from a flag's text to a value of ``kind``, with the range in its refusals."""
        if kind is int:
            high = 2**31 - 1 if self.high is None else self.high
            return flags.integer(1 if self.low is None else self.low, high, self.why)
        if kind is float:
            return flags.number(self.low, self.high, self.low_open, self.high_open, self.why)
        return flags.path if kind is Path else str


def setting(default: object = MISSING, help: str = "", **more: Any) -> Any:
    """A dataclass field with a `Setting`; without ``default`` the flag is required."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, **more)}, kw_only=True)


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
    how = {} if "action" in each.options or plain is str else {"type": each.parser_of(plain)}
    choices = {"choices": list(each.choices)} if each.choices else {}
    return {"help": each.help, **default, **how, **choices, **each.options}


def of(kind: type, args: argparse.Namespace, **more: object) -> Any:
    """The dataclass ``kind``: each field from ``more``, else from the flag of its name."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(kind) if field.name not in more}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}, **more)
