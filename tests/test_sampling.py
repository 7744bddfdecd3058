"""Who samples a few-step generator takes the steps and the shift that it is asked for: the pipeline, and generate."""

import numpy as np
import pytest
import torch

from convert_weight.pipeline import DMDRPipeline
from evaluation import generate
from tests.conftest import random_sit
from train_cc.models import SiT


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
        assert np.abs(made.astype(int) - images).max() <= 1


def test_the_pipeline_takes_labels_that_there_are_and_gives_what_is_asked_for():
    grey, colour = DMDRPipeline(random_sit()), DMDRPipeline(random_sit(in_channels=3))
    for labels in ([], [-1], [10], [11], [3, 10], [-1, 3]):
        with pytest.raises(ValueError, match=r"one label or more of 0 to 9 are allowed"):
            grey(labels)
    with pytest.raises(ValueError, match="output_type is 'pt'"):
        grey([3], output_type="pt")
    assert (grey.config.num_inference_steps, grey.config.timestep_shift) == (1, 1.0)
    for pipeline, mode in ((grey, "L"), (colour, "RGB")):
        pictures = pipeline([0, 9], generator=torch.Generator().manual_seed(1)).images
        arrays = pipeline((0, 9), generator=torch.Generator().manual_seed(1), output_type="np").images
        assert [(picture.mode, picture.size) for picture in pictures] == [(mode, (8, 8))] * 2
        assert np.array_equal(np.stack([np.asarray(picture).reshape(8, 8, -1) for picture in pictures]), arrays)


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
    words = ["--generator", tmp_path / "sit", "--output", tmp_path / "s.npz", "--num-images", 4, "--num-steps", 2]
    generate.main([str(word) for word in [*words, "--timestep-shift", 3]])
    assert asked == [[1.0], [0.75]]
