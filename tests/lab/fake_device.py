"""The device type "fakegpu": what torch must know of a device before tensors can say that they are on it."""

import contextlib
import functools
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

NAME = "fakegpu"
aten = torch.ops.aten
active: list = []  # the device of the running `fake_gpu`, if any; outside of it the type is not available
# Operators that autocast casts to its dtype on CUDA (torch/include/ATen/autocast_mode.h). The others that it knows are
# computed in fp32 here; of a few CUDA would keep the dtype.
LOWER_PRECISION = {
    "_convolution", "_convolution.deprecated", "cudnn_convolution", "cudnn_convolution_transpose", "conv1d",
    "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input",
    "convolution", "prelu", "addmm", "addmv", "addr", "matmul", "einsum", "mm", "mv", "linalg_vecdot", "linear",
    "addbmm", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell",
    "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "_scaled_dot_product_flash_attention",
    "scaled_dot_product_attention",
}  # fmt: skip


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

    def _itself(self, *args: object, **kwargs: object) -> "Stream":
        return self

    query = wait_stream = wait_event = record_event = record = wait = _itself


def synchronize(*device: object) -> None:
    if active:
        active[-1].wait("synchronize")


def always(value: object) -> Callable:
    return lambda *args, **options: value


IGNORED = ("set_rng_state", "set_device", "set_stream", "manual_seed", "manual_seed_all", "empty_cache")
# ``torch.fakegpu``: what torch, FSDP2 and accelerate ask of a device's module.
MODULE = SimpleNamespace(
    Stream=Stream,
    Event=Stream,
    synchronize=synchronize,
    current_stream=Stream,
    is_initialized=always(True),
    is_available=lambda: bool(active),
    device_count=always(1),
    current_device=always(0),
    is_bf16_supported=always(True),
    get_amp_supported_dtype=always([torch.bfloat16, torch.float16]),
    get_rng_state=always(torch.zeros(8, dtype=torch.uint8)),
    _is_in_bad_fork=always(False),
    **dict.fromkeys(("device", "stream"), always(contextlib.nullcontext())),
    **dict.fromkeys(IGNORED, always(None)),
)


def on_gpu(x: Tensor) -> bool:
    return (x.fake_device if isinstance(x, FakeTensor) else x.device).type == NAME


def autocast_kernel(name: str, op: Callable) -> Callable:
    """The kernel that autocast puts in front of ``op``: the cast, then ``op`` itself, without autocast."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def kernel(*args, **kwargs):
        dtype = torch.get_autocast_dtype(NAME) if name in LOWER_PRECISION else torch.float32

        def cast(x: object) -> object:
            floating = isinstance(x, Tensor) and on_gpu(x) and x.is_floating_point() and x.dtype != torch.float64
            return x.to(dtype) if floating else x

        with torch._C._ExcludeDispatchKeyGuard(key):
            args, kwargs = tree_map(cast, (args, kwargs))
            return op(*args, **kwargs)

    return kernel


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)[0]


@functools.cache
def install() -> list[torch.library.Library]:
    """Register the device type with autocast's rules, once a process; they hold as long as the libraries are kept."""

    class Hooks(backend_registration._DummyPrivateUse1Hook):
        def is_available(self) -> bool:
            return bool(active)

    backend_registration._setup_privateuseone_for_python_backend(NAME, MODULE, Hooks())
    everything, operators = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for qualified in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA"):
        namespace, _, name = qualified.partition("::")
        packet, _, overload = name.partition(".")
        if namespace == "aten":
            op = getattr(getattr(aten, packet), overload or "default")
            operators.impl(name, autocast_kernel(name, op), "AutocastPrivateUse1")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        operators.impl("scaled_dot_product_attention", attention, key)
    return [everything, operators]
