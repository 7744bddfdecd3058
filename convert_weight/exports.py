"""Writing a generator folder, a pipeline and an adapter, each read again and compared: what export_generator runs."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from convert_weight.pipeline import DMDRPipeline
from train_cc.distillation.state import generator_state, recorded_arguments
from train_cc.draws import Draws
from train_cc.io.errors import InputError
from train_cc.models.generator import GENERATOR_TARGETS, generator_lora_rank, save_generator
from train_cc.models.lora import save_adapter
from train_cc.models.sit import SiT
from train_cc.run.checkpoint import Checkpoint


@torch.no_grad()
def require_same_outputs(before: SiT, after: nn.Module, tolerance: float = 0) -> None:
    """What was written and read again must give the same velocities, bit for bit or to a part of the largest."""
    draws = Draws(0)
    x, y = draws.noise(2, *before.sample_shape), draws.integers(before.null_class, 2)
    for time in (1.0, 0.5):
        t = torch.full((2,), time)
        expected, found = before(x, t, y), after(x, t, y)
        if (found - expected).abs().max() > tolerance * expected.abs().max():
            raise InputError("what was written gives other outputs than the checkpoint's: is the disk failing?")


def save_lora(generator: SiT, checkpoint: Checkpoint, weights: str, teacher: Path, folder: Path) -> None:
    """Read again, on the teacher, its outputs are ``generator``'s, where it is merged, to the rounding of fp32."""
    recorded = recorded_arguments(checkpoint)
    rank = generator_lora_rank(recorded["use_lora_gen"], recorded["lora_rank"])
    save_adapter(generator_state(checkpoint, weights), rank, GENERATOR_TARGETS, str(teacher), folder)
    adapted = PeftModel.from_pretrained(SiT.from_pretrained(teacher), folder).eval()
    require_same_outputs(generator, adapted, 1e-4)


def save_all(generator: SiT, vae: nn.Module | None, sampling: dict, provenance: dict, folders: dict[str, Path]) -> None:
    """Write what ``folders`` names, read it again, and compare."""
    if "--output-dir" in folders:
        folder = folders["--output-dir"]
        save_generator(generator, folder, sampling["num_inference_steps"], sampling["timestep_shift"], **provenance)
        require_same_outputs(generator, SiT.from_pretrained(folder))
    if "--pipeline" in folders:
        DMDRPipeline(generator, vae, **sampling).save_pretrained(folders["--pipeline"])
        require_same_outputs(generator, DMDRPipeline.from_pretrained(folders["--pipeline"]).generator)
