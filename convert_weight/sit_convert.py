"""A published SiT, DiT or LightningDiT to a model folder (config.json and one safetensors file) that training reads.

`python convert_weight/sit_convert.py` downloads REPA's SiT-XL/2 into sit_weights/ and converts it. With `--input FILE`:
REPA's release or a training checkpoint of it, legacy `decoder_blocks` names, the SiT authors' checkpoint (8 channels,
reversed time), LightningDiT's, DiT's (`--network DiT`), DeepSpeed's mp_rank_00_model_states.pt, .pt or .safetensors,
nested and prefixed. With `--input FOLDER`: a DiT in diffusers' format, such as facebook/DiT-XL-2-256, or one of ours.
Sizes are read off the tensors. A file does not say its direction of time or what it predicts: guesses are printed and
tested by denoising.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from convert_weight.foreign import EXPECTED, read_checkpoint, require_checkpoint_file
from train_cc.io import fields
from train_cc.io.errors import InputError, exits_on_input_error, saying
from train_cc.io.products import check_parent, check_product, need_space, product, record, write_atomically
from train_cc.io.read import kind_of, read_json, sha256
from train_cc.io.remote import download
from train_cc.io.weights import GENERATION_CONFIG, WEIGHTS_NAME, require_tensors

if TYPE_CHECKING:
    from train_cc.models.backbone import Network

REPA_URL = (
    "https://www.dl.dropboxusercontent.com/scl/fi/cxedbs4da5ugjq5wg3zrg/last.pt"
    "?rlkey=8otgrdkno0nd89po3dpwngwcc&st=apcc645o&dl=0"
)


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
    parser.add_argument(
        "--network", choices=["SiT", "DiT"], help="of the file; DiT: it predicts eps at DDPM's steps. Without it SiT"
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


def load_source(args: argparse.Namespace, source: Path) -> "tuple[Network, list[str]]":
    """Return the model, and lines about it. Raises `InputError`."""
    if source.is_dir():
        from train_cc.models.backbone import load_network

        require_checkpoint_file(source)
        folder = source / "transformer" if (source / "transformer").is_dir() else source
        if kind_of(read_json(folder / "config.json", EXPECTED), "SiT") == "DiTTransformer2DModel":
            return load_diffusers(folder)
        return load_network(source), [f"recognised: a model folder of ours, {source}"]
    if args.input is None:
        download(REPA_URL, source, "give a local file by --input")
    try:
        with saying(f"reading {source}"):
            from convert_weight.state_dicts import convert

            options = (args.num_heads, args.encoder_depth, args.time_direction, args.num_classes, args.network)
            return convert(read_checkpoint(source), *options)
    except InputError as error:
        again = "" if args.input else f"; delete {source}, and the same command downloads it again"
        where = "" if str(source) in str(error) else f"{source}: "
        raise InputError(f"{where}{error}{again}") from error


def diffusers_file(folder: Path) -> Path:
    """The weights file of a folder of diffusers, safetensors before .bin."""
    files = [folder / name for name in (WEIGHTS_NAME, WEIGHTS_NAME.replace("safetensors", "bin"))]
    return next((file for file in files if file.is_file()), files[0])


def load_diffusers(folder: Path) -> "tuple[Network, list[str]]":
    """The DiT of diffusers' folder, such as facebook/DiT-XL-2-256's transformer/. Raises `InputError`."""
    from convert_weight.state_dicts import convert, from_diffusers

    config = read_json(folder / "config.json", EXPECTED)
    sizes = {"sample_size": fields.integer(1, 4096), "num_attention_heads": fields.integer(1, 1024)}
    fields.check_numbers({name: config.get(name) for name in sizes}, sizes, folder / "config.json")
    file = diffusers_file(folder)
    state = from_diffusers(require_tensors(read_checkpoint(file), file, "a DiT's tensors"), config["sample_size"])
    return convert(state, config["num_attention_heads"], network="DiT", embedding_shift=1)


def content_of(args: argparse.Namespace, source: Path) -> dict:
    """The record of this command, with the SHA-256 of what it reads, as far as that is there."""
    inner = source / "transformer" if (source / "transformer").is_dir() else source
    of_folder = {"source": diffusers_file(inner), "generation": source / GENERATION_CONFIG}
    files = of_folder if source.is_dir() else {"source": source}
    inputs = {name: sha256(file) for name, file in files.items() if file.is_file()}
    return record("sit_convert", vars(args), inputs=inputs)


def is_there(args: argparse.Namespace, target: Path, content: dict) -> bool:
    """True if the same command made ``target``. Raises `InputError` if it cannot be written."""
    if args.input is not None and target.resolve() in args.input.resolve().parents:
        raise InputError(f"{target} holds --input {args.input}, and would be replaced; choose another --name")
    return check_product(target, content, args.overwrite, "--name")


def check(args: argparse.Namespace, model: "Network", notes: list[str]) -> None:
    """Denoise, if asked for or if the file does not say what it predicts. Raises `InputError`."""
    from convert_weight.denoising import require_denoising, require_noise_prediction
    from convert_weight.state_dicts import FOLDED, UNSAID

    guessed = UNSAID in notes or args.network == "DiT" or any("--time-direction" in line for line in notes)
    if args.check is None and not guessed:
        return
    if args.check is False:
        print("not checked: --no-check")
        return
    if type(model).__name__ == "DiT":
        require_noise_prediction(model)
        return
    direction = "data-at-1" if any(FOLDED in line for line in notes) else "data-at-0"
    with saying("sampling and denoising (about 25 passes of four images; --no-check omits them)"):
        require_denoising(model, direction, strict=args.check is True)


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    source, target = args.input or args.save_dir / "last.pt", args.name and args.save_dir / args.name
    check_parent(args.save_dir / "last.pt")
    content = content_of(args, source)
    if target is None or not is_there(args, target, content):
        from convert_weight.state_dicts import size_name

        model, notes = load_source(args, source)
        content = content if content["inputs"] else content_of(args, source)  # it was downloaded
        print("\n".join(notes))
        check(args, model, notes)
        target = target or args.save_dir / (size_name(model.config) or "SiT-custom").replace("/", "-")
        if not is_there(args, target, content):
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
