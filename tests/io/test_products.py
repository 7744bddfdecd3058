"""The way out: a product is whole or not there, whenever its command is killed, and nothing of others is replaced."""

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest

from tests.conftest import tree
from train_cc.io.errors import InputError
from train_cc.io.products import check_output_file, locked, product, record, record_of, write_record

PARTS = 3


def read_text(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def make(target: Path, seed: int = 0, overwrite: bool = False, file: bool = False, keep: bool = False) -> bool:
    """A command that writes a folder or a file; with ``keep`` part by part. -> False if it was there."""
    content = record("made", {"seed": seed, "overwrite": overwrite}, inputs={"weights": "abc"})
    with product(target, content, overwrite, "--to", file, read_text if file else record_of, keep) as place:
        if place is None:
            return False
        for number in range(PARTS if keep else 0):
            if not (part := place.parts / f"part-{number}").exists():
                (temporary := part.with_suffix(".tmp")).write_text(f"{seed}")
                os.replace(temporary, part)
        text = json.dumps(content | {"parts": [(place.parts / f"part-{k}").read_text() for k in range(PARTS * keep)]})
        if not file:
            (place.new / "inside").mkdir()
            (place.new / "inside" / "deep.txt").write_text(text)
        last = place.new if file else place.new / "config.json"
        last.write_text(text)
        last.chmod(0o600)  # as some libraries do
    return True


def killed(call, folder: Path, change: int) -> bool:
    """``call`` in a fork that ends before change number ``change`` in ``folder``. -> False if it came to its end."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    seen = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal seen
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}) and str(folder) in str(arguments[0]):
            seen += 1
            if seen == change:
                os._exit(9)

    sys.addaudithook(count)
    with contextlib.suppress(BaseException):
        call()
    os._exit(0)


@pytest.mark.parametrize("keep", [False, True], ids=["", "in parts"])
@pytest.mark.parametrize("older", [False, True], ids=["new", "over an older one"])
@pytest.mark.parametrize("file", [False, True], ids=["folder", "file"])
def test_a_command_killed_before_any_change_on_the_disk_continues(tmp_path, file, older, keep):
    kind = {"file": file, "keep": keep}
    make(tmp_path / "truth" / "it", seed=1, overwrite=older, **kind)
    for change in range(1, 100):
        target = tmp_path / str(change) / "it"
        if older:
            make(target, **kind)
            before = target.read_bytes() if file else tree(target)
        if not killed(lambda target=target: make(target, 1, older, **kind), target.parent, change):
            break
        if older and not file and not target.exists():
            assert tree(target.with_name("it.tmp") / "old") == before
        elif older and file:
            assert target.read_bytes() in (before, (tmp_path / "truth" / "it").read_bytes())
        make(target, 1, older, **kind)
        assert tree(target.parent) == tree(tmp_path / "truth"), change
        assert [path.name for path in target.parent.iterdir()] == ["it"]
    assert change > 8


def test_the_same_command_makes_it_once_and_another_is_refused(tmp_path, capsys):
    for name, file in (("folder", False), ("file", True)):
        target = tmp_path / name
        assert make(target, file=file)
        before, umask = tree(tmp_path), os.umask(0o22)
        os.umask(umask)
        assert (target if file else target / "config.json").stat().st_mode & 0o777 == 0o666 & ~umask
        assert not make(target, file=file) and "there already" in capsys.readouterr().out
        with pytest.raises(InputError, match=r"--overwrite"):
            make(target, seed=1, file=file)
        assert tree(tmp_path) == before
        assert make(target, seed=1, overwrite=True, file=file) and tree(tmp_path) != before
    (tmp_path / "folder" / "config.json").unlink()
    with pytest.raises(InputError, match="not whole"):
        make(tmp_path / "folder", seed=1)


def test_parts_of_another_command_are_not_taken(tmp_path):
    change = next(n for n in range(1, 99) if not killed(lambda n=n: make(tmp_path / f"{n}", keep=True), tmp_path, n))
    for number in range(1, change):
        parts = tmp_path / f"{number}.tmp"
        if parts.is_dir() and (parts / "part-0").exists():
            break
    target = tmp_path / str(number)
    with pytest.raises(InputError, match=r"--seed 0 \(asked for: 1\)"):
        make(target, seed=1, keep=True)
    assert (parts / "part-0").read_text() == "0"
    make(target, seed=1, overwrite=True, keep=True)
    assert json.loads((target / "config.json").read_text())["parts"] == ["1"] * PARTS


FOREIGN = ["a folder", "a folder with a record of another kind", "ours with more in it", "its working folder", "a file"]


@pytest.mark.parametrize("what", [*FOREIGN, "a file for its working folder", "a folder for a file", "a pipe"])
def test_what_no_command_wrote_is_never_replaced(tmp_path, what):
    target, work, file = tmp_path / "it", tmp_path / "it.tmp", what in ("a folder for a file", "a pipe")
    if what in ("a folder", "a folder for a file"):
        target.mkdir()
        (target / "args.json").write_text("{}")
    elif what == "a folder with a record of another kind":
        target.mkdir()
        write_record(target, record("cold_start", {}))
    elif what == "ours with more in it":
        make(target)
        (target / "thesis.txt").write_text("mine")
    elif what == "its working folder":
        work.mkdir()
        (work / "thesis.txt").write_text("mine")
    elif what == "a pipe":
        os.mkfifo(target)
    else:
        (target if what == "a file" else work).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(InputError):
            make(target, 1, overwrite, file)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_exists_is_replaced_with_overwrite_only(tmp_path):
    (tmp_path / "a.json").write_text("mine")
    with pytest.raises(InputError, match=r"--picture .*a.json exists; .* --overwrite"):
        check_output_file(tmp_path / "a.json", False, "--picture")
    check_output_file(tmp_path / "a.json", True)


def test_an_error_leaves_what_was_there_and_one_process_writes(tmp_path):
    target = tmp_path / "deep" / "it"
    for overwrite in (False, True):
        with pytest.raises(ZeroDivisionError), product(target, record("made", {}), overwrite) as place:
            (place.new / "config.json").write_text("half")
            with pytest.raises(InputError, match="another process"), product(target, record("made", {}), overwrite):
                pass
            raise ZeroDivisionError
        assert target.exists() == overwrite and not target.with_name("it.tmp").exists()
        make(target, overwrite=overwrite)
    with locked(tmp_path / "deep" / "it.tmp"), pytest.raises(InputError, match="another process"):
        make(target, seed=1, overwrite=True)


def test_an_error_between_the_two_renames_brings_the_older_folder_back(tmp_path, monkeypatch):
    make(tmp_path / "it")
    before, rename = tree(tmp_path), Path.rename

    def full(self, target):
        if self.name == "new":
            raise OSError(28, "full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(InputError, match="it is not written: No space left"):
        make(tmp_path / "it", seed=1, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("finished", [5, None, [["x"]], {"a": 1}, ["/etc", "\0"]], ids=str)
def test_a_record_whose_names_are_damaged_is_of_nothing_whole(tmp_path, finished):
    make(tmp_path / "it")
    content = json.loads((tmp_path / "it" / "args.json").read_text())
    (tmp_path / "it" / "args.json").write_text(json.dumps(content | {"finished": finished}))
    with pytest.raises(InputError, match="is not whole"):
        make(tmp_path / "it")
