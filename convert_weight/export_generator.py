"""A plain generator folder from a training checkpoint: EMA or raw weights, LoRA merged into its base.

`python -m convert_weight.export_generator --checkpoint RUN/checkpoints/torch_units/step-N.pt --output-dir FOLDER`

`--pipeline FOLDER` writes what diffusers loads where this project is not installed; `--push-to-hub NAME` uploads it.
`--adapter FOLDER` writes the LoRA only, for `peft.PeftModel.from_pretrained(SiT.from_pretrained(TEACHER), FOLDER)`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_cc.io import fields
from train_cc.io.class_names import NAMES_FILE as CLASS_NAMES
from train_cc.io.errors import InputError, exits_on_input_error, saying
from train_cc.io.products import check_product, place_of, product, record
from train_cc.io.read import require_file, sha256
from train_cc.io.remote import check_hub_name, push_folder


def build_parser() -> fields.Parser:
    parser = fields.Parser(description=__doc__)
    parser.add_argument("--checkpoint", type=fields.path, required=True, help="a checkpoints/torch_units/step-N.pt")
    parser.add_argument("--output-dir", type=fields.path, help="the generator folder to write")
    parser.add_argument("--pipeline", type=fields.path, help="also or only: a diffusers pipeline folder, VAE inside")
    parser.add_argument("--adapter", type=fields.path, help="also or only: the LoRA of --use-lora-gen as peft's folder")
    parser.add_argument("--vae", help="for --pipeline, if it is not the run's: hub name or folder; none: pixel space")
    parser.add_argument(
        "--class-names",
        default="auto",
        help=f"for --pipeline, so that it takes names: {CLASS_NAMES}. auto: of the teacher's data set, or ImageNet's",
    )
    parser.add_argument(
        "--results", type=fields.path, help="for --pipeline: a results.json, whose figures the card shows"
    )
    parser.add_argument("--half", action="store_true", help="--pipeline's weights in fp16: half the size")
    parser.add_argument(
        "--push-to-hub", metavar="NAME", help="upload --pipeline to the Hugging Face hub as NAME, such as you/dmdr-sit"
    )
    parser.add_argument(
        "--weights", choices=["auto", "ema", "raw"], default="auto", help="auto: EMA where there is one"
    )
    parser.add_argument("--teacher", type=fields.path, help="a LoRA generator's base, if it has moved since")
    parser.add_argument(
        "--trust-teacher-code", action="store_true", help="permission to run the network.py of the teacher's folder"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what this command wrote earlier")
    return parser


def targets_of(args: argparse.Namespace) -> dict[str, Path]:
    """Flag -> the folder to write. Raises `InputError` without one, or if one holds another path of the command."""
    targets = {"--output-dir": args.output_dir, "--pipeline": args.pipeline, "--adapter": args.adapter}
    targets = {flag: folder for flag, folder in targets.items() if folder is not None}
    if not targets:
        raise InputError("nothing to write: give --output-dir, --pipeline or --adapter")
    for flag, value in (("--results", args.results), ("--push-to-hub", args.push_to_hub)):
        if value is not None and args.pipeline is None:
            raise InputError(f"{flag} is of a pipeline: give --pipeline FOLDER, too")
    inputs = {"--checkpoint": args.checkpoint, "--teacher": args.teacher, "--vae": args.vae, "--results": args.results}
    for flag, folder in targets.items():
        place_of(folder)
        for name, value in (inputs | targets).items():
            if name != flag and value is not None and Path(value).resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{flag} {folder} holds {name} {value}; choose another {flag}")
    return targets


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    targets = targets_of(args)
    if args.push_to_hub is not None:
        check_hub_name(args.push_to_hub, "--push-to-hub")
    # Networks take seconds to import: what is wrong with the command line has been said.
    with saying("loading libraries"):
        from convert_weight.exports import export
        from train_cc.run.checkpoint import UNITS_FILE

    # The SHA-256 of a torch_units file is that of the whole checkpoint: it holds those of the other files.
    inputs = {"checkpoint": sha256(require_file(args.checkpoint, UNITS_FILE))}
    if args.results is not None:
        inputs["results"] = sha256(require_file(args.results, "a results.json"))
    content = record("export_generator", vars(args), inputs=inputs)
    if all([check_product(folder, content, args.overwrite, flag) for flag, folder in targets.items()]):
        for flag, folder in targets.items():
            with product(folder, content, flag=flag):  # says so, and clears what a kill has left beside it
                pass
    else:
        with saying("writing and verifying"):
            step = export(args, targets, content)
        for flag, folder in targets.items():
            kind = "generator" if flag == "--output-dir" else flag.removeprefix("--")
            print(f"{kind} after {step} updates -> {folder}, outputs verified")
    if args.push_to_hub is not None:
        print(f"pipeline -> {push_folder(args.pipeline, args.push_to_hub)}")


if __name__ == "__main__":
    main()
