"""Settings: dataclass fields that carry default, range and help. Parsers, checks and docs/flags.md are made of them."""

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from train_cc.io import flags
from train_cc.io.errors import InputError
from train_cc.io.read import shown


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

    def number(self, kind: type) -> flags.Number:
        """The range, for a field of ``kind`` int or float."""
        low, high = (1, 2**31 - 1) if kind is int else (None, None)
        low, high = low if self.low is None else self.low, high if self.high is None else self.high
        return flags.Number(kind, low, high, self.low_open, self.high_open, self.why)

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
    parse = flags.path if plain is Path else each.number(plain)
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
    unknown = [shown(name) for name in content if name not in fields and str(name)[:1] != "_" and not others]
    if missing or unknown:
        problem = f"it lacks {missing[:8]}" if missing else f"it has unknown {unknown[:8]}"
        raise InputError(f"{source}: {problem}; allowed: {', '.join(fields)}")
    for name in fields.keys() & content.keys():
        if allowed := fields[name].metadata["setting"].problem(content[name], hints[name]):
            raise InputError(f"{source}: {name} is {shown(content[name])}; allowed: {allowed}")
    return {name: content.get(name, field.default) for name, field in fields.items()}
