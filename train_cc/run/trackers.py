"""--report-to: a run's rows and previews in tensorboard or wandb, by accelerate. The jsonl logs are written always."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from train_cc.io.read import parsing


@contextlib.contextmanager
def tracking(accelerator: Accelerator, arguments: dict) -> Iterator[None]:
    """Open the tracker that ``accelerator`` was made with, if any, and close it whatever happens.

    Not `accelerator.end_training`, which would end the process group as well.
    """
    if accelerator.log_with:
        config = {name: str(value) for name, value in arguments.items()}
        with parsing("--report-to", "a tracker that can be reached"):  # a library's own errors, such as no login
            accelerator.init_trackers("dmdr", config)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def show_picture(accelerator: Accelerator, path: Path, step: int) -> None:
    for tracker in accelerator.trackers:
        images = np.array(Image.open(path).convert("RGB"))[None]  # (1, H, W, 3)
        order = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"previews": images}, step=step, **order)
