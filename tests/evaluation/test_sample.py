"""evaluation/sample.py: a class by its number or name, and a picture with the names above the columns."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFont
from timm.data import ImageNetInfo

from evaluation import generate, sample
from evaluation.samples.source import class_of, data_of
from tests.conftest import random_sit, refused, words
from train_cc.io.class_names import class_names
from train_cc.io.errors import InputError
from train_cc.models.generator import save_generator
from train_cc.run import pictures

IMAGENET = ImageNetInfo().label_descriptions()


@pytest.fixture
def distilled(tmp_path) -> Path:
    """A run's generator, with the records that lead to the data set of its teacher."""
    save_generator(random_sit(), tmp_path / "run" / "generator", 1, 1.0)
    for folder, arguments in (("run", {"teacher": f"{tmp_path}/teacher"}), ("teacher", {"dataset": "fashion-mnist"})):
        (tmp_path / folder).mkdir(exist_ok=True)
        record = {"made_by": "made by DMDR", "versions": {}, "stage": "x", "arguments": arguments}
        (tmp_path / folder / "args.json").write_text(json.dumps(record))
    return tmp_path / "run" / "generator"


def picture(generator: Path, file: Path, *more) -> np.ndarray:
    sample.main(words("--generator", generator, "--grid", file, "--seed", 4, *more))
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("text,expected", [
    ("207", 207), ("golden retriever", 207), ("Golden Retriever", 207), ("tench", 0), ("Tinca tinca", 0), ("0", 0),
    ("crane", "several classes have that name, such as 134"),
    ("retriever", "no class has that name, such as 205"),
    ("no such thing", "no class has that name; give a number from 0 to 999"),
    ("1000", "the classes 0 to 999"),
    ("-1", "no class has that name"),
    ("", "no class has that name"),
])  # fmt: skip
def test_a_class_by_number_name_or_a_part_of_its_name(text, expected):
    if isinstance(expected, int):
        assert class_of(text, IMAGENET, 1000) == expected
        return
    with pytest.raises(InputError, match=expected):
        class_of(text, IMAGENET, 1000)


def test_names_are_those_of_the_data(distilled, tmp_path):
    assert class_of("ankle boot", class_names("auto", 10, "fashion-mnist"), 10) == 9
    (tmp_path / "names.txt").write_text("zero\none\n")
    assert class_of("one", class_names(str(tmp_path / "names.txt"), 2, "digits"), 2) == 1
    with pytest.raises(InputError, match=r"--names .*names\.txt has 2 names; 10 classes are expected"):
        class_names(str(tmp_path / "names.txt"), 10, None, "--names")
    step = tmp_path / "run" / "checkpoints" / "torch_units" / "step-3.pt"
    step.parent.mkdir(parents=True)
    step.touch()
    (tmp_path / "best.pt").symlink_to(step)  # of another name, elsewhere
    for path in (tmp_path / "best.pt", distilled):
        assert data_of(SimpleNamespace(path=path)) == "fashion-mnist"


def test_columns_are_classes_with_their_names_above(distilled, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("\n".join(f"kind {k}" for k in range(10)))  # a file named like a data set
    a = picture(distilled, tmp_path / "a.png", "--classes", 2, "ankle boot", "--per-class", 3)
    assert '"pullover", "ankle boot"' in capsys.readouterr().out
    b = picture(distilled, tmp_path / "b.png", "--classes", "kind 9", "--per-class", 3, "--names", "digits")
    assert '"kind 9"' in capsys.readouterr().out
    assert a.shape[1] == 2 * 68 + 4 and b.shape[1] == 68 + 4
    assert np.array_equal(a[-3 * 68 :, 72:136], b[-3 * 68 :, 4:68])  # the same noise, whatever else was asked for
    assert not np.array_equal(a[-3 * 68 :, 4:68], b[-3 * 68 :, 4:68]) and b[-3 * 68 :].std() > 5
    above = b[: -3 * 68 - 4]
    assert above.shape[0] >= 16 and (above < 100).any() and (above[:, :2] == 255).all()


def test_a_column_shows_what_a_balanced_set_holds_of_the_class(distilled, tmp_path):
    column = picture(distilled, tmp_path / "a.png", "--classes", 3, "--per-class", 2)
    generate.main(words("--generator", distilled, "--seed", 4, "--num-images", 20, "--output", tmp_path / "s.npz"))
    images = np.load(tmp_path / "s.npz")["arr_0"][[3, 13]]
    expected = np.asarray(pictures.above(pictures.grid([images[:1], images[1:]]), ["dress"]))
    assert np.abs(column.astype(int) - expected).max() <= 1  # a batch of another size rounds otherwise


def test_a_long_name_stays_in_its_column():
    font = ImageFont.load_default(size=13)
    for name in ("great white shark", "a" * 60, "", "one two three four five six seven eight nine ten"):
        lines = pictures.lines_of(name, font, 64)
        assert 1 <= len(lines) <= 4 and all(font.getlength(line) <= 64 for line in lines)
    assert pictures.lines_of("great white shark", font, font.getlength("great white") + 1) == ["great white", "shark"]


@pytest.mark.parametrize("more,message", [
    (("--classes", "seven"), "nobody told the names of this generator's 10 classes"),
    (("--classes", 10), "the classes 0 to 9"),
    (("--per-class", 0), "--per-class is 0"),
    (("--names", "no.txt"), "does not exist"),
    (("--generator", "no"), "does not exist"),
    (("--sampler", "euler", "--timestep-shift", 2), "--timestep-shift is of the few-step"),
    ((), "g.png exists"),
])  # fmt: skip
def test_sample_refuses(teacher, tmp_path, capsys, more, message):
    grid = tmp_path / "g.png"
    if not more:
        grid.write_bytes(b"mine")
    arguments = words("--generator", teacher, "--grid", grid, "--classes", 1, *more)
    assert message in refused(sample.main, arguments, capsys=capsys)
    assert grid.exists() == (not more) and (more or grid.read_bytes() == b"mine")
