"""A reward from the user's own file: ``FILE.py:FUNCTION``, with ``FUNCTION(images, labels) -> (B,)``, larger is better.

Images come as float tensors (B, C, H, W) in [0, 1] on the run's device, with gradient. The file may have:

    setup(device)       called once, before the first image: load a model here
    IMAGES = "uint8"    the function takes uint8 arrays (B, H, W, C) and int labels (B,), both numpy: for --tilt alone,
                        since no gradient passes through
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from train_cc.io.errors import InputError
from train_cc.io.read import first_line
from train_cc.models.vae import images_to_uint8

USERS_FUNCTION = "FILE.py:FUNCTION with FUNCTION(images, labels) -> (B,), larger is better"


def load_module(source: str) -> tuple[ModuleType, str]:
    """``source`` as FILE.py:FUNCTION -> the file as a module, and the function's name. Raises `InputError`."""
    file, _, name = source.rpartition(":")
    path = Path(file)
    if not name.isidentifier() or not path.is_file():
        raise InputError(f"the reward {source!r} is not there; {USERS_FUNCTION} is expected")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}_{abs(hash(path.resolve()))}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is no Python file; {USERS_FUNCTION} is expected")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for themselves there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code, whatever it does
        raise InputError(f"{path} cannot be imported ({first_line(error)})") from error
    if not callable(getattr(module, name, None)):
        raise InputError(f"{path} has no function {name}; {USERS_FUNCTION} is expected")
    return module, name


class PythonReward:
    """The function of a user's file as losses (smaller is better) or, without gradient, as plain rewards."""

    def __init__(self, source: str, device: torch.device | str):
        self.source, self.file = source, Path(source.rpartition(":")[0])
        module, self.name = load_module(source)
        self._function: Callable = getattr(module, self.name)
        self._takes_uint8 = getattr(module, "IMAGES", None) == "uint8"
        if callable(getattr(module, "setup", None)):
            self._guarded(module.setup, device)

    def _guarded(self, call: Callable, *arguments: object) -> object:
        try:
            return call(*arguments)
        except Exception as error:
            raise InputError(f"the reward {self.source} raised {first_line(error)}") from error

    def rewards(self, images: Tensor, y: Tensor) -> Tensor:
        """images (B, C, H, W) in [0, 1], y (B,) -> rewards (B,), fp32. Raises `InputError`."""
        if self._takes_uint8:
            values = self._guarded(self._function, images_to_uint8(images).numpy(), y.cpu().numpy())
        else:
            values = self._guarded(self._function, images, y)
        if isinstance(values, np.ndarray | list | tuple):
            values = self._guarded(lambda: torch.as_tensor(np.asarray(values)))
        if not isinstance(values, Tensor) or values.shape != (len(images),):
            kind = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise InputError(f"the reward {self.source} returned {kind}; ({len(images)},) is expected, one per image")
        return values.to(images.device).float()

    def losses(self, images: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return -self.rewards(images, y), {}

    def check(self, images: Tensor, y: Tensor, with_gradient: bool) -> None:
        """One batch before anything is written: shape, finiteness, and that the gradient reaches the images."""
        images = images.detach().requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            values = self.rewards(images, y)
        if (~torch.isfinite(values)).any():
            raise InputError(f"the reward {self.source} returned values that are not finite on a first batch")
        if with_gradient:
            gradients = torch.autograd.grad(values.sum(), images, allow_unused=True) if values.requires_grad else [None]
            if gradients[0] is None:
                raise InputError(
                    f"no gradient of the reward {self.source} reaches the images: use it without one, by --tilt"
                )
