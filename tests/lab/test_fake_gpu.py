"""A device without hardware: what it refuses, what waits for it, and the dtypes of its autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils import backend_registration

from tests.lab.fake_device import NAME
from tests.lab.fake_gpu import fake_gpu

needed = "_setup_privateuseone_for_python_backend"
pytestmark = pytest.mark.skipif(not hasattr(backend_registration, needed), reason=f"torch has no {needed}")


@pytest.fixture
def gpu():
    with fake_gpu() as device:
        yield device


def line_of(function, offset: int) -> str:
    """`place_in_project` of the line ``offset`` lines below the definition of ``function``."""
    return f"tests/lab/test_fake_gpu.py:{function.__code__.co_firstlineno + offset}"


def test_outside_of_the_context_the_process_is_as_before():
    layer = nn.Linear(2, 2)
    with fake_gpu() as gpu:
        layer.to(gpu.device)
    assert not torch.accelerator.is_available()
    other = nn.Linear(2, 2)
    weight = other.weight
    assert other.double().weight is weight and weight.dtype == torch.float64
    other(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    assert weight.grad.tolist() == [[1, 1], [1, 1]]
    assert torch.Generator().manual_seed(1).device.type == "cpu"


REFUSED = {
    "add": lambda cpu, gpu: cpu + gpu,
    "cat": lambda cpu, gpu: torch.cat([cpu, gpu]),
    "linear": F.linear,
    "where": lambda cpu, gpu: torch.where(cpu > 0, gpu, gpu),
    "embedding": lambda cpu, gpu: F.embedding(torch.tensor([0]), gpu),
    "into the CPU": lambda cpu, gpu: cpu[0, 0].add_(gpu[0, 0]),
    "generator": lambda cpu, gpu: torch.randn(3, generator=torch.Generator(), device=gpu.device),
    # Shapes that depend on values
    "nonzero": lambda cpu, gpu: gpu.nonzero(),
    "masked_select": lambda cpu, gpu: gpu.masked_select(gpu > 0),
    "unique of rows": lambda cpu, gpu: gpu.unique(dim=0),
    "repeat_interleave": lambda cpu, gpu: gpu.repeat_interleave(gpu[0].long(), dim=0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operands_on_two_devices_and_shapes_by_values_are_refused(gpu, name):
    with pytest.raises((RuntimeError, DynamicOutputShapeException), match=r"device|CPU|aten\."):
        REFUSED[name](torch.ones(4, 4), torch.ones(4, 4, device=gpu.device))


ONES = torch.ones(4, dtype=torch.long)
WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0, 0]),
    "bool": lambda x: bool((x > 0).all()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "tolist": lambda x: x.tolist(),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "eigenvalues": lambda x: torch.linalg.eigh(x),
    "singular values": lambda x: torch.linalg.svd(x),
    "mask": lambda x: x[x > 0],
    "mask of rows": lambda x: x[x[:, 0] > 0],
    "put by mask": lambda x: x.index_put((x > 0,), x.flatten()),
    "index from the CPU": lambda x: x[torch.tensor([0, 1])],
    "cpu": lambda x: x.cpu(),
    "to": lambda x: ONES.to(x.device),
    "copy_": lambda x: x.copy_(torch.ones(4, 4)),
    "copy_ to the CPU": lambda x: torch.ones(4, 4).copy_(x),
    "tensor": lambda x: torch.tensor(1.0, device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "synchronize": lambda x: torch.accelerator.synchronize(),
}
NO_WAITS = {
    "non-blocking": lambda x: ONES.to(x.device, non_blocking=True),
    "non-blocking from pinned memory": lambda x: ONES.pin_memory().to(x.device, non_blocking=True),
    "non-blocking to the CPU": lambda x: x.to("cpu", non_blocking=True),
    "full": lambda x: torch.full((), 1.0, device=x.device),
    "fill by mask": lambda x: x.__setitem__(x > 0, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "index from the device": lambda x: x[x[0].long()],
    "repeat_interleave of known size": lambda x: x.repeat_interleave(x[0].long(), dim=0, output_size=7),
    "repeat_interleave by a number": lambda x: x.repeat_interleave(2, dim=0),
    "read of the CPU": lambda x: ONES.sum().item() + len(ONES[ONES > 0]),
    "cast": lambda x: x.half(),
}


@pytest.mark.parametrize("name", WAITS)
def test_each_wait_is_recorded_once_with_its_place(gpu, name):
    WAITS[name](torch.ones(4, 4, device=gpu.device))
    assert [event.place for event in gpu.waits] == [line_of(WAITS[name], 0)], gpu.waits
    assert gpu.copies == []


@pytest.mark.parametrize("name", NO_WAITS)
def test_what_does_not_wait(gpu, name):
    NO_WAITS[name](torch.ones(4, 4, device=gpu.device))
    assert gpu.waits == []
    assert len(gpu.copies) == ("non-blocking" in name)


def test_a_copy_needs_its_source_until_the_host_waits(gpu):
    large = 64 * 2**10 // 4 + 1
    source = torch.ones(large)
    kept = source.view(1, -1)
    on_device = [kept.to(gpu.device, non_blocking=True)]
    del source  # the view holds its memory
    on_device.append(torch.ones(large).pin_memory().to(gpu.device, non_blocking=True))
    on_device.append(torch.ones(large - 1).to(gpu.device, non_blocking=True))
    on_device.append(torch.ones(large).to(gpu.device))
    assert gpu.lost == [] and len(gpu.copies) == 3
    on_device.append(kept.to(gpu.device, non_blocking=True))
    torch.accelerator.synchronize()
    del kept
    assert gpu.lost == []
    freed = lambda: on_device[0].copy_(torch.ones(1, large), non_blocking=True)  # noqa: E731
    freed()
    assert [event.place for event in gpu.lost] == [line_of(freed, 0)]


HALF, SINGLE = torch.bfloat16, torch.float32
AUTOCAST = {  # torch.org: "Autocast Op Reference", CUDA. x is fp32, h half
    "linear": (lambda x, h: F.linear(x, x), HALF),
    "matmul": (lambda x, h: x @ h, HALF),
    "conv2d": (lambda x, h: F.conv2d(x[None, None], x[None, None]), HALF),
    "linear in fp64": (lambda x, h: F.linear(x.double(), x.double()), torch.float64),
    "layer_norm": (lambda x, h: F.layer_norm(h, (4,)), SINGLE),
    "group_norm": (lambda x, h: F.group_norm(h[None], 2), SINGLE),
    "softmax": (lambda x, h: h.softmax(-1), SINGLE),
    "pow": (lambda x, h: h**2, SINGLE),
    "exp": (lambda x, h: h.exp(), SINGLE),
    "sum": (lambda x, h: h.sum(0), SINGLE),
    "norm": (lambda x, h: h.norm(), SINGLE),
    "mse_loss": (lambda x, h: F.mse_loss(h, h), SINGLE),
    "cross_entropy": (lambda x, h: F.cross_entropy(h, h[0].long()), SINGLE),
    "gelu": (lambda x, h: F.gelu(h), HALF),
    "add": (lambda x, h: x + h, SINGLE),
    "addcmul of both": (lambda x, h: torch.addcmul(h, h, x), SINGLE),
    "addcmul of halves": (lambda x, h: torch.addcmul(h, h, h), HALF),
    "attention": (lambda x, h: F.scaled_dot_product_attention(*[x[None, None]] * 3), HALF),
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_computes_in_the_dtype_of_cuda(gpu, name):
    call, expected = AUTOCAST[name]
    x = torch.ones(4, 4, device=gpu.device)
    with torch.autocast(NAME, HALF):
        assert call(x, x.to(HALF)).dtype == expected
        assert F.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == SINGLE  # the CPU has an autocast of its own
