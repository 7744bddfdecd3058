"""Stage 0 in latents: the VAE, its decoder alone, what a teacher learns; and the whole path in miniature."""

import copy
import hashlib
import json
import os
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert_weight import export_generator
from convert_weight.pipeline import DMDRPipeline
from evaluation import evaluate, generate
from evaluation.samples.sampling import decoder_of
from evaluation.standins import write_vae
from tests.conftest import ldm_names, random_sit, refused, run_cold_start, words
from train_cc import dmdr_refl
from train_cc.draws import Draws
from train_cc.images import WHOLE_SETS, load_dataset
from train_cc.io.errors import InputError
from train_cc.models.classifier import ImageClassifier
from train_cc.models.generator import GenerationConfig
from train_cc.models.vae import VAEDecoder, encode_images, latent_space_sha256, load_decoder, load_vae, new_vae
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


# Latents normalised per channel ------------------------------------------------------------------------------------


def configured(folder: Path, **changes: object) -> Path:
    """The VAE in ``folder`` with ``changes`` in its config."""
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return folder


@pytest.fixture(scope="module")
def f16d32(tmp_path_factory) -> Path:
    """In the shape of VA-VAE's f16d32: five stages, 32 channels, mean and deviation per channel."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae") / "f16d32"
    whole = type(new_vae((8,) * 5, groups=4))(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(8,) * 5,
        latent_channels=32,
        norm_num_groups=4,
        scaling_factor=1.0,
        latents_mean=torch.linspace(-2, 3, 32).tolist(),
        latents_std=torch.linspace(0.5, 4, 32).tolist(),
        force_upcast=False,
    )
    whole.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_latents_are_normalised_per_channel_as_diffusers_pipelines_do(f16d32, tmp_path, scale):
    """x0 = (z - mean) scale / std, z = x0 std / scale + mean: encoded, decoded, and decoded in a pipeline."""
    folder = tmp_path / "vae"
    load_vae(str(f16d32)).save_pretrained(folder)
    model = load_vae(str(configured(folder, scaling_factor=scale)))
    mean = torch.linspace(-2, 3, 32).view(1, 32, 1, 1)
    std = torch.linspace(0.5, 4, 32).view(1, 32, 1, 1)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z = model.encode(images.float() / 127.5 - 1).latent_dist.mean
        x0 = (z - mean) * scale / std
        torch.testing.assert_close(encode_images(model, images), x0)
        assert (x0 - z).abs().max() > 0.5
        expected = ((model.decode(z).sample + 1) / 2).clamp(0, 1)
        torch.testing.assert_close(DMDRPipeline(random_sit(in_channels=32), model)._decode(x0), expected)
        torch.testing.assert_close(VAEDecoder(copy.deepcopy(model))(x0), expected)


def test_the_hash_of_a_latent_space(f16d32, tmp_path):
    """With scaling and shift it is that of files made before there were statistics per channel."""
    folder = configured(write_vae(tmp_path / "vae"), scaling_factor=0.5, shift_factor=0.25)
    model = load_vae(str(folder))
    digest = hashlib.sha256(b"[0.5, 0.25]")
    for name, value in sorted(model.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
    assert latent_space_sha256(model) == digest.hexdigest()
    seen = {latent_space_sha256(load_vae(str(f16d32)))}
    load_vae(str(f16d32)).save_pretrained(tmp_path / "other")
    for changes in ({"scaling_factor": 0.5}, {"latents_mean": [0.0] * 32}, {"latents_std": [1.0] * 32}):
        seen.add(latent_space_sha256(load_vae(str(configured(tmp_path / "other", **changes)))))
    assert len(seen) == 4


def test_the_whole_path_with_32_latents_per_channel(folder, f16d32, tmp_path, capsys):
    """Teacher, cold start with previews, samples, pipeline; a VAE with other statistics is refused."""
    taught = train_teacher(folder, f16d32, tmp_path / "teacher", "--max-train-steps", 2, "--patch-size", 1)
    run = run_cold_start(taught, tmp_path / "run", "--vae", f16d32, "--num-previews", 2)
    sampling = words("--generator", run / "generator", "--num-images", 2, "--output", tmp_path / "s.npz")
    generate.main([*sampling, *words("--vae", f16d32)])
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (2, 32, 32, 3)
    units = run / "checkpoints" / "torch_units" / "step-3.pt"
    export_generator.main(words("--checkpoint", units, "--pipeline", tmp_path / "p"))
    shared = json.loads((tmp_path / "p" / "vae" / "config.json").read_text())
    assert shared["latents_std"] == torch.linspace(0.5, 4, 32).tolist() and shared["force_upcast"] is False
    load_vae(str(f16d32)).save_pretrained(tmp_path / "other")
    configured(tmp_path / "other", latents_mean=[0.0] * 32)
    again = [*sampling, "--overwrite", *words("--vae", tmp_path / "other")]
    assert "other latents" in refused(generate.main, again, capsys=capsys)


# Precision of the decoder ------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["force_upcast", "not named"])
def hot(request, tmp_path) -> Path:
    """A VAE whose activations overflow fp16, not fp32; the next layer normalises them again."""
    folder = write_vae(tmp_path / "hot")
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    state["decoder.conv_in.weight"] *= 2e5  # up to 33 000: the weights themselves fit
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config.pop("force_upcast")
    (folder / "config.json").write_text(json.dumps(config | ({"force_upcast": True} if request.param else {})))
    return folder


def test_a_pipeline_in_fp16_decodes_in_fp32_where_fp16_overflows(hot):
    """By the VAE's config, or by its result; afterwards the VAE is in fp16 again."""
    model, x0 = load_vae(str(hot)).half(), torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    pipeline = DMDRPipeline(random_sit(in_channels=4).half(), model)
    with torch.no_grad():
        assert not torch.isfinite(model.decode(x0.half() / 0.18215).sample).all()
        found = pipeline._decode(x0)
        assert model.dtype == torch.float16
        expected = ((copy.deepcopy(model).float().decode(x0 / 0.18215).sample + 1) / 2).clamp(0, 1)
        assert torch.equal(found, expected) and expected.std() > 1e-3
        with pytest.raises(ValueError, match=r"NaN or infinity, computed in torch\.float16"):
            pipeline._decode(x0 * float("inf"))
    assert model.dtype == torch.float16


def test_our_decoder_is_in_fp32_where_a_config_says_so(hot, capsys):
    """Instead of fp16; also under autocast. diffusers' default, true, does not count: sd-vae-ft-ema has it."""
    named = "force_upcast" in (hot / "config.json").read_text()
    half, x0 = load_decoder(str(hot), dtype=torch.float16), torch.randn(2, 4, 4, 4)
    assert half.vae.dtype == (torch.float32 if named else torch.float16)
    assert load_decoder(str(hot), dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        images = half(x0)
    assert torch.isfinite(images).all() == named
    if named:
        assert torch.equal(images, load_decoder(str(hot))(x0))
    _, precision, _ = decoder_of(str(hot), None, (4, 4, 4), torch.device("cpu"), lambda: x0, True)
    assert precision == "fp32" and ("force_upcast" in capsys.readouterr().out) == named


# VAEs in other layouts ---------------------------------------------------------------------------------------------


def test_the_command_for_a_vae_in_ldms_names_makes_the_same_vae(tmp_path, monkeypatch):
    """As it is printed, without a network: of one file, of a whole model's checkpoint, of a folder."""
    monkeypatch.chdir(tmp_path)
    expected = load_vae(str(write_vae(tmp_path / "vae"))).state_dict()
    state = ldm_names(expected, stages=4)
    save_file(state, "one.safetensors")
    torch.save({"state_dict": {f"first_stage_model.{name}": value for name, value in state.items()}}, "whole.ckpt")
    os.mkdir("mixed")
    os.link("vae/config.json", "mixed/config.json")
    save_file(state, "mixed/diffusion_pytorch_model.safetensors")
    for source, made in (
        ("one.safetensors", "one"),
        ("whole.ckpt", "whole"),
        ("mixed", "mixed/diffusion_pytorch_model"),
    ):
        with pytest.raises(InputError, match="LDM's names") as error:
            load_vae(f"./{source}")
        command = str(error.value).partition("expected. ")[2].partition("): ")[2]
        python, flag, program = shlex.split(command.replace("'stabilityai/sd-vae-ft-ema'", "'vae'"))
        assert (python, flag) == ("python", "-c")
        exec(program)
        converted = load_vae(f"./{made}").state_dict()
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[name], value) for name, value in expected.items())


def test_a_vae_in_fp16_files_alone_is_read(tmp_path):
    folder = write_vae(tmp_path / "vae")
    file = folder / "diffusion_pytorch_model.safetensors"
    state = {name: value.half() for name, value in load_file(file).items()}
    save_file(state, folder / "diffusion_pytorch_model.fp16.safetensors")
    file.unlink()
    model = load_vae(str(folder))
    assert model.dtype == torch.float32 and model.files == [folder / "diffusion_pytorch_model.fp16.safetensors"]
    assert all(torch.equal(value, state[name].float()) for name, value in model.state_dict().items())
