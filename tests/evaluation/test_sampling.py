"""evaluation/samples: steps, shift, SDE, guidance and classes of a set of images, as the flags and the model say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import generate, sample
from evaluation.samples import sampling
from evaluation.standins import write_vae
from tests.conftest import random_sit, words
from tests.convert.test_pipeline import two_steps
from train_cc.draws import Draws
from train_cc.io.class_names import KNOWN
from train_cc.models import SiT
from train_cc.models.generator import save_generator
from train_cc.samplers import sde_sample


def made(source, output, *more, count=8):
    generate.main(words("--generator", source, "--output", output, "--num-images", count, *more))
    with np.load(output) as file:
        return file["arr_0"], file["arr_1"], json.loads(str(file["provenance"]))["arguments"]


def noises(seed: int, index: int, count: int) -> list[torch.Tensor]:
    """The noise of image ``index``, of step after step, is its own."""
    draws = Draws(seed, 11, index)
    return [draws.noise(1, 1, 8, 8) for _ in range(count)]


def test_images_are_those_of_the_samplers(teacher, tmp_path):
    """Image 4, the second of its batch."""
    model, y, more = SiT.from_pretrained(teacher), torch.tensor([4]), ("--seed", 5, "--batch-size", 3)
    shifted, _, arguments = made(teacher, tmp_path / "a.npz", "--num-steps", 2, "--timestep-shift", 3, *more)
    expected = two_steps(model, *noises(5, 4, 2), y, 3.0)
    assert np.abs(expected * 255 - shifted[4]).max() <= 1 and expected.std() > 0.02
    assert (arguments["num_steps"], arguments["timestep_shift"]) == ("2", "3.0")
    found, *_ = made(teacher, tmp_path / "b.npz", "--sampler", "sde", "--num-steps", 3, *more, "--shard-size", 4)
    noise = noises(5, 4, 3)
    with torch.no_grad():
        x0 = sde_sample(model, noise[0], y, 3, lambda x: noise.pop(1))
    pixels = ((x0 + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
    assert len(noise) == 1 and np.abs(pixels - found[4]).max() <= 1


@pytest.mark.parametrize("sampler,steps", [("sde", 250), ("euler", 50), ("heun", 50), ("few-step", None)])
def test_a_teachers_solver_has_steps_of_its_own(sampler, steps):
    args = generate.build_parser().parse_args(words("--generator", "g", "--output", "s.npz", "--sampler", sampler))
    assert generate.check_sampling(args).num_steps == steps and args.num_steps is None


def test_guided_channels_are_recorded(tmp_path):
    random_sit(in_channels=3).save_pretrained(tmp_path / "sit")
    guided = ("--sampler", "euler", "--num-steps", 3, "--guidance-scale", 3)
    every, _, arguments = made(tmp_path / "sit", tmp_path / "a.npz", *guided)
    two, _, others = made(tmp_path / "sit", tmp_path / "b.npz", *guided, "--guidance-channels", 2)
    three, *_ = made(tmp_path / "sit", tmp_path / "c.npz", *guided, "--guidance-channels", 3)
    assert np.array_equal(every, three) and np.abs(every.astype(int) - two).max() > 5
    assert "guidance_channels" not in arguments and others["guidance_channels"] == "2"


def test_a_subset_of_the_classes(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("\n".join(KNOWN["fashion-mnist"]))
    whole, every, others = made(teacher, "whole.npz", count=20)
    assert every.tolist() == [*range(10), *range(10)] and "classes" not in others
    for k, (more, labels) in enumerate([((7, 3), [7, 3] * 4), (("bag", 3, "--names", "names.txt"), [8, 3] * 4)]):
        images, found, arguments = made(teacher, f"{k}.npz", "--classes", *more, "--shard-size", 3)
        assert found.tolist() == labels and arguments["classes"] == str(labels[:2])
        assert np.abs(images[0].astype(int) - whole[0]).max() > 1  # the same noise, another class
    again, *_ = made(teacher, "again.npz", "--classes", *range(10), count=20)
    assert np.array_equal(again, whole)
    _, labels, _ = made(teacher, "random.npz", "--classes", 2, 9, "--labels", "random", count=40)
    assert set(labels.tolist()) == {2, 9} and 8 <= (labels == 2).sum() <= 32 and labels.tolist() != [2, 9] * 20


def test_a_set_continued_on_another_device_is_of_one_precision(tmp_path, monkeypatch):
    """Its parts were decoded in fp16, as on a GPU; the CPU that goes on decodes in fp32."""
    random_sit(in_channels=4).save_pretrained(tmp_path / "sit")
    more, choose = ("--vae", write_vae(tmp_path / "vae"), "--shard-size", 4), sampling.decoder_of
    whole, *_ = made(tmp_path / "sit", tmp_path / "whole.npz", *more)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sampling, "decoder_of", lambda *args: choose(*args[:-1], True))
        patch.setattr(sampling, "merge_samples", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        made(tmp_path / "sit", tmp_path / "cut.npz", *more)
    with np.load(tmp_path / "cut.npz.tmp" / "00000000-fp16.npz") as part:
        assert not np.array_equal(part["arr_0"], whole[:4])
    again, *_ = made(tmp_path / "sit", tmp_path / "cut.npz", *more)
    assert np.array_equal(again, whole)


def test_one_step_of_what_was_not_distilled_is_noted(teacher, tmp_path, capfd):
    save_generator(random_sit(), tmp_path / "distilled", 1, 1.0)
    for number, (main, source, more, notes) in enumerate([
        (generate.main, teacher, (), 1),
        (generate.main, teacher, ("--num-steps", 1), 0),
        (generate.main, teacher, ("--sampler", "euler", "--num-steps", 2), 0),
        (generate.main, tmp_path / "distilled", (), 0),
        (sample.main, teacher, ("--classes", 1, "--per-class", 1), 1),
    ]):  # fmt: skip
        output = ("--output", f"{tmp_path}/{number}.npz", "--num-images", 1)
        main(
            words("--generator", source, *more, *(output if main is generate.main else ("--grid", tmp_path / "g.png")))
        )
        err = capfd.readouterr().err
        assert err.count("does not record for how many steps it was distilled") == notes, (number, err)
        assert not notes or (str(teacher) in err and "--sampler euler" in err)
