"""--report-to: a run's rows and previews in tensorboard or wandb, by accelerate. The jsonl logs are written always."""

from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image


def start_trackers(accelerator: Accelerator, arguments: dict) -> None:
    """Nothing where ``accelerator`` was made without a tracker."""
    if accelerator.log_with:
        accelerator.init_trackers("dmdr", {name: str(value) for name, value in arguments.items()})


def show_picture(accelerator: Accelerator, path: Path, step: int) -> None:
    for tracker in accelerator.trackers:
        images = np.array(Image.open(path).convert("RGB"))[None]  # (1, H, W, 3)
        order = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"previews": images}, step=step, **order)
