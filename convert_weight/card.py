"""The model card of a pipeline that is shared: what it is, how it is loaded, how it was made and judged."""

from collections.abc import Mapping
from pathlib import Path

from train_cc.io.fields import flag_of, marked
from train_cc.io.figures import columns_of, markdown_table, with_arrow
from train_cc.setup.arguments import GROUPS

USE = """\
---
library_name: diffusers
tags: [dmdr, sit, class-conditional, distillation]
---

# {name}

A class-conditional SiT generator of {size} x {size} {kind}, {classes} classes. It makes an image in {steps}.
It was distilled from a flow model by distribution matching ([DMDR](https://arxiv.org/abs/2511.13649)).

## Use

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
image = pipeline(class_labels={example}).images[0]
```

`class_labels` takes a number from 0 to {last}{named}, or a list of them.
`trust_remote_code=True` runs `pipeline.py` and `generator/sit.py` of this repository. They need torch, timm, diffusers
and pillow.
"""


def model_card(
    name: str,
    config: Mapping,
    names: list[str] | None,
    recorded: Mapping,
    hashes: Mapping[str, str],
    figures: Mapping | None,
) -> str:
    """Markdown. ``name``: on the hub, or the folder's. ``config``: the generator's. ``recorded``: the run's arguments.

    ``hashes``: what -> SHA-256. ``figures``: what `read_figures` gave.
    """
    steps, classes = recorded["num_steps"], config["num_classes"]
    label = classes // 5
    use = USE.format(
        name=name,
        size=config["input_size"],
        kind="pixels" if config["in_channels"] in (1, 3) else "latents",
        classes=classes,
        steps="one step" if steps == 1 else f"{steps} steps",
        example=f'"{names[label].split(", ")[0]}"' if names else label,
        last=classes - 1,
        named=", or a name of a class" if names else "",
    )
    names_of = [name for name in marked("recipe", *GROUPS.values()) if name not in ("reward", "tilt")]
    rewards = [f"{kind}, weight {weight:g}" for kind, weight, *_ in recorded.get("reward") or []]
    recipe = [[f"`{flag_of(key)}`", recorded[key]] for key in names_of if recorded.get(key) is not None]
    recipe += [["`--reward`", "; ".join(rewards)]] if rewards else []
    parts = [use, "## Recipe\n", markdown_table(["flag", "value"], recipe), ""]
    files = [[what, f"`{sha}`"] for what, sha in hashes.items()]
    parts += ["## Origin\n", markdown_table(["file", "SHA-256"], files), ""]
    if figures is not None:
        parts += ["## Figures\n", *(figures_table(space) for space in (figures, *figures.get("more_spaces", [])))]
    return "\n".join(parts)


def figures_table(results: Mapping) -> str:
    """A table of the rows of a results.json in one feature space, named without the path of its network."""
    rows = results["rows"]
    columns = columns_of(rows.values())
    lines = [
        [name, row.get("images", ""), *(f"{row['figures'][c]:.3g}" if c in row["figures"] else "" for c in columns)]
        for name, row in rows.items()
    ]
    kind, _, source = str(results.get("features", "")).partition(":")
    space = f"{kind}:{Path(source).name}" if source else kind
    head = ["", "images", *(with_arrow(column) for column in columns)]
    return (f"Features: {space}\n\n" if space else "") + markdown_table(head, lines) + "\n"
