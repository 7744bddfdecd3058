"""evaluation/frontier.py: which rows there are, what is kept, and what stops it."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from evaluation import frontier, rows
from evaluation.scatter import picture
from tests.conftest import refused, tree, words


def test_rows_have_their_names_folders_and_picture(tmp_path):
    names = [rows.row_name(g, "teacher") for g in rows.TEACHERS]
    names += [rows.row_name(g, s) for g, stages in rows.SETTINGS.items() for s in ("cold start", *stages)]
    assert len(names) == len(set(names)) == len({rows.folder_name(name) for name in names}) == 21
    assert set(rows.PUBLISHED) <= set(names)
    figures = {
        name: {"figures": {"FID": 1.0, "Recall": 0.1 * i, "IS": 9.0, "Precision": 0.5}} for i, name in enumerate(names)
    }
    picture(figures, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.fixture
def frontier_of(teacher, tmp_path, monkeypatch):
    """A frontier whose launchers write what the real ones would. -> a function of flags, and what was launched."""
    launched = []

    def launch(self, script, log, more, **variables):
        launched.append((script, *more))
        if script == "evaluate":
            row = Path(more[1])
            row.mkdir(parents=True, exist_ok=True)
            figures = {"FID": 1.0, "Recall": 0.5, "IS": 9.0, "Precision": 0.5}
            content = {"rows": {"s": {"figures": figures, "images": 1800}}, "features": "f", "reference_sha256": "r"}
            (row / "figures.json").write_text(json.dumps(content))
        else:
            folder = Path(variables["OUTPUT_DIR"]) / "generator"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")

    monkeypatch.setattr(frontier.Frontier, "launch", launch)
    base = {"--recipe": "digits", "--output-dir": tmp_path / "f", "--teacher": teacher}
    base |= {"--base-steps": 4, "--extra-steps": 2}

    def run(**changed):
        given = base | {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
        frontier.main(words(*(word for pair in given.items() for word in pair)))

    return run, launched


def test_finished_rows_are_kept(frontier_of, tmp_path):
    run, launched = frontier_of
    run()
    scripts = [script for script, *_ in launched]
    assert scripts.count("evaluate") == 15 and scripts.count("cold_start") == 6 and scripts.count("dmdr") == 7
    assert "guidance 1.5 + RL" in (tmp_path / "f" / "frontier.md").read_text()
    launched.clear()
    run()
    assert not launched


def test_a_teacher_that_is_not_there_is_refused(frontier_of, tmp_path, capsys):
    run, launched = frontier_of
    assert "does not exist" in refused(lambda: run(teacher=tmp_path / "no"), capsys=capsys)
    assert not launched


def test_rows_of_other_settings_are_not_taken(frontier_of, tmp_path, capsys, monkeypatch):
    run, launched = frontier_of
    monkeypatch.setenv("SEED", "30")
    run()
    before, count = tree(tmp_path / "f"), len(launched)
    run()
    assert len(launched) == count
    other = shutil.copytree(Path(run.__closure__[0].cell_contents["--teacher"]), tmp_path / "other_teacher")
    state = load_file(other / "diffusion_pytorch_model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, other / "diffusion_pytorch_model.safetensors")
    for changed, told in (
        ({"base_steps": 5}, "--max-train-steps 4, asked 5"),
        ({"teacher_steps": 3}, "--num-steps 32, asked 3"),
        ({"train_flags": "--batch-size 3"}, "--batch-size not given, asked 3"),
        ({"teacher": other}, "teacher"),
    ):
        assert told in refused(lambda changed=changed: run(**changed), capsys=capsys), changed
    monkeypatch.setenv("SEED", "31")
    assert "SEED 30, asked 31" in refused(run, capsys=capsys)
    assert len(launched) == count
    assert {name: content for name, content in tree(tmp_path / "f").items() if name in before} == before


@pytest.mark.parametrize("content", ["{}", "[]", '{"rows": {"s": {"figures": {"FID": NaN}}}}', "\0", "[" * 100_000,
                                     '{"rows": {"s": {"figures": {"FID": 1}, "images": 3}}}'])  # fmt: skip
def test_a_damaged_row_of_the_frontier_is_refused(frontier_of, tmp_path, capsys, content):
    run, _ = frontier_of
    run()
    for name in ("rows/teacher/figures.json", "asked/rows/teacher.json"):
        kept = (tmp_path / "f" / name).read_bytes()
        (tmp_path / "f" / name).write_text(content)
        assert "teacher" in refused(run, capsys=capsys)
        (tmp_path / "f" / name).write_bytes(kept)


def test_the_frontier_stops_at_the_first_failure(teacher, tmp_path, capsys, monkeypatch):
    """One launcher fails while another sleeps: the message comes at once, and nothing is left running."""
    fails = tmp_path / "fails.sh"
    fails.write_text(
        f'echo $$ >> {tmp_path}/pids\necho "the reason" >&2\ncase "$*" in *"4.0"*) exit 3;; esac\nsleep 60\n'
    )
    monkeypatch.setattr(frontier, "LAUNCHERS", dict.fromkeys(("cold_start", "dmdr", "evaluate"), str(fails)))
    arguments = words("--recipe", "digits", "--output-dir", tmp_path / "f", "--teacher", teacher, "--base-steps", 4)
    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        frontier.main([*arguments, *words("--extra-steps", 2, "--jobs", 3)])
    assert stopped.value.code == 2 and time.monotonic() - began < 30
    message = capsys.readouterr().err
    assert "exit code 3" in message and "the reason" in message
    for pid in (tmp_path / "pids").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    assert "--jobs is 0" in refused(frontier.main, [*arguments, "--extra-steps", "2", "--jobs", "0"], capsys=capsys)
