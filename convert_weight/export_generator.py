"""A plain generator folder from a training checkpoint: EMA or raw weights, LoRA merged into its base.

`python convert_weight/export_generator.py --checkpoint RUN/checkpoints/torch_units/step-N.pt --output-dir FOLDER`
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from train_cc.draws import Draws
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.read import sha256
from train_cc.io.write import check_output_dir
from train_cc.models.generator import assemble_generator, generator_lora_rank
from train_cc.models.latents import load_vae
from train_cc.models.sit import WEIGHTS_NAME, SiT
from train_cc.run.checkpoint import Checkpoint, open_checkpoint


def generator_of(checkpoint: Checkpoint, weights: str, teacher: Path | None = None) -> SiT:
    """``weights``: "ema", "raw", or "auto" (EMA where there is one). ``teacher`` replaces the recorded folder."""
    recorded = checkpoint.units["arguments"]
    state = checkpoint.read("accelerator_1/generator.safetensors")
    if weights == "auto":
        weights = "ema" if checkpoint.has("accelerator_1/ema.safetensors") else "raw"
    if weights == "ema":
        if not checkpoint.has("accelerator_1/ema.safetensors"):
            raise InputError(f"{checkpoint.path} has no EMA weights; --weights raw exports the others")
        state |= checkpoint.read("accelerator_1/ema.safetensors")
    lora_rank = generator_lora_rank(recorded["use_lora_gen"], recorded["lora_rank"])
    base = Path(teacher or recorded["teacher"])
    if lora_rank is not None:
        weights_file = base / WEIGHTS_NAME
        if not weights_file.is_file() or sha256(weights_file) != checkpoint.units["teacher_sha256"]:
            raise InputError(f"{base} is not the teacher that this LoRA generator was trained on; give it by --teacher")
    return assemble_generator(checkpoint.units["model_config"], state, base, lora_rank)


@torch.no_grad()
def require_same_outputs(before: SiT, after: SiT) -> None:
    """What was written and read again must give the same velocities, bit for bit."""
    draws = Draws(0)
    x, y = draws.noise(2, *before.sample_shape), draws.integers(before.null_class, 2)
    for time in (1.0, 0.5):
        t = torch.full((2,), time)
        if not torch.equal(before(x, t, y), after(x, t, y)):
            raise InputError("the written generator gives other outputs than the checkpoint's: is the disk failing?")


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoints/torch_units/step-N.pt")
    parser.add_argument("--output-dir", type=Path, help="the generator folder to write")
    parser.add_argument("--pipeline", type=Path, help="also or only: a diffusers pipeline folder, VAE inside")
    parser.add_argument("--vae", help="for --pipeline, if it is not the run's: hub name or folder; none: pixel space")
    parser.add_argument(
        "--weights", choices=["auto", "ema", "raw"], default="auto", help="auto: EMA where there is one"
    )
    parser.add_argument("--teacher", type=Path, help="a LoRA generator's base, if it has moved since")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(argv)
    targets = [folder for folder in (args.output_dir, args.pipeline) if folder is not None]
    if not targets:
        raise InputError("nothing to write: give --output-dir, --pipeline, or both")
    for folder in targets:
        check_output_dir(folder, args.overwrite)
    checkpoint = open_checkpoint(args.checkpoint)
    generator = generator_of(checkpoint, args.weights, args.teacher)
    if args.output_dir is not None:
        generator.save_pretrained(args.output_dir)
        require_same_outputs(generator, SiT.from_pretrained(args.output_dir))
        print(f"generator after {checkpoint.step} updates -> {args.output_dir}, outputs verified")
    if args.pipeline is not None:
        from evaluation.pipeline import DMDRPipeline

        recorded = checkpoint.units["arguments"]
        vae = args.vae or recorded["vae"]
        pipeline = DMDRPipeline(generator, None if vae == "none" else load_vae(vae), recorded["timestep_shift"])
        pipeline.save_pretrained(args.pipeline)
        require_same_outputs(generator, DMDRPipeline.from_pretrained(args.pipeline).generator)
        print(f"pipeline after {checkpoint.step} updates -> {args.pipeline}, outputs verified")


if __name__ == "__main__":
    main()
