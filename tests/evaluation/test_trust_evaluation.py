"""generate, evaluate, report and frontier against wrong input: one message, exit code 2, nothing lost, nothing run."""

import contextlib
import gc
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import evaluate, frontier, generate, report
from evaluation.metrics import frechet_distance, inception_score, precision_recall
from evaluation.report import page
from evaluation.samples import sampling
from evaluation.samples.files import provenance_of
from evaluation.samples.source import Source, open_source
from tests import ROOT
from tests.conftest import TINY, random_sit, refused, run_cold_start, tree, words
from train_cc.io.errors import InputError
from train_cc.io.figures import METRICS, write_figures
from train_cc.io.products import locked
from train_cc.models import features
from train_cc.models.classifier import ImageClassifier
from train_cc.models.generator import save_generator


def sampled(source, output, *more) -> list[str]:
    return words("--generator", source, "--output", output, "--num-images", 10, "--shard-size", 4, *more)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)


@pytest.fixture
def reference(tmp_path, images):
    np.savez(tmp_path / "reference.npz", arr_0=images, arr_1=np.arange(12) % 10)
    return tmp_path / "reference.npz"


@pytest.fixture(scope="module")
def finished_run(teacher, tmp_path_factory):
    return run_cold_start(teacher, tmp_path_factory.mktemp("trust") / "run", "--sample-steps", 3)


# Code and other people's files --------------------------------------------------------------------------------------


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_inception_weights_run_no_code(reference, tmp_path, monkeypatch, capsys):
    """Also where the hash agrees: what is read is tensors alone."""
    weights, trace = tmp_path / "weights.pth", tmp_path / "it-ran"
    for content in (pickle.dumps({"a": Runs(trace)}), None):
        if content is None:
            torch.save({"a": Runs(trace)}, weights)
        else:
            weights.write_bytes(content)
        monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
        refused(evaluate.main, words(reference, reference, "--inception", weights), capsys=capsys)
        assert not trace.exists()


def test_a_damaged_download_of_inception_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(features, "INCEPTION_URL", (tmp_path / "weights.pth").as_uri())
    (tmp_path / "weights.pth").write_bytes(b"what the server sends")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights.pth").write_bytes(b"<html>")
    with pytest.raises(
        InputError, match=f"invalid hash value .*{hashlib.sha256(b'what the server sends').hexdigest()}"
    ):
        features.load_space("inception")


def frontier_words(folder: Path, teacher: Path, reference: Path) -> list:
    """Flags of a frontier of one row."""
    rows = f'seeds = [1]\nbase_steps = 1\nextra_steps = 1\nreference = "{reference}"\nevaluate = "--space pixels"\n'
    (folder / "table.toml").write_text(rows + '[cold_starts]\na = ""\n')
    return ["--recipe", "digits", "--teacher", teacher, "--table", folder / "table.toml"]


FOREIGN = {
    "generate --output": lambda f: (generate, sampled(f.teacher, f.file)),
    "generate --png-dir": lambda f: (generate, sampled(f.teacher, f.new, "--png-dir", f.folder, "--overwrite")),
    "generate parts": lambda f: (generate, sampled(f.teacher, f.of_parts, "--overwrite")),
    "evaluate --output": lambda f: (evaluate, words(*f.pair, "--output", f.file)),
    "evaluate --picture": lambda f: (evaluate, words(*f.pair, "--picture", f.file)),
    "report --output": lambda f: (report, words(f.run, "--output", f.file)),
    "report --curves": lambda f: (report, words(f.run, "--output", f.new, "--curves", f.folder)),
    "frontier": lambda f: (frontier, words(*f.frontier, "--output-dir", f.folder)),
    "a run's record for figures": lambda f: (evaluate, words(*f.pair, "--output", f.run / "args.json")),
    "a run's record for samples": lambda f: (generate, sampled(f.teacher, f.run / "args.json")),
    "a run for PNG files": lambda f: (generate, sampled(f.teacher, f.new, "--png-dir", f.run, "--overwrite")),
    "a run for a frontier": lambda f: (frontier, words(*f.frontier, "--output-dir", f.run)),
    "a picture of a run for figures": lambda f: (evaluate, words(*f.pair, "--output", f.picture)),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_a_command_did_not_write_is_left_alone(
    what, teacher, classifier, reference, finished_run, tmp_path, capsys, monkeypatch
):
    class Files:
        new, file, folder = tmp_path / "new", tmp_path / "precious.npz", tmp_path / "mine"
        of_parts, run = tmp_path / "s.npz", shutil.copytree(finished_run, tmp_path / "run")
        picture = run / "samples" / "step-3" / "grid.png"
        pair = (reference, reference, "--classifier", classifier)
        frontier = frontier_words(tmp_path, teacher, reference)

    Files.teacher = teacher
    Files.file.write_text("mine")
    for folder, name in ((Files.folder, "score_gap.svg"), (tmp_path / "s.npz.tmp", "00000000.npz")):
        folder.mkdir()
        (folder / name).write_text("mine")
    before = tree(tmp_path)
    monkeypatch.setattr(ImageClassifier, "from_pretrained", lambda *_: pytest.fail("refused only after loading"))
    monkeypatch.setattr(Source, "load", lambda *_: pytest.fail("refused only after loading"))
    command, arguments = FOREIGN[what](Files)
    refused(command.main, arguments, capsys=capsys)
    assert tree(tmp_path) == before


def test_overwrite_replaces_what_is_there(teacher, classifier, reference, finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "CHARTS", page.CHARTS[:1])

    def everything():
        generate.main(sampled(teacher, tmp_path / "s.npz", "--png-dir", tmp_path / "png", "--overwrite"))
        pair = words(tmp_path / "s.npz", reference, "--classifier", classifier)
        evaluate.main([*pair, *words("--output", tmp_path / "f.json", "--picture", tmp_path / "p.png"), "--overwrite"])
        outputs = words("--output", tmp_path / "r.html", "--curves", tmp_path / "curves")
        report.main([str(finished_run), *outputs, "--overwrite"])

    everything()
    before = tree(tmp_path)
    everything()
    assert tree(tmp_path).keys() == before.keys()


def odd_paths(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "a_file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "not" / "there")
    (tmp_path / "a_folder").mkdir()
    return {
        "too long": tmp_path / ("x" * 300),
        "below a file": tmp_path / "a_file" / "out",
        "a loop": tmp_path / "loop",
        "below a loop": tmp_path / "loop" / "out",
        "a link to nowhere": tmp_path / "nowhere",
        "below a link to nowhere": tmp_path / "nowhere" / "out",
        "a system folder": Path("/proc/out"),
    }


@pytest.mark.parametrize("kind", ["too long", "below a file", "a loop", "below a loop", "a link to nowhere",
                                  "below a link to nowhere", "a system folder"])  # fmt: skip
def test_odd_output_paths_are_refused_before_the_work(
    kind, teacher, classifier, reference, finished_run, tmp_path, capsys, monkeypatch
):
    path = odd_paths(tmp_path)[kind]
    pair, table = words(reference, reference, "--classifier", classifier), frontier_words(tmp_path, teacher, reference)
    before = tree(tmp_path)
    monkeypatch.setattr(ImageClassifier, "from_pretrained", lambda *_: pytest.fail("refused only after loading"))
    monkeypatch.setattr(Source, "load", lambda *_: pytest.fail("refused only after loading"))
    for main, arguments in (
        (generate.main, sampled(teacher, path)),
        (generate.main, sampled(teacher, tmp_path / "s.npz", "--png-dir", path)),
        (evaluate.main, [*pair, "--output", str(path)]),
        (evaluate.main, [*pair, "--picture", str(path)]),
        (report.main, words(finished_run, "--output", path)),
        (report.main, words(finished_run, "--output", tmp_path / "r.html", "--curves", path)),
        (frontier.main, words(*table, "--output-dir", path)),
    ):
        refused(main, arguments, capsys=capsys)
        assert tree(tmp_path) == before


# Flags --------------------------------------------------------------------------------------------------------------

ODD_NUMBERS = ("-1", "nan", "inf", "1e300", "-1e300", "1e-300", "10" * 30, "abc", "", "1.5.2", "0x10")


@pytest.mark.parametrize("module", [generate, evaluate, frontier])
def test_every_number_has_its_range(module, tmp_path, capsys):
    """No number is taken that the command could not work with: whole numbers and finite ones alone, in a range."""
    parser = module.build_parser()
    numeric = [a for a in parser._actions if isinstance(a.default, int | float) and not isinstance(a.default, bool)]
    numeric += [a for a in parser._actions if a.dest in ("num_steps", "timestep_shift")]
    assert len(numeric) >= (1 if module is frontier else 3)
    for action in numeric:
        for text in ODD_NUMBERS:
            try:
                value = action.type(text)
            except Exception as error:
                assert type(error).__name__ == "ArgumentTypeError", (action.dest, text)
            else:
                assert -1e3 <= value <= 2**63, (action.dest, text)
    message = refused(module.main, [*words("--output", tmp_path / "o"), "--batch", "2"], capsys=capsys)
    assert "see --help" in message


@pytest.mark.parametrize("more", [["--sampler", "euler", "--timestep-shift", 2], ["--num-images", "1e3"],
                                  ["--guidance-scale", "nan"], ["--seed", -1], ["--output", ""],
                                  ["--guidance-interval", "nan", 1]])  # fmt: skip
def test_generate_refuses_flags(teacher, tmp_path, capsys, more):
    refused(generate.main, sampled(teacher, tmp_path / "s.npz", *more), capsys=capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [["--picture-columns", 0], ["--names", "a\nb"], ["--names", ""], ["--bootstrap", -1]])
def test_evaluate_refuses_flags(reference, classifier, capsys, more):
    refused(evaluate.main, words(reference, reference, "--classifier", classifier, *more), capsys=capsys)


# generate -----------------------------------------------------------------------------------------------------------


def provenance(path: Path) -> dict:
    with np.load(path) as file:
        return json.loads(str(file["provenance"]))


def test_a_generator_is_sampled_as_it_was_trained(teacher, tmp_path):
    save_generator(random_sit(), tmp_path / "generator", 2, 3.0)
    generate.main(sampled(tmp_path / "generator", tmp_path / "a.npz"))
    generate.main(sampled(tmp_path / "generator", tmp_path / "b.npz", "--num-steps", 2, "--timestep-shift", 3))
    generate.main(sampled(tmp_path / "generator", tmp_path / "c.npz", "--num-steps", 1))
    a, b, c = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    told = provenance(tmp_path / "a.npz")["arguments"]
    assert (told["num_steps"], told["timestep_shift"]) == ("2", "3.0")
    assert provenance(tmp_path / "c.npz")["arguments"]["num_steps"] == "1"
    generate.main(sampled(teacher, tmp_path / "d.npz", "--sampler", "euler", "--num-images", 4))
    assert provenance(tmp_path / "d.npz")["arguments"]["num_steps"] == str(generate.MULTI_STEPS)


def test_a_checkpoint_is_sampled_as_its_run_trains(teacher, tmp_path):
    run = run_cold_start(teacher, tmp_path / "run", "--num-steps", 2, "--timestep-shift", 2, "--max-train-steps", 1)
    generate.main(sampled(run / "checkpoints/torch_units/step-1.pt", tmp_path / "s.npz"))
    told = provenance(tmp_path / "s.npz")["arguments"]
    assert (told["num_steps"], told["timestep_shift"]) == ("2", "2.0")


@pytest.mark.parametrize("content", ["[]", "{}", '{"num_inference_steps": 0, "timestep_shift": 1}', "\0",
                                     '{"num_inference_steps": 1, "timestep_shift": NaN}', "[" * 100_000])  # fmt: skip
def test_a_damaged_generation_config_is_refused(teacher, tmp_path, capsys, content):
    folder = shutil.copytree(teacher, tmp_path / "generator")
    (folder / "generation_config.json").write_text(content)
    assert "generation_config.json" in refused(generate.main, sampled(folder, tmp_path / "s.npz"), capsys=capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["generator"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_become_no_images(teacher, tmp_path, capsys, value, monkeypatch):
    """Whether the reader refuses the weights or the samples show it: here the weights are damaged after reading."""
    load = Source.load

    def damaged(self):
        model = load(self)
        model.final_layer.linear.bias.data.fill_(value)
        return model

    monkeypatch.setattr(Source, "load", damaged)
    message = refused(generate.main, sampled(teacher, tmp_path / "s.npz"), capsys=capsys)
    assert "samples 0 to 3 hold NaN or infinity" in message and not list(tmp_path.iterdir())


def test_two_processes_do_not_write_one_output(teacher, tmp_path, capsys):
    with locked(tmp_path / "s.npz.tmp"):
        message = refused(generate.main, sampled(teacher, tmp_path / "s.npz"), capsys=capsys)
    assert "another process writes" in message and not (tmp_path / "s.npz").exists()


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_the_same_command_continues_to_the_same_bytes_after_a_kill(every, teacher, tmp_path, monkeypatch):
    """Every change on the disk is one that a kill can come after."""
    arguments = sampled(
        teacher, tmp_path / "s.npz", "--png-dir", tmp_path / "png", "--num-images", 3, "--shard-size", 2
    )
    generate.main(arguments)
    whole = tree(tmp_path)
    calls = ("replace", "rename", "unlink", "rmdir", "mkdir")
    state = {"left": 0}

    class Killed(BaseException):
        pass

    def counted(function):
        def call(*args, **kwargs):
            if state["left"] <= 0:  # dead: nothing is tidied up
                raise Killed
            out = function(*args, **kwargs)
            state["left"] -= 1
            if state["left"] == 0:
                raise Killed
            return out

        return call

    points = 0
    for point in range(1, 60, every):
        shutil.rmtree(tmp_path / "png", ignore_errors=True)
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with monkeypatch.context() as patch:
            state["left"] = point
            for name in calls:
                patch.setattr(os, name, counted(getattr(os, name)))
            with contextlib.suppress(Killed):
                generate.main(arguments)
        gc.collect()  # the lock of the dead is free
        points += state["left"] <= 0
        generate.main(arguments)
        assert tree(tmp_path) == whole, point
        if state["left"] > 0:
            break
    assert points > 12 / every


def test_a_damaged_part_is_made_again(teacher, tmp_path, monkeypatch, capsys):
    generate.main(sampled(teacher, tmp_path / "whole.npz"))
    kept = {}
    monkeypatch.setattr(sampling, "merge_samples", lambda paths, output, _: kept.update(
        {path.name: path.read_bytes() for path in paths}) or (_ for _ in ()).throw(KeyboardInterrupt))  # fmt: skip
    with pytest.raises(SystemExit):
        generate.main(sampled(teacher, tmp_path / "s.npz"))
    monkeypatch.undo()
    folder = tmp_path / "s.npz.tmp"
    assert sorted(kept) == ["00000000.npz", "00000004.npz", "00000008.npz"]
    data = bytearray(kept["00000004.npz"])
    data[len(data) // 3] ^= 1
    (folder / "00000004.npz").write_bytes(data)
    generate.main(sampled(teacher, tmp_path / "s.npz"))
    assert "made again" in capsys.readouterr().out and not folder.exists()
    ours, theirs = (np.load(tmp_path / name) for name in ("s.npz", "whole.npz"))
    assert all(np.array_equal(ours[key], theirs[key]) for key in ("arr_0", "arr_1", "provenance"))


def test_parts_of_other_settings_are_not_taken(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "merge_samples", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        generate.main(sampled(teacher, tmp_path / "s.npz", "--seed", 5))
    monkeypatch.undo()
    generate.main(sampled(teacher, tmp_path / "s.npz"))
    generate.main(sampled(teacher, tmp_path / "t.npz"))
    assert np.array_equal(np.load(tmp_path / "s.npz")["arr_0"], np.load(tmp_path / "t.npz")["arr_0"])


def test_the_decoder_is_part_of_the_provenance(teacher, tmp_path):
    from evaluation.standins import write_vae

    vae = write_vae(tmp_path / "vae")
    digest = hashlib.sha256((vae / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    args = generate.build_parser().parse_args(words("--generator", teacher, "--output", "s.npz", "--vae", vae))
    assert sampling.provenance_of_run(args, open_source(teacher))["vae_sha256"] == digest


@pytest.mark.slow
def test_paths_that_are_no_text_are_written(teacher, reference, classifier, tmp_path):
    """In a process of its own: its standard output is strict, as a user's is."""
    folder = os.fsencode(tmp_path) + b"/\xff$a$\nb"
    os.mkdir(folder)
    code = "import sys; from evaluation import generate, evaluate, report\n"
    code += "teacher, reference, classifier, run, folder = sys.argv[1:]\n"
    code += "generate.main(['--generator', teacher, '--output', folder + '/s\xdc.npz', '--num-images', '4'])\n"
    code += "evaluate.main([folder + '/s\xdc.npz', reference, '--classifier', classifier, "
    code += "'--output', folder + '/o.json', '--picture', folder + '/p'])\n"
    code += "report.main([folder])\n"
    arguments = [*words(teacher, reference, classifier, tmp_path), folder]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert {b"o.json", b"p", b"report.html"} <= set(os.listdir(folder))


# Figures ------------------------------------------------------------------------------------------------------------

EYE = np.eye(3)
BAD_STATISTICS = {
    "NaN in mu": (np.array([0, np.nan, 0]), EYE),
    "infinity in sigma": (np.zeros(3), np.full((3, 3), np.inf)),
    "not symmetric": (np.zeros(3), EYE + np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0]])),
    "negative eigenvalue": (np.zeros(3), np.diag([1.0, 1, -0.01])),
    "complex": (np.zeros(3, complex), EYE),
    "dates": (np.zeros(3, "datetime64[s]"), EYE),
    "objects": (np.zeros(3, object), EYE),
    "strings": (np.zeros(3, "U3"), EYE),
    "booleans": (np.zeros(3, bool), EYE),
    "2-D mu": (np.zeros((1, 3)), EYE),
    "no features": (np.zeros(0), np.zeros((0, 0))),
    "3-D sigma": (np.zeros(3), np.zeros((3, 3, 1))),
    "beyond all features": (np.full(3, 1e200), EYE),
}


@pytest.mark.parametrize("what", BAD_STATISTICS)
def test_statistics_that_cannot_be_are_refused(what):
    good = (np.zeros(3), EYE)
    for pair in ((*BAD_STATISTICS[what], *good), (*good, *BAD_STATISTICS[what])):
        with pytest.raises(InputError):
            frechet_distance(*pair)


def test_statistics_with_the_rounding_of_fp32_are_taken():
    sigma = np.cov(np.random.default_rng(0).normal(size=(20, 40)), rowvar=False).astype(np.float32)  # singular
    sigma[0, 1] *= 1 + 1e-6
    assert frechet_distance(np.ones(40), sigma, np.zeros(40), sigma) == pytest.approx(40, rel=1e-4)


@pytest.mark.parametrize("bad", [torch.full((9, 3), float("nan")), torch.zeros(3, 3), torch.zeros(9), "text",
                                 torch.zeros(9, 3, dtype=torch.long), torch.zeros(9, 3, dtype=torch.complex64),
                                 torch.full((9, 3), 1e300, dtype=torch.double), torch.zeros(9, 0),
                                 torch.zeros(9, 4)])  # fmt: skip
def test_features_that_cannot_be_are_refused(bad):
    good = torch.randn(9, 3)
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(InputError):
            precision_recall(*pair)
    for k in (0, -1, 1.5):
        with pytest.raises(InputError):
            precision_recall(good, good, k)
    with pytest.raises(InputError, match="overflow"):
        precision_recall(good * 1e30, good)


def test_the_inception_score_is_of_finite_numbers():
    for bad in (torch.full((9, 3), float("nan")), torch.zeros(9), torch.zeros(0, 3), torch.zeros(9, 3).long()):
        with pytest.raises(InputError):
            inception_score(bad)
    certain = torch.tensor([[0.0, -2000.0, -2000.0], [-2000.0, 0.0, -2000.0]])  # a class whose share is 0 in float64
    assert inception_score(certain) == pytest.approx(2)


def encrypted(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(signature)
        data[at + offset] |= 1
    path.write_bytes(data)


def lying(path: Path, images: np.ndarray) -> None:
    """A header that names 10^12 images."""
    entry = io.BytesIO()
    np.lib.format.write_array_header_1_0(entry, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 8, 8, 1)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", entry.getvalue() + images.tobytes())


def odd_archives(path: Path, images: np.ndarray) -> dict:
    count, text = len(images), np.array
    content = {
        "float labels": {"arr_1": np.zeros(count)},
        "labels as text": {"arr_1": text(["a"] * count)},
        "negative labels": {"arr_1": np.full(count, -1)},
        "labels beyond the classes": {"arr_1": np.full(count, 10)},
        "too many labels": {"arr_1": np.zeros(count + 1, int)},
        "provenance is no JSON": {"provenance": text("{")},
        "provenance is a list": {"provenance": text("[]")},
        "provenance is nested": {"provenance": text("[" * 100_000)},
        "provenance is infinite": {"provenance": text('{"a": 1e999}')},
        "provenance is a number": {"provenance": np.zeros(3)},
        "no images": {"arr_0": images[:0]},
        "images of no size": {"arr_0": images[:, :0]},
        "two channels": {"arr_0": images.repeat(2, 3)},
        "signed bytes": {"arr_0": images.astype(np.int8)},
        "dates": {"arr_0": images.astype("datetime64[s]")},
        "records": {"arr_0": np.zeros((count, 8, 8, 1), [("a", "u1")])},
        "complex": {"arr_0": images.astype(complex)},
        "objects": {"arr_0": np.full((count, 8, 8, 1), None)},
    }
    made = {name: (lambda each=each: np.savez(path, **({"arr_0": images} | each))) for name, each in content.items()}

    def compressed():
        with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
            archive.writestr("arr_0.npy", b"")

    return made | {
        "lies": lambda: lying(path, images),
        "encrypted": lambda: (np.savez(path, arr_0=images), encrypted(path)),
        "unknown compression": compressed,
        "a zip of text": lambda: zipfile.ZipFile(path, "w").writestr("arr_0.npy", "text"),
        "an array alone": lambda: np.save(path.open("wb"), images),
        "empty": lambda: path.write_bytes(b""),
        "a folder": path.mkdir,
        "a loop": lambda: path.symlink_to(path.name),
    }


ODD_ARCHIVES = tuple(odd_archives(Path("x"), np.zeros((1, 8, 8, 1), np.uint8)))


@pytest.mark.parametrize("what", ODD_ARCHIVES)
def test_odd_archives_are_refused(what, reference, images, classifier, tmp_path, capsys):
    path = tmp_path / "odd.npz"
    odd_archives(path, images)[what]()
    refused(evaluate.main, words(path, reference, "--classifier", classifier), capsys=capsys)
    if "label" not in what and "provenance" not in what:
        refused(evaluate.main, words(reference, path, "--classifier", classifier), capsys=capsys)


@pytest.mark.parametrize("depth", [100, 300, 700, 900, 940, 960, 980, 1000, 2000])
def test_what_is_read_can_be_written_again(depth, tmp_path):
    """JSON's parser and its writer give up at different depths."""
    text = '{"a":' + "[" * depth + "]" * depth + "}"
    try:
        found = provenance_of({"provenance": np.array(text)}, tmp_path)
    except InputError:
        return
    write_figures(tmp_path / "f.json", {"a": {"figures": {}, "generation": found}})


@pytest.mark.parametrize("stored", [{"mu": np.full(512, np.nan), "sigma": np.eye(512)}, {"mu": np.zeros(512)},
                                    {"mu": np.zeros(512), "sigma": -np.eye(512)}])  # fmt: skip
def test_a_reference_whose_statistics_cannot_be_is_refused(stored, reference, images, classifier, tmp_path, capsys):
    np.savez(tmp_path / "stored.npz", arr_0=images, **stored)
    for more in ([], ["--check"]):
        refused(
            evaluate.main, words(reference, tmp_path / "stored.npz", "--classifier", classifier, *more), capsys=capsys
        )


def test_samples_that_are_the_reference_are_named(reference, classifier, tmp_path, capsys):
    shutil.copy(reference, tmp_path / "s.npz")
    evaluate.main(words(tmp_path / "s.npz", reference, "--classifier", classifier))
    assert "is the reference itself" in capsys.readouterr().err


def test_check_needs_no_samples_and_writes_nothing(reference, classifier, tmp_path, capsys):
    before = tree(tmp_path)
    evaluate.main(
        words(tmp_path / "later.npz", reference, "--classifier", classifier, "--check", "--output", tmp_path / "o.json")
    )
    assert "can be evaluated against" in capsys.readouterr().out and tree(tmp_path) == before


@pytest.mark.parametrize("script", ["digits", "fashion", "sitxl"])
@pytest.mark.parametrize("given", [[], ["generator"], ["generator", "--overwrite"]], ids=" ".join)
def test_a_script_of_evaluation_asks_for_its_two_folders(script, given):
    environment = os.environ | {"VIRTUAL_ENV": str(Path(sys.executable).parents[1])}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", str(ROOT / "scripts" / f"evaluate_{script}.sh"), *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: two folders are expected"), done.stderr


@pytest.mark.slow
def test_the_full_size_row_checks_its_reference_before_it_samples(teacher, tmp_path):
    environment = os.environ | {
        "REFERENCE": str(tmp_path / "no.npz"),
        "VIRTUAL_ENV": str(Path(sys.executable).parents[1]),
    }
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", str(ROOT / "scripts" / "evaluate_sitxl.sh"), str(teacher), str(tmp_path / "row")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "no.npz does not exist" in done.stderr
    assert not (tmp_path / "row").exists()


@pytest.mark.slow
def test_the_full_size_row_keeps_its_samples(teacher, reference, tmp_path):
    """After an evaluation that failed, here for want of a fourth image, nothing is sampled twice."""
    environment = os.environ | {"VIRTUAL_ENV": str(Path(sys.executable).parents[1]), "NUM_PROCESSES": "1"}
    environment |= {"REFERENCE": str(reference), "VAE": "none", "SPACES": "pixels"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", str(ROOT / "scripts" / "evaluate_sitxl.sh"), str(teacher), str(tmp_path / "row")]
    command += ["--num-images", "3", "--dtype", "fp32"]
    for printed in ("3 images -> ", "3 images were there already"):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and printed in done.stdout
        assert f"the samples are kept in {tmp_path / 'row' / 'samples.npz'}" in done.stderr


# The report ---------------------------------------------------------------------------------------------------------

ODD_JSON = ["", "null", "[]", "3", '"text"', "{}", '{"rows": []}', '{"rows": {}}', '{"rows": {"a": 1}}',
            '{"rows": {"a": {"figures": {"FID": NaN}}}}', '{"rows": {"a": {"figures": {"FID": "x"}}}}',
            '{"rows": {"a": {"figures": [1]}}}', '{"arguments": [], "stage": 1}', '{"rows": {"a": {"figures": '
            '{"FID": 1' + "0" * 500 + "}}}}", "[" * 100_000, "1" * 10_000, '{"arguments": {"seed": {"a": [[]]}}, '
            '"stage": ["\\ud800"]}', "\x00\xff"]  # fmt: skip


@pytest.mark.parametrize("content", ODD_JSON, ids=lambda text: text[:20])
def test_odd_json_beside_a_run_is_named_on_the_page_and_the_rest_shown(content, finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "CHARTS", page.CHARTS[:1])
    for where in ("run/args.json", "results.json", "frontier/frontier.json"):
        folder = tmp_path / where.replace("/", "_")
        shutil.copytree(finished_run, folder / "run", ignore=shutil.ignore_patterns("checkpoints", "*.safetensors"))
        path = folder / where
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        report.main(words(folder / "run", "--output", folder / "r.html"))
        text = (folder / "r.html").read_text(encoding="utf-8")
        assert text.count("<svg") == 1 and "data:image/png" in text
        if "ud800" not in content or where != "run/args.json":
            assert path.name in text


def test_odd_rows_of_a_log_are_left_out(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "$x_{$ <b>", ignore=shutil.ignore_patterns("checkpoints"))
    log = run / "loss_logs" / "loss_gen_log.jsonl"
    odd = [
        '{"step": null}',
        '{"step": 1e400}',
        '{"step": "3"}',
        "[1]",
        "[" * 100_000,
        "1" * 10_000,
        "\0",
        '{"step": true}',
    ]
    fine = [
        f'{{"step": 9, "score_gap": {value}}}' for value in ("1" + "0" * 400, "NaN", "[]", "-Infinity", '"a"', "true")
    ]
    log.write_text(log.read_text() + "\n".join(odd + fine) + "\n")
    (run / "samples" / "step-²").mkdir()
    shutil.copy(run / "samples" / "step-3" / "grid.png", run / "samples" / "step-²" / "grid.png")
    (run / "samples" / "step-7").mkdir()
    (run / "samples" / "step-7" / "grid.png").write_bytes(b"\x89PNG no")
    other = shutil.copytree(run, tmp_path / "other")
    report.main(words(run, other, "--output", tmp_path / "r.html"))
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert f"{len(odd)} line(s) cannot be read" in text and "step-7/grid.png is damaged" in text
    assert text.count("<svg") > 8 and "<b>" not in text


# Random damage ------------------------------------------------------------------------------------------------------


def damaged(data: bytes, draw: random.Random) -> bytes:
    """One of the ways in which a file goes wrong: bits, holes, ends, text that is still JSON but another one."""
    data = bytearray(data)
    at, length = draw.randrange(len(data) + 1), draw.choice((1, 2, 8, 100, 5000))
    kind = draw.randrange(8)
    if kind == 0 and data:
        data[at % len(data)] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at : at + length] = bytes(length)
    elif kind == 3:
        data[at : at + length] = draw.randbytes(length)
    elif kind == 4:
        del data[at : at + length]
    elif kind == 5:
        data[at:at] = data[at : at + length] or b"x"
    elif kind == 6:
        return b""
    else:
        odd = (b"null", b"-1", b"[]", b"{}", b"NaN", b"1e999", b'"a"', b"9" * 5000, b"true", b"[" * 50_000)
        digits = [i for i, byte in enumerate(data[:100_000]) if chr(byte).isdigit()] or [at]
        start = draw.choice(digits)
        data[start : start + 1] = draw.choice(odd)
    return bytes(data)


def fuzz(folder: Path, count: int, seed: int, teacher, classifier, images, run: Path) -> None:
    """Damage a file that a command reads, run the command: it ends well or with exit code 2."""
    draw = random.Random(seed)
    save_generator(random_sit(depth=1), folder / "generator", 1, 1.0)
    np.savez(folder / "reference.npz", arr_0=images, mu=np.zeros(512), sigma=np.eye(512))
    generate.main(sampled(folder / "generator", folder / "s.npz"))
    shutil.copytree(classifier, folder / "classifier")
    shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("checkpoints", "*.safetensors"))
    rows = {"rows": {"control: a": {"figures": dict.fromkeys(METRICS, 0.5)}}}
    (folder / "results.json").write_text(json.dumps(rows))
    left = folder / "left.npz"
    keep = sampling.merge_samples
    sampling.merge_samples = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(SystemExit):
        generate.main(sampled(folder / "generator", left))
    sampling.merge_samples = keep
    kept = shutil.copytree(folder / "left.npz.tmp", folder / "kept")
    figures = words(folder / "s.npz", folder / "reference.npz", "--classifier", folder / "classifier")
    commands = {
        "generator/*": (generate.main, sampled(folder / "generator", folder / "n.npz", "--overwrite")),
        "left.npz.tmp/*": (generate.main, sampled(folder / "generator", left, "--overwrite")),
        "s.npz": (evaluate.main, figures),
        "reference.npz": (evaluate.main, figures),
        "classifier/*": (evaluate.main, figures),
        "run/args.json": (report.main, words(folder / "run")),
        "run/loss_logs/*": (report.main, words(folder / "run")),
        "run/samples/step-3/grid.png": (report.main, words(folder / "run")),
        "results.json": (report.main, words(folder / "run")),
    }
    for number in range(count):
        pattern = draw.choice(sorted(commands))
        path = draw.choice(sorted(folder.glob(pattern)))
        main, arguments = commands[pattern]
        before = path.read_bytes()
        path.write_bytes(damaged(before, draw))
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                main(arguments)
        except SystemExit as stopped:
            assert stopped.code == 2, (number, path)
        except Exception as error:
            (folder / "escaped").write_bytes(path.read_bytes())
            raise AssertionError(f"damage {number} of seed {seed} to {path} escaped as {error!r}") from error
        if pattern.startswith("left"):
            shutil.rmtree(folder / "left.npz.tmp", ignore_errors=True)
            shutil.copytree(kept, folder / "left.npz.tmp")
            left.unlink(missing_ok=True)
        else:
            path.write_bytes(before)


@pytest.mark.parametrize("count", [40, pytest.param(5000, marks=pytest.mark.slow)])
def test_random_damage_never_escapes(count, teacher, classifier, images, finished_run, tmp_path, monkeypatch):
    assert TINY["input_size"] == images.shape[1]
    monkeypatch.setattr(page, "CHARTS", page.CHARTS[:1])
    fuzz(tmp_path, count, 0, teacher, classifier, images, finished_run)
