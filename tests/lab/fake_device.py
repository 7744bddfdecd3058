"""The device type "fakegpu": what torch must know of a device before tensors can say that they are on it."""

import contextlib
import functools
import weakref

import torch
from torch import Tensor
from torch.utils import backend_registration

from tests.lab import cuda_rules

NAME = "fakegpu"


active: list = []  # the device of the running `fake_gpu`, if any; outside of it the type is not available


class Generator(torch.Generator):
    """`torch.Generator` that may be asked for on the fake device, where it draws nothing."""

    def __new__(cls, device: torch.device | str = "cpu"):
        device = torch.device(device)
        if device.type != NAME:
            return REAL_GENERATOR(device)
        generator = super().__new__(cls)
        generator._device = device
        FAKE_GENERATORS.add(generator._cdata)
        weakref.finalize(generator, FAKE_GENERATORS.discard, generator._cdata)
        return generator

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__()

    @property
    def device(self) -> torch.device:
        return self._device


REAL_GENERATOR = torch.Generator
FAKE_GENERATORS: set[int] = set()  # addresses: an operator is given another Python object of the same generator


def require_generator_on_device(generator: torch.Generator | None) -> None:
    if generator is not None and generator._cdata not in FAKE_GENERATORS:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")


class Stream:
    """A queue of the device; also an event in one. Nothing runs, and so nothing is waited for by the device."""

    stream_id = device_index = 0
    device_type = 20  # c10's number of PrivateUse1

    def __init__(self, *args: object, **kwargs: object):
        self.device = torch.device(NAME, 0)

    def synchronize(self) -> None:
        synchronize()

    def query(self) -> bool:
        return True

    def _nothing(self, *args: object, **kwargs: object) -> "Stream":
        return self

    wait_stream = wait_event = record_event = record = wait = _nothing


def synchronize(*device: object) -> None:
    if active:
        active[-1].wait("synchronize")


class DeviceModule:
    """``torch.fakegpu``: what torch, FSDP2 and accelerate ask of a device's module."""

    Stream = Event = Stream
    synchronize = staticmethod(synchronize)

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return bool(active)

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self, **options: object) -> bool:
        return True

    def get_rng_state(self, *device: object) -> Tensor:
        return torch.zeros(8, dtype=torch.uint8)

    def current_stream(self, *device: object) -> Stream:
        return Stream()

    def _context(self, *args: object) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def _nothing(self, *args: object) -> None:
        pass

    device = stream = _context
    set_rng_state = set_device = set_stream = manual_seed = manual_seed_all = empty_cache = _nothing


@functools.cache
def install() -> tuple:
    """Register the device type, once a process, and return what must be kept."""

    class Hooks(backend_registration._DummyPrivateUse1Hook):
        def is_available(self) -> bool:
            return bool(active)

    backend_registration._setup_privateuseone_for_python_backend(NAME, DeviceModule(), Hooks())
    return cuda_rules.register(NAME)
