"""What a product was asked for with: it is kept for the same settings alone, and a difference is named."""

import hashlib
import json
import os
import re
from pathlib import Path

from evaluation.files import require_plain
from train_cc.io.errors import InputError
from train_cc.io.read import read_json, sha256
from train_cc.io.write import mark_of, write_atomically

ROOT = Path(__file__).resolve().parents[1]


def folder_sha256(folder: Path) -> str:
    """Of the names and contents of a model folder's files."""
    told = "".join(f"{path.name} {sha256(path)}\n" for path in sorted(folder.iterdir()) if path.is_file())
    return hashlib.sha256(told.encode()).hexdigest()


def settings_of(script: Path, words: list[str], **more: object) -> dict[str, str]:
    """All that decides what ``script`` makes: its text, the flags, the variables that it reads, and ``more``."""
    settings = {"launcher's SHA-256": sha256(script)} | {name: str(value) for name, value in more.items()}
    read = set(re.findall(r"\$\{([A-Z0-9_]+)", script.read_text(encoding="utf-8")))
    settings |= {name: os.environ[name] for name in sorted(read - {"OUTPUT_DIR", "TEACHER"}) if name in os.environ}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag = word
            settings.setdefault(flag, "")
        else:
            settings[flag] = f"{settings.get(flag, '')} {word}".strip()
    return settings


def require_same(note: Path, settings: dict[str, str], product: Path) -> None:
    """``product`` is not there yet, or was asked for with ``settings``; they are noted. Raises `InputError`."""
    if product.is_dir() and any(product.iterdir()):
        if not note.is_file():
            raise InputError(f"{product} is there, but {note}, which says how it was made, is not: move it away")
        content = read_json(note, "the settings of a product")
        require_plain(content, note)
        recorded = content.get("settings")
        recorded = recorded if isinstance(recorded, dict) else {}
        differing = [
            f"{name} {recorded.get(name, 'not given')!s:.80}, asked {settings.get(name, 'not given')!s:.80}"
            for name in sorted(settings.keys() | recorded.keys())
            if settings.get(name) != recorded.get(name)
        ]
        if differing:
            raise InputError(
                f"{product} was made with {'; '.join(differing[:6])}. It is kept: choose another --output-dir, or "
                "move it away to make it again"
            )
    else:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps({"made_by": mark_of("settings"), "settings": settings}, indent=2) + "\n")


def require_reference(content: dict, path: Path) -> None:
    """The reference that a row was evaluated against is still the one that lies there. Raises `InputError`."""
    reference = content.get("reference")
    there = isinstance(reference, str) and reference and (ROOT / reference).is_file()
    if there and sha256(ROOT / reference) != content.get("reference_sha256"):
        raise InputError(f"{reference} has changed since {path} was made; move that row away to make it again")
