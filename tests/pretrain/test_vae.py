"""Stage 0 in latents: the VAE, its decoder alone, what a teacher learns; and the whole path in miniature."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from convert_weight import export_generator
from evaluation import evaluate, generate
from tests.conftest import refused, run_cold_start, words
from train_cc import dmdr_refl
from train_cc.draws import Draws
from train_cc.images import WHOLE_SETS, load_dataset
from train_cc.models.classifier import ImageClassifier
from train_cc.models.generator import GenerationConfig
from train_cc.models.vae import VAEDecoder, encode_images, latent_space_sha256, load_vae
from train_cc.pretrain import classifier, data, networks, teacher, vae

SMALL_VAE = ["--channels", "8", "16", "--groups", "4", "--batch-size", "4", "--max-train-steps", "5"]
SMALL_TEACHER = ["--hidden-size", "16", "--num-heads", "2", "--depth", "2", "--batch-size", "8", "--patch-size", "4"]
CLASSIFIER = ["--image-size", "16", "--batch-size", "8", "--max-train-steps", "2"]


def write_idx(file: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    file.write_bytes(header + array.tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data set in Fashion-MNIST's files: bars whose height is the class."""
    folder = tmp_path_factory.mktemp("fashion")
    for begin, number, seed in (("train", 60, 0), ("t10k", 30, 1)):
        labels = np.arange(number, dtype=np.uint8) % 10
        images = np.random.default_rng(seed).integers(0, 60, (number, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[: 2 * label + 4, 8:20] += 150
        write_idx(folder / f"{begin}-images-idx3-ubyte", images)
        write_idx(folder / f"{begin}-labels-idx1-ubyte", labels)
    return folder


def of(folder: Path) -> list[str]:
    return words("--dataset", "fashion-mnist", "--data-dir", folder)


def train_vae(folder: Path, output: Path, *more: object) -> Path:
    vae.main([*of(folder), *SMALL_VAE, *words("--output-dir", output, *more)])
    return output


def train_teacher(folder: Path, of_vae: Path, output: Path, *more: object) -> Path:
    teacher.main([*of(folder), *SMALL_TEACHER, *words("--vae", of_vae, "--output-dir", output, *more)])
    return output


@pytest.fixture(scope="module")
def stage_0(folder, tmp_path_factory) -> Path:
    """All networks of the recipe, a few steps each."""
    root = tmp_path_factory.mktemp("stage_0")
    for name, purpose in (("reward", "reward"), ("evaluation", "evaluation")):
        words_of = words("--purpose", purpose, "--output-dir", root / f"classifier_{name}")
        classifier.main([*of(folder), *CLASSIFIER, *words_of])
    first = train_vae(folder, root / "vae_first")
    judge = ["--decoder-of", first, "--classifier", root / "classifier_reward"]
    train_vae(folder, root / "vae", *judge)
    train_teacher(folder, first, root / "teacher", "--max-train-steps", 3)
    for split, more in (("test", []), ("train", ["--num-images", 30]), ("test", ["--vae", root / "vae"])):
        name = f"{split}{'_through_vae' if '--vae' in more else ''}.npz"
        data.main([*of(folder), *words("--split", split, "--output", root / name, *more)])
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


# Data -------------------------------------------------------------------------------------------------------------


def test_images_are_as_a_decoder_makes_them(folder):
    images, labels = load_dataset("fashion-mnist", folder)
    assert images.shape == (60, 3, 32, 32) and images.dtype == torch.uint8 and labels.tolist() == list(range(10)) * 6
    border = images.clone()
    border[:, :, 2:-2, 2:-2] = 0
    assert not border.any() and images.any()
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    held_out, _ = load_dataset("fashion-mnist", folder, "test")
    assert len(held_out) == 30 and not torch.equal(held_out, images[:30])


def test_another_data_set_of_the_same_names_is_refused(folder, tmp_path, capsys, monkeypatch):
    """MNIST has the counts, the shape and the labels of Fashion-MNIST."""
    monkeypatch.setitem(WHOLE_SETS, 60, "0" * 64)
    told = refused(data.main, [*of(folder), *words("--output", tmp_path / "o.npz")], capsys=capsys)
    assert "another data set than Fashion-MNIST" in told and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "more, told",
    [
        (["--dataset", "digits", "--split", "test"], "digits are one set"),
        (["--dataset", "digits", "--num-images", "5000"], "digits, train has 1797"),
        (["--dataset", "digits", "--vae", "VAE"], "1 channel; three"),
        (["--vae", "./nowhere"], "nowhere"),
    ],
)
def test_odd_references(folder, tmp_path, capsys, more, told):
    flags = more if "digits" in more else [*of(folder), *more]
    assert told in refused(data.main, [*flags, *words("--output", tmp_path / "o.npz")], capsys=capsys)
    assert not (tmp_path / "o.npz").exists()


# The VAE ----------------------------------------------------------------------------------------------------------


def test_latents_have_unit_spread_and_invert_the_scaling(folder, stage_0):
    images, _ = load_dataset("fashion-mnist", folder)
    model = load_vae(str(stage_0 / "vae_first"))
    latents = encode_images(model, images)
    assert latents.shape == (60, 4, 16, 16) and latents.std().item() == pytest.approx(1, rel=1e-4)
    x = images.float() / 127.5 - 1
    with torch.no_grad():
        direct = model.decode(model.encode(x).latent_dist.mean).sample
        through = VAEDecoder(model)(latents)
    assert (through - ((direct + 1) / 2).clamp(0, 1)).abs().max() < 1e-4 and through.std() > 0.01


def test_the_decoder_alone_is_trained_further(stage_0):
    """Encoder, scaling and so the latents stay: what was a teacher of the first VAE's is one of the second's."""
    first, second = weights(stage_0 / "vae_first"), weights(stage_0 / "vae")
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved and all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
    assert {name for name in first if name.startswith("decoder.") and first[name].ndim > 1} <= moved
    scalings = [
        json.loads((stage_0 / name / "config.json").read_text())["scaling_factor"] for name in ("vae", "vae_first")
    ]
    assert scalings[0] == scalings[1]


@pytest.mark.parametrize("decoder", [False, True], ids=["all", "decoder alone"])
def test_a_killed_vae_continues_to_the_same_bits(folder, stage_0, tmp_path, monkeypatch, decoder):
    name = "vae" if decoder else "vae_first"
    more = ["--decoder-of", stage_0 / "vae_first", "--classifier", stage_0 / "classifier_reward"] if decoder else []

    class Dying(Draws):
        def __init__(self, *key, **options):
            if key[-1] == 3:
                raise RuntimeError("killed")
            super().__init__(*key, **options)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr("train_cc.pretrain.networks.Draws", Dying)
        train_vae(folder, tmp_path / "run", "--checkpoint-steps", 2, *more)
    assert not (tmp_path / "run" / "config.json").exists()
    train_vae(folder, tmp_path / "run", "--checkpoint-steps", 2, *more)
    straight, again = weights(stage_0 / name), weights(tmp_path / "run")
    assert straight.keys() == again.keys() and all(torch.equal(straight[key], again[key]) for key in straight)


def test_both_losses_fall(folder, stage_0, monkeypatch, tmp_path):
    """On the same batch, over as many steps: the reconstruction's, and with a classifier that of its features."""
    images, _ = load_dataset("fashion-mnist", folder)
    own = ["--output-dir", str(tmp_path), *SMALL_VAE, "--batch-size", "8"]
    judge = words("--decoder-of", stage_0 / "vae_first", "--classifier", stage_0 / "classifier_reward")
    for more in ([], [*judge, "--feature-weight", "1"]):
        args = vae.command_parser().parse_args([*own, *more])
        model = load_vae(str(stage_0 / "vae_first"))
        training = networks.vae_training(model.train(), images, args)
        losses = []
        for _ in range(6):
            training.optimizer.zero_grad()
            losses.append(training.update(0))
            losses[-1].backward()
            training.optimizer.step()
        assert losses[-1] < 0.99 * losses[0]


@pytest.mark.parametrize(
    "more, told",
    [
        (["--dataset", "digits"], "three channels"),
        (["--channels", "8", "18"], "does not divide"),
        (["--channels", *["8"] * 7], "cannot be halved"),
        (["--classifier", "X"], "give both"),
        (["--decoder-of", "nowhere/", "--classifier", "X"], "nowhere"),
    ],
)
def test_odd_vaes(folder, tmp_path, capsys, more, told):
    flags = [*of(folder), *SMALL_VAE, "--output-dir", str(tmp_path / "run"), *more]
    flags = flags[4:] if "digits" in more else flags
    assert told in refused(vae.main, flags, capsys=capsys)
    assert not (tmp_path / "run").exists()


def test_a_decoder_is_not_trained_into_the_vae_that_it_is_of(folder, stage_0, tmp_path, capsys):
    judge = ["--classifier", str(stage_0 / "classifier_reward")]
    flags = [*of(folder), *SMALL_VAE, *judge, "--decoder-of", str(stage_0 / "vae"), "--overwrite"]
    before = sorted(path.stat().st_mtime_ns for path in (stage_0 / "vae").iterdir())
    message = refused(vae.main, [*flags, "--output-dir", str(stage_0 / ".." / stage_0.name / "vae")], capsys=capsys)
    assert "--decoder-of and --output-dir are both" in message
    assert before == sorted(path.stat().st_mtime_ns for path in (stage_0 / "vae").iterdir())
    ImageClassifier("test_resnet", num_classes=10, in_channels=1, image_size=16).save_pretrained(tmp_path / "grey")
    flags[flags.index("--classifier") + 1] = str(tmp_path / "grey")
    message = refused(vae.main, [*flags, "--output-dir", str(tmp_path / "run")], capsys=capsys)
    assert "takes 1 channel(s), the images have 3" in message


# The teacher ------------------------------------------------------------------------------------------------------


def test_a_teacher_records_its_latents_and_a_student_inherits_them(stage_0, path_in_miniature):
    space = latent_space_sha256(load_vae(str(stage_0 / "vae")))
    for folder in (stage_0 / "teacher", path_in_miniature / "dmdr" / "generator"):
        assert GenerationConfig.read(folder).latent_space_sha256 == space
    assert not (stage_0 / "teacher" / "latents.safetensors").exists()


def test_a_killed_teacher_goes_on_with_the_latents_that_it_had(folder, stage_0, tmp_path, monkeypatch, capsys):
    run, parts, more = tmp_path / "run", tmp_path / "run.tmp", ["--max-train-steps", 3, "--checkpoint-steps", 1]

    class Dying(Draws):
        def __init__(self, *key, **options):
            if key[-1] == 2:
                raise RuntimeError("killed")
            super().__init__(*key, **options)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr("train_cc.pretrain.networks.Draws", Dying)
        train_teacher(folder, stage_0 / "vae_first", run, *more)
    assert (parts / "latents.safetensors").exists()
    other = train_vae(folder, tmp_path / "other", "--seed", 5)
    (tmp_path / "swapped").symlink_to(other)
    record = json.loads((parts / "args.json").read_text())
    record["arguments"]["vae"] = str(tmp_path / "swapped")
    (parts / "args.json").write_text(json.dumps(record))  # as if the VAE of this name had changed meanwhile
    flags = [*of(folder), *SMALL_TEACHER, *words("--vae", tmp_path / "swapped", "--output-dir", run, *more)]
    assert "of another VAE" in refused(teacher.main, flags, capsys=capsys)
    record["arguments"]["vae"] = str(stage_0 / "vae_first")
    (parts / "args.json").write_text(json.dumps(record))

    def held_out_alone(vae, images):
        assert len(images) == 30  # those of the training were computed before the kill
        return encode_images(vae, images)

    for module in ("models.vae", "pretrain.networks"):
        monkeypatch.setattr(f"train_cc.{module}.encode_images", held_out_alone)
    train_teacher(folder, stage_0 / "vae_first", run, *more)
    straight, again = weights(stage_0 / "teacher"), weights(run)
    assert all(torch.equal(straight[key], again[key]) for key in straight) and len(straight) > 10


def test_a_vae_of_other_latents_is_refused(folder, stage_0, path_in_miniature, tmp_path, capsys):
    """By the stages and by what samples: the pictures would be nonsense, and no shape tells."""
    other = train_vae(folder, tmp_path / "other", "--seed", 5)
    from tests.conftest import flags
    from train_cc import cold_start

    run = flags(stage_0 / "teacher", tmp_path / "run", "--vae", other)
    assert "other latents" in refused(cold_start.main, run, capsys=capsys)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
    for model in (stage_0 / "teacher", path_in_miniature / "dmdr" / "generator"):
        sampling = words("--generator", model, "--vae", other, "--num-images", 2, "--output", tmp_path / "s.npz")
        assert "other latents" in refused(generate.main, sampling, capsys=capsys)
    assert not (tmp_path / "s.npz").exists()
    units = path_in_miniature / "dmdr" / "checkpoints" / "torch_units" / "step-4.pt"
    export = words("--checkpoint", units, "--pipeline", tmp_path / "p", "--vae", other)
    assert "other latents" in refused(export_generator.main, export, capsys=capsys)
    assert not (tmp_path / "p").exists()


# The whole path ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path_in_miniature(stage_0, tmp_path_factory) -> Path:
    """Two updates of a cold start, two more with a reward behind the decoder, samples of both, and their figures."""
    root = tmp_path_factory.mktemp("path")
    common = ["--vae", stage_0 / "vae", "--holdout-classifier", stage_0 / "classifier_evaluation"]
    run_cold_start(stage_0 / "teacher", root / "cold_start", *common, "--max-train-steps", 2)
    units = root / "cold_start" / "checkpoints" / "torch_units" / "step-2.pt"
    more = [
        "--resume-ckpt",
        units,
        "--encoder-type",
        "classifier",
        "--reward-classifier",
        stage_0 / "classifier_reward",
    ]
    more += ["--reward-weight", 0.05, "--reward-micro-batch", 2, "--max-train-steps", 4]
    from tests.conftest import flags

    dmdr_refl.main(flags(stage_0 / "teacher", root / "dmdr", *common, *more))
    for name in ("cold_start", "dmdr"):
        sampling = ["--generator", root / name / "generator", "--vae", stage_0 / "vae", "--num-images", 30]
        generate.main(words(*sampling, "--output", root / f"{name}.npz"))
    judged = [root / "cold_start.npz", root / "dmdr.npz", stage_0 / "train.npz", stage_0 / "test_through_vae.npz"]
    names = ["cold start", "DMDR", "real training images", "test images through the VAE"]
    how = ["--names", *names, "--classifier", stage_0 / "classifier_evaluation", "--output", root / "results.json"]
    evaluate.main(words(*judged, stage_0 / "test.npz", *how))
    return root


def test_the_whole_path_in_miniature(path_in_miniature):
    rows = (path_in_miniature / "dmdr" / "loss_logs" / "loss_gen_log.jsonl").read_text().splitlines()
    assert len(rows) == 2 and json.loads(rows[-1])["grad_norm_reward_classifier_x0"] > 0
    with np.load(path_in_miniature / "dmdr.npz") as samples:
        assert samples["arr_0"].shape == (30, 32, 32, 3) and samples["arr_0"].std() > 0
    results = (path_in_miniature / "results.json").read_text()
    assert all(name in results for name in ("cold start", "DMDR", "real training images", "through the VAE"))
    assert (path_in_miniature / "dmdr" / "samples" / "step-4" / "grid.png").exists()
