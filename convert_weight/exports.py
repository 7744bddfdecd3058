"""Writing a generator folder, a pipeline and an adapter, each read again and compared: what export_generator runs."""

import argparse
import contextlib
import json
import shutil
from pathlib import Path

import diffusers
import torch
from peft import PeftModel
from torch import nn

from convert_weight import pipeline
from convert_weight.card import model_card
from train_cc.distillation.state import generator_from, generator_state, sampling_of, weights_kind
from train_cc.draws import Draws
from train_cc.io.class_names import class_names
from train_cc.io.errors import InputError
from train_cc.io.figures import read_figures
from train_cc.io.products import need_space, product, record_of, write_atomically
from train_cc.io.read import sha256
from train_cc.models import network
from train_cc.models.generator import generator_lora_rank, save_generator
from train_cc.models.lora import GENERATOR_TARGETS, save_adapter
from train_cc.models.sit import SiT, check_sit_config
from train_cc.models.vae import load_vae, require_decoder, require_latent_space
from train_cc.run.checkpoint import Checkpoint, open_checkpoint

INDEX = "model_index.json"
CARD = "README.md"
# What the pipeline's own files are named, and the modules that they are copies of.
CODE = {"pipeline.py": pipeline, "generator/sit.py": network}


@torch.no_grad()
def require_same_outputs(before: SiT, after: nn.Module, tolerance: float = 0) -> None:
    """Raises `InputError` if the velocities differ, by more than ``tolerance`` times the largest."""
    draws = Draws(0)
    x, y = draws.noise(2, *before.sample_shape), draws.integers(before.null_class, 2)
    for time in (1.0, 0.5):
        t = torch.full((2,), time)
        expected, again = before(x, t, y), after(x, t, y)
        if (again - expected).abs().max() > tolerance * expected.abs().max():
            raise InputError("what was written gives other outputs than the checkpoint's: is the disk failing?")


def save_lora(generator: SiT, checkpoint: Checkpoint, weights: str, teacher: Path, folder: Path) -> None:
    """Read again, on the teacher, its outputs are ``generator``'s, where it is merged, to the rounding of fp32."""
    recorded = checkpoint.units["arguments"]
    rank = generator_lora_rank(recorded["use_lora_gen"], recorded["lora_rank"])
    save_adapter(generator_state(checkpoint, weights), rank, GENERATOR_TARGETS, str(teacher), folder)
    adapted = PeftModel.from_pretrained(SiT.from_pretrained(teacher), folder).eval()
    require_same_outputs(generator, adapted, 1e-4)


def save_folder(generator: SiT, sampling: dict, provenance: dict, folder: Path) -> None:
    """A generator folder, read again and compared."""
    save_generator(generator, folder, sampling["num_inference_steps"], sampling["timestep_shift"], **provenance)
    require_same_outputs(generator, SiT.from_pretrained(folder))


def save_pipeline(
    generator: SiT, vae: nn.Module | None, sampling: dict, names: list[str] | None, provenance: dict, folder: Path
) -> None:
    """A folder that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` reads without this project.

    It holds the weights and two files of code. ``names``: of the classes.
    """
    save_folder(generator, sampling, provenance, folder / "generator")
    if vae is not None:
        vae.save_pretrained(folder / "vae")
    for name, module in CODE.items():
        shutil.copyfile(module.__file__, folder / name)
    index = {
        "_class_name": ["pipeline", "DMDRPipeline"],
        "_diffusers_version": diffusers.__version__,
        "generator": ["sit", "SiT"],
        "vae": [None, None] if vae is None else ["diffusers", "AutoencoderKL"],
        **sampling,
        "id2label": {str(number): name for number, name in enumerate(names)} if names else None,
    }
    write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")


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
    if args.pipeline is not None:
        vae, names = vae_of(args, checkpoint, recorded), names_of(args, checkpoint, teacher)
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
                save_lora(generator, checkpoint, args.weights, teacher, fresh)
            else:
                shared = {name: value for name, value in provenance.items() if name != "run"}  # a path of this machine
                save_pipeline(generator, vae, sampling, names, shared, fresh)
                name, hashes = args.push_to_hub or folder.name, hashes_of(fresh, content, provenance)
                card = model_card(name, generator.config, names, recorded, hashes, figures)
                write_atomically(fresh / CARD, card)
    return checkpoint.step


def vae_of(args: argparse.Namespace, checkpoint: Checkpoint, recorded: dict) -> nn.Module | None:
    """The pipeline's; None in pixel space."""
    name, config = args.vae or recorded["vae"], check_sit_config(checkpoint.units["model_config"], args.checkpoint)
    require_decoder(config["in_channels"], name, args.checkpoint)
    if name == "none":
        return None
    vae = load_vae(name)
    require_latent_space(checkpoint.units.get("latent_space_sha256"), vae, name)
    return vae


def names_of(args: argparse.Namespace, checkpoint: Checkpoint, teacher: Path) -> list[str] | None:
    """Names of the classes; the teacher's record names its data set, on the machine that trained it."""
    dataset = record_of(teacher).get("arguments", {}).get("dataset")
    return class_names(args.class_names, checkpoint.units["model_config"]["num_classes"], dataset)


def hashes_of(folder: Path, content: dict, provenance: dict) -> dict[str, str]:
    """SHA-256 for the card: of the weights in ``folder``, and of their sources."""
    own = {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*.safetensors"))}
    made_from = {"the checkpoint": content["inputs"]["checkpoint"], "the teacher": provenance["teacher_sha256"]}
    return own | made_from | {f"reward {n + 1}": each for n, each in enumerate(provenance["rewards_sha256"])}
