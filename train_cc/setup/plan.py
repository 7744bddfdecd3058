"""What a command would do: arguments, images, checkpoints, parameters, memory (`--dry-run`).

Inputs are checked as a run checks them, the teacher's weights by their header alone.

Weights, gradients and optimizer states are exact. Activations are measured: what autograd keeps for backward in models
of depth 1 and 2 at the true width, extrapolated over depth and batch; reward at a quarter of the side, by area.
Attention is taken as fused, as on a GPU.
"""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from train_cc.io.errors import InputError
from train_cc.models.classifier import ImageClassifier
from train_cc.models.dinov2 import IMAGE_SIZE, PATCH_SIZE, DINOv2Classifier, official_file
from train_cc.models.estimator import ScoreEstimator
from train_cc.models.features import FeatureSpace, load_space
from train_cc.models.generator import generator_lora_rank
from train_cc.models.lora import GENERATOR_TARGETS, add_lora, hold_frozen_in
from train_cc.models.sit import WEIGHTS_NAME, SiT, read_sit_config
from train_cc.models.vae import VAEDecoder, load_vae, new_vae, require_decoder, vae_files
from train_cc.rewards.build import require_judge_fits
from train_cc.rewards.python_file import load_module
from train_cc.rewards.spec import named_apart
from train_cc.rewards.statistics import read_statistics
from train_cc.run.checkpoint import newest_intact, open_checkpoint
from train_cc.run.session import COMPUTE_DTYPES, resolve_precision, sharding_asked
from train_cc.setup.arguments import rewards_of

GIB = 2**30
DINOV2_SIZES = {"vits14": (384, 12), "vitb14": (768, 12), "vitl14": (1024, 24)}  # width, depth


def count(model: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def weight_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor], autocast: AbstractContextManager) -> int:
    """Bytes that autograd keeps for the backward of ``forward``, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        held = forward()  # kept alive until all addresses have been seen
    total = sum(kept.values())
    del held
    return total


def extrapolate(measure: Callable[[int, int], int], depth: int, batch: int) -> int:
    """``measure(depth, batch)`` at depths and batches of 1 and 2 -> linear in both."""
    one, deeper, wider, both = measure(1, 1), measure(2, 1), measure(1, 2), measure(2, 2)
    per_block, per_sample = deeper - one, wider - one
    per_both = both - deeper - wider + one
    d, b = depth - 1, batch - 1
    return one + d * per_block + b * per_sample + d * b * per_both


def network_activations(config: dict, args: argparse.Namespace, role: str, dtype: torch.dtype) -> int:
    """Of one training forward and backward of the generator or the estimator at ``--batch-size``."""

    def measure(depth: int, batch: int, checkpointed: bool = args.gradient_checkpointing) -> int:
        model = SiT(**{**config, "depth": depth})
        if role == "estimator":
            model = ScoreEstimator(model, args.lora_rank, args.lora_init_spread)
            network = model.network
        elif args.use_lora_gen:
            add_lora(model, generator_lora_rank(True, args.lora_rank), GENERATOR_TARGETS, None, 0)
            network = model
        else:
            network = model
        if checkpointed:
            network.enable_gradient_checkpointing()
        hold_frozen_in(model, dtype)
        x, t, y = torch.zeros(batch, *network.sample_shape), torch.zeros(batch), torch.zeros(batch, dtype=torch.long)
        scale = (args.lora_scale_fake,) if role == "estimator" else ()
        return kept_bytes(model, lambda: model(x, t, y, *scale), _autocast(dtype))

    total = extrapolate(measure, config["depth"], args.batch_size)
    if args.gradient_checkpointing:  # and what recomputing a block holds while its backward runs
        plain = partial(measure, checkpointed=False)
        total += extrapolate(plain, 2, args.batch_size) - extrapolate(plain, 1, args.batch_size)
    return total


def _autocast(dtype: torch.dtype) -> AbstractContextManager:
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


def like(dtype: torch.dtype) -> torch.dtype:
    """A dtype of the same size whose convolutions a CPU has."""
    return torch.bfloat16 if dtype.itemsize == 2 else torch.float32


def decoder_cost(decoder: VAEDecoder, config: dict, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """(parameters, activation bytes) of ``decoder``: measured at a quarter of the side, by area."""
    decoder = decoder.to(like(dtype))
    side = max(1, config["input_size"] // 4)
    z = torch.zeros(1, config["in_channels"], side, side, requires_grad=True)
    kept = kept_bytes(decoder, lambda: decoder(z), nullcontext())
    return count(decoder), kept * batch * (config["input_size"] // side) ** 2


def dinov2_cost(width: int, depth: int, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """(parameters, activation bytes) of a DINOv2 of this size with its 4-layer head."""
    from timm.models.vision_transformer import VisionTransformer

    def build(depth: int) -> VisionTransformer:
        options = {"embed_dim": width, "num_heads": width // 64, "init_values": 1e-5, "num_classes": 0}
        model = VisionTransformer(IMAGE_SIZE, PATCH_SIZE, depth=depth, **options)
        return model.requires_grad_(False).to(like(dtype))

    def measure(depth: int, batch: int) -> int:
        model = build(depth)
        images = torch.zeros(batch, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=like(dtype), requires_grad=True)
        return kept_bytes(model, lambda: model(images), nullcontext())

    with torch.device("meta"):
        parameters = count(build(depth)) + 1000 * (5 * width + 1)
    return parameters, extrapolate(measure, depth, batch)


def judge_cost(source: nn.Module | str, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """(parameters, activation bytes) of a classifier; ``source``: a DINOv2's URL where it is not here yet.

    A DINOv2's size is that which the name says, ViT-L where it says none.
    """
    if isinstance(source, str):
        return dinov2_cost(
            *next((size for name, size in DINOV2_SIZES.items() if name in source), (1024, 24)), batch, dtype
        )
    if isinstance(source, DINOv2Classifier):
        return dinov2_cost(source.backbone.embed_dim, len(source.backbone.blocks), batch, dtype)
    model = source.requires_grad_(False).eval().to(like(dtype))
    side = model.preprocessing["image_size"] if isinstance(model, FeatureSpace) else model.config["image_size"]
    images = torch.zeros(1, model.in_channels, side, side, requires_grad=True)
    return count(model), batch * kept_bytes(model, lambda: model(images), nullcontext())


# The inputs, read as a run reads them ------------------------------------------------------------------------------


def judges_to_come(
    args: argparse.Namespace, num_classes: int, shown: int
) -> tuple[dict[str, nn.Module | str], dict[str, nn.Module | str], list[str]]:
    """-> networks that reward, others that judge, what to say. What is to be downloaded is a URL or has random weights.

    Raises `InputError`.
    """
    notes: list[str] = []
    specs = [*rewards_of(args), *args.tilt]
    rewarding = {}
    for spec, name in zip(specs, named_apart(specs), strict=True):
        if spec.kind == "python":
            load_module(spec.source)
            notes.append(f"what {spec.source} needs is not known: its memory comes on top")
        elif spec.kind == "frechet":
            rewarding[name] = load_space(
                str(read_statistics(Path(spec.source)).space["name"]), dinov2_backbone=args.dinov2_backbone
            )
        elif spec.kind == "dinov2":
            sources = (args.dinov2_backbone, args.dinov2_head)
            here = [official_file(source, download_it=False) for source in sources]
            rewarding[name] = DINOv2Classifier.from_official(*sources) if all(here) else args.dinov2_backbone
        else:
            rewarding[name] = classifier_to_come(spec.source)
    holdout = {"holdout classifier": classifier_to_come(args.holdout_classifier)} if args.holdout_classifier else {}
    for name, judge in (rewarding | holdout).items():
        if isinstance(judge, nn.Module) and hasattr(judge, "num_classes"):
            require_judge_fits("holdout" if name in holdout else "reward", judge, num_classes, shown)
    return rewarding, holdout, notes


def classifier_to_come(source: str) -> ImageClassifier:
    return ImageClassifier.from_pretrained(source) if Path(source).exists() else ImageClassifier.untrained(source)


def decoder_to_come(vae: str) -> tuple[VAEDecoder, list[str]]:
    """-> the decoder that ``vae`` names, and what to say of it. Raises `InputError`."""
    if vae_files(vae, download=False) is not None:
        return VAEDecoder(load_vae(vae)), []
    return VAEDecoder(new_vae()), [f"the VAE {vae} is to be downloaded: planned with the size of sd-vae-ft-ema"]


def begins_at(stage: str, args: argparse.Namespace) -> int:
    """The step that the run starts from. Raises `InputError` for a checkpoint that is missing or not whole."""
    checkpoint = newest_intact(args.output_dir / "checkpoints")[0] if args.auto_resume else None
    if checkpoint is None and args.resume_ckpt is not None:
        checkpoint = open_checkpoint(args.resume_ckpt)
    if checkpoint is None and stage == "dmdr_refl":
        raise InputError("--resume-ckpt is missing: this stage starts from a cold start's torch_units/step-N.pt")
    return checkpoint.step if checkpoint is not None else 0


def planned_precision(args: argparse.Namespace) -> tuple[str, list[str]]:
    """-> the precision to plan for, and what to say of it."""
    if args.mixed_precision == "auto" and not torch.cuda.is_available():
        return "bf16", ["no GPU here: --mixed-precision auto is planned as bf16, as on a GPU (here it would be fp32)"]
    return resolve_precision(args.mixed_precision), []


# The plan ----------------------------------------------------------------------------------------------------------


def networks_to_come(args: argparse.Namespace, config: dict, dtype: torch.dtype) -> tuple[SiT, ScoreEstimator]:
    with torch.device("meta"):
        generator, estimator = SiT(**config), ScoreEstimator(SiT(**config), args.lora_rank, None)
        if args.use_lora_gen:
            add_lora(generator, generator_lora_rank(True, args.lora_rank), GENERATOR_TARGETS, None, 0)
    hold_frozen_in(generator, dtype)
    hold_frozen_in(estimator, dtype)
    return generator, estimator


def state_bytes(
    args: argparse.Namespace, generator: SiT, estimator: ScoreEstimator, processes: int, dtype: torch.dtype
) -> dict[str, int]:
    """What both networks hold from turn to turn, in each process."""
    trained, lora = count(generator, trainable=True), count(estimator, trainable=True)
    moments = 2 if args.optimizer == "adamw8bit" else 8
    held = {
        "generator weights": weight_bytes(generator),
        "generator gradients": 4 * trained,
        "generator optimizer": moments * trained,
        "EMA": 4 * trained if args.ema_decay else 0,
        "estimator weights": weight_bytes(estimator),
        "estimator LoRA gradients and optimizer": (4 + moments) * lora,
    }
    if sharding_asked() and processes > 1:
        held = {name: -(-value // processes) for name, value in held.items()}
        # A unit is gathered while the next one comes: blocks, or what is outside of them.
        units = [*generator.blocks, nn.ModuleList(m for name, m in generator.named_children() if name != "blocks")]
        largest = max(sum(p.numel() for p in unit.parameters()) for unit in units)
        held["gathered weights and gradients of two units"] = 2 * largest * (dtype.itemsize + 4)
        if args.gradient_accumulation_steps > 1:  # reduced and sharded with the last chunk alone
            held["whole gradients while they are accumulated"] = 4 * max(trained, lora)
    return held


def reward_bytes(
    args: argparse.Namespace, config: dict, dtype: torch.dtype
) -> tuple[dict[str, int], int | None, list[str]]:
    """-> weights of decoder and classifiers; the reward's activations, if any; what to say. Raises `InputError`."""
    shown = require_decoder(config["in_channels"], args.vae, args.teacher)
    rewarding, holdout, notes = judges_to_come(args, config["num_classes"], shown)
    held, activations = {}, 0
    batch = args.reward_micro_batch or args.batch_size
    if args.vae != "none" and (args.num_previews or rewarding):
        decoder, more = decoder_to_come(args.vae)
        notes += more
        parameters, activations = decoder_cost(decoder, config, batch, dtype)
        held["decoder weights"] = dtype.itemsize * parameters
    for name, judge in (rewarding | holdout).items():
        parameters, kept = judge_cost(judge, batch, dtype)
        held[f"{'reward ' if name in rewarding else ''}{name} weights"] = dtype.itemsize * parameters
        activations += kept if name in rewarding else 0
    return held, activations if rewarding else None, notes


def plan(stage: str, args: argparse.Namespace, processes: int) -> str:
    """The text that `--dry-run` prints. Raises `InputError` for inputs that a run would refuse.

    A teacher whose weights are not there yet, but its config.json is, can be planned with.
    """
    precision, notes = planned_precision(args)
    dtype = COMPUTE_DTYPES[precision]
    config = read_sit_config(args.teacher)
    if not (args.teacher / WEIGHTS_NAME).exists():
        notes.append(f"{args.teacher / WEIGHTS_NAME} does not exist yet: a run needs it")
    if args.num_classes not in (None, config["num_classes"]):
        raise InputError(f"--num-classes is {args.num_classes}, but {args.teacher} has {config['num_classes']} classes")
    begin = begins_at(stage, args)
    of_reward, reward, more = reward_bytes(args, config, dtype)
    generator, estimator = networks_to_come(args, config, dtype)
    held = state_bytes(args, generator, estimator, processes, dtype) | of_reward
    turns = {name: network_activations(config, args, name, dtype) for name in ("estimator", "generator")}
    if reward is not None:
        told = " (an upper bound: --reward-checkpointing recomputes)" if args.reward_checkpointing else ""
        turns[f"generator, reward{told}"] = turns["generator"] + reward
    trained, lora = count(generator, trainable=True), count(estimator, trainable=True)
    batch = args.batch_size * args.gradient_accumulation_steps * processes
    saved = 4 * (trained + 2 * trained + (trained if args.ema_decay else 0) + 3 * lora)
    kept = max(0, -(-(args.max_train_steps - begin) // args.checkpoint_steps))
    kept = min(kept, args.keep_checkpoints) if args.keep_checkpoints else kept
    return "\n".join(
        [
            f"{stage}, dry run: nothing is trained or written",
            "",
            "arguments:",
            *[f"  --{name.replace('_', '-')} {value}" for name, value in vars(args).items() if name != "dry_run"],
            "",
            *[f"note: {note}" for note in notes + more],
            f"effective batch: {batch} = {args.batch_size} a process x {args.gradient_accumulation_steps} accumulated "
            f"x {processes} process(es), precision {precision}",
            f"images that the generator is trained on, from step {begin} to {args.max_train_steps}: "
            f"{batch * max(0, args.max_train_steps - begin):,}",
            f"parameters: generator {trained:,} trained of {count(generator):,}; estimator {lora:,} trained, "
            f"{count(estimator) - lora:,} frozen",
            f"checkpoints kept: {kept} (every {args.checkpoint_steps} updates), {saved / GIB:.2f} GiB each, "
            f"{kept * saved / GIB:.2f} GiB in all",
            "",
            f"memory per process{', sharded (FSDP2)' if sharding_asked() and processes > 1 else ''}:",
            *[f"  {name}: {value / GIB:.2f} GiB" for name, value in held.items() if value],
            *[f"  activations, {name} turn: {value / GIB:.2f} GiB" for name, value in turns.items()],
            f"  peak, about: {(sum(held.values()) + max(turns.values())) / GIB:.2f} GiB",
        ]
    )
