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
from evaluation.standins import write_vae
from tests.conftest import random_sit, refused, words
from train_cc.io.class_names import class_names
from train_cc.io.errors import InputError
from train_cc.models.generator import save_generator
from train_cc.run import pictures

IMAGENET = ImageNetInfo().label_descriptions()


def of_run(folder, teacher, dataset):
    """A run's folder with its generator, and the record that leads to the teacher's data set."""
    save_generator(random_sit(), folder / "run" / "generator", 1, 1.0)
    mark = {"made_by": "made by DMDR", "versions": {}}
    for where, arguments in ((folder / "run", {"teacher": str(folder / "teacher")}), (teacher, {"dataset": dataset})):
        where.mkdir(exist_ok=True)
        (where / "args.json").write_text(json.dumps(mark | {"stage": "x", "arguments": arguments}))
    return folder / "run" / "generator"


@pytest.mark.parametrize(
    "text,expected",
    [("207", 207), ("golden retriever", 207), ("Golden Retriever", 207), ("tench", 0), ("Tinca tinca", 0), ("0", 0)],
)
def test_a_class_by_number_name_or_a_part_of_its_name(text, expected):
    assert class_of(text, IMAGENET, 1000) == expected


def test_a_name_that_is_none_or_of_several_is_refused():
    for text, told in (
        ("crane", "several classes have that name, such as 134"),
        ("retriever", "no class has that name, such as 205"),
        ("no such thing", "no class has that name; give a number from 0 to 999"),
        ("1000", "the classes 0 to 999"),
        ("-1", "no class has that name"),
        ("", "no class has that name"),
    ):
        with pytest.raises(InputError, match=told):
            class_of(text, IMAGENET, 1000)
    with pytest.raises(InputError, match="nobody told the names of this generator's 10 classes"):
        class_of("seven", None, 10)


def test_names_are_those_of_the_data(tmp_path):
    assert class_of("ankle boot", class_names("auto", 10, "fashion-mnist"), 10) == 9
    (tmp_path / "names.txt").write_text("zero\none\n")
    assert class_of("one", class_names(str(tmp_path / "names.txt"), 2, "digits"), 2) == 1
    with pytest.raises(InputError, match=r"--names .*names\.txt has 2 names; 10 classes are expected"):
        class_names(str(tmp_path / "names.txt"), 10, None, "--names")


def test_a_checkpoint_by_a_link_of_another_name_knows_its_data(tmp_path):
    of_run(tmp_path, tmp_path / "teacher", "digits")
    step = tmp_path / "run" / "checkpoints" / "torch_units" / "step-3.pt"
    step.parent.mkdir(parents=True)
    step.touch()
    (tmp_path / "best.pt").symlink_to(step)
    assert data_of(SimpleNamespace(path=tmp_path / "best.pt")) == "digits"


def test_a_file_of_names_may_be_named_like_a_data_set(tmp_path, capsys, monkeypatch):
    generator = of_run(tmp_path, tmp_path / "teacher", "fashion-mnist")
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("\n".join(f"kind {k}" for k in range(10)))
    arguments = words("--generator", generator, "--classes", "kind 3", "--per-class", 1, "--grid", tmp_path / "a.png")
    sample.main([*arguments, "--names", "digits"])
    assert '"kind 3"' in capsys.readouterr().out


def test_columns_are_classes_with_their_names_above(tmp_path, capsys):
    generator = of_run(tmp_path, tmp_path / "teacher", "fashion-mnist")
    arguments = words("--generator", generator, "--per-class", 3, "--seed", 4)
    sample.main([*arguments, "--classes", "2", "ankle boot", "--grid", str(tmp_path / "a.png")])
    assert '"pullover", "ankle boot"' in capsys.readouterr().out
    sample.main([*arguments, "--classes", "9", "--grid", str(tmp_path / "b.png")])
    a, b = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "ab")
    assert a.shape[1] == 2 * 68 + 4 and b.shape[1] == 68 + 4
    assert np.array_equal(a[-3 * 68 :, 72:136], b[-3 * 68 :, 4:68])  # the same noise, whatever else was asked for
    assert not np.array_equal(a[-3 * 68 :, 4:68], b[-3 * 68 :, 4:68]) and b[-3 * 68 :].std() > 5
    above = b[: -3 * 68 - 4]
    assert above.shape[0] >= 16 and (above < 100).any() and (above[:, :2] == 255).all()


def test_a_column_shows_what_a_balanced_set_holds_of_the_class(tmp_path):
    generator = of_run(tmp_path, tmp_path / "teacher", "digits")
    given = words("--generator", generator, "--seed", 4)
    sample.main([*given, *words("--classes", 3, "--per-class", 2, "--grid", tmp_path / "a.png")])
    generate.main([*given, *words("--num-images", 20, "--output", tmp_path / "s.npz")])
    images = np.load(tmp_path / "s.npz")["arr_0"][[3, 13]]
    shown = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    expected = np.asarray(pictures.above(pictures.grid([images[:1], images[1:]]), ["3"]).convert("RGB"))
    assert np.abs(shown.astype(int) - expected).max() <= 1  # a batch of another size rounds otherwise


def test_latents_are_decoded(tmp_path):
    random_sit(in_channels=4).save_pretrained(tmp_path / "latent")
    arguments = words("--generator", tmp_path / "latent", "--vae", write_vae(tmp_path / "vae"), "--per-class", 1)
    sample.main([*arguments, *words("--classes", 1, 2, "--grid", tmp_path / "g.png")])
    assert Image.open(tmp_path / "g.png").mode == "RGB"


def test_a_long_name_stays_in_its_column():
    font = ImageFont.load_default(size=13)
    for name in ("great white shark", "a" * 60, "", "one two three four five six seven eight nine ten"):
        lines = pictures.lines_of(name, font, 64)
        assert 1 <= len(lines) <= 4 and all(font.getlength(line) <= 64 for line in lines)
    assert pictures.lines_of("great white shark", font, 64) == ["great white", "shark"] or len(lines) > 1


def test_sample_refuses(teacher, tmp_path, capsys):
    def told(*more):
        arguments = words("--generator", teacher, "--grid", tmp_path / "g.png", "--classes", 1, *more)
        return refused(sample.main, arguments, capsys=capsys)

    assert "nobody told the names" in told("--classes", "seven")
    assert "the classes 0 to 9" in told("--classes", 10)
    assert "--per-class is 0" in told("--per-class", 0)
    assert "does not exist" in told("--names", tmp_path / "no.txt")
    assert "does not exist" in told("--generator", tmp_path / "no")
    assert "--timestep-shift is of the few-step" in told("--sampler", "euler", "--timestep-shift", 2)
    (tmp_path / "g.png").write_bytes(b"mine")
    assert "--grid" in told() and (tmp_path / "g.png").read_bytes() == b"mine"
