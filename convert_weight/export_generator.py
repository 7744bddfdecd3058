"""A plain generator folder from a training checkpoint: EMA or raw weights, LoRA merged into its base.

`python convert_weight/export_generator.py --checkpoint RUN/checkpoints/torch_units/step-N.pt --output-dir FOLDER`

`--adapter FOLDER` writes the LoRA alone, for `peft.PeftModel.from_pretrained(SiT.from_pretrained(TEACHER), FOLDER)`.
"""

import argparse
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_cc.io import flags
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.read import require_file, sha256
from train_cc.io.weights import WEIGHTS_NAME
from train_cc.io.whole import check_whole_folder, is_there, was_interrupted, whole_folder
from train_cc.io.write import need_space, record

WRITTEN = ("config.json", WEIGHTS_NAME, "generation_config.json")
PIPELINE_WRITTEN = ("model_index.json", "generator", "vae")
ADAPTER_WRITTEN = ("adapter_config.json", "adapter_model.safetensors", "README.md")


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
    targets["--adapter"] = (args.adapter, ADAPTER_WRITTEN)
    return {flag: target for flag, target in targets.items() if target[0] is not None}


def check_targets(args: argparse.Namespace, content: dict) -> bool:
    """-> whether what is there may be replaced. Raises `InputError` where it is not ours, or among what is read.

    ``content``: this command's record.
    """
    targets = targets_of(args)
    overwrite = args.overwrite or was_interrupted(content, *(folder for folder, _ in targets.values()))
    given = {"--checkpoint": args.checkpoint, "--teacher": args.teacher, "--vae": args.vae}
    for flag, (folder, names) in targets.items():
        others = given | {other: path for other, (path, _) in targets.items() if other != flag}
        for name, value in others.items():
            if value is not None and folder.resolve() in (Path(value).resolve(), *Path(value).resolve().parents):
                raise InputError(f"{flag} {folder} holds {name} {value}; choose another {flag}")
        check_whole_folder(folder, names, overwrite, flag)
    return overwrite


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    folders = [folder for folder, _ in targets_of(args).values()]
    if not folders:
        raise InputError("nothing to write: give --output-dir, --pipeline or --adapter")
    # Networks take seconds to import: what is wrong with the command line has been said.
    from convert_weight.exports import save_all, save_lora
    from train_cc.distillation.state import generator_from, kind_of, recorded_arguments, sampling_of
    from train_cc.models.sit import check_sit_config
    from train_cc.models.vae import load_vae, require_decoder
    from train_cc.run.checkpoint import EXPECTED, open_checkpoint

    # The SHA-256 of a torch_units file is that of the whole checkpoint: it holds those of the other files.
    inputs = {"checkpoint": sha256(require_file(args.checkpoint, EXPECTED))}
    content = record("export_generator", vars(args), inputs=inputs)
    if not args.overwrite and is_there(content, *folders):
        print(f"there already, by the same command: {' and '.join(map(str, folders))}; --overwrite makes it anew")
        return
    overwrite = check_targets(args, content)
    checkpoint = open_checkpoint(args.checkpoint)
    recorded, vae = recorded_arguments(checkpoint), None
    if args.adapter is not None and not recorded["use_lora_gen"]:
        raise InputError(f"--adapter: {args.checkpoint} has no LoRA of the generator; it was trained whole")
    provenance = {
        "run": recorded.get("output_dir"),
        "step": checkpoint.step,
        "weights": kind_of(checkpoint, args.weights),
        "teacher_sha256": checkpoint.units["teacher_sha256"],
        "rewards_sha256": checkpoint.units.get("rewards_sha256", []),
        "latent_space_sha256": checkpoint.units.get("latent_space_sha256"),
    }
    if args.pipeline is not None:
        name = args.vae or recorded["vae"]
        config = check_sit_config(checkpoint.units["model_config"], args.checkpoint)
        require_decoder(config["in_channels"], name, args.checkpoint)
        vae = None if name == "none" else load_vae(name)
    generator = generator_from(checkpoint, args.weights, args.teacher)

    size = sum(value.nbytes for value in generator.state_dict().values())
    targets = targets_of(args)
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
