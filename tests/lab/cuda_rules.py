"""What torch decides by device on CUDA, given to another device type: autocast's casts and the attention kernel."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from train_cc.run.meters import tensors_in

aten = torch.ops.aten

# Autocast's operators (torch/include/ATen/autocast_mode.h). Their names come from the installed torch, which has the
# rules of CUDA in every build; those that are in none of these lists are computed in fp32.
LOWER_PRECISION = {  # cast to autocast's dtype
    "_convolution", "_convolution.deprecated", "cudnn_convolution", "cudnn_convolution_transpose", "conv1d",
    "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input",
    "convolution", "prelu", "addmm", "addmv", "addr", "matmul", "einsum", "mm", "mv", "linalg_vecdot", "linear",
    "addbmm", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell",
    "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "_scaled_dot_product_flash_attention",
    "scaled_dot_product_attention",
}  # fmt: skip
WITH_FP32_RESULT = {  # asked for an fp32 result, their input is not cast
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm",
    "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList",
}  # fmt: skip
PROMOTED = {  # cast to the widest of their inputs
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot",
    "scatter_add",
}  # fmt: skip
NORMS = {"norm.Scalar": aten.norm.ScalarOpt_dtype, "norm.ScalarOpt_dim": aten.norm.ScalarOpt_dim_dtype}


class AutocastCache:
    """Casts of trained fp32 weights, kept as in C++ until the outermost autocast ends: a second use costs nothing."""

    def __init__(self):
        self._casts: dict[int, tuple[weakref.ref, Tensor]] = {}

    def clear(self) -> None:
        self._casts.clear()

    def cast(self, x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
        """``x`` in ``dtype`` where autocast may touch it: floating, not fp64, on ``device``."""
        if not eligible(x, device) or x.dtype == dtype:
            return x
        kept = dtype == torch.get_autocast_dtype(device) and x.dtype == torch.float32 and x.requires_grad and x.is_leaf
        if not kept or x._is_view() or not torch.is_autocast_cache_enabled():
            return x.to(dtype)
        held = self._casts.get(id(x))
        if held is None or held[0]() is not x:
            held = self._casts[id(x)] = (weakref.ref(x), x.to(dtype))
        return held[1]


def device_type(x: Tensor) -> str:
    return x.fake_device.type if isinstance(x, FakeTensor) else x.device.type


def eligible(x: object, device: str) -> bool:
    return isinstance(x, Tensor) and device_type(x) == device and x.is_floating_point() and x.dtype != torch.float64


def register(device: str) -> tuple[AutocastCache, list[torch.library.Library]]:
    """Give PrivateUse1, named ``device``, the rules of CUDA. They hold as long as the libraries are kept."""
    cache = AutocastCache()
    everything, operators = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for qualified in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA"):
        namespace, _, name = qualified.partition("::")
        packet, _, overload = name.partition(".")
        if namespace == "aten":
            op = getattr(getattr(aten, packet), overload or "default")
            operators.impl(name, autocast_kernel(name, op, cache, device), "AutocastPrivateUse1")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        operators.impl("scaled_dot_product_attention", attention, key)
    return cache, [everything, operators]


def autocast_kernel(name: str, op: Callable, cache: AutocastCache, device: str) -> Callable:
    """What autocast puts in front of ``op``: the casts of its list, then ``op`` itself, without autocast."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    positions = {argument.name: i for i, argument in enumerate(op._schema.arguments)}

    def cast_all(dtype, args, kwargs):
        return tree_map(lambda x: cache.cast(x, dtype, device) if isinstance(x, Tensor) else x, (args, kwargs))

    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(key):
            if name in LOWER_PRECISION:
                args, kwargs = cast_all(torch.get_autocast_dtype(device), args, kwargs)
            elif name in WITH_FP32_RESULT:
                given = args[positions["dtype"]] if positions["dtype"] < len(args) else kwargs.get("dtype")
                if eligible(args[0], device) and given is None:
                    args, kwargs = args[: positions["dtype"]], {**kwargs, "dtype": torch.float32}
            elif name in PROMOTED:
                args, kwargs = cast_all(widest(args, kwargs, device), args, kwargs)
            elif name in NORMS:
                return NORMS[name](*args, dtype=torch.float32 if eligible(args[0], device) else args[0].dtype)
            else:
                args, kwargs = cast_all(torch.float32, args, kwargs)
            return op(*args, **kwargs)

    return kernel


def widest(args: tuple, kwargs: dict, device: str) -> torch.dtype:
    """Of a promoted operator: fp32 if any of its tensors is, else autocast's dtype."""
    dtypes = {x.dtype for x in tensors_in(args, kwargs) if eligible(x, device)}
    return torch.float32 if torch.float32 in dtypes else torch.get_autocast_dtype(device)


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """Flash in half precision without a mask, as on a GPU, else plain products."""
    width, half = q.shape[-1], q.dtype in (torch.float16, torch.bfloat16)
    if q.ndim != 4 or not half or attn_mask is not None or not width == v.shape[-1] <= 256:
        return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)[0]
    pad, scale = -width % 8, width**-0.5 if scale is None else scale
    q, k, v = (torch.nn.functional.pad(x, (0, pad)) if pad else x for x in (q, k, v))
    return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0][..., :width]
