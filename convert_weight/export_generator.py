"""A plain generator folder from a training checkpoint: EMA or raw weights, LoRA merged into its base.

`python -m convert_weight.export_generator --checkpoint RUN/checkpoints/torch_units/step-N.pt --output-dir FOLDER`

`--pipeline FOLDER` writes what diffusers loads where this project is not installed; `--push-to-hub NAME` uploads it.
`--adapter FOLDER` writes the LoRA alone, for `peft.PeftModel.from_pretrained(SiT.from_pretrained(TEACHER), FOLDER)`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_cc.io import flags
from train_cc.io.class_names import EXPECTED as CLASS_NAMES
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.hub import check_hub_name, push_folder
from train_cc.io.read import require_file, sha256
from train_cc.io.saying import saying
from train_cc.io.weights import GENERATION_CONFIG, WEIGHTS_NAME
from train_cc.io.whole import check_whole_folder, is_there, was_interrupted
from train_cc.io.write import record

WRITTEN = ("config.json", WEIGHTS_NAME, GENERATION_CONFIG)
CARD = "README.md"
PIPELINE_WRITTEN = ("model_index.json", "pipeline.py", "generator", "vae", CARD)
ADAPTER_WRITTEN = ("adapter_config.json", "adapter_model.safetensors", "README.md")


def build_parser() -> flags.Parser:
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--checkpoint", type=flags.path, required=True, help="a checkpoints/torch_units/step-N.pt")
    parser.add_argument("--output-dir", type=flags.path, help="the generator folder to write")
    parser.add_argument("--pipeline", type=flags.path, help="also or only: a diffusers pipeline folder, VAE inside")
    parser.add_argument("--adapter", type=flags.path, help="also or only: the LoRA of --use-lora-gen as peft's folder")
    parser.add_argument("--vae", help="for --pipeline, if it is not the run's: hub name or folder; none: pixel space")
    parser.add_argument(
        "--class-names",
        default="auto",
        help=f"for --pipeline, so that it takes names: {CLASS_NAMES}. auto: of the teacher's data set, or ImageNet's",
    )
    parser.add_argument(
        "--results", type=flags.path, help="for --pipeline: a results.json, whose figures the card shows"
    )
    parser.add_argument(
        "--push-to-hub", metavar="NAME", help="upload --pipeline to the Hugging Face hub as NAME, such as you/dmdr-sit"
    )
    parser.add_argument(
        "--weights", choices=["auto", "ema", "raw"], default="auto", help="auto: EMA where there is one"
    )
    parser.add_argument("--teacher", type=flags.path, help="a LoRA generator's base, if it has moved since")
    parser.add_argument("--overwrite", action="store_true", help="replace what this command wrote earlier")
    return parser


def targets_of(args: argparse.Namespace) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Flag -> the folder to write, and what will be in it. Raises `InputError` where there is none."""
    targets = {"--output-dir": (args.output_dir, WRITTEN), "--pipeline": (args.pipeline, PIPELINE_WRITTEN)}
    targets["--adapter"] = (args.adapter, ADAPTER_WRITTEN)
    targets = {flag: target for flag, target in targets.items() if target[0] is not None}
    if not targets:
        raise InputError("nothing to write: give --output-dir, --pipeline or --adapter")
    for flag, given in (("--results", args.results), ("--push-to-hub", args.push_to_hub)):
        if given is not None and args.pipeline is None:
            raise InputError(f"{flag} is of a pipeline: give --pipeline FOLDER, too")
    return targets


def check_targets(args: argparse.Namespace, content: dict) -> bool:
    """-> whether what is there may be replaced. Raises `InputError` where it is not ours, or among what is read.

    ``content``: this command's record.
    """
    targets = targets_of(args)
    overwrite = args.overwrite or was_interrupted(content, *(folder for folder, _ in targets.values()))
    given = {"--checkpoint": args.checkpoint, "--teacher": args.teacher, "--vae": args.vae, "--results": args.results}
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
    targets = targets_of(args)
    if args.push_to_hub is not None:
        check_hub_name(args.push_to_hub, "--push-to-hub")
    # Networks take seconds to import: what is wrong with the command line has been said.
    with saying("loading libraries"):
        from convert_weight.exports import export
        from train_cc.run.checkpoint import EXPECTED

    # The SHA-256 of a torch_units file is that of the whole checkpoint: it holds those of the other files.
    inputs = {"checkpoint": sha256(require_file(args.checkpoint, EXPECTED))}
    if args.results is not None:
        inputs["results"] = sha256(require_file(args.results, "a results.json"))
    content = record("export_generator", vars(args), inputs=inputs)
    folders = [folder for folder, _ in targets.values()]
    if not args.overwrite and is_there(content, *folders):
        print(f"there already, by the same command: {' and '.join(map(str, folders))}; --overwrite makes it anew")
    else:
        overwrite = check_targets(args, content)
        with saying("writing and verifying"):
            step = export(args, targets, content, overwrite)
        for flag, folder in zip(targets, folders, strict=True):
            kind = "generator" if flag == "--output-dir" else flag.removeprefix("--")
            print(f"{kind} after {step} updates -> {folder}, outputs verified")
    if args.push_to_hub is not None:
        print(f"pipeline -> {push_folder(args.pipeline, args.push_to_hub)}")


if __name__ == "__main__":
    main()
