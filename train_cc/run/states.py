"""States of networks and optimizers, whole and on the CPU, whatever wraps or shards them. Collective: every rank calls.
The EMA's decay grows with the number of its updates (docs/method.md: EMA of the generator).

What comes back from a file is checked here against the network that it is for: names, shapes, dtypes, finiteness. The
moments' file has their SHA-256, and is only checked for their names.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from train_cc.io.errors import InputError
from train_cc.io.read import value_text
from train_cc.io.weights import fit, require_finite
from train_cc.run.diagnostics import gathered
from train_cc.run.session import Session

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and buffers by plain name; on ranks other than 0 empty."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return {name: value.contiguous() for name, value in get_model_state_dict(model, options=options).items()}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Moments by parameter name. Hyperparameters are left out: on resume those of the command line apply."""
    return get_optimizer_state_dict(model, optimizer, options=WHOLE).get("state", {})  # empty on ranks other than 0


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: object, source: object) -> None:
    """Copy ``state`` into the moments, a parameter at a time; hyperparameters stay what the optimizer was built with.

    Raises `InputError` if it is not the state of ``model``'s trained parameters: the fused kernel checks nothing.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not isinstance(state, dict) or state.keys() != trained.keys():
        names = set(map(value_text, state)) if isinstance(state, dict) else set()
        other = sorted(names ^ set(map(value_text, trained)))
        raise InputError(f"{source} is not the optimizer state of what this run trains: it differs in {other[:6]}")
    for name, p in trained.items():
        put_moments(optimizer, p, state[name])


@torch.no_grad()
def put_moments(optimizer: torch.optim.Optimizer, p: Tensor, moments: Mapping[str, Tensor]) -> None:
    """Give ``optimizer`` copies of whole ``moments``, sharded as ``p`` is; the copies do not alias the file."""
    own = {"step": moments["step"].to(p.device if optimizer.defaults.get("fused") else "cpu", copy=True)}
    for key in ("exp_avg", "exp_avg_sq"):
        if hasattr(moments[key], "codes"):  # in 8 bits, never sharded
            own[key] = moments[key].to(p.device)
        else:
            own[key] = torch.zeros_like(p)
            copy_whole(own[key], moments[key])
    optimizer.state[p] = own


def copy_into(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: object) -> None:
    """Copy ``state`` into ``own``. Raises `InputError` where names, shapes or dtypes differ, or it is not finite."""
    hint = "another size, class count, LoRA rank or --use-lora-gen?"
    fit({name: tensor.shape for name, tensor in own.items()}, state, source, hint)
    for name, tensor in own.items():
        if state[name].dtype != tensor.dtype:
            raise InputError(f"{source}: {name} is {state[name].dtype}, expected {tensor.dtype}")
    require_finite(state, source)
    for name, tensor in own.items():
        copy_whole(tensor, state[name])


def whole_on_main(session: Session, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors``, sharded ones gathered, on the CPU of the main process; on other processes empty. Collective."""
    copies = {}
    for name, tensor in tensors.items():
        whole = gathered(tensor)  # by all processes
        if session.is_main:
            copies[name] = whole.cpu()
    return copies


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copy ``value``, whole and the same on every process, into ``target``, which may be sharded."""
    if isinstance(target, DTensor):
        value = value.to(target.device, target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


@torch.no_grad()
def not_finite_groups(session: Session, groups: Mapping[str, list[Tensor]]) -> list[str]:
    """The names of the ``groups`` of tensors that hold NaN or infinity in any process, the same on all processes.

    One reduction, and one look at the device. Of a sharded tensor every process checks its own part.
    """
    flags = []
    for tensors in groups.values():
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        local = [tensor for tensor in local if tensor.numel() and tensor.is_floating_point()]
        largest = torch.nn.utils.get_total_norm(local, float("inf"))
        flags.append((~torch.isfinite(largest)).float().to(session.device))
    return [name for name, share in zip(groups, session.mean(torch.stack(flags)).tolist(), strict=True) if share > 0]


# The EMA -------------------------------------------------------------------------------------------------------------


def decay_at(n: int, decay: float) -> float:
    """min(decay, (1 + n) / (10 + n)) at the average's n-th update: a long decay must not keep its start for ever."""
    return min(decay, (1 + n) / (10 + n))


def warmed_up_average(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor | int], None]:
    """Return ``average(averaged, current, n)``, the n-th update of ``averaged`` in place, for `AveragedModel`."""

    def average(averaged: list[Tensor], current: list[Tensor], n: Tensor | int) -> None:
        get_ema_multi_avg_fn(decay_at(int(n), decay))(averaged, current, n)

    return average


@dataclass
class Average:
    """The average of named weights. ``updates`` is n, part of a checkpoint."""

    decay: float
    values: dict[str, Tensor]
    updates: int = 0

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], decay: float) -> "Average":
        """An average that begins at ``weights``."""
        return cls(decay, {name: value.detach().clone() for name, value in weights.items()})

    def update(self, weights: Mapping[str, Tensor]) -> None:
        self.updates += 1
        current = [weights[name].detach() for name in self.values]
        warmed_up_average(self.decay)(list(self.values.values()), current, self.updates)

    @torch.no_grad()
    def _swap(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            raw = weight.clone()
            weight.copy_(self.values[name])
            self.values[name].copy_(raw)

    @contextlib.contextmanager
    def in_place_of(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The average stands in ``weights`` inside; the raw ones come back afterwards, bit for bit."""
        self._swap(weights)
        try:
            yield
        finally:
            self._swap(weights)
