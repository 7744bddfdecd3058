"""examples/: generators to try at once, with code of their own; they draw what this project's sampler draws."""

import pytest
import torch
from diffusers import DiffusionPipeline

from tests import ROOT
from train_cc.models import load_network
from train_cc.models.vae import load_decoder
from train_cc.samplers import few_step_sample

EXAMPLES = sorted(path.parent.name for path in (ROOT / "examples").glob("*/model_index.json"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_draws_its_classes(name, tmp_path, monkeypatch):
    folder = ROOT / "examples" / name
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 5.5e6
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    labels = torch.arange(10)
    images = pipeline(labels.tolist(), generator=torch.Generator().manual_seed(1), output_type="pt").images
    network = load_network(folder / "generator")
    noise = torch.randn(10, *network.sample_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x0 = few_step_sample(network, noise, labels, pipeline.config.num_inference_steps)
        expected = load_decoder(str(folder / "vae") if pipeline.vae is not None else None)(x0)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    apart = (images[:, None] - images[None]).abs().mean(dim=(2, 3, 4)) + torch.eye(10)
    assert images.std() > 0.2 and apart.min() > 0.05  # ten pictures, no two alike
