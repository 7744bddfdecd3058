"""What the figures of an update are made of: bands of t, gradients at x0, sizes of updates. Pure tensors, no sync."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Lower edges of the four bands of t, in hundredths, as in the names of the columns.
BANDS = (0, 25, 50, 75)


def by_band(name: str, values: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Sums and counts of ``values`` (B,) in the four bands of t (B,): they add up over batches, turns and processes."""
    band = (t * len(BANDS)).long().clamp(max=len(BANDS) - 1)
    sums = torch.zeros(len(BANDS), device=t.device).index_add_(0, band, values.float())
    counts = torch.zeros(len(BANDS), device=t.device).index_add_(0, band, torch.ones_like(values, dtype=torch.float32))
    named = {f"{name}_t{low:02}": value for low, value in zip(BANDS, sums, strict=True)}
    return named | {f"{name}_n{low:02}": value for low, value in zip(BANDS, counts, strict=True)}


def band_means(figures: dict[str, float]) -> dict[str, float | None]:
    """Sums by their counts; None where a band had no sample."""
    means = dict(figures)
    for low in BANDS:
        for key in [key for key in figures if key.endswith(f"_n{low:02}")]:
            name, count = key.replace(f"_n{low:02}", f"_t{low:02}"), means.pop(key)
            means[name] = figures[name] / count if count > 0 else None
    return means


def compare_gradients(direction: Tensor, of_reward: Tensor) -> dict[str, Tensor]:
    """Norms at x0 of the gradients of loss_dmd (direction / numel) and of the weighted reward loss; their cosine."""
    of_dmd, of_reward = direction.flatten() / direction.numel(), of_reward.flatten()
    return {
        "grad_norm_dmd_x0": of_dmd.norm(),
        "grad_norm_reward_x0": of_reward.norm(),
        "grad_cosine_x0": torch.cosine_similarity(of_dmd, of_reward, dim=0),
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
