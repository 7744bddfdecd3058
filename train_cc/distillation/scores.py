"""The two readings of the estimator at a noised sample: the fake score and the real one."""

import torch
from torch import Tensor

from train_cc.distillation.settings import Run
from train_cc.samplers import apply_guidance, guided_rows, with_null_rows
from train_cc.schedules import dynamic_guidance_scale


@torch.no_grad()
def scores(run: Run, x_t: Tensor, t_cpu: Tensor, t: Tensor, y: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """(v_fake, v_real) at x_t (B, C, H, W) by one network call, each row at its own LoRA scale.

    ``t_cpu`` and ``t`` are the same times (B,) on the CPU and on the device; ``c`` is the annealing c(k). Guidance
    applies to the real score alone, and finds its rows in ``t_cpu`` without asking the device.
    """
    method, batch = run.method, len(x_t)
    rows = guided_rows(t_cpu, method.real_guidance_scale, method.real_guidance_interval)
    rows = rows.to(x_t.device, non_blocking=True)
    x_t, t, y = (torch.cat([each, each]) for each in (x_t, t, y))
    x_t, t, y = with_null_rows(x_t, t, y, rows + batch, run.num_classes)
    scale_real = dynamic_guidance_scale(method.lora_scale_real, c)
    lora_scale = torch.cat([t.new_full((batch,), method.lora_scale_fake), t.new_full((len(t) - batch,), scale_real)])
    v = run.estimator(x_t, t, y, lora_scale=lora_scale)
    v_fake, v_real, v_null = v.split([batch, batch, len(rows)])
    return v_fake, apply_guidance(v_real, v_null, rows, method.real_guidance_scale)
