"""The generator as a diffusers pipeline, with its VAE inside.

pipeline = DMDRPipeline.from_pretrained(folder)
images = pipeline(class_labels=[207], num_inference_steps=1).images
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from train_cc.io.read import check_numbers, read_json
from train_cc.io.write import copy_mode
from train_cc.models.generator import SAMPLING
from train_cc.models.sit import SiT
from train_cc.models.vae import images_to_uint8, load_vae, pixels_to_images, unscaled
from train_cc.samplers import few_step_sample

INDEX = "model_index.json"


class DMDRPipeline(DiffusionPipeline):
    """Class labels to images. ``vae``: None for a generator of pixels."""

    _optional_components = ["vae"]  # noqa: RUF012  (diffusers reads it)
    model_cpu_offload_seq = "generator->vae"

    def __init__(
        self,
        generator: SiT,
        vae: AutoencoderKL | None = None,
        timestep_shift: float = 1.0,
        num_inference_steps: int = 1,
    ):
        """``timestep_shift`` and ``num_inference_steps``: what ``generator`` was trained for."""
        super().__init__()
        self.register_modules(generator=generator, vae=vae)
        self.register_to_config(timestep_shift=timestep_shift, num_inference_steps=num_inference_steps)

    def save_pretrained(self, folder: str | os.PathLike, **options) -> None:
        super().save_pretrained(folder, **options)
        for path in Path(folder).rglob("*.safetensors"):
            copy_mode(Path(folder) / INDEX, path)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, torch_dtype: torch.dtype | None = None) -> "DMDRPipeline":
        """Read what `save_pretrained` wrote: config, shapes and values checked, nothing run. Raises `InputError`."""
        folder = Path(folder)
        index = read_json(folder / INDEX, "a DMDR pipeline's folder")
        check_numbers(index, SAMPLING, folder / INDEX)
        generator = SiT.from_pretrained(folder / "generator")
        vae = load_vae(str((folder / "vae").absolute())) if (folder / "vae").is_dir() else None
        pipeline = cls(generator, vae, **{name: index[name] for name in SAMPLING if name in index})
        return pipeline if torch_dtype is None else pipeline.to(torch_dtype)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """``num_inference_steps``: as trained, unless given. ``generator``: torch's random one, of all noise.

        ``output_type``: "pil" or "np".
        """
        classes = self.generator.config.num_classes
        if not class_labels or not all(0 <= label < classes for label in class_labels):
            raise ValueError(
                f"class_labels is {list(class_labels)}; one label or more of 0 to {classes - 1} are allowed"
            )
        if output_type not in ("pil", "np"):
            raise ValueError(f"output_type is {output_type!r}; allowed: 'pil', 'np'")
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        check_numbers({"num_inference_steps": steps}, SAMPLING, "the call")
        y = torch.tensor(list(class_labels), device=self._execution_device)
        shape = (len(y), *self.generator.sample_shape)

        def noise(like: torch.Tensor | None = None) -> torch.Tensor:
            return randn_tensor(shape, generator=generator, device=y.device)

        x0 = few_step_sample(self._velocity, noise(), y, steps, self.config.timestep_shift, noise)
        images = images_to_uint8(self._decode(x0)).numpy()
        if output_type == "pil":
            images = [Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image) for image in images]
        return ImagePipelineOutput(images=images)

    def _velocity(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.generator(x, t, y).float()

    def _decode(self, x0: torch.Tensor) -> torch.Tensor:
        if self.vae is None:
            return pixels_to_images(x0)
        return pixels_to_images(self.vae.decode(unscaled(x0, self.vae.config).to(self.vae.dtype)).sample)
