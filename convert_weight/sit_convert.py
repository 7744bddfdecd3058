"""A published SiT checkpoint to a model folder (config.json and one safetensors file) that training reads.

`python convert_weight/sit_convert.py` downloads REPA's SiT-XL/2 into sit_weights/ and converts it. With `--input FILE`:
REPA's release or a training checkpoint of it, legacy `decoder_blocks` names, the SiT authors' checkpoint (8 channels,
reversed time), DeepSpeed's mp_rank_00_model_states.pt, .pt or .safetensors, nested and prefixed; or a folder of ours.
Sizes are read off the tensors. A file does not say its direction of time or what it predicts: guesses are printed and
tested by denoising.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from convert_weight.foreign import read_checkpoint
from train_cc.io import fields
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.products import check_parent, check_product, need_space, product, record, write_atomically
from train_cc.io.read import sha256
from train_cc.io.remote import download
from train_cc.io.saying import saying
from train_cc.io.weights import GENERATION_CONFIG, WEIGHTS_NAME, fit, load_weights

if TYPE_CHECKING:
    from train_cc.models.sit import SiT

REPA_URL = (
    "https://www.dl.dropboxusercontent.com/scl/fi/cxedbs4da5ugjq5wg3zrg/last.pt"
    "?rlkey=8otgrdkno0nd89po3dpwngwcc&st=apcc645o&dl=0"
)
UNSAID = "guessed: it predicts a velocity, as SiT's files do; a DiT's eps has the same names"
FOLDED = "folded v(x, t) = -v_theirs(x, 1 - t) in"


def convert(
    content: object,
    num_heads: int | None = None,
    encoder_depth: int = 8,
    time_direction: str | None = None,
    num_classes: int | None = None,
) -> "tuple[SiT, list[str]]":
    """Return the model, and lines about what was recognised, guessed and dropped. Raises `InputError`."""
    import torch

    from convert_weight import state_dicts
    from convert_weight.foreign import network_kind
    from train_cc.models.sit import SIT_SIZES, SiT

    state, place = state_dicts.unnest(content)
    notes = [f"weights: {place}"]
    if kind := network_kind(state):
        raise InputError(f"this is {kind}; a SiT is expected")
    projectors = [name for name in state if re.match(r"projectors?\.", name)]  # they serve REPA's training only
    state = {name: value for name, value in state.items() if name not in projectors}
    if projectors:
        notes.append(f"dropped: {len(projectors)} tensors of REPA's projectors")
    if any(name.startswith("decoder_blocks.") for name in state):
        state = state_dicts.rename_decoder_blocks(state, encoder_depth)
        notes.append(f"legacy names: decoder_blocks.N became blocks.N + {encoder_depth}")
    config = state_dicts.config_of(state, num_heads)
    config["num_classes"], null_row = state_dicts.classes_of(config["num_classes"] + 1, num_classes)
    variance = state_dicts.has_variance_channels(state, config)
    direction, time = state_dicts.time_direction(state, config, bool(projectors), time_direction)
    notes += [guess for guess in (null_row, time, None if projectors else UNSAID) if guess]
    with torch.device("meta"):
        model = SiT(**config)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if variance:
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            own[name] = (2 * own[name][0], *own[name][1:])
    fit(own, state, "this SiT")
    if variance:
        state = state_dicts.keep_velocity_channels(state, config)
        notes.append(f"kept {config['in_channels']} of {2 * config['in_channels']} output channels")
    if direction == "data-at-1":
        state = state_dicts.reverse_time(state)
        notes.append(f"data at time 1, as in the SiT authors' files: {FOLDED}")
    load_weights(model, state, "this SiT")
    names = [name for name, size in SIT_SIZES.items() if size.items() <= config.items()]
    count = sum(value.numel() for value in model.state_dict().values())
    notes.append(f"recognised: {names[0] if names else 'a SiT outside the size table'}, {config}, {count} elements")
    return model.eval(), notes


def plain_name(text: str) -> str:
    """The name of one folder."""
    if text in ("", ".", "..") or text != Path(text).name or not text.isprintable():
        fields.refuse(repr(text), "one plain folder name")
    return text


def build_parser() -> fields.Parser:
    parser = fields.Parser(description=__doc__)
    parser.add_argument(
        "--input", type=fields.path, help="a local checkpoint; without it REPA's SiT-XL/2 is downloaded"
    )
    parser.add_argument(
        "--save-dir",
        type=fields.path,
        default=Path(__file__).resolve().parents[1] / "sit_weights",
        help="folder in which the model folder is made",
    )
    parser.add_argument(
        "--name", type=plain_name, help="of the model folder in --save-dir; without it the size's, such as SiT-XL-2"
    )
    parser.add_argument("--num-heads", type=fields.integer(1, 1024), help="for a size outside the table")
    parser.add_argument(
        "--encoder-depth", type=fields.integer(0, 1000), default=8, help="for legacy decoder_blocks names"
    )
    parser.add_argument(
        "--time-direction",
        choices=["data-at-0", "data-at-1"],
        help="the time of data in the file: 0 in REPA's, 1 in the SiT authors'; without it guessed from the channels",
    )
    parser.add_argument(
        "--num-classes",
        type=fields.integer(1, 10**6),
        help="classes of the label table, whose last row is the null class; without it all rows but one",
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        help="test by denoising what the network predicts, and its direction of time; without it if that was guessed",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model folder of this command")
    return parser


def load_source(args: argparse.Namespace) -> "tuple[SiT, list[str], Path]":
    """Return the model, lines about it, and the file or folder that was read. Raises `InputError`."""
    if args.input is not None and args.input.is_dir():
        from convert_weight.foreign import require_checkpoint_file
        from train_cc.models.sit import SiT

        require_checkpoint_file(args.input)
        return SiT.from_pretrained(args.input), [f"recognised: a model folder of ours, {args.input}"], args.input
    source = args.input or args.save_dir / "last.pt"
    if args.input is None:
        download(REPA_URL, source, "give a local file by --input")
    try:
        with saying(f"reading {source}"):
            options = (args.num_heads, args.encoder_depth, args.time_direction, args.num_classes)
            return *convert(read_checkpoint(source), *options), source
    except InputError as error:
        again = "" if args.input else f"; delete {source}, and the same command downloads it again"
        where = "" if str(source) in str(error) else f"{source}: "
        raise InputError(f"{where}{error}{again}") from error


def target_of(args: argparse.Namespace, config: dict | None = None) -> Path:
    """The model folder to write, named after the size unless a name was given."""
    from train_cc.models.sit import SIT_SIZES

    known = [name for name, size in SIT_SIZES.items() if config and size.items() <= config.items()]
    return args.save_dir / (args.name or (known[0].replace("/", "-") if known else "SiT-custom"))


def content_of(args: argparse.Namespace) -> dict:
    """The record of this command, with the SHA-256 of what it reads, as far as that is there."""
    source = args.input or args.save_dir / "last.pt"
    of_folder = {"source": source / WEIGHTS_NAME, "generation": source / GENERATION_CONFIG}
    files = of_folder if source.is_dir() else {"source": source}
    inputs = {name: sha256(file) for name, file in files.items() if file.is_file()}
    return record("sit_convert", vars(args), inputs=inputs)


def is_there(args: argparse.Namespace, target: Path, content: dict) -> bool:
    """True if the same command made ``target``. Raises `InputError` if it cannot be written."""
    if args.input is not None and target.resolve() in args.input.resolve().parents:
        raise InputError(f"{target} holds --input {args.input}, and would be replaced; choose another --name")
    return check_product(target, content, args.overwrite, "--name")


def check(args: argparse.Namespace, model: "SiT", notes: list[str]) -> None:
    """Denoise, if asked for or if the file does not say what it predicts. Raises `InputError`."""
    if args.check is None and UNSAID not in notes and not any("--time-direction" in line for line in notes):
        return
    if args.check is False:
        print("not checked: --no-check")
        return
    from convert_weight.denoising import require_denoising

    direction = "data-at-1" if any(FOLDED in line for line in notes) else "data-at-0"
    with saying("sampling and denoising (about 25 passes of four images; --no-check omits them)"):
        require_denoising(model, direction, strict=args.check is True)


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    content, model = content_of(args), None
    check_parent(args.save_dir / "last.pt")
    if args.name is None or not is_there(args, target_of(args), content):
        model, notes, source = load_source(args)
        content = content if content["inputs"] else content_of(args)  # it was downloaded
        print("\n".join(notes))
        check(args, model, notes)
    target = target_of(args, model and model.config)
    if not is_there(args, target, content):
        args.save_dir.mkdir(parents=True, exist_ok=True)
        need_space(args.save_dir, sum(value.nbytes for value in model.state_dict().values()))
    with saying(f"writing {target}"), product(target, content, args.overwrite, "--name") as place:
        if place is None:
            return
        model.save_pretrained(place.new)
        origin = {"source": str(args.input or REPA_URL), "notes": notes}
        if source.is_file():
            origin |= {"bytes": source.stat().st_size, "sha256": content["inputs"]["source"]}
        elif (source / GENERATION_CONFIG).is_file():  # a generator's steps, rewards and latent space
            shutil.copyfile(source / GENERATION_CONFIG, place.new / GENERATION_CONFIG)
        write_atomically(place.new / "source.json", json.dumps(origin, indent=2) + "\n")
    print(f"model folder: {target}")


if __name__ == "__main__":
    main()
