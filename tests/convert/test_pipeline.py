"""convert_weight/pipeline.py: a shared generator sampled as its run was trained, by diffusers' conventions."""

import numpy as np
import pytest
import torch

from convert_weight.pipeline import DMDRPipeline
from tests.conftest import random_sit
from train_cc.io.class_names import KNOWN
from train_cc.models import SiT


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def two_steps(model: SiT, noise: torch.Tensor, fresh: torch.Tensor, y: torch.Tensor, shift: float) -> np.ndarray:
    """Images in [0, 1] after t = 1 and t = s / (1 + s), the shifted middle: the sampler, written out."""
    t = shift * 0.5 / (1 + (shift - 1) * 0.5)
    with torch.no_grad():
        x0 = noise - model(noise, torch.ones(len(y)), y)
        x_t = (1 - t) * x0 + t * fresh
        x0 = x_t - t * model(x_t, torch.full((len(y),), t), y)
    return ((x0 + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def test_the_pipeline_samples_at_its_shift():
    model, labels, draws = random_sit(), [3, 0, 9], seeded(7)
    noise, fresh = (torch.randn(3, 1, 8, 8, generator=draws) for _ in range(2))
    expected = {shift: two_steps(model, noise, fresh, torch.tensor(labels), shift) for shift in (1.0, 3.0)}
    assert np.abs(expected[1.0] - expected[3.0]).max() > 0.02
    for shift, images in expected.items():
        pipeline = DMDRPipeline(model, timestep_shift=shift)
        assert np.abs(pipeline(labels, 2, generator=seeded(7), output_type="np").images - images).max() < 1e-3


@pytest.mark.parametrize("channels,mode", [(1, "L"), (3, "RGB")])
def test_pictures_arrays_tensors_and_latents_are_as_diffusers_pipelines_give_them(channels, mode):
    """Floats in [0, 1]; images last in NumPy, first in torch; a tuple without return_dict; no graph is kept."""
    pipeline = DMDRPipeline(random_sit(in_channels=channels))
    kinds = ("np", "pt", "latent", "pil")
    arrays, tensor, latent, pictures = (pipeline([0, 9], generator=seeded(1), output_type=k).images for k in kinds)
    assert arrays.dtype == np.float32 and arrays.shape == (2, 8, 8, channels)
    assert 0 <= arrays.min() < 0.3 and 0.7 < arrays.max() <= 1
    assert tensor.dtype == torch.float32 and torch.equal(tensor.permute(0, 2, 3, 1), torch.from_numpy(arrays))
    assert torch.equal(((latent + 1) / 2).clamp(0, 1), tensor) and latent.max() > 1 and not latent.requires_grad
    assert [(picture.mode, picture.size) for picture in pictures] == [(mode, (8, 8))] * 2
    pixels = np.stack([np.asarray(picture).reshape(8, 8, -1) for picture in pictures])
    assert np.array_equal(pixels, (arrays * 255).round())
    plain = pipeline((0, 9), generator=seeded(1), output_type="np", return_dict=False)
    assert type(plain) is tuple and len(plain) == 1 and np.array_equal(plain[0], arrays)


def test_labels_that_there_are_and_generators_for_each_image():
    pipeline = DMDRPipeline(random_sit())
    assert (pipeline.config.num_inference_steps, pipeline.config.timestep_shift) == (1, 1.0)
    both = pipeline([0, 9], generator=[seeded(1), seeded(2)], output_type="pt").images
    alone = pipeline(9, generator=seeded(2), output_type="pt").images
    assert torch.allclose(both[1:], alone, atol=1e-5) and alone.std() > 0.02
    for labels in ([], [-1], [10], [3, 10], [-1, 3]):
        with pytest.raises(ValueError, match=r"one label or more of 0 to 9 are allowed"):
            pipeline(labels)
    with pytest.raises(ValueError, match="output_type is 'tf'; allowed: 'pil', 'np', 'pt', 'latent'"):
        pipeline([3], output_type="tf")
    with pytest.raises(ValueError, match="a list of 2; allowed: one, or one for each of 3"):
        pipeline([3, 4, 5], generator=[seeded(1), seeded(2)])
    for steps in (0, 1.5, "2", True, 10**9):
        with pytest.raises(ValueError, match="num_inference_steps"):
            pipeline(3, steps)


def test_labels_are_numbers_or_names():
    ids = {str(number): name for number, name in enumerate(KNOWN["fashion-mnist"])} | {"1": "bag"}
    pipeline = DMDRPipeline(random_sit(), id2label=ids)
    assert pipeline.label_ids([3, "Ankle Boot", "top", 0]) == [3, 9, 0, 0] and pipeline.label_ids("T-shirt, top") == [0]
    assert pipeline.label_ids(7) == [7] and pipeline.label_ids("SANDAL") == [5]
    for given in (np.int64(3), np.array(3), torch.tensor(3), torch.tensor([3]), np.array([3]), range(3, 4)):
        assert pipeline.label_ids(given) == [3]
    for given in (None, 3.7, [3.7], torch.tensor([3.7])):
        with pytest.raises(ValueError, match=r"class_labels is .*a whole number, a name or a list"):
            pipeline.label_ids(given)
    for given, told in (("bag", r"classes \[1, 8\]"), ("sandals", "Near: sandal"), (["shirt", 10], "0 to 9")):
        with pytest.raises(ValueError, match=told):
            pipeline.label_ids(given)
    with pytest.raises(ValueError, match="has no names"):
        DMDRPipeline(random_sit())("shirt")
