"""Files from the network: continued where they stopped, and there only once they are whole."""

import http.client
import os
import re
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from train_cc.io.errors import InputError
from train_cc.io.products import check_parent, need_space

LOCAL = "give a local file by --input"


def is_url(source: str | Path) -> bool:
    return str(source).startswith(("http://", "https://"))


def whole_archive(path: Path) -> str | None:
    """What is wrong with a downloaded .pt or .pth: a zip archive has its directory at its end. None: nothing."""
    return None if zipfile.is_zipfile(path) else "it is no PyTorch file"


def download(
    url: str,
    target: Path,
    least: int = 0,
    problem: Callable[[Path], str | None] = lambda path: None,
    hint: str = LOCAL,
) -> Path:
    """``url`` to ``target``, continuing what a stopped download left in ``target``.part. A partial file never counts.

    The server's size must be reached, ``least`` bytes too, and ``problem`` must find nothing. Processes of one machine
    wait for each other. Raises `InputError`, ``hint`` at its end, without a connection, for a web page in place of the
    file, where the disk is too small, or where the server sent too little.
    """
    if target.exists():  # also where nothing can be written
        return target
    check_parent(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(target.name + ".lock")
    with FileLock(lock):
        try:
            if not target.exists():
                part = target.with_name(target.name + ".part")
                _fetch(url, part, hint)
                told = problem(part)
                if told is None and part.stat().st_size < least:
                    told = f"it has {part.stat().st_size:,} bytes, at least {least:,} are expected"
                if told is not None:
                    part.unlink()
                    raise InputError(f"what {url} sent was deleted: {told}; {hint}")
                os.replace(part, target)
        finally:
            lock.unlink(missing_ok=True)
    return target


def _fetch(url: str, part: Path, hint: str) -> None:
    """All of ``url`` into ``part``, from its present end."""
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as response:
            if response.headers.get_content_type() == "text/html":
                raise InputError(f"{url} sent a web page, not the file; {hint}")
            if have and not _continues(response, have):
                have = 0
            length = response.headers.get("Content-Length", "")
            total = have + int(length) if length.isdigit() else None
            if total is not None:
                need_space(part.parent, total - have)
            with part.open("ab" if have else "wb") as file:
                _copy(response, file, part.stem, have, total)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # "range not satisfiable": nothing comes after what is there
            if _size_told(error.headers.get("Content-Range")) in (have, None):
                return
            part.unlink()
            return _fetch(url, part, hint)
        raise InputError(f"cannot download {url}: {error}; {hint}") from error
    except InputError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, OSError) and error.filename is not None:  # the disk's, not the network's
            raise
        told = f"{type(error).__name__}: {error}"
        raise InputError(f"the download of {url} stopped ({told}); the same command continues it, or {hint}") from error
    if total is not None and part.stat().st_size != total:
        told = f"{part} has {part.stat().st_size:,} of {total:,} bytes"
        raise InputError(f"{told}; the same command continues the download, or {hint}")


def _continues(response: http.client.HTTPResponse, have: int) -> bool:
    """Whether the answer begins at byte ``have``: a server without ranges starts from the beginning."""
    begin = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", f"bytes {have}-"))
    return response.status == 206 and begin is not None and int(begin[1]) == have


def _size_told(content_range: str | None) -> int | None:
    size = re.search(r"/(\d+)$", content_range or "")
    return int(size[1]) if size else None


def _copy(response: http.client.HTTPResponse, file, name: str, have: int, total: int | None) -> None:
    progress = tqdm(desc=name, total=total, initial=have, unit="B", unit_scale=True, mininterval=2)
    with progress:
        while block := response.read(1 << 20):
            file.write(block)
            progress.update(len(block))
