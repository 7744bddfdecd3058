"""What the figures of an update are made of: bands of t, gradients at x0, sizes of updates. Pure tensors, no sync."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Lower edges of the four bands of t, in hundredths, as in the names of the columns.
BANDS = (0, 25, 50, 75)


BY_BAND = "_by_band"  # ends the name of a figure that comes by band


def band_columns(name: str) -> tuple[str, ...]:
    """The columns of figure ``name`` by band, such as score_gap_t00."""
    return tuple(f"{name}_t{low:02}" for low in BANDS)


def by_band(values: Tensor, t: Tensor) -> Tensor:
    """Sums and counts of ``values`` (B,) in the four bands of t (B,): (2, 4). They add up over batches."""
    band = (t * len(BANDS)).long().clamp(max=len(BANDS) - 1)
    both = torch.stack([values.float(), torch.ones_like(values, dtype=torch.float32)])
    return torch.zeros(2, len(BANDS), device=t.device).index_add_(1, band, both)


def columns(figures: dict[str, float | list[list[float]]]) -> dict[str, float | None]:
    """A row of the log: a figure by band becomes four columns, its sums by its counts; None where no sample was."""
    row: dict[str, float | None] = {}
    for name, value in figures.items():
        if name.endswith(BY_BAND):
            means = [each / count if count > 0 else None for each, count in zip(*value, strict=True)]
            row |= zip(band_columns(name.removesuffix(BY_BAND)), means, strict=True)
        else:
            row[name] = value
    return row


def compare_gradients(of_matching: Tensor, of_reward: Tensor) -> dict[str, Tensor]:
    """Norms at x0 of the gradients of matching and of the weighted reward, any one shape, and their cosine."""
    return {
        "grad_norm_dmd_x0": of_matching.norm(),
        "grad_norm_reward_x0": of_reward.norm(),
        "grad_cosine_x0": torch.cosine_similarity(of_matching.flatten(), of_reward.flatten(), dim=0),
    }


def gathered(figure: Tensor) -> Tensor:
    """What sharded tensors add up to, as a plain tensor; any other is as it is."""
    return figure.full_tensor() if isinstance(figure, DTensor) else figure


def whole_norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all of them together, 0-d, whether they are sharded or not."""
    return gathered(torch.nn.utils.get_total_norm(tensors))


class UpdateSize:
    """|new - old| / |old| of what is trained in the middle block: an update's size against its weights.

    One block, since a copy of all weights would cost memory and time; the same one in every update.
    """

    def __init__(self, blocks: nn.ModuleList):
        block = blocks[len(blocks) // 2]
        self._watched = [p for p in block.parameters() if p.requires_grad]
        self._before = [p.detach().clone() for p in self._watched]

    def ratio(self) -> Tensor:
        """To be called after the update. -> 0-d."""
        moved = [p.detach() - before for p, before in zip(self._watched, self._before, strict=True)]
        return whole_norm(moved) / whole_norm(self._before)
