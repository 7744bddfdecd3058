"""What a product was asked for with: it is kept for the same settings alone; a stale one is put aside, and said so."""

import hashlib
import json
import os
import re
import threading
from pathlib import Path

from train_cc.io.errors import InputError
from train_cc.io.products import write_atomically
from train_cc.io.read import read_json, require_file, require_plain, sha256

ROOT = Path(__file__).resolve().parents[1]
MOVING = threading.Lock()  # rows are made side by side, and the seeds of one share a name in the folder of stale ones
GIVEN = {"OUTPUT_DIR", "TEACHER", "RESUME_CKPT", "SEED"}  # variables of the launchers that the frontier gives itself


def folder_sha256(folder: Path) -> str:
    """Of the names and contents of a model folder's files."""
    told = "".join(f"{path.name} {sha256(path)}\n" for path in sorted(folder.iterdir()) if path.is_file())
    return hashlib.sha256(told.encode()).hexdigest()


def settings_of(script: Path, words: list[str], **more: object) -> dict[str, str]:
    """All that decides what ``script`` makes: its commands, the flags, the variables that it reads, and ``more``.

    How many processes there are, where there are several: they decide the batch.
    """
    text = script.read_text(encoding="utf-8")
    commands = "\n".join(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    settings = {"launcher's SHA-256": hashlib.sha256(commands.encode()).hexdigest()}
    read = sorted(set(re.findall(r"\$\{([A-Z0-9_]+)", text)) - GIVEN)
    settings |= {name: os.environ[name] for name in read if name in os.environ}
    return settings | processes_of(text) | plain_settings(words, **more)


def processes_of(launcher: str) -> dict[str, str]:
    """What decides how many processes a script with the text ``launcher`` starts; {} for one."""
    asked = {name: os.environ.get(name, "") for name in ("NUM_PROCESSES", "NUM_NODES")}
    found = {name: value for name, value in asked.items() if value not in ("", "1")}
    if config := os.environ.get("ACCELERATE_CONFIG"):
        found["ACCELERATE_CONFIG"] = sha256(require_file(Path(config), "a config of accelerate"))
    if not asked["NUM_PROCESSES"] and (config or "one_process_unless_asked" not in launcher):
        import torch

        found |= {"GPUs": str(torch.cuda.device_count())} if torch.cuda.device_count() > 1 else {}
    return found


def plain_settings(words: list[str], **more: object) -> dict[str, str]:
    """Flag -> its words, a repeated one's all; and ``more``. `--encoder-type none` sets aside rewards before it."""
    settings = {name: str(value) for name, value in more.items()}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag = word
            settings.setdefault(flag, "")
        else:
            settings[flag] = f"{settings.get(flag, '')} {word}".strip()
            if (flag, word) == ("--encoder-type", "none"):
                settings.pop("--reward", None)
    return settings


def content_sha256(path: Path) -> str:
    """Of a file, or of a folder's files."""
    return folder_sha256(path) if path.is_dir() else sha256(path)


def contents_of(words: list[str]) -> dict[str, str]:
    """What the files and folders among ``words`` hold, also those of SPACE:PATH and FILE:FUNCTION, by their names."""
    found: dict[str, str] = {}
    for word in words:
        ends = (word, word.removeprefix("classifier:"), word.rpartition(":")[0])
        path = next((end for end in ends if end.strip(".") and os.path.exists(end)), None)
        if path is not None:
            found[f"content of {word}"] = content_sha256(Path(path))
    return found


def keep_or_put_aside(note: Path, settings: dict[str, str], product: Path, aside: Path) -> None:
    """After it ``product`` is absent, or was asked for with ``settings``, which are noted in ``note``.

    A stale product, and one that is damaged beyond reading its note, is moved into the folder ``aside``, never deleted.
    Raises `InputError` for one without a note: nobody knows whose it is.
    """
    if product.exists() and (product.is_file() or any(product.iterdir())):
        if not note.is_file():
            raise InputError(f"{product} is there, but {note}, which says how it was made, is not: move it away")
        differing = differences(recorded_in(note), settings)
        if not differing:
            return
        aside.mkdir(parents=True, exist_ok=True)
        with MOVING:
            number = next(k for k in range(1, 10**6) if not (aside / f"{note.stem}-{k}").exists())
            os.replace(product, aside / f"{note.stem}-{number}")
        print(f"stale: {product} was made with {'; '.join(differing[:6])}; now in {aside.name}/{note.stem}-{number}")
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps({"settings": settings}, indent=2) + "\n")


def recorded_in(note: Path) -> dict:
    """The settings in a note; {} for what is damaged."""
    try:
        content = read_json(note, "the settings of a product")
        require_plain(content, note)
    except InputError:
        return {}
    return content["settings"] if isinstance(content.get("settings"), dict) else {}


def differences(recorded: dict, settings: dict[str, str]) -> list[str]:
    """What was recorded otherwise than asked. The same file or folder named by another path does not differ."""
    was, asked = ({in_full(name): in_full(str(value)) for name, value in of.items()} for of in (recorded, settings))
    return [
        f"{name} {was.get(name, 'not given'):.80}, asked {asked.get(name, 'not given'):.80}"
        for name in sorted(asked.keys() | was.keys())
        if asked.get(name) != was.get(name)
    ]


def in_full(words: str) -> str:
    """The paths among ``words``, also of SPACE:PATH and FILE:FUNCTION, as absolute ones, where they exist."""
    parts = re.split("([ :])", words)
    return "".join(os.path.realpath(part) if part.strip(" :.") and os.path.exists(part) else part for part in parts)
