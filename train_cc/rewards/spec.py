"""What a command line says of a reward: its kind, weight and source. Needs no torch."""

from typing import NamedTuple

from train_cc.io.errors import InputError

# Kind -> what its source is; None: it takes none.
KINDS = {
    "dinov2": None,
    "classifier": "a folder of pretrain/classifier.py, or a timm name",
    "frechet": "a statistics file of evaluation/statistics.py",
    "python": "FILE.py:FUNCTION",
}
TILT_KINDS = ("dinov2", "classifier", "python")


class RewardSpec(NamedTuple):
    """``weight`` of a reward, or beta of a tilt."""

    kind: str
    weight: float
    source: str | None = None

    @property
    def name(self) -> str:
        """As in the columns of the log: the function's own name, or the kind."""
        return self.source.rpartition(":")[2] if self.kind == "python" else self.kind


def named_apart(specs: list[RewardSpec]) -> list[str]:
    """A name for each: a second one of a kind is classifier_2."""
    names: list[str] = []
    for spec in specs:
        name, number = spec.name, 1
        while name in names:
            number += 1
            name = f"{spec.name}_{number}"
        names.append(name)
    return names


def require_sense(rewards: list[RewardSpec], tilts: list[RewardSpec]) -> None:
    """No reward stands twice, nor as a reward and a tilt. Raises `InputError`."""
    seen: set[tuple[str, str | None]] = set()
    for spec in [*rewards, *tilts]:
        key = spec.kind, spec.source
        if key in seen:
            told = " ".join(filter(None, key))
            raise InputError(f"{told} is given twice as a reward or a tilt; once is expected")
        seen.add(key)
