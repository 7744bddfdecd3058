"""The products of export_generator: a generator folder, a pipeline with its model card, an adapter, each compared."""

import argparse
import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from convert_weight import pipeline
from train_cc.distillation.state import generator_from, generator_state, sampling_of, weights_kind
from train_cc.draws import Draws
from train_cc.io.class_names import class_names
from train_cc.io.errors import InputError
from train_cc.io.fields import flag_of, marked
from train_cc.io.figures import columns_of, markdown_table, read_figures, with_arrow
from train_cc.io.products import need_space, product, record_of, write_atomically
from train_cc.io.read import sha256
from train_cc.models.backbone import CODE, USUAL, Network, check_config, load_network, trust_code
from train_cc.models.generator import generator_lora_rank, save_generator
from train_cc.models.lora import save_adapter
from train_cc.models.vae import load_vae, require_decoder, require_latent_space
from train_cc.run.checkpoint import open_checkpoint
from train_cc.setup.arguments import GROUPS

# A pipeline is loaded and sampled where nothing of this project is: folder, file for its samples.
LOADED = """
import sys, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.generator.requires_grad_(False)  # as what it is compared with: kernels, and so rounding, may depend on it
torch.save(pipeline([0, 0], generator=torch.Generator().manual_seed(0), output_type="latent").images, sys.argv[2])
"""


@torch.no_grad()
def require_same_outputs(before: Network, after: nn.Module, tolerance: float = 0) -> None:
    """Raises `InputError` if the velocities differ, by more than ``tolerance`` times the largest."""
    draws = Draws(0)
    x, y = draws.noise(2, *before.sample_shape), draws.integers(before.null_class, 2)
    for time in (1.0, 0.5):
        t = torch.full((2,), time)
        expected, again = before(x, t, y), after(x, t, y)
        if (again - expected).abs().max() > tolerance * expected.abs().max():
            raise InputError("what was written gives other outputs than the checkpoint's: is the disk failing?")


def save_folder(generator: Network, sampling: dict, provenance: dict, folder: Path) -> None:
    """A generator folder, read again and compared."""
    save_generator(generator, folder, sampling["num_inference_steps"], sampling["timestep_shift"], **provenance)
    require_same_outputs(generator, load_network(folder).requires_grad_(False))


def save_pipeline(
    generator: Network, vae: nn.Module | None, sampling: dict, names: list[str] | None, provenance: dict, folder: Path
) -> None:
    """A folder that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` reads without this project.

    It holds the weights and two files of code. ``names``: of the classes.
    """
    save_folder(generator, sampling, provenance, folder / "generator")
    if vae is not None:
        vae.save_pretrained(folder / "vae")
    shutil.copyfile(pipeline.__file__, folder / "pipeline.py")
    write_atomically(folder / "generator" / CODE, generator.code)
    index = {
        "_class_name": ["pipeline", "DMDRPipeline"],
        "_diffusers_version": diffusers.__version__,
        "generator": ["network", type(generator).__name__],
        "vae": [None, None] if vae is None else ["diffusers", "AutoencoderKL"],
        **sampling,
        "id2label": {str(number): name for number, name in enumerate(names)} if names else None,
    }
    write_atomically(folder / "model_index.json", json.dumps(index, indent=2) + "\n")


def require_same_samples(generator: Network, vae: nn.Module | None, sampling: dict, folder: Path) -> None:
    """The pipeline in ``folder`` samples in a process of its own what ``generator`` does. Raises `InputError`."""
    own = pipeline.DMDRPipeline(generator, vae, sampling["timestep_shift"], sampling["num_inference_steps"])
    expected = own([0, 0], generator=torch.Generator().manual_seed(0), output_type="latent").images
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-I", "-c", LOADED, str(folder.absolute()), f"{cache}/samples.pt"]
        process = subprocess.run(command, cwd=cache, env=os.environ | {"HF_MODULES_CACHE": cache}, capture_output=True)
        if process.returncode:
            last = process.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise InputError(f"the pipeline that was written cannot be loaded: {''.join(last)}")
        samples = torch.load(f"{cache}/samples.pt", weights_only=True)
    if (samples - expected).abs().max() > 1e-4 * expected.abs().max():
        raise InputError("the pipeline that was written gives other samples than the checkpoint: is the disk failing?")


# The model card -----------------------------------------------------------------------------------------------------

USE = """\
---
library_name: diffusers
tags: [dmdr, {tag}, class-conditional, distillation]
---

# {name}

A class-conditional {network} generator of {size} x {size} {kind}, {classes} classes. It makes an image in {steps}.
It was distilled from a flow model by distribution matching ([DMDR](https://arxiv.org/abs/2511.13649)).

## Use

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
image = pipeline(class_labels={example}).images[0]
```

`class_labels` takes a number from 0 to {last}{named}, or a list of them.
`trust_remote_code=True` runs `pipeline.py` and `generator/network.py` of this repository. They need torch, timm,
diffusers and pillow.
"""


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
    head = ["", "images", *map(with_arrow, columns)]
    return (f"Features: {space}\n\n" if space else "") + markdown_table(head, lines) + "\n"


def model_card(
    name: str, config: Mapping, names: list[str] | None, recorded: Mapping, hashes: Mapping, figures: Mapping | None
) -> str:
    """Markdown. ``name``: on the hub, or the folder's. ``config``: the generator's. ``recorded``: the run's arguments.

    ``hashes``: file -> SHA-256. ``figures``: the content of a results.json.
    """
    steps, classes = recorded["num_steps"], config["num_classes"]
    label = classes // 5
    use = USE.format(
        name=name,
        network=config.get("_class_name", USUAL),
        tag=config.get("_class_name", USUAL).lower(),
        size=config["input_size"],
        kind="pixels" if config["in_channels"] in (1, 3) else "latents",
        classes=classes,
        steps="one step" if steps == 1 else f"{steps} steps",
        example=f'"{names[label].split(", ")[0]}"' if names else label,
        last=classes - 1,
        named=", or a name of a class" if names else "",
    )
    values = {key: recorded.get(key) for key in marked("recipe", *GROUPS.values()) if key not in ("reward", "tilt")}
    recipe = [[f"`{flag_of(key)}`", value] for key, value in values.items() if value is not None]
    if rewards := [f"{kind}, weight {weight:g}" for kind, weight, *_ in recorded.get("reward") or []]:
        recipe.append(["`--reward`", "; ".join(rewards)])
    if recorded.get("gan_data"):
        use += f"It was trained on real data too, by a GAN: `{Path(recorded['gan_data']).name}`.\n"
    files = [[file, f"`{sha}`"] for file, sha in hashes.items()]
    parts = [use, "## Recipe\n", markdown_table(["flag", "value"], recipe), ""]
    parts += ["## Origin\n", markdown_table(["file", "SHA-256"], files), ""]
    if figures is not None:
        parts += ["## Figures\n", *map(figures_table, (figures, *figures.get("more_spaces", [])))]
    return "\n".join(parts)


# The command -----------------------------------------------------------------------------------------------------


def export(args: argparse.Namespace, targets: dict[str, Path], content: dict) -> int:
    """Each of ``targets``, flag -> folder, with record ``content``. -> the checkpoint's step.

    All are renamed when all are written and verified. Raises `InputError`.
    """
    checkpoint = open_checkpoint(args.checkpoint)
    recorded = checkpoint.units["arguments"]
    if args.adapter is not None and not recorded["use_lora_gen"]:
        raise InputError(f"--adapter: {args.checkpoint} has no LoRA of the generator; it was trained whole")
    provenance = {
        "run": recorded.get("output_dir"),
        "step": checkpoint.step,
        "weights": weights_kind(checkpoint, args.weights),
        "teacher_sha256": checkpoint.units["teacher_sha256"],
        "rewards_sha256": checkpoint.units.get("rewards_sha256", []),
        "latent_space_sha256": checkpoint.units.get("latent_space_sha256"),
    }
    teacher, sampling = args.teacher or Path(recorded["teacher"]), sampling_of(recorded)
    if args.trust_teacher_code:
        trust_code(teacher)
    if args.pipeline is not None:
        config = check_config(checkpoint.units["model_config"], args.checkpoint)
        vae_name, vae = args.vae or recorded["vae"], None
        require_decoder(config["in_channels"], vae_name, args.checkpoint)
        if vae_name != "none":
            vae = load_vae(vae_name)
            require_latent_space(provenance["latent_space_sha256"], vae, vae_name)
        # The teacher's record names its data set, on the machine that trained it.
        dataset = record_of(teacher).get("arguments", {}).get("dataset")
        names = class_names(args.class_names, config["num_classes"], dataset)
        figures = None if args.results is None else read_figures(args.results)
    generator = generator_from(checkpoint, args.weights, args.teacher)
    size = sum(value.nbytes for value in generator.state_dict().values())
    with contextlib.ExitStack() as whole:
        for flag, folder in targets.items():
            need_space(folder.parent, size)
            place = whole.enter_context(product(folder, content, args.overwrite, flag))
            if place is None:
                continue
            fresh = place.new
            if flag == "--output-dir":
                save_folder(generator, sampling, provenance, fresh)
            elif flag == "--adapter":
                rank = generator_lora_rank(True, recorded["lora_rank"])
                save_adapter(
                    generator_state(checkpoint, args.weights), rank, generator.generator_targets, str(teacher), fresh
                )
                adapted = PeftModel.from_pretrained(load_network(teacher), fresh).eval()
                require_same_outputs(generator, adapted, 1e-4)  # ``generator`` has it merged: equal but for rounding
            else:
                shared = {name: value for name, value in provenance.items() if name != "run"}  # a path of this machine
                if args.half:  # rounded: fp16 files then hold the same values
                    generator, vae = (network and copy.deepcopy(network).half().float() for network in (generator, vae))
                save_pipeline(generator, vae, sampling, names, shared, fresh)
                for path in fresh.rglob("*.safetensors") if args.half else ():
                    save_file({name: t.half() for name, t in load_file(path).items()}, path, {"format": "pt"})
                require_same_samples(generator, vae, sampling, fresh)
                hashes = {str(path.relative_to(fresh)): sha256(path) for path in sorted(fresh.rglob("*.safetensors"))}
                hashes |= {"the checkpoint": content["inputs"]["checkpoint"], "the teacher": shared["teacher_sha256"]}
                hashes |= {f"reward {n + 1}": each for n, each in enumerate(shared["rewards_sha256"])}
                name = args.push_to_hub or folder.name
                card = model_card(name, config, names, recorded, hashes, figures)
                write_atomically(fresh / "README.md", card)
    return checkpoint.step
