"""Inductor for a card that is not there: what `torch.compile` makes of a graph on CUDA, its kernels and their code.

A graph that was captured on the CPU is told that its tensors lie on an H100. Inductor then lowers it, fuses it and
writes Triton's code as it would there. Neither GPU nor driver is needed, but a torch that is built for CUDA. Attention
and products are library kernels, and not among those counted.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx, config, scheduler
from torch._inductor.codegen.triton_combo_kernel import ComboKernel
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from train_cc.io.errors import InputError
from train_cc.run.session import INDUCTOR

CUDA = torch.device("cuda", 0)
CAPABILITY = 90  # of an H100: sm_90
MAJOR, MINOR = divmod(CAPABILITY, 10)
# As CUDA reports an H100 SXM: of it depends how reductions are split.
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=MAJOR,
    minor=MINOR,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=2**16,
    warp_size=32,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    L2_cache_size=50 * 2**20,
)
LIBRARY = (scheduler.ExternKernelSchedulerNode, scheduler.NopKernelSchedulerNode)


def require_cuda_lowering() -> None:
    """Raises `InputError` where torch was built without CUDA, or Triton is missing."""
    if not (torch.backends.cuda.is_built() and find_spec("triton")):
        raise InputError(
            "--roofline with --compile asks torch's compiler what it makes for CUDA, which needs a torch that is built "
            "for CUDA, and Triton; a GPU is not needed. Install torch from PyPI on Linux, or leave --compile away"
        )


class Driver:
    """Triton's, of a card that nothing runs on."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, H100.warp_size)

    def get_current_device(self) -> int:
        return CUDA.index

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA


def always(value: object) -> Callable:
    return lambda *args, **kwargs: value


@contextlib.contextmanager
def absent_card() -> Iterator[None]:
    """Inductor and Triton take the machine for one with an H100, to generate and compile code, never to run it.

    Where there is a GPU they go on to ask that one: what they are told they keep for the whole process.
    """
    if torch.cuda.is_available():
        yield
        return
    import triton

    told = {"get_device_properties": H100, "current_device": CUDA.index}
    of_interface = told | {"get_compute_capability": CAPABILITY, "is_bf16_supported": True}
    of_interface |= {"is_triton_capable": True, "raise_if_triton_unavailable": None}
    of_torch = told | {"get_device_capability": (MAJOR, MINOR), "device_count": 1}
    with contextlib.ExitStack() as stack:
        for owner, answers in ((CudaInterface.Worker, told), (CudaInterface, of_interface)):
            for name, value in answers.items():
                stack.enter_context(mock.patch.object(owner, name, staticmethod(always(value))))
        for name, value in of_torch.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", always(value)))
        stack.enter_context(mock.patch.object(scheduler, "has_triton", always(True)))
        stack.enter_context(mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu", always(None)))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", Driver()))
        yield


# Attention, as the library kernel that it is on CUDA ----------------------------------------------------------------


@torch.library.custom_op("dmdr::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise NotImplementedError("a shape alone")


@torch.library.custom_op("dmdr::attention_backward", mutates_args=())
def attention_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("a shape alone")


attention.register_fake(lambda q, k, v: torch.empty_like(v))
attention_backward.register_fake(lambda gradient, q, k, v, out: tuple(map(torch.empty_like, (q, k, v))))
attention.register_autograd(
    lambda context, gradient: attention_backward(gradient, *context.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
)


def library_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In place of `F.scaled_dot_product_attention`: a plain function, which torch's compiler can trace."""
    return torch.ops.dmdr.attention(q, k, v)


# A graph ------------------------------------------------------------------------------------------------------------


@dataclass
class Lowered:
    """What Inductor makes of one graph."""

    sizes: list[int] = field(default_factory=list)  # bytes that each fused kernel reads and writes
    code: str = ""  # the module that launches them, with Triton's source of each


def on_cuda(graph: GraphModule, inputs: list) -> tuple[GraphModule, list, FakeTensorMode]:
    """A copy of ``graph`` whose tensors lie on the card, as shapes."""
    graph, mode = copy.deepcopy(graph), FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        given = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA) if isinstance(x, Tensor) else x
            for x in inputs
        ]
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": CUDA}
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*given)
    return graph, given, mode


def lower(graph: GraphModule, inputs: list, **options) -> Lowered:
    """What Inductor makes of ``graph`` on CUDA, captured on the CPU; ``options``: those of `compile_fx_inner`."""
    found = Lowered()
    codegen, partition = scheduler.Scheduler.codegen, ComboKernel.horizontal_partition

    def counted_codegen(self):
        counted_elsewhere = (*LIBRARY, scheduler.ForeachKernelSchedulerNode)
        alone = [node for node in self.nodes if not isinstance(node, counted_elsewhere)]
        found.sizes += [node.get_read_write_buffers_sizes() for node in alone]
        return codegen(self)

    def counted_partition(*args, **kwargs):  # of kernels made one: how many are left
        parts = partition(*args, **kwargs)
        found.sizes += [sum(node.get_read_write_buffers_sizes() for node in part) for part in parts]
        return parts

    def compile_to_module(self):
        found.code = self.codegen()[0].value
        return SimpleNamespace(call=None)  # nothing is compiled, nor run

    moved, given, mode = on_cuda(graph, inputs)
    with (
        absent_card(),
        mock.patch.object(scheduler.Scheduler, "codegen", counted_codegen),
        mock.patch.object(ComboKernel, "horizontal_partition", staticmethod(counted_partition)),
        mock.patch.object(GraphLowering, "compile_to_module", compile_to_module),
        # Benchmarks and folded constants would run on the card.
        config.patch(INDUCTOR | {"benchmark_combo_kernel": False, "joint_graph_constant_folding": False}),
        config.patch(fx_graph_cache=False, fx_graph_remote_cache=False, compile_threads=1),
        tracing(TracingContext(mode)),
    ):
        compile_fx.compile_fx_inner(moved, given, **options)
    return found
