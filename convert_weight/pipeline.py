"""A one-step or few-step generator as a diffusers pipeline: class labels in, images out.

pipeline = DiffusionPipeline.from_pretrained(FOLDER_OR_HUB_NAME, trust_remote_code=True)
images = pipeline(class_labels=["golden retriever", 207]).images

This file needs torch, diffusers and pillow only: a pipeline that is shared holds a copy of it.
"""

import difflib
import operator
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

MOST_STEPS = 1000
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class DMDRPipeline(DiffusionPipeline):
    """``generator``: the velocity network v(x, t, y). ``vae``: None for a generator of pixels.

    ``num_inference_steps`` and ``timestep_shift``: what ``generator`` was trained for. ``id2label``: a class's number,
    as text, to its names, separated by ", ".
    """

    _optional_components = ["vae"]  # noqa: RUF012  (diffusers reads it)
    model_cpu_offload_seq = "generator->vae"

    def __init__(
        self,
        generator: ModelMixin,
        vae: AutoencoderKL | None = None,
        timestep_shift: float = 1.0,
        num_inference_steps: int = 1,
        id2label: dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(generator=generator, vae=vae)
        self.register_to_config(
            timestep_shift=timestep_shift, num_inference_steps=num_inference_steps, id2label=id2label
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """``class_labels``: a number or a name of `id2label`, or several. ``num_inference_steps``: as trained, if None.

        ``generator``: torch's random one, of all noise, or a list of one per image. ``output_type``: "pil"; "np", float
        (B, H, W, C) in [0, 1]; "pt", a float tensor (B, C, H, W) in [0, 1]; "latent", the samples before the VAE.
        ``return_dict``: False for a tuple. Raises `ValueError` for what is not allowed.
        """
        labels = self.label_ids(class_labels)
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"num_inference_steps is {steps!r}; allowed: a whole number, 1 to {MOST_STEPS}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; allowed: {', '.join(map(repr, OUTPUT_TYPES))}")
        if isinstance(generator, list) and len(generator) not in (1, len(labels)):
            raise ValueError(f"generator is a list of {len(generator)}; allowed: one, or one for each of {len(labels)}")
        images = self._sample(torch.tensor(labels, device=self._execution_device), steps, generator)
        if output_type != "latent":
            images = self._decode(images).float()
        if output_type in ("pil", "np"):
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            pixels = (images * 255).round().astype("uint8")
            images = [Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image) for image in pixels]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def label_ids(self, class_labels: int | str | Sequence[int | str]) -> list[int]:
        """Numbers of classes that are given as numbers or names. Raises `ValueError`."""
        # A tensor or array of several has __index__, too.
        single = hasattr(class_labels, "__index__") and getattr(class_labels, "ndim", 0) == 0
        classes = self.generator.config.num_classes
        try:
            values = [class_labels] if single or isinstance(class_labels, str) else list(class_labels)
            labels = [self._id_of(each) if isinstance(each, str) else operator.index(each) for each in values]
        except TypeError:
            raise ValueError(
                f"class_labels is {class_labels!r}; a whole number, a name or a list of them is allowed"
            ) from None
        if not labels or not all(0 <= label < classes for label in labels):
            raise ValueError(f"class_labels is {values}; one label or more of 0 to {classes - 1} are allowed")
        return labels

    def _id_of(self, name: str) -> int:
        if not self.config.id2label:
            raise ValueError(f"class_labels has {name!r}, but this pipeline has no names of classes: give numbers")
        ids: dict[str, list[int]] = {}
        for number, names in self.config.id2label.items():
            for each in {names.lower(), *names.lower().split(", ")}:
                ids.setdefault(each, []).append(int(number))
        numbers = ids.get(name.lower(), [])
        if len(numbers) != 1:
            near = ", ".join(difflib.get_close_matches(name.lower(), ids, 5))
            problem = f"is the name of classes {numbers}: give a number" if numbers else "is no name of a class"
            raise ValueError(f"class_labels has {name!r}, which {problem}{f'. Near: {near}' if near else ''}")
        return numbers[0]

    def _sample(self, y: torch.Tensor, steps: int, generator: torch.Generator | list[torch.Generator] | None):
        """x0_hat = x_t - t v from t = 1, then re-noised to the next time: t <- s t / (1 + (s - 1) t). (B, C, H, W)."""
        size, shift = self.generator.config.input_size, self.config.timestep_shift
        shape = (len(y), self.generator.config.in_channels, size, size)
        x_t = randn_tensor(shape, generator=generator, device=y.device)
        for step in range(steps):
            time, ahead = (1 - i / steps for i in (step, step + 1))
            t = x_t.new_full((len(y),), shift * time / (1 + (shift - 1) * time))
            x0 = x_t - t.view(-1, 1, 1, 1) * self.generator(x_t, t, y).float()
            if step + 1 < steps:
                noise = randn_tensor(shape, generator=generator, device=y.device)
                t = torch.full_like(t, shift * ahead / (1 + (shift - 1) * ahead)).view(-1, 1, 1, 1)
                x_t = (1 - t) * x0 + t * noise
        return x0

    def _decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Return images in [0, 1], (B, C, H, W). Raises `ValueError` if they are not finite."""
        if self.vae is not None:
            x0 = self._decode_latents(self._unscaled(x0))
        if not torch.isfinite(x0).all():
            problem = f"the images hold NaN or infinity, computed in {self.generator.dtype}"
            raise ValueError(f"{problem}: a wider torch_dtype is needed, or the weights are damaged")
        return ((x0 + 1) / 2).clamp(0, 1)

    def _unscaled(self, x0: torch.Tensor) -> torch.Tensor:
        """The generator's latents -> the VAE's, by its config: x0 std / scale + mean, as diffusers' own pipelines."""
        config, mean, std = self.vae.config, self.vae.config.get("latents_mean"), self.vae.config.get("latents_std")
        if mean is None or std is None:
            return x0 / config.scaling_factor + (config.shift_factor or 0.0)
        mean, std = (torch.tensor(each, dtype=x0.dtype, device=x0.device).view(-1, 1, 1) for each in (mean, std))
        return x0 * std / config.scaling_factor + mean

    def _decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """In the VAE's dtype; in fp32 where its config says that it overflows fp16 (force_upcast), or where it does."""
        dtype = self.vae.dtype
        if not (dtype == torch.float16 and self.vae.config.force_upcast):
            images = self.vae.decode(latents.to(dtype)).sample
            if dtype == torch.float32 or torch.isfinite(images).all():
                return images
        try:
            self.vae.to(torch.float32)
            return self.vae.decode(latents.float()).sample
        finally:
            self.vae.to(dtype)
