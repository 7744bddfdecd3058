"""Small worlds that several test files share: runs in fp16 on a CPU, and what autograd keeps."""

import torch
from accelerate.state import AcceleratorState
from torch import nn

from tests.conftest import flags, spread_lora_b, trained
from train_cc import cold_start
from train_cc.run.diagnostics import gathered
from train_cc.run.session import open_session
from train_cc.setup.build import build

LARGE = 2.0**120  # a scale that no gradient bears, nor after fifty halvings
GOOD = 2.0**8


def half_run(teacher, output, *more, of_generator: float = GOOD, of_estimator: float = GOOD):
    """A run in fp16 with GradScaler("cpu") at these scales: accelerate allows fp16 on a GPU only."""
    AcceleratorState._reset_state(True)
    session = open_session("bf16")
    AcceleratorState._shared_state["_mixed_precision"] = "fp16"
    session.generator_accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=of_generator)
    session.estimator_accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=of_estimator)
    words = flags(teacher, output, "--ratio-update", 1, "--num-previews", 0, *more)
    run = build(cold_start.stage_parser().parse_args(words), session)
    spread_lora_b(run.plain_estimator)
    return run


def scales(run) -> list[float]:
    return [a.scaler.get_scale() for a in (run.session.generator_accelerator, run.session.estimator_accelerator)]


def moved(model, before: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(gathered(now), gathered(before[name])) for name, now in trained(model).items())


def rewarded(classifier) -> list:
    return ["--encoder-type", "classifier", "--reward-classifier", classifier, "--reward-weight", 0.5]


def inputs(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t, t and y of the tiny teacher, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(batch, 1, 8, 8, generator=generator), torch.rand(batch, generator=generator)
    return x, t, torch.arange(batch) % 10


def kept_bytes(model: nn.Module, forward) -> int:
    """Bytes that autograd keeps between ``forward`` and its backward, parameters apart."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()  # noqa: F841  (kept alive until all addresses have been seen)
    return sum(kept.values())
