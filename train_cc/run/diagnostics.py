"""Figures of an update: bands of t, gradients at x0, sizes of updates. Pure tensors, no sync."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train_cc.run.logbook import BANDS, OVERFLOW


def by_band(values: Tensor, t: Tensor) -> Tensor:
    """Sums and counts of ``values`` (B,) in the four bands of t (B,): (2, 4). They add up over batches."""
    band = (t * len(BANDS)).long().clamp(max=len(BANDS) - 1)
    both = torch.stack([values.float(), torch.ones_like(values, dtype=torch.float32)])
    return torch.zeros(2, len(BANDS), device=t.device).index_add_(1, band, both)


def compare_gradients(name: str, of_matching: Tensor, of_term: Tensor) -> dict[str, Tensor]:
    """Norms at x0 of the gradients of matching and of the weighted term ``name``, of one shape, and their cosine."""
    return {
        "grad_norm_dmd_x0": of_matching.norm(),
        f"grad_norm_{name}_x0": of_term.norm(),
        f"grad_cosine_{name}_x0": torch.cosine_similarity(of_matching.flatten(), of_term.flatten(), dim=0),
    }


def finite(values: Tensor) -> Tensor:
    """True if all of ``values`` are finite numbers, 0-d on their device."""
    return values.isfinite().all()


def first_overflow(**stages: Tensor) -> dict[str, Tensor]:
    """Figures by stage: 1 for the first of ``stages`` (0-d, True if finite) that is not finite, 0 for all others.

    ``stages`` come in the order of computation: an overflow is the fault of the network in which it begins.
    """
    figures, good = {}, None
    for name, now in stages.items():
        figures[f"{OVERFLOW}{name}"] = (~now if good is None else good & ~now).float()
        good = now if good is None else good & now
    return figures


def gathered(figure: Tensor) -> Tensor:
    """The whole of a sharded figure as a plain tensor; any other is returned as it is."""
    return figure.full_tensor() if isinstance(figure, DTensor) else figure


def whole_norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all of them together, 0-d, whether they are sharded or not."""
    return gathered(torch.nn.utils.get_total_norm(tensors))


class UpdateSize:
    """|new - old| / |old| of the trained weights of one block: an update's size against its weights.

    The middle one of the trained blocks, the same in every update: a copy of all weights would cost memory and time.
    """

    def __init__(self, blocks: Iterable[nn.Module]):
        trained = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
        trained = [weights for weights in trained if weights]
        self._watched = trained[len(trained) // 2]
        self._before = [p.detach().clone() for p in self._watched]

    def ratio(self) -> Tensor:
        """To be called after the update. -> 0-d."""
        moved = [p.detach() - before for p, before in zip(self._watched, self._before, strict=True)]
        return whole_norm(moved) / whole_norm(self._before)
