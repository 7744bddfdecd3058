"""What Inductor makes of a run's blocks: the bytes of each fused kernel, by its own scheduler, without a GPU."""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import nn
from torch._inductor import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from evaluation.lowering import Lowered, library_attention, lower
from train_cc.distillation.run import Run
from train_cc.models.lora import lora_layers, set_lora_scale
from train_cc.run.roofline import LAUNCH, MEMORY_EFFICIENCY, Card, Cost, Roofline


def replica(block: nn.Module) -> nn.Module:
    """``block`` on the CPU, of shapes alone; to be called in a `FakeTensorMode`."""
    held = [*block.parameters(), *(layer.scale for layer in lora_layers(block) if layer.scale is not None)]
    memo = {}
    for x in held:
        empty = torch.empty(x.shape, dtype=x.dtype)
        memo[id(x)] = nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty
    return copy.deepcopy(block, memo)


def compiled(
    block: nn.Module, x: torch.Size, c: torch.Size, dtype: torch.dtype, training: bool
) -> tuple[Lowered, Lowered]:
    """The forward and the backward (empty unless ``training``) of ``block`` under autocast to ``dtype``, on CUDA."""
    found = {False: Lowered(), True: Lowered()}

    def compile_one(graph, inputs, **options):
        plain = copy.deepcopy(graph)
        found[bool(options.get("is_backward"))] = lower(graph, inputs, **options)
        return compile_fx.make_boxed_func(plain.forward)

    def backend(graph, inputs):
        return compile_fx.compile_fx(graph, inputs, inner_compile=compile_one)

    torch._dynamo.reset()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.set_grad_enabled(training),
        mock.patch.object(F, "scaled_dot_product_attention", library_attention),
    ):
        block = replica(block)
        whole = block.adaLN_modulation[1].weight.requires_grad
        given = [torch.empty(x, dtype=dtype, requires_grad=training), torch.empty(c, dtype=dtype, requires_grad=whole)]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = torch.compile(block, backend=backend)(*given)
        if training:
            out.backward(torch.empty_like(out))
    return found[False], found[True]


# The cycle, its blocks compiled -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Of a run of a block: what its graph depends on."""

    network: str
    training: bool
    x: torch.Size
    c: torch.Size
    dtype: torch.dtype


@dataclass
class BlockRuns:
    """How often the first block of either network ran, by kind; all blocks are alike."""

    blocks: dict[str, nn.ModuleList]
    count: Counter = field(default_factory=Counter)
    scales: dict[Kind, torch.Tensor | None] = field(default_factory=dict)

    @classmethod
    @contextlib.contextmanager
    def of(cls, run: Run) -> Iterator["BlockRuns"]:
        runs = cls({"generator": run.plain_generator.blocks, "estimator": run.plain_estimator.network.blocks})

        def seen(name, block, given):
            x, c = given
            kind = Kind(name, torch.is_grad_enabled(), x.shape, c.shape, x.dtype)
            runs.count[kind] += 1
            runs.scales[kind] = next((layer.scale for layer in lora_layers(block)), None)

        hooks = [
            blocks[0].register_forward_pre_hook(lambda block, given, name=name: seen(name, block, given))
            for name, blocks in runs.blocks.items()
        ]
        try:
            yield runs
        finally:
            for hook in hooks:
                hook.remove()

    def small_kernels(self, kind: Kind, card: Card, device: str) -> Cost:
        block = self.blocks[kind.network][0]
        set_lora_scale(lora_layers(block), self.scales[kind])
        return small_kernels(block, kind, card, device)

    def gain(self, eager: dict[Kind, Cost], card: Card) -> Cost:
        """What the cycle costs more, or less, when all blocks are compiled: fused kernels for those of ``eager``."""
        total = Cost()
        for kind, count in self.count.items():
            blocks = self.blocks[kind.network]
            set_lora_scale(lora_layers(blocks[0]), self.scales[kind])
            forward, backward = compiled(blocks[0], kind.x, kind.c, kind.dtype, kind.training)
            sizes = [*forward.sizes, *backward.sizes]
            seconds = sum(max(size / (MEMORY_EFFICIENCY * card.bandwidth), LAUNCH) for size in sizes)
            runs = count * len(blocks)
            total.seconds += runs * (seconds - eager[kind].seconds)
            total.bytes += runs * (sum(sizes) - eager[kind].bytes)
            total.kernels += runs * (len(sizes) - eager[kind].kernels)
        return total


def small_kernels(block: nn.Module, kind: Kind, card: Card, device: str) -> Cost:
    """Of one eager run of ``block``, products and attention left out. Without gradient weights are cast before."""
    costs = Roofline(card, device)
    whole = block.adaLN_modulation[1].weight.requires_grad
    x = torch.empty(kind.x, dtype=kind.dtype, device=device, requires_grad=kind.training)
    c = torch.empty(kind.c, dtype=kind.dtype, device=device, requires_grad=kind.training and whole)
    half = kind.dtype != torch.float32
    with torch.set_grad_enabled(kind.training):
        with torch.autocast(device, kind.dtype, enabled=half):
            if not kind.training:
                block(x, c)
            with costs:
                out = block(x, c)
        if kind.training:
            with costs:
                out.backward(torch.empty_like(out))
    return costs.total(kind="other")
