"""evaluation/generate.py: images by seed and index, what was made before, decoders, what is refused."""

import json

import numpy as np
import pytest
import torch

from evaluation import generate
from evaluation.samples import sampling
from evaluation.samples.source import Source
from evaluation.standins import write_vae
from tests.conftest import random_sit, refused, run_cold_start, tree, words
from train_cc.io.products import locked
from train_cc.io.read import sha256
from train_cc.models.generator import save_generator
from train_cc.models.vae import VAEDecoder


def flags(source, output, *more) -> list[str]:
    return words("--generator", source, "--output", output, "--num-images", 10, *more)


def samples(source, output, *more) -> dict[str, np.ndarray]:
    generate.main(flags(source, output, *more))
    with np.load(output) as file:
        return dict(file)


def provenance(content: dict) -> dict:
    return json.loads(str(content["provenance"]))


@pytest.fixture
def latent(tmp_path):
    """A network of latents, and the flags of its decoder."""
    random_sit(in_channels=4).save_pretrained(tmp_path / "latent")
    return tmp_path / "latent", "--vae", write_vae(tmp_path / "vae")


@pytest.mark.parametrize(
    "more",
    [
        ["--num-steps", 2, "--timestep-shift", 2],
        ["--sampler", "heun", "--num-steps", 3, "--guidance-scale", 1.5, "--guidance-interval", 0, 0.6],
        ["--sampler", "euler", "--num-steps", 3, "--labels", "random", "--seed", 5],
    ],
)
def test_images_depend_on_seed_and_index_only(teacher, tmp_path, more):
    a = samples(teacher, tmp_path / "a.npz", *more, "--batch-size", 3, "--shard-size", 4)
    b = samples(teacher, tmp_path / "b.npz", *more, "--batch-size", 7)
    assert np.array_equal(a["arr_1"], b["arr_1"])
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1
    assert a["arr_0"].shape == (10, 8, 8, 1) and a["arr_0"].dtype == np.uint8 and a["arr_0"].std() > 5
    assert np.array_equal(a["arr_1"], np.arange(10)) != ("random" in more)
    assert not (tmp_path / "a.npz.tmp").exists()


# A generator's own settings ---------------------------------------------------------------------------------------


def test_a_generator_is_sampled_as_it_was_trained(teacher, tmp_path):
    save_generator(random_sit(), tmp_path / "generator", 2, 3.0)
    a = samples(tmp_path / "generator", tmp_path / "a.npz")
    b = samples(tmp_path / "generator", tmp_path / "b.npz", "--num-steps", 2, "--timestep-shift", 3)
    c = samples(tmp_path / "generator", tmp_path / "c.npz", "--num-steps", 1)
    assert np.array_equal(a["arr_0"], b["arr_0"]) and not np.array_equal(a["arr_0"], c["arr_0"])
    recorded = [(each["num_steps"], each["timestep_shift"]) for each in (provenance(m)["arguments"] for m in (a, c))]
    assert recorded == [("2", "3.0"), ("1", "3.0")]
    d = samples(teacher, tmp_path / "d.npz", "--sampler", "euler", "--num-images", 1)
    assert provenance(d)["arguments"]["num_steps"] == str(generate.MULTI_STEPS)


def test_a_checkpoint_is_sampled_as_its_export(teacher, tmp_path):
    more = ("--num-steps", 2, "--timestep-shift", 2, "--ema-decay", 0.9, "--max-train-steps", 1)
    run = run_cold_start(teacher, tmp_path / "run", *more)
    exported = samples(run / "generator", tmp_path / "a.npz")
    kept = samples(run / "checkpoints/torch_units/step-1.pt", tmp_path / "b.npz")
    assert np.array_equal(exported["arr_0"], kept["arr_0"])
    for each in (exported, kept):
        arguments = provenance(each)["arguments"]
        assert [arguments[name] for name in ("sampler", "num_steps", "timestep_shift")] == ["few-step", "2", "2.0"]


# What is there ----------------------------------------------------------------------------------------------------


def test_the_same_command_makes_it_once_and_another_is_refused(teacher, tmp_path, capsys):
    command = flags(teacher, tmp_path / "s.npz", "--png-dir", tmp_path / "png")
    generate.main(flags(teacher, tmp_path / "s.npz"))
    before = (tmp_path / "s.npz").read_bytes()
    generate.main(command)  # the images of the file
    assert "there already" in capsys.readouterr().out and len(list((tmp_path / "png").glob("*.png"))) == 10
    assert (tmp_path / "s.npz").read_bytes() == before
    before_refusal = tree(tmp_path)
    assert "made with --seed 0" in refused(generate.main, [*command, "--seed", "5"], capsys=capsys)
    with locked(tmp_path / "t.npz.tmp"):
        assert "another process writes" in refused(generate.main, flags(teacher, tmp_path / "t.npz"), capsys=capsys)
    assert tree(tmp_path) == before_refusal
    generate.main([*command, "--seed", "5", "--overwrite"])
    assert (tmp_path / "s.npz").read_bytes() != before and tree(tmp_path).keys() == before_refusal.keys()


def test_generation_continues_from_its_whole_parts(teacher, tmp_path, monkeypatch, capsys):
    """Stopped before the third part, of which the first is damaged then."""
    whole = samples(teacher, tmp_path / "whole.npz", "--shard-size", 4)
    batch, batches = sampling.generate_batch, []

    def stopped(model, decode, indices, args):
        batches.append(indices[0])
        if batches == [0, 4, 8]:
            raise KeyboardInterrupt
        return batch(model, decode, indices, args)

    monkeypatch.setattr(sampling, "generate_batch", stopped)
    with pytest.raises(SystemExit) as stop:
        samples(teacher, tmp_path / "cut.npz", "--shard-size", 4)
    assert stop.value.code == 130 and not (tmp_path / "cut.npz").exists()
    part = tmp_path / "cut.npz.tmp" / "00000000.npz"
    part.write_bytes(part.read_bytes()[:-50])
    again = samples(teacher, tmp_path / "cut.npz", "--shard-size", 4)
    assert batches == [0, 4, 8, 0, 8] and "made again" in capsys.readouterr().out
    assert all(np.array_equal(again[name], whole[name]) for name in whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.npz", "whole.npz"]


# Decoders ---------------------------------------------------------------------------------------------------------


def test_latents_are_decoded_in_parts(latent, tmp_path, monkeypatch):
    """At most so many at once, and each of them."""
    whole = samples(latent[0], tmp_path / "whole.npz", *latent[1:], "--num-images", 7)
    assert provenance(whole)["vae_sha256"] == sha256(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    decode, counts = VAEDecoder.forward, []
    monkeypatch.setattr(VAEDecoder, "forward", lambda self, x0: counts.append(len(x0)) or decode(self, x0))
    monkeypatch.setattr(sampling, "DECODED_AT_ONCE", 3)
    parts = samples(latent[0], tmp_path / "parts.npz", *latent[1:], "--num-images", 7)
    assert counts == [3, 3, 1] and parts["arr_0"].shape == whole["arr_0"].shape == (7, 64, 64, 3)
    assert np.abs(parts["arr_0"].astype(int) - whole["arr_0"]).max() <= 1


def test_half_precision_decodes_where_it_does_not_show(latent, tmp_path, monkeypatch, capsys):
    """As on a GPU. The file records what decoded it, and is finished whatever that was."""
    choose, more = sampling.decoder_of, (*latent[1:], "--num-images", 3)
    wide = samples(latent[0], tmp_path / "s.npz", *more)
    monkeypatch.setattr(sampling, "decoder_of", lambda *args: choose(*args[:-1], True))
    samples(latent[0], tmp_path / "s.npz", *more)
    assert "there already" in capsys.readouterr().out
    half = samples(latent[0], tmp_path / "half.npz", *more)
    assert [provenance(each)["decoder"] for each in (wide, half)] == ["fp32", "fp16"]
    further = np.abs(half["arr_0"].astype(int) - wide["arr_0"])
    assert further.any() and (further > 1).mean() <= 1e-3
    monkeypatch.setattr(sampling, "FURTHER", -1.0)  # nothing is near enough
    again = samples(latent[0], tmp_path / "again.npz", *more)
    assert np.array_equal(again["arr_0"], wide["arr_0"]) and provenance(again)["decoder"] == "fp32"
    assert "images are decoded in fp32: in fp16 0.00% of the pixels" in capsys.readouterr().out


def test_what_shows_in_half_precision():
    x0, off = torch.full((2, 3, 50, 50), 128 / 255), torch.zeros(2, 3, 50, 50)
    for change, expected in ((0.9 / 255, ""), (float("inf"), "its activations overflow")):
        assert sampling.what_shows(lambda x: x, lambda x, change=change: x + change, x0) == expected
    off.view(-1)[:15] = 1.6 / 255  # of 15 000
    assert sampling.what_shows(lambda x: x, lambda x: x + off, x0) == ""
    off.view(-1)[15] = 1.6 / 255
    assert sampling.what_shows(lambda x: x, lambda x: x + off, x0).startswith("0.11% of the pixels")


def test_attention_is_chosen_for_samples_as_for_training(teacher, tmp_path, monkeypatch):
    seen, batch = [], sampling.samples_of
    watched = lambda model, *rest: seen.append(model.blocks[0].attn.fused_attn) or batch(model, *rest)  # noqa: E731
    monkeypatch.setattr(sampling, "samples_of", watched)
    for dtype in ("fp32", "bf16"):
        samples(teacher, tmp_path / f"{dtype}.npz", "--dtype", dtype, "--num-images", 2)
    assert seen == [True, False]


# What is refused --------------------------------------------------------------------------------------------------

REFUSED = [
    (["--num-images", 0], "--num-images is 0"),
    (["--num-images", "1e3"], "--num-images is 1e3"),
    (["--timestep-shift", 0], "--timestep-shift is 0"),
    (["--sampler", "euler", "--timestep-shift", 2], "--timestep-shift is of the few-step sampler"),
    (["--seed", -1], "--seed is -1"),
    (["--guidance-scale", "nan"], "--guidance-scale is nan"),
    (["--guidance-interval", 0.9, 0.1], "0 <= LOW < HIGH <= 1"),
    (["--guidance-interval", "nan", 1], "0 <= LOW < HIGH <= 1"),
    (["--vae", "somewhere/vae"], "--vae none is needed"),
    (["--generator", "no"], "no does not exist"),
    (["--output", ""], "--output"),
    (["--batch", 2], "see --help"),
]


@pytest.mark.parametrize("more,message", REFUSED, ids=lambda value: " ".join(words(*value))[:30])
def test_flags_are_refused_before_anything_is_written(teacher, tmp_path, capsys, more, message):
    assert message in refused(generate.main, flags(teacher, tmp_path / "s.npz", *more), capsys=capsys)
    assert not list(tmp_path.iterdir())


def test_samples_that_are_not_finite_become_no_images(teacher, tmp_path, capsys, monkeypatch):
    """The weights are damaged after the reader, which refuses such."""
    load = Source.load

    def damaged(self):
        model = load(self)
        model.final_layer.linear.bias.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(Source, "load", damaged)
    message = refused(generate.main, flags(teacher, tmp_path / "s.npz", "--shard-size", 4), capsys=capsys)
    assert "samples 0 to 3 hold NaN or infinity" in message and not list(tmp_path.iterdir())
