"""A state dict from outside: names, shapes, kinds and values are checked before a network takes them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train_cc.io.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"  # of a model folder, beside config.json
GENERATION_CONFIG = "generation_config.json"  # of it too: how a generator is sampled, what rewarded it, its latents


def fit(
    own: Mapping[str, Sequence[int]],
    state: Mapping[str, "Tensor | Sequence[int]"],
    source: Path | str,
    hint: str = "",
) -> None:
    """Raise `InputError` unless ``state``, of tensors or their shapes, has exactly the names and shapes of ``own``."""
    shapes = {name: tuple(getattr(value, "shape", value)) for name, value in state.items()}
    problems = {
        "missing": sorted(own.keys() - shapes.keys()),
        "unexpected": sorted(map(str, shapes.keys() - own.keys())),
        "other shapes": [
            f"{name} {shapes[name]}, expected {tuple(own[name])}"
            for name in sorted(own.keys() & shapes.keys())
            if shapes[name] != tuple(own[name])
        ],
    }
    words = [f"{kind}: {', '.join(name[:120] for name in names[:6])}" for kind, names in problems.items() if names]
    if words:
        raise InputError(f"{source} does not fit{f' ({hint})' if hint else ''}: {'; '.join(words)}")


def require_finite(state: Mapping[str, "Tensor"], source: Path | str) -> None:
    """No tensor of ``state`` holds NaN or infinity. Raises `InputError` that names the first that does."""
    import torch

    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{source}: {name} holds NaN or infinity; weights that are not finite are not used")


def require_tensors(content: object, source: Path | str, expected: str) -> dict[str, "Tensor"]:
    """``content`` is a dict of named plain tensors. -> it. Raises `InputError`."""
    import torch

    if not isinstance(content, Mapping) or not content:
        kind = "nothing" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise InputError(f"{source} holds {kind}; {expected} is expected")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            problem = f"it holds {str(name)[:80]!r}, a {type(value).__name__}"
            raise InputError(f"{source} is no bare state dict of tensors: {problem}; {expected} is expected")
        plain = value.layout == torch.strided and not (value.is_nested or value.is_quantized or value.is_complex())
        if not plain or value.device.type != "cpu":
            problem = "nested" if value.is_nested else f"{value.dtype}, {value.layout}, on {value.device.type}"
            raise InputError(f"{source}: {name} is {problem}; plain real numbers are expected")
        if value.nbytes > value.untyped_storage().nbytes():
            raise InputError(f"{source}: {name} names {value.nbytes:,} bytes and holds fewer")
    return dict(content)


def block_count(names: Iterable[str], source: Path | str) -> int:
    """N of the ``blocks.0.`` to ``blocks.(N - 1).`` in ``names``. Raises `InputError` where one is missing."""
    blocks = {match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))}
    if far := sorted(number for number in blocks if len(number) > 4):
        raise InputError(f"{source} has a block {far[0][:40]}; 0 to 9999 are possible")
    numbers = {int(number) for number in blocks}
    if numbers != set(range(len(numbers))):
        gaps = sorted(set(range(max(numbers))) - numbers)
        raise InputError(f"{source}: blocks {gaps[:8]} are missing of 0 to {max(numbers)}")
    return len(numbers)


def load_weights(
    module: "nn.Module", state: Mapping[str, "Tensor"], source: Path | str, hint: str = "", partly: bool = False
) -> None:
    """``state`` into ``module``, which may be on the meta device: names, shapes and kinds fit exactly, values finite.

    Values become copies in the dtype of what they replace: of a mapped file, one view left would keep all of it in
    memory. ``partly``: what ``state`` does not name stays as it is. Raises `InputError`.
    """
    require_tensors(state, source, "a state dict")
    own = module.state_dict()
    if partly:
        own = {name: value for name, value in own.items() if name in state}
    fit({name: value.shape for name, value in own.items()}, state, source, hint)
    loaded = {}
    for name, value in state.items():
        if value.is_floating_point() != own[name].is_floating_point():
            raise InputError(f"{source}: {name} is {value.dtype}, {own[name].dtype} is expected")
        loaded[name] = value.to(own[name].dtype, copy=True).contiguous()
    require_finite(loaded, source)
    module.load_state_dict(loaded, assign=True, strict=not partly)
