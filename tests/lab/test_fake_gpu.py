"""A device without hardware, what it refuses and records, and the meters that watch it."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils import backend_registration

from tests.conftest import random_sit
from tests.lab import cuda_rules, fake_device
from tests.lab.fake_gpu import FakeGpu, fake_gpu
from tests.lab.fake_processes import fake_processes
from tests.lab.roofline import CARDS, LAUNCH, Card, Roofline
from train_cc.io.errors import InputError
from train_cc.models import SiT
from train_cc.run.meters import FlopCounter

needed = "_setup_privateuseone_for_python_backend"
pytestmark = pytest.mark.skipif(not hasattr(backend_registration, needed), reason=f"torch has no {needed}")
NAME = fake_device.NAME


@pytest.fixture
def gpu():
    with fake_gpu() as device:
        yield device


def update(gpu: FakeGpu, model: nn.Module, optimizer: torch.optim.Optimizer, dtype=torch.bfloat16) -> Tensor:
    """One step of training as the project takes it: autocast, clipped gradients, fused AdamW. -> v."""
    x, t = torch.randn(4, 1, 8, 8, device=gpu.device), torch.rand(4, device=gpu.device)
    y = torch.zeros(4, dtype=torch.long, device=gpu.device)
    with torch.autocast(NAME, dtype, enabled=dtype != torch.float32):
        v = model(x, t, y)
    v.float().pow(2).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return v


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), fused=True)


def line_of(function, offset: int) -> str:
    """`place_in_project` of the line ``offset`` lines below the definition of ``function``."""
    return f"tests/lab/test_fake_gpu.py:{function.__code__.co_firstlineno + offset}"


# Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_waits_for_nothing(gpu, dtype, checkpointing):
    model = random_sit().to(gpu.device)
    if checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = fused(model)
    gpu.clear()
    for _ in range(2):
        v = update(gpu, model, optimizer, dtype)
    assert v.dtype == dtype and v.device.type == NAME
    assert gpu.waits == gpu.copies == []
    moments = optimizer.state[model.final_layer.linear.weight]["exp_avg"]
    assert moments.shape == model.final_layer.linear.weight.shape and moments.device.type == NAME


def test_a_scaler_waits_for_nothing(gpu):
    layer = nn.Linear(4, 4).to(gpu.device)
    optimizer, scaler = fused(layer), torch.amp.GradScaler(NAME)
    gpu.clear()
    scaler.scale(layer(torch.randn(2, 4, device=gpu.device)).sum()).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert gpu.waits == []


def test_cpu_tensors_stay_real_and_come_back_real(gpu):
    layer = nn.Linear(2, 2)
    (layer(torch.ones(1, 2)).sum()).backward()
    assert layer.weight.grad.tolist() == [[1, 1], [1, 1]]
    back = torch.randn(2, 3, device=gpu.device).cpu()
    assert back.numpy().shape == (2, 3)
    assert torch.accelerator.is_available()


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


# What CUDA refuses -------------------------------------------------------------------------------------------------

ON_BOTH = {
    "add": lambda cpu, gpu: cpu + gpu,
    "cat": lambda cpu, gpu: torch.cat([cpu, gpu]),
    "linear": F.linear,
    "where": lambda cpu, gpu: torch.where(cpu > 0, gpu, gpu),
    "embedding": lambda cpu, gpu: F.embedding(torch.tensor([0]), gpu),
    "into the CPU": lambda cpu, gpu: cpu[0, 0].add_(gpu[0, 0]),
    "generator": lambda cpu, gpu: torch.randn(3, generator=torch.Generator(), device=gpu.device),
}


@pytest.mark.parametrize("name", ON_BOTH)
def test_operands_on_two_devices_raise(gpu, name):
    with pytest.raises(RuntimeError, match=r"device|CPU"):
        ON_BOTH[name](torch.ones(4, 4), torch.ones(4, 4, device=gpu.device))


def test_attention_of_other_shapes_is_computed_plainly(gpu):
    x = torch.ones(3, 16, 8, device=gpu.device, dtype=HALF)
    assert "bmm" in operators(lambda: F.scaled_dot_product_attention(x, x, x))


def test_a_number_on_the_cpu_may_join(gpu):
    x = torch.ones(4, 4, device=gpu.device)
    assert (torch.tensor(2.0) * x).device == torch.where(x > 0, x, torch.tensor(0.0)).device == gpu.device
    drawn = torch.randn(3, generator=torch.Generator(gpu.device).manual_seed(5), device=gpu.device)
    assert drawn.shape == (3,)
    assert gpu.waits == []


# Waits -------------------------------------------------------------------------------------------------------------

ONES = torch.ones(4, dtype=torch.long)
WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0, 0]),
    "bool": lambda x: bool((x > 0).all()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique of rows": lambda x: x.unique(dim=0),
    "equal": lambda x: torch.equal(x, x),
    "eigenvalues": lambda x: torch.linalg.eigh(x),
    "singular values": lambda x: torch.linalg.svd(x),
    "allclose": lambda x: torch.allclose(x, x),
    "mask": lambda x: x[x > 0],
    "mask of rows": lambda x: x[x[:, 0] > 0],
    "put by mask": lambda x: x.index_put((x > 0,), x.flatten()),
    "index from the CPU": lambda x: x[torch.tensor([0, 1])],
    "repeat_interleave": lambda x: x.repeat_interleave(x[0].long(), dim=0),
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


def test_a_wait_in_the_backward_pass_has_its_place(gpu):
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            gradient.sum().item()
            return gradient

    Reads.apply(torch.ones(3, device=gpu.device, requires_grad=True)).sum().backward()
    assert [event.place for event in gpu.waits] == [line_of(Reads.backward, 2)]


def test_what_depends_on_values_has_the_largest_shape(gpu):
    x = torch.ones(4, 3, device=gpu.device)
    assert x[x > 0].shape == x.masked_select(x > 0).shape == x.unique().shape == (12,)
    assert x[x[:, 0] > 0].shape == (4, 3)
    assert x.nonzero().shape == (12, 2)
    assert x.tolist() == [[0.0] * 3] * 4 and x.sum().item() == 0.0 and (x > 0).all().item() is False


# Autocast and attention --------------------------------------------------------------------------------------------

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


def test_autocast_knows_every_operator_of_cuda():
    known = {name.split("::")[1] for name in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")}
    for names in (cuda_rules.LOWER_PRECISION, cuda_rules.WITH_FP32_RESULT, cuda_rules.PROMOTED, cuda_rules.REFUSED):
        assert names <= known


def test_autocast_casts_a_trained_weight_once_and_forgets_it(gpu):
    layer, x = nn.Linear(64, 64, bias=False).to(gpu.device), torch.ones(4, 64, device=gpu.device, dtype=HALF)
    with torch.no_grad(), Roofline(CARDS["h100"], NAME) as roofline:
        for _ in range(2):
            with torch.autocast(NAME, HALF):
                layer(x)
                layer(x)
    assert roofline.rows["other", "_to_copy"].kernels == 2


def operators(call) -> set[str]:
    with Roofline(CARDS["h100"], NAME) as roofline:
        call()
    return {name for _, name in roofline.rows}


@pytest.mark.parametrize(
    ("dtype", "masked", "kernel"), [(HALF, False, "flash"), (SINGLE, False, "efficient"), (HALF, True, "efficient")]
)
def test_attention_takes_the_kernel_of_a_gpu(gpu, dtype, masked, kernel):
    q = torch.ones(2, 3, 16, 8, device=gpu.device, dtype=dtype, requires_grad=True)
    mask = torch.ones(16, 16, device=gpu.device, dtype=torch.bool) if masked else None
    names = operators(lambda: F.scaled_dot_product_attention(q, q, q, mask).sum().backward())
    expected = f"_scaled_dot_product_{kernel}_attention"
    assert {expected, f"{expected}_backward"} <= names and q.grad.shape == q.shape


# Meters ------------------------------------------------------------------------------------------------------------


def test_roofline_of_a_known_product(gpu):
    card = Card(half=1e12, single=1e11, bandwidth=1e12)
    a = torch.empty(1024, 2048, device=gpu.device, dtype=HALF)
    b = torch.empty(2048, 512, device=gpu.device, dtype=HALF)
    with Roofline(card, NAME) as roofline:
        a @ b
    cost = roofline.total(kind="matrix product")
    assert cost.kernels == 1 and cost.flop == 2 * 1024 * 2048 * 512
    assert cost.bytes == 2 * (1024 * 2048 + 2048 * 512 + 1024 * 512)
    assert cost.seconds == cost.flop / (0.72 * 1e12)
    with Roofline(card, NAME) as roofline:
        a.float() @ b.float()
    assert roofline.total(kind="matrix product").seconds == cost.flop / (0.72 * 1e11)


def test_roofline_counts_what_a_kernel_moves(gpu):
    x, row = torch.empty(1 << 20, 4, device=gpu.device), torch.empty(4, device=gpu.device)
    size = x.nbytes
    for call, expected in {
        (lambda: x + row): 2 * size + 16,
        (lambda: x + row.expand_as(x)): 2 * size + 16,
        (lambda: x.add_(row)): 2 * size + 16,
        (lambda: x.zero_()): size,
        (lambda: x.view(-1, 2).t()): 0,
        (lambda: torch.empty_like(x)): 0,
    }.items():
        with Roofline(CARDS["h100"], NAME) as roofline:
            call()
        assert roofline.total().bytes == expected
        assert roofline.total().seconds == pytest.approx(expected / (0.85 * 3.35e12))
    with Roofline(CARDS["h100"], NAME) as roofline:
        row + 1
    assert roofline.total().seconds == LAUNCH


def test_flop_on_the_fake_device_are_those_of_the_cpu(gpu):
    def count(model: SiT, device) -> int:
        x, y = torch.ones(4, 1, 8, 8, device=device), torch.zeros(4, dtype=torch.long, device=device)
        with FlopCounter() as counter:
            model(x, torch.ones(4, device=device), y).sum().backward()
        return counter.total

    model = random_sit()
    on_cpu = count(model, "cpu")
    assert on_cpu == count(model.to(gpu.device), gpu.device) > 1_000_000


# Processes ---------------------------------------------------------------------------------------------------------


def test_accelerate_is_on_the_fake_device(gpu):
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("no", torch.float32)):
        with fake_processes():
            first, second = (Accelerator(mixed_precision=precision, cpu=True) for _ in range(2))
            assert first.device == second.device == gpu.device and first.num_processes == 1
            assert first.mixed_precision == precision and (second.scaler is not None) == (precision == "fp16")
            with first.autocast():
                assert F.linear(torch.ones(2, 2, device=gpu.device), torch.ones(2, 2, device=gpu.device)).dtype == dtype
    assert Accelerator(cpu=True).device.type == "cpu"


@pytest.mark.parametrize("sharded", [False, True])
def test_rank_0_of_eight(gpu, sharded):
    model = random_sit()
    with fake_processes(8):
        accelerator = Accelerator(mixed_precision="bf16")
        assert accelerator.num_processes == 8
        if sharded:
            model.to(gpu.device)
            mesh = init_device_mesh(NAME, (8,))
            for unit in (*model.blocks, model):
                fully_shard(unit, mesh=mesh)
        else:
            model = accelerator.prepare_model(model)
        optimizer = fused(model)
        gpu.clear()
        for _ in range(2):
            update(gpu, model, optimizer)
        assert gpu.waits == []
    assert not torch.distributed.is_initialized()


# Where it cannot be made -------------------------------------------------------------------------------------------


def test_a_torch_that_cannot_is_told(monkeypatch):
    monkeypatch.delattr(backend_registration, needed)
    with pytest.raises(InputError, match="cannot make a fake GPU"):
        fake_device.install.__wrapped__()


def test_a_place_that_is_taken_is_told(monkeypatch):
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "npu")
    with pytest.raises(InputError, match="'npu' has the place"):
        fake_device.install.__wrapped__()
