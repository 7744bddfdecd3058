"""What a torch_units file may hold: every field by type and range, checked once, right after it was read."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from train_cc.io.errors import InputError
from train_cc.io.read import Number, shown
from train_cc.run.folder import OF_A_STEP

FORMAT_VERSION = 3  # 1: sizes of the files without their SHA-256; 2: without the networks that rewarded
# Files that every checkpoint has, and the form of what may come beside them: no name leads out of the folder.
NEEDED_FILES = {
    "accelerator_1/generator.safetensors",
    "accelerator_1/optimizer.pt",
    "accelerator_2/estimator_lora.safetensors",
    "accelerator_2/optimizer.pt",
}
FILE_NAME = re.compile(f"accelerator_[12]/({'|'.join(OF_A_STEP)})")
HASH = re.compile(r"[0-9a-f]{64}")
STEP, COUNT = Number(int, 1, 2**31 - 1), Number(int, 0, 2**62)
MODEL_CONFIG = {
    "input_size": Number(int, 1, 4096),
    "in_channels": Number(int, 1, 4096),
    "patch_size": Number(int, 1, 4096),
    "hidden_size": Number(int, 1, 65536),
    "depth": Number(int, 1, 4096),
    "num_heads": Number(int, 1, 4096),
    "num_classes": Number(int, 1, 2**31 - 1),
    "mlp_ratio": Number(float, 1e-3, 1e3),
}
# Arguments of the run that others read: the export, the pipeline, the next stage.
ARGUMENTS = {
    "lora_rank": Number(int, 1, 4096),
    "num_steps": Number(int, 1, 1000),
    "timestep_shift": Number(float, 1e-3, 1e3),
}
SCALER = {
    "scale": Number(float, 1e-30, 1e38),
    "growth_factor": Number(float, 1, 1e6),
    "backoff_factor": Number(float, 1e-6, 1),
    "growth_interval": Number(int, 1, 2**31 - 1),
    "_growth_tracker": COUNT,
}
REWARD_SCALE = {"backoff": Number(float, 1e-30, 1), "good_turns": COUNT}


class NewerFormat(InputError):
    """Written by newer code than this: not damaged, and nothing to go around."""


def numbers(value: object, allowed: Mapping[str, Number]) -> str | None:
    """What is wrong with ``value`` as a dict of exactly the ``allowed`` numbers; None: nothing."""
    if not isinstance(value, dict) or set(value) != set(allowed):
        return f"a dict of {', '.join(allowed)}"
    for name, number in allowed.items():
        if told := number.problem(value[name]):
            return f"{name} {told}, not {shown(value[name])}"
    return None


def files(value: object, hashed: bool) -> str | None:
    words = "a dict of file names, each with its size" + (" and SHA-256" if hashed else "")
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return words
    if missing := sorted(NEEDED_FILES - value.keys()):
        return f"{words}; {', '.join(missing)} missing"
    for name, entry in value.items():
        if not FILE_NAME.fullmatch(name):
            return f"{words}, none of which is {shown(name)}"
        if hashed:
            good = isinstance(entry, dict) and entry.keys() == {"size", "sha256"}
            if not good or COUNT.problem(entry["size"]) or not is_hash(entry["sha256"]):
                return f"{words}, which {name} has not"
        elif COUNT.problem(entry):
            return f"{words}, which {name} has not"
    return None


def is_hash(value: object) -> bool:
    return isinstance(value, str) and HASH.fullmatch(value) is not None


def hashes(value: object) -> str | None:
    good = isinstance(value, list) and all(map(is_hash, value))
    return None if good else "a list of SHA-256"


def latent_space(value: object) -> str | None:
    return None if value is None or is_hash(value) else "the SHA-256 of a latent space, or None"


def plain(value: object, depth: int = 3) -> bool:
    """Whether ``value`` is what JSON can hold, not nested deeply."""
    if isinstance(value, list):
        return depth > 0 and all(plain(each, depth - 1) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def arguments(value: object) -> str | None:
    words = "a dict of the run's arguments"
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return words
    for name, number in ARGUMENTS.items():
        if name not in value or number.problem(value[name]):
            return f"{words}; {name} is {shown(value.get(name))}, allowed: {number.problem(value.get(name))}"
    for name, kind in (("use_lora_gen", bool), ("teacher", str), ("vae", str)):
        if not isinstance(value.get(name), kind):
            return f"{words}; {name} is {shown(value.get(name))}, allowed: a {kind.__name__}"
    if value.get("optimizer", "adamw") not in ("adamw", "adamw8bit"):
        return f"{words}; optimizer is {shown(value['optimizer'])}, allowed: adamw, adamw8bit"
    bad = [name for name, each in value.items() if not plain(each)]
    return f"{words}, of plain values; {shown(bad[0])} is none" if bad else None


def scalers(value: object) -> str | None:
    words = "a list of two, each None or the state of a gradient scaler"
    if not isinstance(value, list) or len(value) != 2:
        return words
    told = [numbers(each, SCALER) for each in value if each is not None and each != {}]
    return next((f"{words}: {each}" for each in told if each), None)


def overflows(value: object) -> str | None:
    good = isinstance(value, dict) and all(isinstance(name, str) for name in value)
    return None if good and not any(map(COUNT.problem, value.values())) else "a dict of names, each with a count"


def reward_scales(value: object) -> str | None:
    words = f"a dict of rewards, each with {', '.join(REWARD_SCALE)}"
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return words
    return next((f"{words}: {told}" for each in value.values() if (told := numbers(each, REWARD_SCALE))), None)


# field -> its check, which tells what is allowed where the value is not.
FIELDS: dict[str, Callable[[object], str | None]] = {
    "step": STEP.problem,
    "samples_seen": COUNT.problem,
    "model_config": lambda value: numbers(value, MODEL_CONFIG),
    "teacher_sha256": lambda value: None if is_hash(value) else "64 hexadecimal digits",
    "arguments": arguments,
    "scalers": scalers,
}
OPTIONAL = {
    "effective_batch": Number(int, 1, 2**62).problem,
    "ema_updates": COUNT.problem,
    "rewards_sha256": hashes,
    "latent_space_sha256": latent_space,
    "overflows": overflows,
    "reward_scales": reward_scales,
}


def check_units(content: object, path: Path) -> dict:
    """``content`` of a torch_units file, with every file as {"size", "sha256"} (None: not known, format 1).

    Raises `InputError` that names the field, what it holds and what is allowed.
    """
    told = f"the checkpoint {path} is not a checkpoint of this project, or is damaged"
    if not isinstance(content, dict) or "format_version" not in content:
        raise InputError(f"{told}: it has no format version; a checkpoints/torch_units/step-N.pt is expected")
    version = content["format_version"]
    if Number(int, 1, 2**31 - 1).problem(version):
        raise InputError(f"{told}: its format version is {shown(version)}")
    if version > FORMAT_VERSION:
        raise NewerFormat(
            f"{path} has format version {version}, this code reads up to {FORMAT_VERSION}; update the code"
        )
    known = FIELDS | {"files": lambda value: files(value, hashed=version > 1)}
    if missing := sorted(known.keys() - content.keys()):
        raise InputError(f"{told}: it lacks {missing}")
    known |= OPTIONAL | {"format_version": lambda value: None}
    for name, value in content.items():
        if name not in known:
            raise InputError(f"{told}: it holds {shown(name)}, which no checkpoint does")
        if allowed := known[name](value):
            raise InputError(f"{told}: {name} is {shown(value)}; allowed: {allowed}")
    if version == 1:
        sizes = {name: {"size": size, "sha256": None} for name, size in content["files"].items()}
        return content | {"files": sizes}
    return content
