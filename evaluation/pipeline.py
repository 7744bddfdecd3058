"""The generator as a diffusers pipeline, with its VAE inside.

pipeline = DMDRPipeline.from_pretrained(folder)
images = pipeline(class_labels=[207], num_inference_steps=1).images
"""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from train_cc.models.latents import images_to_uint8, pixels_to_images
from train_cc.models.sit import SiT
from train_cc.samplers import few_step_sample


class DMDRPipeline(DiffusionPipeline):
    """Class labels to images. ``vae``: None for a generator of pixels."""

    _optional_components = ["vae"]  # noqa: RUF012  (diffusers reads it)

    def __init__(self, generator: SiT, vae: AutoencoderKL | None = None, timestep_shift: float = 1.0):
        super().__init__()
        self.register_modules(generator=generator, vae=vae)
        self.register_to_config(timestep_shift=timestep_shift)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        num_inference_steps: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """``generator``: torch's random one, of all noise. ``output_type``: "pil" or "np"."""
        classes = self.generator.config.num_classes
        if not class_labels or not all(0 <= label < classes for label in class_labels):
            raise ValueError(
                f"class_labels is {list(class_labels)}; one label or more of 0 to {classes - 1} are allowed"
            )
        if output_type not in ("pil", "np"):
            raise ValueError(f"output_type is {output_type!r}; allowed: 'pil', 'np'")
        y = torch.tensor(list(class_labels), device=self._execution_device)
        shape = (len(y), *self.generator.sample_shape)

        def noise(like: torch.Tensor | None = None) -> torch.Tensor:
            return randn_tensor(shape, generator=generator, device=y.device)

        x0 = few_step_sample(self._velocity, noise(), y, num_inference_steps, self.config.timestep_shift, noise)
        images = images_to_uint8(self._decode(x0)).numpy()
        if output_type == "pil":
            images = [Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image) for image in images]
        return ImagePipelineOutput(images=images)

    def _velocity(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.generator(x, t, y).float()

    def _decode(self, x0: torch.Tensor) -> torch.Tensor:
        if self.vae is None:
            return pixels_to_images(x0)
        return pixels_to_images(self.vae.decode(x0.to(self.vae.dtype) / self.vae.config.scaling_factor).sample)
