"""Files from the network: of an address, and of the Hugging Face hub, which has a cache. Both are checked as any file.

Importing this module, and naming a folder that is there, asks no network.
"""

import contextlib
import functools
import http.client
import os
import re
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from train_cc.io.errors import OF_THE_DISK, InputError
from train_cc.io.products import RECORD, check_parent, writing
from train_cc.io.read import first_line
from train_cc.io.weights import GENERATION_CONFIG, WEIGHTS_NAME

HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")  # org/name or org/name@revision
# What begins a path of ours, or the name of a size: never an organisation.
OURS = {f"{network}-{size}" for network in ("SiT", "DiT", "LightningDiT") for size in ("S", "B", "L", "XL")}
OURS |= {"runs", "sit_weights"}
MODEL_FILES = ("config.json", WEIGHTS_NAME, GENERATION_CONFIG)
PLACES = ("", "generator/")  # of a model in its repository: at the root, or in a pipeline that was shared
HOW_TO_MAKE = "`bash scripts/pretrain_digits.sh` makes digits' teacher, `python convert_weight/sit_convert.py` SiT-XL/2"


@contextlib.contextmanager
def asking_the_hub(message: str) -> Iterator[None]:
    """Around calls of huggingface_hub only: any exception of it becomes an `InputError` that ``message`` begins.

    Its versions use requests, httpx or httpx2, and a library in Rust for large files: their exceptions share no class.
    """
    try:
        yield
    except Exception as error:
        raise InputError(f"{message}: {first_line(error).rstrip('.')}. {advice(error)}") from error


def advice(error: Exception) -> str:
    """Advice to a person after an exception of huggingface_hub."""
    if isinstance(error, OSError) and error.errno in OF_THE_DISK:
        return "The hub's cache could not be written; HF_HOME names another folder for it"
    answers = (getattr(each, "response", None) for each in (error, error.__cause__))  # a snapshot's has it as its cause
    status = next((answer.status_code for answer in answers if answer is not None), None)
    if status == 403:
        return "The token has no right to this: another name, or `hf auth login` with a token that has"
    if status is not None or (not isinstance(error, OSError) and isinstance(error, ValueError)):
        return "Check the name, and log in by `hf auth login` if it is private or yours"
    return "Check the network, the proxy and HF_ENDPOINT, and log in by `hf auth login`"


def check_hub_name(name: str, flag: str) -> None:
    """Raises `InputError` for what cannot be a repository's name."""
    from huggingface_hub.utils import validate_repo_id

    with asking_the_hub(f"{flag} is {name!r}; a name such as you/dmdr-sit is expected"):
        validate_repo_id(name)


# A model folder: here, or on the hub -----------------------------------------------------------------------------


def hub_name(source: Path | str) -> tuple[str, str | None] | None:
    """(repository, revision or None) where ``source`` names one; None for a path."""
    path, match = Path(source), HUB_NAME.fullmatch(str(source))
    if match is None or path.parts[0] in OURS or path.exists() or path.parent.exists():
        return None
    return match[1], match[2]


def model_folder(source: Path | str) -> Path:
    """The folder with a model's config.json: ``source`` itself, or the hub's cache. Raises `InputError`."""
    path = Path(source)
    if (name := hub_name(path)) is not None:
        root = _snapshot(*name)
        folder = next((root / place for place in PLACES if (root / place / "config.json").is_file()), None)
        if folder is None:
            raise InputError(f"{source} on the hub has neither config.json nor generator/config.json: it is no model")
        return folder
    if not path.exists():
        raise InputError(
            f"{path} does not exist; a model folder, or org/name on the hub, is expected. To make one: {HOW_TO_MAKE}"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        expected = f"a model folder, with config.json and {WEIGHTS_NAME}, is expected"
        raise InputError(f"{path / 'config.json'} does not exist; {expected}{models_inside(path)}")
    return path


def models_inside(folder: Path) -> str:
    """The words for a folder that is no model's but holds some, such as a pipeline or a run; "" if it holds none."""
    kind = " is a diffusers pipeline, and" if (folder / "model_index.json").is_file() else ""
    inside = [str(path.parent) for path in sorted(folder.glob("*/config.json"))[:8]]
    return f". {folder}{kind} holds the model folder(s) {', '.join(inside)}" if inside else ""


def pinned(source: Path) -> Path:
    """``source`` for a record: a name on the hub as org/name@commit, a path as it is. Raises `InputError`."""
    if (name := hub_name(source)) is None:
        return source
    return Path(f"{name[0]}@{_snapshot(*name).name}")


@functools.cache
def _snapshot(repository: str, revision: str | None) -> Path:
    """The folder of a model's files in the hub's cache, which has the commit's name."""
    from huggingface_hub import snapshot_download

    files = [place + name for place in PLACES for name in MODEL_FILES]
    expected = f"a model folder, or org/name[@revision], is expected ({HOW_TO_MAKE})"
    with asking_the_hub(f"no folder {repository} is here; {expected}. The hub says"):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))


def push_folder(folder: Path, repository: str) -> str:
    """``folder`` as a model repository on the hub, made where it is missing. -> its address. Raises `InputError`."""
    from huggingface_hub import HfApi

    again = f"{folder} is whole, and the same command uploads it"
    with asking_the_hub(f"--push-to-hub {repository} failed; {again}. The hub says"):
        api = HfApi()
        url = api.create_repo(repository, exist_ok=True)
        # The record of the command names paths of this machine.
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, ignore_patterns=[RECORD])
    return str(url)


# Single files ----------------------------------------------------------------------------------------------------


def hub_file(repository: str, name: str, what: str, revision: str | None = None) -> Path | None:
    """File ``name`` of ``repository``, downloaded where the cache lacks it; None where the repository has no such file.

    Raises `InputError`; ``what`` is its name.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with asking_the_hub(f"cannot load {what}: no folder has this name, and the hub says"):
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except EntryNotFoundError as error:
            if isinstance(error, FileNotFoundError):  # no file here, and no answer from the hub
                raise
            return None


def cached_hub_file(repository: str, name: str, revision: str | None = None) -> Path | None:
    """The file where the cache has it; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(repository, name, revision=revision)
    except ValueError as error:
        raise InputError(f"{repository!r} is no folder and no name on the hub: {first_line(error)}") from error
    return Path(file) if isinstance(file, str) else None


# An address -------------------------------------------------------------------------------------------------------


def is_url(source: str | Path) -> bool:
    return str(source).startswith(("http://", "https://"))


def download(url: str, target: Path, hint: str, sha256: str | None = None) -> Path:
    """The PyTorch file of ``url`` as ``target``, whole or not there. Processes of one machine wait for each other.

    Raises `InputError`, ``hint`` in it, without a connection, for a web page, a file cut short, or another ``sha256``.
    """
    if target.exists():  # also where nothing can be written
        return target
    import torch.hub  # takes seconds

    check_parent(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part, lock = target.with_name(target.name + ".part"), FileLock(target.with_name(target.name + ".lock"))
    again = f"give the same command again, fetch it by `curl -L -C - -o {target} '{url}'`, or {hint}"
    timeout = socket.getdefaulttimeout()
    with lock:
        try:
            if not target.exists():
                socket.setdefaulttimeout(60)  # torch's has none
                with writing(target):
                    torch.hub.download_url_to_file(url, str(part), hash_prefix=sha256)
                if not zipfile.is_zipfile(part):  # the directory of an archive is at its end
                    raise InputError(f"what {url} sent was deleted: it is no whole PyTorch file; {again}")
                os.replace(part, target)
        except (http.client.HTTPException, OSError, ValueError, RuntimeError) as error:
            if isinstance(error, InputError) or getattr(error, "errno", None) in OF_THE_DISK:
                raise
            raise InputError(f"cannot download {url} ({first_line(error)}); {again}") from error
        finally:
            socket.setdefaulttimeout(timeout)
            for path in target.parent.iterdir():  # torch's own unfinished files too, also of a killed command
                if path.name.startswith(part.name):
                    path.unlink()
            Path(lock.lock_file).unlink(missing_ok=True)
    return target
