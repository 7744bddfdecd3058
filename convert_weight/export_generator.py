"""A plain generator folder from a training checkpoint: EMA or raw weights, LoRA merged into its base.

`python convert_weight/export_generator.py --checkpoint RUN/checkpoints/torch_units/step-N.pt --output-dir FOLDER`

`--adapter FOLDER` writes the LoRA alone, for `peft.PeftModel.from_pretrained(SiT.from_pretrained(TEACHER), FOLDER)`.
"""

import argparse
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peft import PeftModel
from torch import nn

from train_cc.distillation.state import generator_from, generator_state, kind_of, recorded_arguments, sampling_of
from train_cc.draws import Draws
from train_cc.io import flags
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.write import check_whole_folder, need_space, record, was_interrupted, whole_folder
from train_cc.models.generator import (
    GENERATION_CONFIG,
    GENERATOR_TARGETS,
    generator_lora_rank,
    save_generator,
)
from train_cc.models.lora import ADAPTER_FILES, save_adapter
from train_cc.models.sit import WEIGHTS_NAME, SiT, check_sit_config
from train_cc.models.vae import load_vae, require_decoder
from train_cc.run.checkpoint import Checkpoint, open_checkpoint

WRITTEN = ("config.json", WEIGHTS_NAME, GENERATION_CONFIG)
PIPELINE_WRITTEN = ("model_index.json", "generator", "vae")


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


def build_parser() -> flags.Parser:
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--checkpoint", type=flags.path, required=True, help="a checkpoints/torch_units/step-N.pt")
    parser.add_argument("--output-dir", type=flags.path, help="the generator folder to write")
    parser.add_argument("--pipeline", type=flags.path, help="also or only: a diffusers pipeline folder, VAE inside")
    parser.add_argument("--adapter", type=flags.path, help="also or only: the LoRA of --use-lora-gen as peft's folder")
    parser.add_argument("--vae", help="for --pipeline, if it is not the run's: hub name or folder; none: pixel space")
    parser.add_argument(
        "--weights", choices=["auto", "ema", "raw"], default="auto", help="auto: EMA where there is one"
    )
    parser.add_argument("--teacher", type=flags.path, help="a LoRA generator's base, if it has moved since")
    parser.add_argument("--overwrite", action="store_true", help="replace what this command wrote earlier")
    return parser


def targets_of(args: argparse.Namespace) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Flag -> the folder to write, and what will be in it."""
    targets = {"--output-dir": (args.output_dir, WRITTEN), "--pipeline": (args.pipeline, PIPELINE_WRITTEN)}
    targets["--adapter"] = (args.adapter, (*ADAPTER_FILES, "README.md"))
    return {flag: target for flag, target in targets.items() if target[0] is not None}


def check_targets(args: argparse.Namespace) -> bool:
    """-> whether what is there may be replaced. Raises `InputError` where it is not ours, or among what is read."""
    targets = targets_of(args)
    if not targets:
        raise InputError("nothing to write: give --output-dir, --pipeline or --adapter")
    content = record("export_generator", vars(args))
    overwrite = args.overwrite or was_interrupted(content, *(folder for folder, _ in targets.values()))
    given = {"--checkpoint": args.checkpoint, "--teacher": args.teacher, "--vae": args.vae}
    for flag, (folder, names) in targets.items():
        others = given | {other: path for other, (path, _) in targets.items() if other != flag}
        for name, value in others.items():
            if value is not None and folder.resolve() in (Path(value).resolve(), *Path(value).resolve().parents):
                raise InputError(f"{flag} {folder} holds {name} {value}; choose another {flag}")
        check_whole_folder(folder, names, overwrite, flag)
    return overwrite


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
        from convert_weight.pipeline import DMDRPipeline

        DMDRPipeline(generator, vae, **sampling).save_pretrained(folders["--pipeline"])
        require_same_outputs(generator, DMDRPipeline.from_pretrained(folders["--pipeline"]).generator)


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    overwrite = check_targets(args)
    checkpoint = open_checkpoint(args.checkpoint)
    recorded, vae = recorded_arguments(checkpoint), None
    if args.adapter is not None and not recorded["use_lora_gen"]:
        raise InputError(f"--adapter: {args.checkpoint} has no LoRA of the generator; it was trained whole")
    provenance = {
        "run": recorded.get("output_dir"),
        "step": checkpoint.step,
        "weights": kind_of(checkpoint, args.weights),
        "teacher_sha256": checkpoint.units["teacher_sha256"],
    }
    if args.pipeline is not None:
        name = args.vae or recorded["vae"]
        config = check_sit_config(checkpoint.units["model_config"], args.checkpoint)
        require_decoder(config["in_channels"], name, args.checkpoint)
        vae = None if name == "none" else load_vae(name)
    generator = generator_from(checkpoint, args.weights, args.teacher)

    size = sum(value.nbytes for value in generator.state_dict().values())
    content, targets = record("export_generator", vars(args)), targets_of(args)
    with contextlib.ExitStack() as whole:  # all are renamed when all are written and verified
        folders = {}
        for flag, (folder, names) in targets.items():
            need_space(folder.parent, size)
            folders[flag] = whole.enter_context(whole_folder(folder, content, names, overwrite))
        save_all(generator, vae, sampling_of(recorded), provenance, folders)
        if "--adapter" in folders:
            save_lora(generator, checkpoint, args.weights, args.teacher or recorded["teacher"], folders["--adapter"])
    for flag, (folder, _) in targets.items():
        kind = "generator" if flag == "--output-dir" else flag.removeprefix("--")
        print(f"{kind} after {checkpoint.step} updates -> {folder}, outputs verified")


if __name__ == "__main__":
    main()
