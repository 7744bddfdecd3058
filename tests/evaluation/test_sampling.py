"""Who samples a few-step generator takes the steps and the shift that it is asked for: the pipeline, and generate."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from convert_weight.pipeline import DMDRPipeline
from evaluation import generate, sample
from tests.conftest import random_sit, words
from tests.paper.test_math import gaussian_velocity
from train_cc.draws import Draws
from train_cc.io.class_names import KNOWN
from train_cc.models import SiT
from train_cc.models.generator import save_generator
from train_cc.samplers import guide, sde_sample


def two_steps(model, noise, fresh, y, shift):
    """x0 after t = 1 and t = s / (1 + s), the shifted middle: the sampler, written out."""
    t = shift * 0.5 / (1 + (shift - 1) * 0.5)
    with torch.no_grad():
        x0 = noise - model(noise, torch.ones(len(y)), y)
        x_t = (1 - t) * x0 + t * fresh
        return x_t - t * model(x_t, torch.full((len(y),), t), y)


def pixels(x0: torch.Tensor) -> np.ndarray:
    return (((x0 + 1) / 2).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def test_the_pipeline_samples_at_its_shift():
    model, labels = random_sit(), [3, 0, 9]
    draws = torch.Generator().manual_seed(7)
    noise, fresh = (torch.randn(3, 1, 8, 8, generator=draws) for _ in range(2))
    expected = {shift: pixels(two_steps(model, noise, fresh, torch.tensor(labels), shift)) for shift in (1.0, 3.0)}
    assert np.abs(expected[1.0].astype(int) - expected[3.0]).max() > 5
    for shift, images in expected.items():
        pipeline = DMDRPipeline(model, timestep_shift=shift)
        made = pipeline(labels, 2, generator=torch.Generator().manual_seed(7), output_type="np").images
        assert np.abs(made * 255 - images).max() <= 1


def test_the_pipeline_takes_labels_that_there_are_and_gives_what_is_asked_for():
    grey, colour = DMDRPipeline(random_sit()), DMDRPipeline(random_sit(in_channels=3))
    for labels in ([], [-1], [10], [11], [3, 10], [-1, 3]):
        with pytest.raises(ValueError, match=r"one label or more of 0 to 9 are allowed"):
            grey(labels)
    with pytest.raises(ValueError, match="output_type is 'tf'; allowed: 'pil', 'np', 'pt', 'latent'"):
        grey([3], output_type="tf")
    with pytest.raises(ValueError, match="a list of 2; allowed: one, or one for each of 3"):
        grey([3, 4, 5], generator=[torch.Generator(), torch.Generator()])
    assert (grey.config.num_inference_steps, grey.config.timestep_shift) == (1, 1.0)
    for pipeline, mode in ((grey, "L"), (colour, "RGB")):
        pictures = pipeline([0, 9], generator=torch.Generator().manual_seed(1)).images
        arrays = pipeline((0, 9), generator=torch.Generator().manual_seed(1), output_type="np").images
        assert [(picture.mode, picture.size) for picture in pictures] == [(mode, (8, 8))] * 2
        shown = np.stack([np.asarray(picture).reshape(8, 8, -1) for picture in pictures])
        assert np.array_equal(shown, (arrays * 255).round()) and shown.std() > 5


def test_the_pipeline_gives_arrays_and_tensors_as_diffusers_pipelines_do():
    """Floats in [0, 1]; images last in NumPy, first in torch; a tuple without return_dict."""
    for pipeline in (DMDRPipeline(random_sit()), DMDRPipeline(random_sit(in_channels=3))):
        channels = pipeline.generator.config.in_channels

        def give(kind, pipeline=pipeline, **more):
            return pipeline([0, 9], generator=torch.Generator().manual_seed(1), output_type=kind, **more)

        arrays, tensor, latent = (give(kind).images for kind in ("np", "pt", "latent"))
        assert arrays.dtype == np.float32 and arrays.shape == (2, 8, 8, channels)
        assert 0 <= arrays.min() < 0.3 and 0.7 < arrays.max() <= 1
        assert tensor.dtype == torch.float32 and torch.equal(tensor.permute(0, 2, 3, 1), torch.from_numpy(arrays))
        assert torch.equal(((latent + 1) / 2).clamp(0, 1), tensor) and latent.max() > 1
        given = give("np", return_dict=False)
        assert type(given) is tuple and len(given) == 1 and np.array_equal(given[0], arrays)


def test_a_list_of_generators_has_one_for_each_image():
    pipeline = DMDRPipeline(random_sit())
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = pipeline([0, 9], generator=seeds, output_type="pt").images
    alone = pipeline(9, generator=torch.Generator().manual_seed(2), output_type="pt").images
    assert torch.allclose(both[1:], alone, atol=1e-5) and alone.std() > 0.02


def test_the_pipeline_keeps_no_graph(monkeypatch):
    asked, forward = [], SiT.forward
    monkeypatch.setattr(SiT, "forward", lambda *args: asked.append(torch.is_grad_enabled()) or forward(*args))
    DMDRPipeline(random_sit())([1], num_inference_steps=2)
    assert asked == [False, False]


def test_generate_samples_at_the_shift_it_is_given(tmp_path, monkeypatch):
    """The times that the network is asked at: 1, and the shifted middle."""
    random_sit().save_pretrained(tmp_path / "sit")
    asked, forward = [], SiT.forward
    monkeypatch.setattr(
        SiT, "forward", lambda self, x, t, y: asked.append(t.unique().tolist()) or forward(self, x, t, y)
    )
    common = ("--generator", tmp_path / "sit", "--output", tmp_path / "s.npz", "--num-images", 4, "--num-steps", 2)
    generate.main(words(*common, "--timestep-shift", 3))
    assert asked == [[1.0], [0.75]]


# A teacher's SDE --------------------------------------------------------------------------------------------------


def law_of_the_sde(mu: float, s: float, num_steps: int) -> tuple[float, float]:
    """Mean and deviation after ``num_steps`` of Euler-Maruyama for N(mu, s^2) by its true score.

    x_t is N((1 - t) mu, (1 - t)^2 s^2 + t^2); the reverse SDE is dx = (v - w/2 score) dt + sqrt(w) dW, w = 2 t;
    the last step adds no noise.
    """
    mean, variance, times = 0.0, 1.0, [*np.linspace(1, 0.04, num_steps), 0.0]
    for t, t_next in itertools.pairwise(times):
        m, var, step = (1 - t) * mu, (1 - t) ** 2 * s**2 + t**2, t - t_next
        slope_v, slope_score = (t - (1 - t) * s**2) / var, -1 / var  # of E[noise - x0 | x_t] and of the score
        slope = slope_v - t * slope_score
        mean -= step * (-mu + slope * (mean - m))
        variance = (1 - step * slope) ** 2 * variance + (2 * t * step if t_next else 0)
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("num_steps", [2, 10, 250])
def test_the_sde_samples_the_law_that_its_steps_have(num_steps):
    draws = Draws(num_steps)
    noise = draws.noise(64, 1, 32, 32)
    x0 = sde_sample(gaussian_velocity(0.7, 0.4), noise, torch.zeros(64), num_steps, draws.noise_like)
    mean, deviation = law_of_the_sde(0.7, 0.4, num_steps)
    error = deviation / 256  # of the mean of 64 x 32 x 32 numbers
    assert x0.mean().item() == pytest.approx(mean, abs=4 * error)
    assert x0.std().item() == pytest.approx(deviation, abs=3 * error)


def test_the_sde_converges_to_the_data():
    """More steps, a smaller error, down to that of the last step, which is .04 long whatever their number."""
    draws, errors = Draws(3), []
    for num_steps in (5, 20, 250):
        noise = draws.noise(64, 1, 32, 32)
        x0 = sde_sample(gaussian_velocity(0.7, 1.0), noise, torch.zeros(64), num_steps, draws.noise_like)
        errors.append(max(abs(x0.mean().item() - 0.7), abs(x0.std().item() - 1)))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.015


def test_guidance_in_the_sde_follows_its_interval():
    """Calls with null rows are those at t in the interval; the times go from 1 to 0.04."""
    rows, times = [], []

    def model(x, t, y):
        rows.append(len(x)), times.append(t[0].item())
        return gaussian_velocity(0.7, 0.4)(x, t)

    noise, y = torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.long)
    sde_sample(guide(model, 9, 1.8, (0.0, 0.7)), noise, y, 250)
    assert np.allclose(times, np.linspace(1, 0.04, 250), atol=1e-6)
    assert rows == [4 if t <= 0.7 else 2 for t in times] and rows.count(4) == 172


# Guidance of some channels ----------------------------------------------------------------------------------------


def test_the_first_channels_are_guided():
    x, t, y = torch.randn(3, 4, 2, 2), torch.tensor([0.1, 0.5, 0.9]), torch.arange(3)

    def by_class(x, t, y):
        return x * 0.1 + y.view(-1, 1, 1, 1)

    plain, all_of_it = by_class(x, t, y), guide(by_class, 9, 1.5, (0, 0.6))(x, t, y)
    three = guide(by_class, 9, 1.5, (0, 0.6), 3)(x, t, y)
    assert torch.equal(three[:, :3], all_of_it[:, :3]) and torch.equal(three[:, 3:], plain[:, 3:])
    assert not torch.equal(three[:, 3:], all_of_it[:, 3:])
    assert torch.equal(guide(by_class, 9, 1.5, (0, 0.6), 4)(x, t, y), all_of_it)


# Their flags ------------------------------------------------------------------------------------------------------


def made(source, output, *more, count=8):
    generate.main(words("--generator", source, "--output", output, "--num-images", count, *more))
    with np.load(output) as file:
        return file["arr_0"], file["arr_1"], json.loads(str(file["provenance"]))["arguments"]


SDE = ("--sampler", "sde", "--num-steps", 6, "--guidance-scale", 1.8, "--guidance-interval", 0, 0.7)


def test_images_of_the_sde_depend_on_seed_and_index_alone(teacher, tmp_path):
    a, _, arguments = made(teacher, tmp_path / "a.npz", *SDE, "--batch-size", 3, "--shard-size", 4)
    b, _, _ = made(teacher, tmp_path / "b.npz", *SDE, count=5)
    assert np.abs(a[:5].astype(int) - b).max() <= 1 and a.std() > 5
    assert (arguments["sampler"], arguments["num_steps"]) == ("sde", "6")
    other, _, _ = made(teacher, tmp_path / "c.npz", *SDE[:4], "--guidance-scale", 1, count=5)
    assert np.abs(other.astype(int) - b).max() > 5


def test_the_images_of_the_sde_are_those_of_the_sampler(teacher, tmp_path):
    """The noise of image i, of step after step, is its own."""
    found, _, _ = made(teacher, tmp_path / "a.npz", "--sampler", "sde", "--num-steps", 3, "--seed", 5, count=1)
    draws = Draws(5, 11, 0)
    noises = [draws.noise(1, 1, 8, 8) for _ in range(3)]
    with torch.no_grad():
        x0 = sde_sample(SiT.from_pretrained(teacher), noises[0], torch.tensor([0]), 3, lambda x: noises.pop(1))
    assert len(noises) == 1 and np.abs(pixels(x0).astype(int) - found).max() <= 1


def test_the_sde_takes_250_steps_unless_told():
    args = generate.build_parser().parse_args(words("--generator", "g", "--output", "s.npz", "--sampler", "sde"))
    assert generate.check_sampling(args).num_steps == 250 and args.num_steps is None


def test_guided_channels_are_recorded(tmp_path):
    random_sit(in_channels=3).save_pretrained(tmp_path / "sit")
    guided = ("--sampler", "euler", "--num-steps", 3, "--guidance-scale", 3)
    every, _, arguments = made(tmp_path / "sit", tmp_path / "a.npz", *guided)
    two, _, others = made(tmp_path / "sit", tmp_path / "b.npz", *guided, "--guidance-channels", 2)
    three, _, _ = made(tmp_path / "sit", tmp_path / "c.npz", *guided, "--guidance-channels", 3)
    assert np.array_equal(every, three) and np.abs(every.astype(int) - two).max() > 5
    assert "guidance_channels" not in arguments and others["guidance_channels"] == "2"


@pytest.mark.parametrize("more,labels", [
    (("--classes", 7, 3), [7, 3, 7, 3, 7, 3, 7, 3]),
    (("--classes", "bag", 3, "--names", "names.txt"), [8, 3, 8, 3, 8, 3, 8, 3]),
])  # fmt: skip
def test_a_subset_of_the_classes(more, labels, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("\n".join(KNOWN["fashion-mnist"]))
    images, found, arguments = made(teacher, tmp_path / "a.npz", *more, "--shard-size", 3)
    assert found.tolist() == labels and arguments["classes"] == str(labels[:2]) and images.std() > 5
    whole, every, others = made(teacher, tmp_path / "b.npz", count=20)
    assert every.tolist() == [*range(10), *range(10)] and "classes" not in others
    assert np.abs(images[1].astype(int) - whole[1]).max() > 1  # the same noise, another class
    again, _, _ = made(teacher, tmp_path / "c.npz", "--classes", *range(10), count=20)
    assert np.array_equal(again, whole)


def test_labels_are_drawn_of_a_subset(teacher, tmp_path):
    _, labels, _ = made(teacher, tmp_path / "a.npz", "--classes", 2, 9, "--labels", "random", count=40)
    assert set(labels.tolist()) == {2, 9} and 8 <= (labels == 2).sum() <= 32 and labels.tolist() != [2, 9] * 20


# A teacher in one step --------------------------------------------------------------------------------------------

NOTE = "does not record for how many steps it was distilled"


def test_one_step_of_what_was_not_distilled_is_noted(teacher, tmp_path, capfd):
    save_generator(random_sit(), tmp_path / "distilled", 1, 1.0)
    grid = ("--classes", 1, "--per-class", 1, "--grid", tmp_path / "g.png", "--overwrite")
    for number, (call, source, more, notes) in enumerate([
        (generate.main, teacher, (), 1),
        (generate.main, teacher, ("--num-steps", 1), 0),
        (generate.main, teacher, ("--sampler", "euler"), 0),
        (generate.main, tmp_path / "distilled", (), 0),
        (generate.main, tmp_path / "distilled", ("--sampler", "heun", "--num-steps", 2), 0),
        (sample.main, teacher, grid, 1),
        (sample.main, tmp_path / "distilled", grid, 0),
    ]):  # fmt: skip
        output = ("--output", tmp_path / f"{number}.npz", "--num-images", 1) if call is generate.main else ()
        call(words("--generator", source, *output, *more))
        err = capfd.readouterr().err
        assert err.count(NOTE) == notes, (number, err)
        assert not notes or (str(teacher) in err and "--sampler euler" in err)
