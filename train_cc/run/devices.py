"""Whether torch can use the GPUs that this machine has: a run must not fall back to the CPU without a word."""

import os
import subprocess

import torch

from train_cc.io.errors import InputError
from train_cc.io.read import first_line

ON_THE_CPU = "CUDA_VISIBLE_DEVICES= (empty) before the command runs on the CPU"


def gpus_shown() -> list[str]:
    """The lines of ``nvidia-smi -L`` that are of GPUs; none where there is no such command, or all are hidden."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.split(",")[0].strip() in ("", "-1"):
        return []
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in told.splitlines() if line.startswith("GPU ")]


def why_not() -> str:
    """Why torch has no CUDA here."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a wheel without CUDA: install one with it (https://pytorch.org)"
    try:
        torch.cuda.init()
    except Exception as error:  # of the driver, whatever it says
        return f"torch {torch.__version__} for CUDA {torch.version.cuda} says: {first_line(error)}"
    return f"torch {torch.__version__} for CUDA {torch.version.cuda} finds none of them"


def require_usable_gpus() -> None:
    """Raises `InputError` for GPUs that are shown and cannot be used: an old driver, a wrong wheel, a card too new."""
    if not torch.cuda.is_available():
        if shown := gpus_shown():
            raise InputError(
                f"nvidia-smi shows {len(shown)} GPU(s), but torch cannot use them. {why_not()}. {ON_THE_CPU}"
            )
        return
    place = int(os.environ.get("LOCAL_RANK", 0))
    if place >= torch.cuda.device_count():
        raise InputError(
            f"NUM_PROCESSES asks for more than the {torch.cuda.device_count()} visible GPU(s) of this machine, one "
            "process each"
        )
    try:
        torch.zeros(1, device=f"cuda:{place}").add_(1).item()
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(place)
        raise InputError(
            f"{torch.cuda.get_device_name(place)} (sm_{major}{minor}) cannot compute with torch {torch.__version__}, "
            f"which has kernels for {' '.join(torch.cuda.get_arch_list())}: {first_line(error)}. {ON_THE_CPU}"
        ) from error
