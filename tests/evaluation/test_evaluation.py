"""From a model folder to samples, figures and the frontier: the commands, their files, and what they refuse."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import evaluate, generate
from evaluation.figures import tables
from evaluation.figures.row import Embedded, Reference, row_of
from evaluation.figures.spaces import hold_out, stored_by_space
from evaluation.metrics import equal_sets, neighbours, precision_recall, sliced_wasserstein, statistics
from evaluation.samples import sampling
from evaluation.standins import write_vae
from tests import ROOT
from tests.conftest import random_sit, refused, run_cold_start, save_unchecked, words
from train_cc.io.class_names import KNOWN
from train_cc.io.errors import InputError
from train_cc.io.figures import METRICS, read_figures
from train_cc.io.products import record, write_record
from train_cc.models.classifier import ImageClassifier
from train_cc.models.features import load_space
from train_cc.models.vae import VAEDecoder
from train_cc.pretrain import data


@pytest.fixture
def digits(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["data", "--output", str(tmp_path / "reference.npz")])
    data.main()
    return tmp_path / "reference.npz"


def samples(source, output, *more):
    generate.main(words("--generator", source, "--output", output, "--num-images", 10, *more))
    with np.load(output) as file:
        return {name: file[name] for name in file.files}


# generate.py


@pytest.mark.parametrize(
    "more",
    [
        ["--num-steps", 2, "--timestep-shift", 2],
        ["--sampler", "heun", "--num-steps", 3, "--guidance-scale", 1.5, "--guidance-interval", 0, 0.6],
        ["--sampler", "euler", "--num-steps", 3, "--labels", "random", "--seed", 5],
    ],
)
def test_images_depend_on_seed_and_index_alone(teacher, tmp_path, more):
    a = samples(teacher, tmp_path / "a.npz", *more, "--batch-size", 3, "--shard-size", 4)
    b = samples(teacher, tmp_path / "b.npz", *more, "--batch-size", 7)
    assert np.array_equal(a["arr_1"], b["arr_1"])
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1
    assert a["arr_0"].shape == (10, 8, 8, 1) and a["arr_0"].dtype == np.uint8 and a["arr_0"].std() > 5
    if "random" not in more:
        assert np.array_equal(a["arr_1"], np.arange(10))
    assert not (tmp_path / "a.npz.tmp").exists()


def test_two_processes_give_the_same_images(teacher, tmp_path):
    alone = samples(teacher, tmp_path / "one.npz")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--module"]
    command += ["evaluation.generate", *words("--generator", teacher, "--output", tmp_path / "two.npz")]
    command += ["--num-images", "10", "--shard-size", "3"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    with np.load(tmp_path / "two.npz") as two:
        assert np.array_equal(two["arr_1"], alone["arr_1"])
        assert np.abs(two["arr_0"].astype(int) - alone["arr_0"]).max() <= 1


def test_generation_continues_from_its_parts(teacher, tmp_path, monkeypatch):
    whole = samples(teacher, tmp_path / "whole.npz", "--shard-size", 4)
    batch, made = sampling.generate_batch, []

    def stopped(model, decode, indices, args):
        if indices[0] == 8 and len(made) == 2:
            raise KeyboardInterrupt
        made.append(indices[0])
        return batch(model, decode, indices, args)

    monkeypatch.setattr(sampling, "generate_batch", stopped)
    with pytest.raises(SystemExit) as stop:
        samples(teacher, tmp_path / "cut.npz", "--shard-size", 4)
    assert stop.value.code == 130
    assert not (tmp_path / "cut.npz").exists()
    made.append("again")
    again = samples(teacher, tmp_path / "cut.npz", "--shard-size", 4)
    assert made == [0, 4, "again", 8]
    assert np.array_equal(again["arr_0"], whole["arr_0"])


def test_a_checkpoint_is_sampled_as_its_export(teacher, tmp_path):
    run = run_cold_start(teacher, tmp_path / "run", "--ema-decay", 0.9)
    exported = samples(run / "generator", tmp_path / "a.npz", "--png-dir", tmp_path / "png")
    kept = samples(run / "checkpoints/torch_units/step-3.pt", tmp_path / "b.npz")
    assert np.array_equal(exported["arr_0"], kept["arr_0"])
    assert len(list((tmp_path / "png").glob("*.png"))) == 10
    assert json.loads(str(exported["provenance"]))["arguments"]["sampler"] == "few-step"


def test_latents_are_decoded(tmp_path):
    random_sit(in_channels=4).save_pretrained(tmp_path / "latent")
    vae = write_vae(tmp_path / "vae")
    made = samples(tmp_path / "latent", tmp_path / "s.npz", "--vae", vae, "--dtype", "bf16", "--num-images", 3)
    assert made["arr_0"].shape == (3, 64, 64, 3)


def test_latents_are_decoded_in_parts(tmp_path, monkeypatch):
    """At most so many at once, and each of them."""
    random_sit(in_channels=4).save_pretrained(tmp_path / "latent")
    more = ("--vae", write_vae(tmp_path / "vae"), "--num-images", 7)
    whole = samples(tmp_path / "latent", tmp_path / "whole.npz", *more)["arr_0"]
    decode, counts = VAEDecoder.forward, []
    monkeypatch.setattr(VAEDecoder, "forward", lambda self, x0: counts.append(len(x0)) or decode(self, x0))
    monkeypatch.setattr(sampling, "DECODED_AT_ONCE", 3)
    parts = samples(tmp_path / "latent", tmp_path / "parts.npz", *more)["arr_0"]
    assert counts == [3, 3, 1] and parts.shape == whole.shape
    assert np.abs(parts.astype(int) - whole).max() <= 1


def test_half_precision_decodes_where_it_does_not_show(tmp_path, monkeypatch, capsys):
    """As on a GPU. The file says what decoded it, and is finished whatever that was."""
    random_sit(in_channels=4).save_pretrained(tmp_path / "latent")
    vae, choose = write_vae(tmp_path / "vae"), sampling.decoder_of
    more = ("--vae", vae, "--num-images", 3)
    wide = samples(tmp_path / "latent", tmp_path / "s.npz", *more, "--png-dir", tmp_path / "png")
    monkeypatch.setattr(sampling, "decoder_of", lambda *args: choose(*args[:-1], True))
    samples(tmp_path / "latent", tmp_path / "s.npz", *more, "--png-dir", tmp_path / "png")
    assert capsys.readouterr().out.count("there already") == 2
    half = samples(tmp_path / "latent", tmp_path / "half.npz", *more)
    assert [json.loads(str(made["provenance"]))["decoder"] for made in (wide, half)] == ["fp32", "fp16"]
    further = np.abs(half["arr_0"].astype(int) - wide["arr_0"])
    assert further.any() and (further > 1).mean() <= 1e-3

    monkeypatch.setattr(sampling, "FURTHER", -1.0)  # nothing is near enough
    again = samples(tmp_path / "latent", tmp_path / "again.npz", *more)
    assert np.array_equal(again["arr_0"], wide["arr_0"])
    assert json.loads(str(again["provenance"]))["decoder"] == "fp32"
    assert "images are decoded in fp32: in fp16 0.00% of the pixels" in capsys.readouterr().out


def test_what_shows_in_half_precision():
    x0 = torch.full((2, 3, 50, 50), 128 / 255)
    wide = lambda x: x  # noqa: E731
    off = torch.zeros_like(x0)
    off.view(-1)[:15] = 1.6 / 255  # 15 of 15 000
    assert sampling.what_shows(wide, lambda x: x + 0.9 / 255, x0) == ""
    assert sampling.what_shows(wide, lambda x: x + off, x0) == ""
    off.view(-1)[:16] = 1.6 / 255
    assert sampling.what_shows(wide, lambda x: x + off, x0).startswith("0.11% of the pixels")
    assert sampling.what_shows(wide, lambda x: x * float("inf"), x0) == "its activations overflow"


def test_attention_is_chosen_for_samples_as_for_training(tmp_path, monkeypatch):
    random_sit().save_pretrained(tmp_path / "g")
    seen, batch = [], sampling.samples_of
    watched = lambda model, *rest: seen.append(model.blocks[0].attn.fused_attn) or batch(model, *rest)  # noqa: E731
    monkeypatch.setattr(sampling, "samples_of", watched)
    for dtype in ("fp32", "bf16"):
        samples(tmp_path / "g", tmp_path / f"{dtype}.npz", "--dtype", dtype, "--num-images", 2)
    assert seen == [True, False]


def test_generate_refuses(teacher, tmp_path, capsys):
    def told(*more):
        return refused(
            generate.main, words("--generator", teacher, "--output", tmp_path / "s.npz", *more), capsys=capsys
        )

    assert "--num-images is 0" in told("--num-images", 0)
    assert "--timestep-shift is 0" in told("--timestep-shift", 0)
    assert "--seed is -1" in told("--seed", -1)
    assert "0 <= LOW < HIGH <= 1" in told("--guidance-interval", 0.9, 0.1)
    assert "--vae none is needed" in told("--vae", "somewhere/vae", "--num-images", 2)
    assert "does not exist" in told("--generator", tmp_path / "no")
    (tmp_path / "s.npz").write_bytes(b"mine")
    assert "exists" in told("--num-images", 2)
    assert (tmp_path / "s.npz").read_bytes() == b"mine"


# evaluate.py


def test_real_data_against_itself(digits, classifier, tmp_path, capsys):
    evaluate.main(words(digits, digits, "--classifier", classifier, "--output", tmp_path / "o.json"))
    assert "| reference | 0.00 | 1.000 |" in capsys.readouterr().out
    record = json.loads((tmp_path / "o.json").read_text())
    assert record["rows"]["reference"]["images"] == 1797 and len(record["reference_sha256"]) == 64
    assert "computed from the reference's 1797 images" in record["fid_reference"]


def test_provenance_travels_with_the_figures(teacher, digits, classifier, tmp_path, capsys):
    samples(teacher, tmp_path / "s.npz", "--seed", 7)
    arguments = words(tmp_path / "s.npz", digits, "--classifier", classifier, "--bootstrap", 5)
    evaluate.main([*arguments, "--output", str(tmp_path / "o.json"), "--picture", str(tmp_path / "p.png")])
    assert "FID-0.01k" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "o.json").read_text())["rows"].values()
    assert row["generation"]["arguments"]["seed"] == "7" and len(row["generation"]["generator_sha256"]) == 64
    assert {"num_steps", "guidance_scale", "labels", "vae", "dtype"} <= row["generation"]["arguments"].keys()
    for name, (low, high) in row["intervals"].items():
        assert low <= high, name
    assert (tmp_path / "p.png").stat().st_size > 0


def test_figures_are_shown_though_their_file_cannot_be_written(digits, classifier, tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(SystemExit):
            evaluate.main(words(digits, digits, "--classifier", classifier, "--output", tmp_path / "o.json"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    out, err = capsys.readouterr()
    assert "| reference | 0.00 |" in out and "File too large" in err and not (tmp_path / "o.json").exists()


def written(folder, images, labels):
    """As PNG files, in a folder per class if there are labels."""
    for i, image in enumerate(images):
        place = folder if labels is None else folder / f"{labels[i]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze(2)).save(place / f"{i:04d}.png")
    return folder


def test_a_folder_of_png_has_the_figures_of_its_npz(digits, classifier, teacher, tmp_path):
    with np.load(digits) as file:
        images, labels = file["arr_0"][:40], file["arr_1"][:40]
    order = np.argsort(labels, kind="stable")
    np.savez(tmp_path / "a.npz", arr_0=images[order], arr_1=labels[order])
    classes, flat = written(tmp_path / "classes", images[order], labels[order]), written(tmp_path / "b", images, None)
    samples_ = (tmp_path / "a.npz", classes, flat)
    evaluate.main(words(*samples_, digits, "--classifier", classifier, "--output", tmp_path / "o.json"))
    of_npz, of_classes, of_flat = (row["figures"] for row in read_figures(tmp_path / "o.json")["rows"].values())
    assert of_classes == of_npz and of_npz["FID"] > 0
    assert of_flat["FID"] == pytest.approx(of_npz["FID"]) and "accuracy" not in of_flat
    # A folder of evaluation.generate has its provenance; a folder is a reference too.
    samples(teacher, tmp_path / "g.npz", "--png-dir", tmp_path / "png")
    pair = words(tmp_path / "png", classes, "--classifier", classifier, "--output", tmp_path / "p.json", "--overwrite")
    evaluate.main([*pair, "--picture", str(tmp_path / "p.png")])
    record = read_figures(tmp_path / "p.json")
    assert len(record["rows"]["png"]["generation"]["generator_sha256"]) == len(record["reference_sha256"]) == 64
    before = record["reference_sha256"]
    Image.new("L", (8, 8), 9).save(classes / "3" / "0000.png")
    evaluate.main([*pair, "--overwrite"])
    assert read_figures(tmp_path / "p.json")["reference_sha256"] != before


def test_class_folders_in_another_order_than_the_classifiers_are_refused(digits, classifier, tmp_path, capsys):
    judge = shutil.copytree(classifier, tmp_path / "judge")
    write_record(judge, record("pretrain.classifier", {"dataset": "fashion-mnist"}))
    names = KNOWN["fashion-mnist"]
    folder = written(tmp_path / "png", np.load(digits)["arr_0"][:20], names * 2)
    message = refused(evaluate.main, words(folder, digits, "--classifier", judge), capsys=capsys)
    assert "the folder ankle boot is its class 1, but the model's class 9" in message


def test_a_reference_without_images_gives_the_fid_and_the_is_of_its_images(digits, classifier, tmp_path, capsys):
    images = np.load(digits)["arr_0"]
    np.savez(tmp_path / "s.npz", arr_0=images[:300])
    mu, sigma = statistics(load_space(f"classifier:{classifier}").of(images, 500)[0])
    np.savez(tmp_path / "mu.npz", mu=mu, sigma=sigma)
    rows = {}
    for name in ("reference", "mu"):
        reference = digits if name == "reference" else tmp_path / "mu.npz"
        more = ("--classifier", classifier, "--output", tmp_path / f"{name}.json", "--bootstrap", 2)
        evaluate.main(words(tmp_path / "s.npz", reference, *more))
        rows[name] = read_figures(tmp_path / f"{name}.json")["rows"]["s"]
    assert rows["mu"]["figures"].keys() == rows["mu"]["intervals"].keys() == {"FID", "IS"}
    for name, value in rows["mu"]["figures"].items():
        assert value == pytest.approx(rows["reference"]["figures"][name]) and value > 0
    assert "without images" in json.loads((tmp_path / "mu.json").read_text())["missing"]


def test_samples_in_the_order_of_their_classes_are_noted(digits, classifier, tmp_path, capsys):
    """Also without labels, by the classes that the judge sees; in random order there is nothing to note."""
    judge = ImageClassifier.from_pretrained(classifier)
    head = judge.network.get_classifier()
    shown = torch.arange(10)[:, None, None, None].expand(-1, 1, 8, 8) / 10
    with torch.no_grad():  # ten grey values, each a class of its own
        f = judge.features_and_logits(shown)[0]
        head.weight.copy_(1e4 * (f - f.mean(dim=0)))
        head.bias.copy_(-(head.weight @ f.mean(dim=0)) - 0.5e4 * (f - f.mean(dim=0)).square().sum(dim=1))
    judge.save_pretrained(tmp_path / "judge")
    labels = np.arange(5200) // 520
    grey = (shown * 255).round().numpy().astype(np.uint8).transpose(0, 2, 3, 1)[labels]
    order = np.random.default_rng(0).permutation(5200)
    np.savez(tmp_path / "sorted.npz", arr_0=grey)
    np.savez(tmp_path / "shuffled.npz", arr_0=grey[order], arr_1=labels[order])
    pair = words(tmp_path / "sorted.npz", tmp_path / "shuffled.npz", digits, "--classifier", tmp_path / "judge")
    evaluate.main([*pair, "--output", str(tmp_path / "o.json")])
    rows = read_figures(tmp_path / "o.json")["rows"]
    (note,) = rows["sorted"]["notes"]
    scores = [rows[name]["figures"]["IS"] for name in ("sorted", "shuffled")]
    assert scores[0] < 6 and scores[1] > 9 and rows["shuffled"]["notes"] == []
    assert f"{scores[0]:.2f}" in note and "class by class" in note and note in capsys.readouterr().err


def test_stored_statistics_are_used(digits, classifier, tmp_path, capsys):
    space = load_space(f"classifier:{classifier}")
    images = np.load(digits)["arr_0"]
    mu, sigma = statistics(space.of(images, 500)[0])
    np.savez(tmp_path / "stored.npz", arr_0=images, mu=mu + 1, sigma=sigma)
    evaluate.main(words(digits, tmp_path / "stored.npz", "--classifier", classifier))
    printed = capsys.readouterr().out
    assert f"| reference | {len(mu):.2f} |" in printed and "stored" in printed


def test_count_suffix():
    assert [tables.heads_of(["FID"], n)[0] for n in (50_000, 60_000, 5_000, 1_800)] == [
        "FID",
        "FID",
        "FID-5k",
        "FID-1.8k",
    ]


def embedded(features, classes=5, labels=None):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(features), classes, generator=generator)
    return Embedded(features, logits, labels, labels is not None)


def test_bootstrap_intervals_hold_every_figure():
    torch.manual_seed(0)
    labels = np.arange(200) % 5
    real = Reference(embedded(torch.randn(200, 4), labels=labels))
    made = embedded(torch.randn(200, 4) * 1.2, labels=labels)
    row = row_of(made, real, 200, 30, {"FD": 0.1, "SW": 0.05})
    assert set(row["intervals"]) == set(row["figures"]) == set(METRICS) - {"ADM recall", "ADM precision"}
    for name, (low, high) in row["intervals"].items():
        assert low < row["figures"][name] < high, name
        if name in ("Precision", "Recall", "accuracy"):
            assert high - low < 0.25
    assert row["figures"]["FDr"] == pytest.approx(row["figures"]["FID"] / 0.1)  # one set of all: the same distance


def test_figures_of_sets_are_means_over_equal_counts():
    """70 samples against 30 images: two sets of 30, each as a table of its own would have it."""
    torch.manual_seed(0)
    real, made = torch.randn(30, 3), torch.randn(70, 3) * 1.1
    row = row_of(embedded(made), Reference(embedded(real)), 30)["figures"]
    sets = equal_sets(70, 30, 30)
    assert len(sets) == 2
    parts = [neighbours(real[b], made[a]).figures() for a, b in sets]
    for name in ("Precision", "Recall", "Density", "Coverage"):
        assert row[name] == pytest.approx(np.mean([part[name] for part in parts])) and parts[0][name] != parts[1][name]
    apart = [sliced_wasserstein(made[a], real[b]) for a, b in sets]
    assert row["SW"] == pytest.approx(np.mean(apart)) and "FDr" not in row


def test_recall_and_accuracy_of_a_class(capsys):
    """Samples that are the real ones, but for class 1, which is far away and taken for class 0."""
    torch.manual_seed(0)
    labels = np.arange(60) % 3
    real = torch.randn(60, 2) + 10 * torch.from_numpy(labels)[:, None]
    made = real + 100 * torch.from_numpy(labels == 1)[:, None]
    logits = torch.nn.functional.one_hot(torch.from_numpy(np.where(labels == 1, 0, labels)), 3).float()
    reference = Reference(Embedded(real, logits, labels, True))
    good, bad = (row_of(Embedded(x, logits, labels, True), reference, 60) for x in (real, made))
    assert good["classes"] == {"recall": [1, 1, 1], "accuracy": [1, 0, 1]}
    assert bad["classes"]["recall"][1] < 0.9
    (line,) = tables.suffered({"first": good, "second": bad})
    assert line.startswith("second: recall against first fell most in class 1 (1.00 to 0.")
    unknown = tables.suffered({"a": {"classes": {"recall": None}}, "b": {"classes": {"recall": None}}})
    assert unknown == []
    assert tables.suffered({"a": good, "b": good}) == ["b: in none"]
    unlabelled = {"classes": {"recall": None}}
    assert tables.suffered({"a": good, "b": unlabelled, "c": {}, "d": good}) == ["d: in none"]


def test_rows_of_several_seeds_have_a_mean_and_a_spread(digits, classifier, capsys):
    rows = {
        f"{name}, seed {seed}": {"figures": {"FID": fid, "Recall": 0.5, "IS": 9.0, "Precision": seed / 4}, "images": 8}
        for name, seed, fid in (("a", 1, 1.0), ("a", 2, 2.0), ("a", 3, 3.0), ("b", 1, 4.0))
    }
    _, _, first, second = tables.table(tables.means_of(rows), 10_000).splitlines()
    assert first == "| a | 3 | 2.00 +- 1.00 | 0.500 +- 0.000 | 9.00 +- 0.00 | 0.500 +- 0.250 |"
    assert second == "| b | 1 | 4.00 | 0.500 | 9.00 | 0.250 |"
    command = words(digits, digits, "--classifier", classifier, "--over-seeds", "--names", "no seed")
    assert "'NAME, seed N' is expected" in refused(evaluate.main, command, capsys=capsys)


BAD_SAMPLES = {
    "wide": "holds images",
    "float": "arr_0 float64",
    "few": "4 generated images or more",
    "flat": "arr_0 uint8",
    "nothing": "no arr_0",
    "objects": "holds Python objects",
    "cut": "is damaged or something else",
    "missing": "does not exist",
    "labels": "labels of shape",
    "negative": "labels from -1 to 5",
}


@pytest.mark.parametrize("how", BAD_SAMPLES)
def test_bad_samples_are_refused(digits, classifier, tmp_path, capsys, how):
    images, path = np.load(digits)["arr_0"], tmp_path / f"{how}.npz"
    content = {
        "wide": {"arr_0": images.repeat(2, 2)},
        "float": {"arr_0": images.astype(float)},
        "few": {"arr_0": images[:3]},
        "flat": {"arr_0": images[..., 0]},
        "nothing": {"images": images},
        "objects": {"arr_0": np.array([{}], dtype=object)},
        "labels": {"arr_0": images, "arr_1": np.zeros(3)},
        "negative": {"arr_0": images[:7], "arr_1": np.arange(-1, 6)},
    }
    if how in content:
        np.savez(path, **content[how])
    elif how == "cut":
        path.write_bytes(digits.read_bytes()[:1000])
    run = words(path, digits, "--classifier", classifier)
    assert BAD_SAMPLES[how] in refused(evaluate.main, run, capsys=capsys)


def test_two_files_of_one_name_need_names(digits, classifier, tmp_path, capsys):
    message = refused(evaluate.main, words(digits, digits, digits, "--classifier", classifier), capsys=capsys)
    assert "--names" in message


def test_bad_references_and_spaces_are_refused(digits, classifier, tmp_path, capsys):
    def told(reference, *space):
        return refused(evaluate.main, words(digits, reference, *space), capsys=capsys)

    images = np.load(digits)["arr_0"]
    np.savez(tmp_path / "mu.npz", arr_0=images, mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    assert "of Inception's features" in told(tmp_path / "mu.npz", "--classifier", classifier)
    np.savez(tmp_path / "mu.npz", arr_0=images, mu=np.zeros(2047), sigma=np.zeros((2047, 2047)))
    assert "features" in told(tmp_path / "mu.npz", "--classifier", classifier)
    np.savez(tmp_path / "few.npz", arr_0=images[:2])
    assert "4 reference images or more" in told(tmp_path / "few.npz", "--classifier", classifier)
    assert "config.json does not exist" in told(digits, "--classifier", tmp_path)
    weights = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    assert "does not exist" in told(digits, "--inception", weights)
    weights.write_bytes(b"something else")
    assert "SHA-256" in told(digits, "--inception", weights)
    np.savez(tmp_path / "coloured.npz", arr_0=images.repeat(3, axis=3))
    coloured = tmp_path / "coloured.npz"
    message = refused(evaluate.main, words(coloured, coloured, "--classifier", classifier), capsys=capsys)
    assert "1 channel(s), these have 3" in message


def test_features_that_are_not_finite_are_refused(digits, classifier, tmp_path, capsys):
    model = ImageClassifier.from_pretrained(classifier)
    with torch.no_grad():
        next(model.network.parameters()).fill_(float("nan"))
    save_unchecked(model, tmp_path / "nan")
    message = refused(evaluate.main, words(digits, digits, "--classifier", tmp_path / "nan"), capsys=capsys)
    assert "not finite" in message


# Several spaces, and what is held out


@pytest.fixture
def two_classifiers(classifier, reward_folder):
    return [f"classifier:{classifier}", f"classifier:{reward_folder}"]


def test_a_fresh_real_draw_scores_one_and_noise_more(digits, two_classifiers, tmp_path, capsys):
    """Thirds of the real digits: held out, reference, and a third as samples; and noise."""
    content = dict(np.load(digits))
    order = np.random.default_rng(0).permutation(1797)
    parts = np.split(order, 3)
    for name, rows in zip(("held", "reference", "fresh"), parts, strict=True):
        np.savez(tmp_path / f"{name}.npz", arr_0=content["arr_0"][rows], arr_1=content["arr_1"][rows])
    noise = np.random.default_rng(1).integers(0, 256, (599, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "noise.npz", arr_0=noise, arr_1=np.arange(599) % 10)
    files_ = [tmp_path / f"{name}.npz" for name in ("fresh", "noise", "reference")]
    more = ["--held-out", tmp_path / "held.npz", "--output", tmp_path / "o.json"]
    evaluate.main(words(*files_, "--space", *two_classifiers, "pixels", *more))
    record = json.loads((tmp_path / "o.json").read_text())
    means = record["over_spaces"]
    for name in ("FDr", "SWr"):
        assert means["held-out real"]["figures"][name] == 1
        assert 0.7 < means["fresh"]["figures"][name] < 1.4
        assert means["noise"]["figures"][name] > 2
    spaces = [record, *record["more_spaces"]]
    assert [each["features"] for each in spaces] == [*two_classifiers, "pixels"]
    assert means["noise"]["figures"]["SWr"] == pytest.approx(
        np.mean([each["rows"]["noise"]["figures"]["SWr"] for each in spaces])
    )
    real = spaces[2]["rows"]["held-out real"]["figures"]
    assert real["Precision"] > 0.5 and {"IS", "accuracy"}.isdisjoint(real) and "FID" in real
    assert len(spaces[0]["rows"]["noise"]["classes"]["accuracy"]) == 10
    printed = capsys.readouterr().out
    assert "sets of 599 images" in printed and "the mean over 3 spaces" in printed
    assert "noise: recall against fresh fell most in class" in printed
    assert "KID" in printed and " +- " in printed and "draws" not in record["rows"]["noise"]
    assert read_figures(tmp_path / "o.json")["set_size"] == 599


def test_a_mean_over_spaces_says_which_of_them_rewarded_a_row(digits, two_classifiers, tmp_path, capsys):
    content, files_ = np.load(digits), []
    judge = load_space(two_classifiers[1]).sha256
    for name, rewards, rows in (("plain", [], slice(0, 99)), ("rewarded", [judge], slice(99, 198))):
        files_.append(tmp_path / f"{name}.npz")
        np.savez(files_[-1], arr_0=content["arr_0"][rows], provenance=json.dumps({"rewards_sha256": rewards}))
    more = ["--held-out", "halves", "--output", tmp_path / "o.json"]
    evaluate.main(words(*files_, digits, "--space", *two_classifiers, *more))
    line = f"Spaces that rewarded it are in the mean of rewarded: {two_classifiers[1]}."
    assert line in capsys.readouterr().out
    means = json.loads((tmp_path / "o.json").read_text())["over_spaces"]
    assert [row.get("rewarded_in") for row in means.values()] == [None, [two_classifiers[1]], None]


def test_pixels_are_the_images_themselves(digits):
    images = np.load(digits)["arr_0"][:5]
    space = load_space("pixels", image_shape=(8, 8, 1))
    features, logits = space.of(images, 2)
    assert logits is None and torch.equal(features * 255, torch.from_numpy(images).reshape(5, 64).float())
    assert space.size == 64


def test_halves_are_disjoint_and_keep_their_labels(digits, tmp_path):
    held = hold_out(digits, "halves")
    content = np.load(digits)
    parts = [(part["arr_0"].reshape(898, -1), part["arr_1"]) for part in (held.reference, held.held_out)]
    known = {image.tobytes(): label for image, label in zip(content["arr_0"], content["arr_1"], strict=True)}
    for images, labels in parts:
        assert all(known[image.tobytes()] == label for image, label in zip(images, labels, strict=True))
    images = [image.tobytes() for images, _ in parts for image in images]
    assert len(set(images)) == len({image.tobytes() for image in content["arr_0"]}) - 1  # 1797 is odd
    assert "provenance" in held.reference and np.bincount(held.held_out["arr_1"]).min() > 60


def test_a_ceiling_of_another_count_has_no_fid(digits, two_classifiers, tmp_path, capsys):
    content = np.load(digits)
    np.savez(tmp_path / "s.npz", arr_0=content["arr_0"][:1000])
    more = ["--held-out", "halves", "--output", tmp_path / "o.json", "--bootstrap", 3, "--adm"]
    evaluate.main(words(tmp_path / "s.npz", digits, "--space", *two_classifiers, *more))
    record = json.loads((tmp_path / "o.json").read_text())
    ceiling = record["rows"]["held-out real"]["figures"]
    assert {"FID", "IS"}.isdisjoint(ceiling) and ceiling["FDr"] == 1 and record["set_size"] == 898
    printed = capsys.readouterr().out
    assert "| FID-1k | Recall-0.898k | IS-1k |" in printed and "| held-out real | - |" in printed
    space = load_space(two_classifiers[0])
    adm = precision_recall(*(space.of(images, 500)[0] for images in (content["arr_0"], content["arr_0"][:1000])))
    figures_ = record["rows"]["s"]["figures"]
    # One image of the 1797 is in neither half
    assert (figures_["ADM precision"], figures_["ADM recall"]) == pytest.approx(adm, abs=2e-3)
    assert figures_["Recall"] != figures_["ADM recall"]
    low, high = record["over_spaces"]["s"]["intervals"]["FDr"]
    assert low < record["over_spaces"]["s"]["figures"]["FDr"] < high


def test_spaces_and_held_out_files_that_cannot_be(digits, two_classifiers, tmp_path, capsys):
    def told(reference, *more):
        return refused(evaluate.main, words(digits, reference, *more), capsys=capsys)

    first, second = two_classifiers
    assert f"--space names {first} twice" in told(digits, "--space", first, second, first)
    folder = first.removeprefix("classifier:")
    assert "are one space" in told(digits, "--space", first, f"classifier:{folder}/../{Path(folder).name}")
    assert "is no feature space here; allowed: classifier:FOLDER" in told(digits, "--space", first, "vgg")
    assert "pixels" in told(digits, "--space", "vgg")
    assert "--dinov2-backbone" in told(digits, "--space", "dinov2")
    assert "not allowed with" in told(digits, "--space", first, "--classifier", folder)
    assert "does not exist" in told(digits, "--space", first, "--held-out", tmp_path / "no.npz")
    shutil.copy(digits, tmp_path / "same.npz")
    assert "they are not held out" in told(digits, "--space", first, "--held-out", tmp_path / "same.npz")
    images = np.load(digits)["arr_0"]
    np.savez(tmp_path / "other.npz", arr_0=images[::-1][:900])
    assert "900 of the 900 images" in told(digits, "--space", first, "--held-out", tmp_path / "other.npz")
    content = np.concatenate([images[:20], 255 - images[20:900]])  # one in 45 would show in every figure
    np.savez(tmp_path / "few.npz", arr_0=content)
    assert "20 of the 900 images" in told(digits, "--space", first, "--held-out", tmp_path / "few.npz")
    np.savez(tmp_path / "wide.npz", arr_0=images.repeat(2, 2))
    assert "holds images (8, 16, 1)" in told(digits, "--space", first, "--held-out", tmp_path / "wide.npz")
    named = told(digits, "--space", first, "--names", "held-out real")
    assert "no row of samples can be named held-out real" in named
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((5, 80, 80, 1), np.uint8))
    large = tmp_path / "large.npz"
    message = refused(evaluate.main, words(large, large, "--space", "pixels"), capsys=capsys)
    assert "at most 4096 numbers, these have 80 x 80 x 1" in message
    np.savez(tmp_path / "few.npz", arr_0=images[:5])
    assert "two halves need 8" in told(tmp_path / "few.npz", "--space", first, "--held-out", "halves")
    assert "two halves need 8" in told(tmp_path / "few.npz", "--space", first, "--held-out", "halves", "--check")


def test_inceptions_statistics_are_of_no_other_space_as_wide(tmp_path):
    content = {"arr_0": None, "mu": np.zeros(2048), "sigma": np.eye(2048)}
    wide = SimpleNamespace(name="timm:resnet50", size=2048)
    with pytest.raises(InputError, match="of Inception's features: ask for that space"):
        stored_by_space(content, tmp_path, [wide])
    inception = SimpleNamespace(name="inception", size=2048)
    assert list(stored_by_space(content, tmp_path, [wide, inception])) == ["inception"]


def test_adms_second_statistics_are_those_of_sfid(tmp_path):
    content = {"arr_0": None, "mu": np.zeros(8), "sigma": np.eye(8), "mu_s": np.ones(6), "sigma_s": 2 * np.eye(6)}
    spaces = [SimpleNamespace(name=name, size=size) for name, size in (("inception", 8), ("inception-spatial", 6))]
    stored = stored_by_space(content, tmp_path, spaces)
    assert stored.keys() == {"inception", "inception-spatial"}
    assert np.array_equal(stored["inception-spatial"][1], 2 * np.eye(6))
    assert list(stored_by_space(content, tmp_path, spaces[:1])) == ["inception"]


def test_stored_statistics_find_their_space(digits, two_classifiers, tmp_path, capsys):
    """By the hash where the file names a space, else by the number of features, and only where that is one space's."""
    images, (first, second) = np.load(digits)["arr_0"], two_classifiers
    spaces = [load_space(text) for text in two_classifiers]
    sizes = [space.size for space in spaces]
    assert sizes[0] != sizes[1]
    stored = {"mu": np.full(sizes[1], 7.0), "sigma": np.eye(sizes[1])}
    np.savez(tmp_path / "r.npz", arr_0=images, **stored)
    evaluate.main(words(digits, tmp_path / "r.npz", "--space", first, second, "--output", tmp_path / "o.json"))
    record = json.loads((tmp_path / "o.json").read_text())
    assert "computed" in record["fid_reference"] and "stored" in record["more_spaces"][0]["fid_reference"]
    assert "halves" not in str(record["arguments"]["held_out"])
    for space, expected in ((spaces[1], None), (spaces[0], "by both hashes none of the spaces here")):
        told = np.array(json.dumps(space.describe() | {"images": 1797, "source": {}}))
        np.savez(tmp_path / "named.npz", arr_0=images, space=told, **stored)
        arguments = words(digits, tmp_path / "named.npz", "--space", second)
        if expected:
            assert expected in refused(evaluate.main, arguments, capsys=capsys)
        else:
            evaluate.main(arguments)
    np.savez(tmp_path / "w.npz", arr_0=images, mu=np.zeros(33), sigma=np.eye(33))
    message = refused(evaluate.main, words(digits, tmp_path / "w.npz", "--space", first, second), capsys=capsys)
    assert f"stores mu (33,), but {first} has {sizes[0]}, {second} has {sizes[1]} features" in message
