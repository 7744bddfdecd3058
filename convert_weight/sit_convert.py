"""A published SiT checkpoint to a model folder (config.json and one safetensors file) that training reads.

`python convert_weight/sit_convert.py` downloads REPA's SiT-XL/2 into sit_weights/ and converts it. With `--input FILE`:
REPA's release or a training checkpoint of it, legacy `decoder_blocks` names, the SiT authors' checkpoint (8 channels,
reversed time), or a folder of ours. Sizes are read off the tensors.
"""

import argparse
import json
import pickle
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from convert_weight import state_dicts
from train_cc.draws import Draws
from train_cc.flow import interpolate
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.read import sha256
from train_cc.io.write import write_atomically
from train_cc.models.sit import SIT_SIZES, SiT
from train_cc.objectives import velocity_matching_loss
from train_cc.samplers import euler_sample

REPA_URL = (
    "https://www.dl.dropboxusercontent.com/scl/fi/cxedbs4da5ugjq5wg3zrg/last.pt"
    "?rlkey=8otgrdkno0nd89po3dpwngwcc&st=apcc645o&dl=0"
)


def download(url: str, target: Path) -> Path:
    """``url`` to ``target``, continuing what a stopped download left in ``target``.part. A partial file never counts.

    Raises `InputError` without a connection, where the disk is too small, or where the server sent too little.
    """
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            if have and response.status != 206:  # the server starts from the beginning
                have = 0
            total = have + int(response.headers.get("Content-Length", 0))
            need_space(target.parent, total - have)
            progress = tqdm(desc=target.name, total=total or None, initial=have, unit="B", unit_scale=True)
            with part.open("ab" if have else "wb") as file, progress:
                while block := response.read(1 << 20):
                    file.write(block)
                    progress.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # "range not satisfiable": the part is whole already
            raise InputError(f"cannot download {url}: {error}; give a local file by --input") from error
        total = have
    except OSError as error:
        raise InputError(
            f"the download of {url} stopped ({error}); the same command continues it, --input takes a local file"
        ) from error
    if total and part.stat().st_size != total:
        raise InputError(f"{part} has {part.stat().st_size} of {total} bytes; the same command continues the download")
    part.rename(target)
    return target


def need_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{folder} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB are needed; nothing was written")


def read_checkpoint(path: Path) -> object:
    """A .pt file's content without running code from it; argparse.Namespace is the one class that is allowed."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; a SiT checkpoint or a model folder is expected")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is damaged or a pickle that holds code; it was not run") from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise InputError(f"{path} is truncated or no PyTorch file: {error}") from error


def convert(content: object, num_heads: int | None = None, encoder_depth: int = 8) -> tuple[SiT, list[str]]:
    """-> the model, and lines that say what was recognised and what was dropped. Raises `InputError`."""
    state, place = state_dicts.unnest(content)
    told = [f"weights: {place}"]
    state, dropped = state_dicts.drop_projectors(state)
    if dropped:
        told.append(f"dropped: {len(dropped)} tensors of REPA's projectors")
    if any(name.startswith("decoder_blocks.") for name in state):
        state = state_dicts.rename_decoder_blocks(state, encoder_depth)
        told.append(f"legacy names: decoder_blocks.N became blocks.N + {encoder_depth}")
    config = state_dicts.config_of(state, num_heads)
    variance = state_dicts.has_variance_channels(state, config)
    with torch.device("meta"):
        model = SiT(**config)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise InputError(f"this SiT has missing keys {missing[:8]} and unexpected keys {unexpected[:8]}")
    if variance:
        state = state_dicts.reverse_time(state_dicts.keep_velocity_channels(state, config))
        told.append("the SiT authors' layout: kept 4 of 8 output channels, folded v(x, t) = -v_theirs(x, 1 - t) in")
    reshaped = [f"{n} {tuple(state[n].shape)}, not {tuple(s)}" for n, s in expected.items() if state[n].shape != s]
    if reshaped:
        raise InputError(f"tensors of another shape: {'; '.join(reshaped[:8])}")
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    names = [name for name, size in SIT_SIZES.items() if size.items() <= config.items()]
    count = sum(value.numel() for value in model.state_dict().values())
    told.append(f"recognised: {names[0] if names else 'a SiT outside the size table'}, {config}, {count} elements")
    return model.eval(), told


HYPOTHESES = {
    "as converted": (1, False),
    "wrong sign": (-1, False),
    "wrong time direction": (1, True),
    "wrong sign and time direction": (-1, True),
}


@torch.no_grad()
def check_denoising(model: SiT, count: int = 4, num_steps: int = 6) -> dict[str, float]:
    """How well the model, read in each of four ways, denoises what it samples itself when read so. No data is needed.

    -> for each way mean (v - (noise - x0))^2 / mean (noise - x0)^2 over three times. A flow model read rightly stays
    well below 1; read with a wrong sign or time direction it does not denoise its own samples.
    """
    draws = Draws(0)
    noise = draws.noise(count, *model.sample_shape)
    y = draws.integers(model.null_class, count)
    errors = {}
    for name, (sign, reverse) in HYPOTHESES.items():

        def velocity(x, t, y, sign=sign, reverse=reverse):
            return sign * model(x, 1 - t if reverse else t, y)

        x0 = euler_sample(velocity, noise, y, num_steps).clamp(-10, 10)
        error = 0.0
        for time in (0.3, 0.5, 0.7):
            fresh, t = draws.noise_like(x0), torch.full((count,), time)
            v = velocity(interpolate(x0, fresh, t), t, y)
            error += (velocity_matching_loss(v, x0, fresh) / (fresh - x0).square().mean()).item() / 3
        errors[name] = error
    return errors


def require_denoising(model: SiT) -> None:
    errors = check_denoising(model)
    for name, error in errors.items():
        print(f"check: read {name}, relative denoising error {error:.3f}")
    if min(errors, key=errors.get) != "as converted" or errors["as converted"] > 0.95:
        raise InputError("the converted model denoises better when read otherwise: its sign or time direction is wrong")


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, help="a local checkpoint; without it REPA's SiT-XL/2 is downloaded")
    parser.add_argument("--save-dir", type=Path, default=Path(__file__).resolve().parents[1] / "sit_weights")
    parser.add_argument("--name", help="of the model folder in --save-dir; without it the size's, such as SiT-XL-2")
    parser.add_argument("--num-heads", type=int, help="for a size outside the table")
    parser.add_argument("--encoder-depth", type=int, default=8, help="for legacy decoder_blocks names")
    parser.add_argument("--check", action="store_true", help="test sign and time direction by denoising")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model folder")
    args = parser.parse_args(argv)
    source = args.input
    if source is None:
        args.save_dir.mkdir(parents=True, exist_ok=True)
        source = args.save_dir / "last.pt"
        if not source.exists():
            download(REPA_URL, source)
    if source.is_dir():
        model, told = SiT.from_pretrained(source), [f"recognised: a model folder of ours, {source}"]
    else:
        model, told = convert(read_checkpoint(source), args.num_heads, args.encoder_depth)
    print("\n".join(told))
    if args.check:
        require_denoising(model)

    size = {name: model.config[name] for name in ("depth", "hidden_size", "num_heads", "patch_size")}
    known = [name.replace("/", "-") for name, entry in SIT_SIZES.items() if entry == size]
    target = args.save_dir / (args.name or (known[0] if known else "SiT-custom"))
    if target.exists() and not args.overwrite:
        raise InputError(f"{target} exists; choose another --name, or replace it with --overwrite")
    args.save_dir.mkdir(parents=True, exist_ok=True)
    need_space(args.save_dir, sum(value.numel() * 4 for value in model.state_dict().values()))
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    origin = {"source": str(args.input or REPA_URL), "notes": told}
    if source.is_file():
        origin |= {"bytes": source.stat().st_size, "sha256": sha256(source)}
    write_atomically(temporary / "source.json", json.dumps(origin, indent=2) + "\n")
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    print(f"model folder: {target}")


if __name__ == "__main__":
    main()
