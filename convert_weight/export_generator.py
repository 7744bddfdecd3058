"""A plain generator folder from a training checkpoint: EMA or raw weights, LoRA merged into its base.

`python convert_weight/export_generator.py --checkpoint RUN/checkpoints/torch_units/step-N.pt --output-dir FOLDER`
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_cc.errors import InputError, exits_on_input_error
from train_cc.models.generator import assemble_generator
from train_cc.models.sit import SiT
from train_cc.run.checkpoint import Checkpoint, open_checkpoint
from train_cc.run.logbook import check_output_dir


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
    lora_rank = 2 * recorded["lora_rank"] if recorded["use_lora_gen"] else None
    return assemble_generator(checkpoint.units["model_config"], state, teacher or recorded["teacher"], lora_rank)


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoints/torch_units/step-N.pt")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument(
        "--weights", choices=["auto", "ema", "raw"], default="auto", help="auto: EMA where there is one"
    )
    parser.add_argument("--teacher", type=Path, help="a LoRA generator's base, if it has moved since")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(argv)
    check_output_dir(args.output_dir, args.overwrite)
    checkpoint = open_checkpoint(args.checkpoint)
    generator_of(checkpoint, args.weights, args.teacher).save_pretrained(args.output_dir)
    print(f"generator after {checkpoint.step} updates -> {args.output_dir}")


if __name__ == "__main__":
    main()
