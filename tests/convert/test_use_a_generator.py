"""docs/use_a_generator.md, as pasted: its commands and its Python, on a run of three updates."""

import re
import shlex

import pytest
from PIL import Image

from convert_weight import export_generator
from evaluation import generate
from tests import ROOT
from tests.conftest import random_sit, run_cold_start

PAGE = (ROOT / "docs" / "use_a_generator.md").read_text()
MAINS = {"evaluation.generate": generate.main, "convert_weight.export_generator": export_generator.main}
CHANGED = {"step-500": "step-3", "step-N": "step-3", "RUN/": "runs/lora/", "TEACHER": "teacher"}


def pieces() -> list[tuple[str, str]]:
    """(section, command or Python) in their order. What needs the hub is in tests/io/test_remote.py."""
    found = []
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        title = section.splitlines()[0]
        if "Hub" not in title and title != "Share it":
            for block in re.findall(r"^ {4}(python [^\n]+)$|^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
                found.append((title, "".join(block)))
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the runs that the page names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    random_sit().save_pretrained("teacher")
    (tmp_path / "teacher" / "args.json").write_text(
        '{"made_by": "made by DMDR", "stage": "teacher", "arguments": {"dataset": "digits"}}'
    )
    run_cold_start("teacher", tmp_path / "runs" / "digits" / "dmdr")
    run_cold_start("teacher", tmp_path / "runs" / "lora", "--use-lora-gen")
    return tmp_path


def test_every_command_and_every_line_of_python_runs(here):
    done, names = [], {}
    for title, text in pieces():
        for old, new in CHANGED.items():
            text = text.replace(old, new)
        if text.startswith("python "):
            _, _, module, *flags = shlex.split(text)
            MAINS[module](flags)
        else:
            exec(text, names := {})
        done.append(title)
        if title == "In Python":
            assert names["x0"].shape == (2, 1, 8, 8) and names["x0"].std() > 0
        elif "pipeline" in names:
            assert Image.open(here / "seven.png").size == (8, 8) and len(names["images"]) == 3
    assert done == ["Sample to a file", "In Python", *["As a diffusers pipeline"] * 2, *["The LoRA only"] * 2]
    assert len(list((here / "runs/digits/pictures").glob("*.png"))) == 100
