"""evaluation/evaluate.py: its figures, spaces, what is held out, its files, and what is refused."""

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import evaluate, generate
from evaluation.figures.spaces import read_real
from evaluation.metrics import precision_recall, statistics
from evaluation.samples.files import provenance_of
from tests import ROOT
from tests.conftest import refused, tree, words
from train_cc.io.class_names import KNOWN
from train_cc.io.errors import InputError
from train_cc.io.figures import read_figures, write_figures
from train_cc.io.products import record, write_record
from train_cc.models import features
from train_cc.models.classifier import ImageClassifier
from train_cc.models.features import load_space
from train_cc.pretrain import data


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "reference.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["data", "--output", str(path)])
        data.main()
    return path


@pytest.fixture(scope="module")
def content(digits):
    return dict(np.load(digits))


@pytest.fixture(scope="module")
def judges(classifier, reward_folder):
    return [f"classifier:{classifier}", f"classifier:{reward_folder}"]


def judged(tmp_path, *arguments) -> dict:
    evaluate.main(words(*arguments, "--output", tmp_path / "o.json", "--overwrite"))
    return read_figures(tmp_path / "o.json")


def saved(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


# Figures ----------------------------------------------------------------------------------------------------------


def test_real_data_against_itself_and_stored_statistics(digits, content, classifier, tmp_path, capsys):
    result = judged(tmp_path, digits, digits, "--classifier", classifier)
    out, err = capsys.readouterr()
    assert "| reference | 0.00 | 1.000 |" in out and "is the reference itself" in err
    assert result["rows"]["reference"]["images"] == 1797 and len(result["reference_sha256"]) == 64
    assert "computed from the reference's 1797 images" in result["fid_reference"]
    mu, sigma = statistics(load_space(f"classifier:{classifier}").of(content["arr_0"], 500)[0])
    stored = saved(tmp_path / "stored.npz", arr_0=content["arr_0"], mu=mu + 1, sigma=sigma)
    assert "stored" in judged(tmp_path, digits, stored, "--classifier", classifier)["fid_reference"]
    assert f"| reference | {len(mu):.2f} |" in capsys.readouterr().out


def test_provenance_travels_with_the_figures(teacher, digits, classifier, tmp_path, capsys):
    command = words("--generator", teacher, "--output", tmp_path / "s.npz", "--num-images", 10, "--seed", 7)
    generate.main([*command, "--png-dir", str(tmp_path / "png")])
    more = ("--classifier", classifier, "--bootstrap", 5, "--picture", tmp_path / "p.png")
    rows = judged(tmp_path, tmp_path / "s.npz", tmp_path / "png", digits, *more)["rows"]
    assert "FID-0.01k" in capsys.readouterr().out and Image.open(tmp_path / "p.png").height > 16
    for row in rows.values():  # the folder's images are the file's
        assert row["generation"]["arguments"]["seed"] == "7" and len(row["generation"]["generator_sha256"]) == 64
        assert {"num_steps", "guidance_scale", "labels", "vae", "dtype"} <= row["generation"]["arguments"].keys()
        assert all(low <= high for low, high in row["intervals"].values()) and "draws" not in row
    assert rows["png"]["figures"]["FID"] == rows["s"]["figures"]["FID"]


def written(folder, images, labels):
    """As PNG files, in a folder per class if there are labels."""
    for i, image in enumerate(images):
        place = folder if labels is None else folder / f"{labels[i]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze(2)).save(place / f"{i:04d}.png")
    return folder


def test_a_folder_of_png_has_the_figures_of_its_npz(digits, content, classifier, tmp_path, capsys):
    images, labels = content["arr_0"][:40], content["arr_1"][:40]
    order = np.argsort(labels, kind="stable")
    npz = saved(tmp_path / "a.npz", arr_0=images[order], arr_1=labels[order])
    classes, flat = written(tmp_path / "classes", images[order], labels[order]), written(tmp_path / "b", images, None)
    rows = judged(tmp_path, npz, classes, flat, digits, "--classifier", classifier)["rows"]
    of_npz, of_classes, of_flat = (row["figures"] for row in rows.values())
    assert of_classes == of_npz and of_npz["FID"] > 0
    assert of_flat["FID"] == pytest.approx(of_npz["FID"]) and "accuracy" not in of_flat
    hashes = set()  # a folder is a reference too
    for grey in (None, 9):
        Image.new("L", (8, 8), grey).save(classes / "3" / "0000.png") if grey else None
        hashes.add(judged(tmp_path, flat, classes, "--space", "pixels")["reference_sha256"])
    assert len(hashes) == 2
    judge = shutil.copytree(classifier, tmp_path / "judge")
    write_record(judge, record("pretrain.classifier", {"dataset": "fashion-mnist"}))
    folder = written(tmp_path / "png", images[:20], KNOWN["fashion-mnist"] * 2)
    message = refused(evaluate.main, words(folder, digits, "--classifier", judge), capsys=capsys)
    assert "the folder ankle boot is its class 1, but the model's class 9" in message


def test_a_reference_without_images_gives_the_fid_and_the_is_of_its_images(digits, content, classifier, tmp_path):
    samples = saved(tmp_path / "s.npz", arr_0=content["arr_0"][:300])
    mu, sigma = statistics(load_space(f"classifier:{classifier}").of(content["arr_0"], 500)[0])
    references = (digits, saved(tmp_path / "mu.npz", mu=mu, sigma=sigma))
    results = [judged(tmp_path, samples, each, "--classifier", classifier, "--bootstrap", 2) for each in references]
    of_images, alone = (each["rows"]["s"] for each in results)
    assert alone["figures"].keys() == alone["intervals"].keys() == {"FID", "IS"}
    for name, value in alone["figures"].items():
        assert value == pytest.approx(of_images["figures"][name]) and value > 0
    assert "without images" in results[1]["missing"]


# Several spaces, and what is held out -----------------------------------------------------------------------------


def test_a_fresh_real_draw_scores_one_and_noise_more(content, judges, tmp_path, capsys):
    """Thirds of the real digits: held out, reference, and a third as samples; and noise."""
    parts = np.split(np.random.default_rng(0).permutation(1797), 3)
    for name, rows in zip(("held", "reference", "fresh"), parts, strict=True):
        saved(tmp_path / f"{name}.npz", arr_0=content["arr_0"][rows], arr_1=content["arr_1"][rows])
    noise = np.random.default_rng(1).integers(0, 256, (599, 8, 8, 1), np.uint8)
    saved(tmp_path / "noise.npz", arr_0=noise, arr_1=np.arange(599) % 10)
    files = [tmp_path / f"{name}.npz" for name in ("fresh", "noise", "reference")]
    result = judged(tmp_path, *files, "--space", *judges, "pixels", "--held-out", tmp_path / "held.npz")
    means, spaces = result["over_spaces"], [result, *result["more_spaces"]]
    for name in ("FDr", "SWr"):
        assert means["held-out real"]["figures"][name] == 1
        assert 0.7 < means["fresh"]["figures"][name] < 1.4 and means["noise"]["figures"][name] > 2
    assert [each["features"] for each in spaces] == [*judges, "pixels"]
    ratios = [each["rows"]["noise"]["figures"]["SWr"] for each in spaces]
    assert means["noise"]["figures"]["SWr"] == pytest.approx(np.mean(ratios))
    real = spaces[2]["rows"]["held-out real"]["figures"]
    assert real["Precision"] > 0.5 and {"IS", "accuracy"}.isdisjoint(real) and "FID" in real
    assert "ADM recall" not in spaces[0]["rows"]["noise"]["figures"]
    assert len(spaces[0]["rows"]["noise"]["classes"]["accuracy"]) == 10 and result["set_size"] == 599
    printed = capsys.readouterr().out
    assert "sets of 599 images" in printed and "the mean over 3 spaces" in printed
    assert "noise: recall against fresh fell most in class" in printed and "KID" in printed and " +- " in printed


def test_a_ceiling_of_another_count_has_no_fid(digits, content, judges, tmp_path, capsys):
    samples = saved(tmp_path / "s.npz", arr_0=content["arr_0"][:1000])
    more = ("--held-out", "halves", "--bootstrap", 3, "--adm")
    result = judged(tmp_path, samples, digits, "--space", *judges, *more)
    ceiling, figures = (result["rows"][name]["figures"] for name in ("held-out real", "s"))
    assert {"FID", "IS", "ADM recall"}.isdisjoint(ceiling) and ceiling["FDr"] == 1 and result["set_size"] == 898
    printed = capsys.readouterr().out
    assert "| FID-1k | Recall-0.898k | IS-1k |" in printed and "| held-out real | - |" in printed
    space = load_space(judges[0])
    adm = precision_recall(*(space.of(images, 500)[0] for images in (content["arr_0"], content["arr_0"][:1000])))
    # One image of the 1797 is in neither half
    assert (figures["ADM precision"], figures["ADM recall"]) == pytest.approx(adm, abs=2e-3)
    assert figures["Recall"] != figures["ADM recall"]
    low, high = result["over_spaces"]["s"]["intervals"]["FDr"]
    assert low < result["over_spaces"]["s"]["figures"]["FDr"] < high


def test_a_mean_over_spaces_names_those_that_rewarded_a_row(digits, content, judges, tmp_path, capsys):
    files, judge = [], load_space(judges[1]).sha256
    for name, rewards, rows in (("plain", [], slice(0, 99)), ("rewarded", [judge], slice(99, 198))):
        provenance = json.dumps({"rewards_sha256": rewards})
        files.append(saved(tmp_path / f"{name}.npz", arr_0=content["arr_0"][rows], provenance=provenance))
    means = judged(tmp_path, *files, digits, "--space", *judges, "--held-out", "halves")["over_spaces"]
    assert [row.get("rewarded_in") for row in means.values()] == [None, [judges[1]], None]
    out, err = capsys.readouterr()
    assert f"Spaces that rewarded it are in the mean of rewarded: {judges[1]}." in out
    assert f"{judges[1]}: This space rewarded rewarded: judge it in a space that no reward used." in err


def test_halves_are_disjoint_and_keep_their_labels(digits, content):
    first, second = read_real(digits, "halves")
    known = {image.tobytes(): label for image, label in zip(content["arr_0"], content["arr_1"], strict=True)}
    halves = [(part["arr_0"], part["arr_1"]) for part in (first, second)]
    assert all(known[image.tobytes()] == label for half in halves for image, label in zip(*half, strict=True))
    images = [image.tobytes() for half, _ in halves for image in half]
    assert len(images) == 2 * 898 and len(set(images)) == len(known) - 1  # 1797 is odd
    assert "provenance" in first and np.bincount(second["arr_1"]).min() > 60


def test_stored_statistics_find_their_space(digits, content, judges, tmp_path, capsys):
    """By the hash if the file names a space, else by the number of features."""
    images, spaces = content["arr_0"], [load_space(text) for text in judges]
    stored = {"arr_0": images, "mu": np.full(spaces[1].size, 7.0), "sigma": np.eye(spaces[1].size)}
    result = judged(tmp_path, digits, saved(tmp_path / "r.npz", **stored), "--space", *judges)
    assert "computed" in result["fid_reference"] and "stored" in result["more_spaces"][0]["fid_reference"]
    for space, source in zip(spaces, (None, "mu and sigma stored in the reference"), strict=True):
        text = np.array(json.dumps(space.describe() | {"images": 1797, "source": {}}))
        arguments = (digits, saved(tmp_path / "named.npz", space=text, **stored), "--space", judges[1])
        if source:
            assert judged(tmp_path, *arguments)["fid_reference"] == source
        else:
            message = refused(evaluate.main, words(*arguments), capsys=capsys)
            assert "by both hashes none of the spaces here" in message


# Files ------------------------------------------------------------------------------------------------------------


def test_figures_are_printed_though_their_file_cannot_be_written(digits, tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(SystemExit):
            judged(tmp_path, digits, digits, "--space", "pixels")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    out, err = capsys.readouterr()
    assert "| reference | 0.00 |" in out and "File too large" in err and not (tmp_path / "o.json").exists()


def test_check_needs_no_samples_and_writes_nothing(digits, tmp_path, capsys):
    evaluate.main(words("later.npz", digits, "--space", "pixels", "--check", "--output", tmp_path / "o.json"))
    assert "can be evaluated against" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("depth", [100, 900, 960, 2000])
def test_a_provenance_that_is_read_can_be_written_again(depth, tmp_path):
    """JSON's parser and its writer give up at different depths."""
    text = '{"a":' + "[" * depth + "]" * depth + "}"
    try:
        result = provenance_of({"provenance": np.array(text)}, tmp_path)
    except InputError:
        return
    write_figures(tmp_path / "f.json", {"a": {"figures": {}, "generation": result}})


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_damaged_download_of_inception_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(features, "INCEPTION_URL", (tmp_path / "weights.pth").as_uri())
    (tmp_path / "weights.pth").write_bytes(b"what the server sends")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights.pth").write_bytes(b"<html>")
    with pytest.raises(
        InputError, match=f"invalid hash value .*{hashlib.sha256(b'what the server sends').hexdigest()}"
    ):
        load_space("inception")


def test_inception_weights_run_no_code(digits, tmp_path, monkeypatch, capsys):
    """Also if the hash agrees: only tensors are read."""
    weights, trace = tmp_path / "weights.pth", tmp_path / "it-ran"
    for write in (lambda: weights.write_bytes(pickle.dumps({"a": Runs(trace)})),
                  lambda: torch.save({"a": Runs(trace)}, weights)):  # fmt: skip
        write()
        monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
        refused(evaluate.main, words(digits, digits, "--inception", weights), capsys=capsys)
        assert not trace.exists()


# What is refused --------------------------------------------------------------------------------------------------


def lying(path: Path, images: np.ndarray) -> None:
    """A header that names 10^12 images."""
    entry = io.BytesIO()
    np.lib.format.write_array_header_1_0(entry, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 8, 8, 1)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", entry.getvalue() + images.tobytes())


BAD_ARRAYS = {  # of a file of 12 images
    "another width": (lambda x: {"arr_0": x.repeat(2, 2)}, "holds images (8, 16, 1)"),
    "floats": (lambda x: {"arr_0": x.astype(float)}, "arr_0 float64"),
    "three images": (lambda x: {"arr_0": x[:3]}, "4 generated images or more"),
    "no channels": (lambda x: {"arr_0": x[..., 0]}, "arr_0 uint8"),
    "another name": (lambda x: {"images": x}, "no arr_0"),
    "objects": (lambda x: {"arr_0": np.full(x.shape, None)}, "Python objects"),
    "labels of another count": (
        lambda x: {"arr_0": x, "arr_1": np.zeros(13, int)},
        "has 12 images and labels int64 (13,)",
    ),
    "negative labels": (lambda x: {"arr_0": x[:7], "arr_1": np.arange(-1, 6)}, "labels from -1 to 5"),
    "labels from 1": (lambda x: {"arr_0": x[:10], "arr_1": np.arange(1, 11)}, "knows 0 to 9: do they count from 1?"),
    "provenance no JSON": (lambda x: {"arr_0": x, "provenance": np.array("{")}, "provenance"),
    "provenance a list": (lambda x: {"arr_0": x, "provenance": np.array("[]")}, "provenance"),
    "provenance infinite": (lambda x: {"arr_0": x, "provenance": np.array('{"a": 1e999}')}, "finite"),
    "provenance a number": (lambda x: {"arr_0": x, "provenance": np.zeros(3)}, "provenance"),
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_arrays_that_are_no_samples_are_refused(what, digits, content, classifier, tmp_path, capsys):
    arrays, message = BAD_ARRAYS[what]
    path = saved(tmp_path / "odd.npz", **arrays(content["arr_0"][:12]))
    assert message in refused(evaluate.main, words(path, digits, "--classifier", classifier), capsys=capsys)


@pytest.fixture(scope="module")
def odd(tmp_path_factory, content):
    """The folder of the commands below."""
    path, x = tmp_path_factory.mktemp("odd"), content["arr_0"]
    saved(path / "real.npz", arr_0=x)
    saved(path / "same.npz", arr_0=x)
    saved(path / "few_same.npz", arr_0=np.concatenate([x[:20], 255 - x[20:900]]))
    saved(path / "wide.npz", arr_0=x.repeat(2, 2))
    saved(path / "wide_mu.npz", arr_0=x, mu=np.zeros(2048), sigma=np.eye(2048))
    saved(path / "mu_of_33.npz", arr_0=x, mu=np.zeros(33), sigma=np.eye(33))
    saved(path / "nan.npz", arr_0=x, mu=np.full(64, np.nan), sigma=np.eye(64))
    saved(path / "negative.npz", arr_0=x, mu=np.zeros(64), sigma=-np.eye(64))
    saved(path / "two.npz", arr_0=x[:2])
    saved(path / "five.npz", arr_0=x[:5])
    saved(path / "large.npz", arr_0=np.full((5, 80, 80, 1), 9, np.uint8))
    (path / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"something else")
    (path / "cut.npz").write_bytes((path / "five.npz").read_bytes()[:300])
    lying(path / "lies.npz", x[:12])
    (path / "file").write_text("mine")
    (path / "loop").symlink_to("loop")
    (path / "loops").mkdir()
    (path / "nowhere").symlink_to("not/there")
    ImageClassifier("test_resnet", num_classes=10, in_channels=1, image_size=32).save_pretrained(path / "judge")
    return path


JUDGE = "--space classifier:judge"
REFUSED = {  # command, words; all in one folder
    f"real.npz wide_mu.npz {JUDGE}": "of Inception's features: ask for that space",
    f"real.npz mu_of_33.npz {JUDGE} pixels": "stores mu (33,), but classifier:judge has 96, pixels has 64 features",
    "no.npz real.npz --space pixels": "does not exist",
    "cut.npz real.npz --space pixels": "cut.npz is damaged",
    "real.npz cut.npz --space pixels": "cut.npz is damaged",
    "file real.npz --space pixels": "file is damaged",
    "lies.npz real.npz --space pixels": "lies.npz",
    "loops real.npz --space pixels": "loops holds no images",
    "real.npz nan.npz --space pixels --check": "nan.npz",
    "real.npz negative.npz --space pixels": "negative.npz",
    "real.npz two.npz --space pixels": "4 reference images or more",
    "large.npz large.npz --space pixels": "at most 4096 numbers, these have 80 x 80 x 1",
    "real.npz real.npz --classifier .": "config.json does not exist",
    "real.npz real.npz --inception weights-inception-2015-12-05-6726825d.pth": "SHA-256",
    f"real.npz real.npz {JUDGE} pixels classifier:judge": "--space names classifier:judge twice",
    f"real.npz real.npz {JUDGE} classifier:loops/../judge": "are one space",
    f"real.npz real.npz {JUDGE} --classifier judge": "not allowed with",
    "real.npz real.npz --space pixels --held-out no.npz": "does not exist",
    "real.npz real.npz --space pixels --held-out same.npz": "they are not held out",
    "real.npz real.npz --space pixels --held-out few_same.npz": "20 of the 900 images",
    "real.npz real.npz --space pixels --held-out wide.npz": "holds images (8, 16, 1)",
    "five.npz five.npz --space pixels --held-out halves": "two halves need 8",
    "five.npz five.npz --space pixels --held-out halves --check": "two halves need 8",
    "real.npz real.npz real.npz --space pixels": "tell them apart by --names",
    "real.npz real.npz --space pixels --names a b": "--names gives 2 names for 1 sample files",
    "real.npz real.npz --space pixels --names held-out_real": "no row of samples can be named held-out real",
    "real.npz real.npz --space pixels --names a\nb": "--names",
    "real.npz real.npz --space pixels --names one --over-seeds": "'NAME, seed N' is expected",
    "real.npz five.npz real.npz --space pixels": "the sample files hold [5, 1797] images",
    "real.npz real.npz --space pixels --bootstrap -1": "--bootstrap is -1",
    "real.npz real.npz --space pixels --picture-columns 0": "--picture-columns is 0",
    "real.npz real.npz --space pixels --output file": "exists",
    "real.npz real.npz --space pixels --picture judge/config.json": "exists",
    "real.npz real.npz --space pixels --picture new --output new": "--picture",
    "real.npz real.npz --space pixels --output file/out": "file is a file",
    "real.npz real.npz --space pixels --output loop/out": "loop",
    "real.npz real.npz --space pixels --output nowhere/out": "leads nowhere",
    "real.npz real.npz --space pixels --output /proc/out": "/proc",
    f"real.npz real.npz --space pixels --output {'n' * 300}": "File name too long",
}


@pytest.mark.parametrize("command", REFUSED)
def test_commands_are_refused(command, odd, capsys, monkeypatch):
    monkeypatch.chdir(odd)
    before = tree(odd)
    arguments = [word.replace("held-out_real", "held-out real") for word in command.split(" ")]
    assert REFUSED[command] in refused(evaluate.main, arguments, capsys=capsys)
    assert tree(odd) == before


# The scripts ------------------------------------------------------------------------------------------------------


def script(name: str, *arguments, **variables) -> subprocess.CompletedProcess:
    environment = os.environ | {"VIRTUAL_ENV": str(Path(sys.executable).parents[1])} | variables
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", str(ROOT / "scripts" / f"evaluate_{name}.sh"), *words(*arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["digits", "fashion", "sitxl"])
def test_a_script_of_evaluation_asks_for_its_two_folders(name):
    done = script(name, "generator", "--overwrite")
    assert done.returncode == 2 and done.stderr.startswith("error: two folders are expected"), done.stderr


@pytest.mark.slow
def test_the_full_size_row_keeps_its_samples(teacher, digits, tmp_path):
    """The reference is checked first. After an evaluation that failed, for want of a fourth image, all are kept."""
    done = script("sitxl", teacher, tmp_path / "row", REFERENCE=str(tmp_path / "no.npz"))
    assert done.returncode == 2 and "no.npz does not exist" in done.stderr and not (tmp_path / "row").exists()
    variables = {"NUM_PROCESSES": "1", "REFERENCE": str(digits), "VAE": "none", "SPACES": "pixels"}
    for printed in ("3 images -> ", "there already"):
        done = script("sitxl", teacher, tmp_path / "row", "--num-images", 3, "--dtype", "fp32", **variables)
        assert done.returncode == 2 and printed in done.stdout
        assert f"the samples are kept in {tmp_path / 'row' / 'samples.npz'}" in done.stderr


@pytest.mark.slow
def test_paths_that_are_no_text_are_written(teacher, digits, tmp_path):
    """In a process of its own: its standard output is strict, as a user's is."""
    folder = os.fsencode(tmp_path) + b"/\xff$a$\nb"
    os.mkdir(folder)
    code = "import sys; from evaluation import generate, evaluate, report; teacher, reference, folder = sys.argv[1:]\n"
    code += "generate.main(['--generator', teacher, '--output', folder + '/s\xdc.npz', '--num-images', '4'])\n"
    code += "evaluate.main([folder + '/s\xdc.npz', reference, '--space', 'pixels', "
    code += "'--output', folder + '/o.json', '--picture', folder + '/p']); report.main([folder])\n"
    command = [sys.executable, "-c", code, *words(teacher, digits), folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert {b"o.json", b"p", b"report.html"} <= set(os.listdir(folder))
