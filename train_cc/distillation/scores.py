"""The roles of the estimator, a frozen teacher with a LoRA: fake score, real score, and the teacher itself."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train_cc.samplers import apply_guidance, guided_rows, with_null_rows
from train_cc.schedules import dynamic_guidance_scale
from train_cc.settings import Method


@dataclass(frozen=True)
class LoraScores:
    """``estimator`` as its accelerator prepared it. Each role is one call of it, so that DDP and FSDP2 see one module.

    x_t (B, C, H, W), t (B,), y (B,) -> v (B, C, H, W).
    """

    estimator: nn.Module
    method: Method
    num_classes: int

    def fake(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The score of the generator's distribution, which is trained."""
        return self.estimator(x_t, t, y, lora_scale=self.method.lora_scale_fake)

    def teacher(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The frozen teacher, bit for bit."""
        return self.estimator(x_t, t, y, lora_scale=0.0)

    @torch.no_grad()
    def both(self, x_t: Tensor, t_cpu: Tensor, t: Tensor, y: Tensor, c: float) -> tuple[Tensor, Tensor]:
        """(v_fake, v_real) by one network call; the real one at the annealing c(k).

        ``t_cpu`` and ``t`` are the same times on the CPU and on the device. Guidance applies to the real score only,
        and finds its rows in ``t_cpu`` without asking the device.
        """
        method, batch = self.method, len(x_t)
        rows = guided_rows(t_cpu, method.real_guidance_scale, method.real_guidance_interval)
        rows = rows.to(x_t.device, non_blocking=True)
        x_t, t, y = (torch.cat([each, each]) for each in (x_t, t, y))
        x_t, t, y = with_null_rows(x_t, t, y, rows + batch, self.num_classes)
        v_fake, v_real, v_null = self.read(x_t, t, y, batch, c).split([batch, batch, len(rows)])
        return v_fake, apply_guidance(v_real, v_null, rows, method.real_guidance_scale)

    def read(self, x_t: Tensor, t: Tensor, y: Tensor, fakes: int, c: float) -> Tensor:
        """The fake score of the first ``fakes`` rows, the real one of the others, each row at its own LoRA scale."""
        real = dynamic_guidance_scale(self.method.lora_scale_real, c)
        scales = [t.new_full((fakes,), self.method.lora_scale_fake), t.new_full((len(t) - fakes,), real)]
        return self.estimator(x_t, t, y, lora_scale=torch.cat(scales))
