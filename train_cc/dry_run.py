"""What a command would do, without loading weights: arguments, images, checkpoints, parameters, memory (`--dry-run`).

Weights, gradients and optimizer states are exact. Activations are measured: what autograd keeps for backward in models
of depth 1 and 2 at the true width, extrapolated over depth and batch; reward at a quarter of the side, by area.
Attention is taken as fused, as on a GPU.
"""

import argparse
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from train_cc.io.errors import InputError
from train_cc.models.estimator import ScoreEstimator
from train_cc.models.generator import generator_lora_rank
from train_cc.models.latents import LATENT_CHANNELS, VAEDecoder, new_vae
from train_cc.models.lora import GENERATOR_TARGETS, add_lora, hold_frozen_in
from train_cc.models.reward import IMAGE_SIZE, PATCH_SIZE
from train_cc.models.sit import SiT
from train_cc.parts import effective_batch
from train_cc.run.session import COMPUTE_DTYPES, resolve_precision, sharding_asked

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


def decoder_cost(config: dict, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """(parameters, activation bytes) of sd-vae-ft-ema's decoder: measured at a quarter of the side, by area."""
    decoder = VAEDecoder(new_vae()).to(like(dtype))
    side = max(1, config["input_size"] // 4)
    z = torch.zeros(1, LATENT_CHANNELS, side, side, requires_grad=True)
    kept = kept_bytes(decoder, lambda: decoder(z), nullcontext())
    return count(decoder), kept * batch * (config["input_size"] // side) ** 2


def dinov2_cost(args: argparse.Namespace, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """(parameters, activation bytes) of the DINOv2 size that the backbone's name says; ViT-L where it says none."""
    from timm.models.vision_transformer import VisionTransformer

    width, depth = next((size for name, size in DINOV2_SIZES.items() if name in args.dinov2_backbone), (1024, 24))

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


def plan(stage: str, args: argparse.Namespace, processes: int) -> str:
    """The text that `--dry-run` prints. Raises `InputError` where the teacher's config.json cannot be read."""
    precision = resolve_precision(args.mixed_precision)
    dtype = COMPUTE_DTYPES[precision]
    path = args.teacher / "config.json"
    try:
        config = {name: value for name, value in json.loads(path.read_text()).items() if not name.startswith("_")}
        with torch.device("meta"):
            generator, estimator = SiT(**config), ScoreEstimator(SiT(**config), args.lora_rank, None)
            if args.use_lora_gen:
                add_lora(generator, generator_lora_rank(True, args.lora_rank), GENERATOR_TARGETS, None, 0)
        hold_frozen_in(generator, dtype)
        hold_frozen_in(estimator, dtype)
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, AssertionError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    trained, lora = count(generator, trainable=True), count(estimator, trainable=True)
    ema = trained if args.ema_decay else 0
    moments = 2 if args.optimizer == "adamw8bit" else 8
    fixed_bytes = {
        "generator weights": weight_bytes(generator),
        "generator gradients": 4 * trained,
        "generator optimizer": moments * trained,
        "EMA": 4 * ema,
        "estimator weights": weight_bytes(estimator),
        "estimator LoRA gradients and optimizer": (4 + moments) * lora,
    }
    sharded = sharding_asked() and processes > 1
    if sharded:
        fixed_bytes = {name: -(-value // processes) for name, value in fixed_bytes.items()}
        # A unit is gathered while the next one comes: blocks, or what is outside of them.
        units = [*generator.blocks, nn.ModuleList(m for name, m in generator.named_children() if name != "blocks")]
        largest = max(sum(p.numel() for p in unit.parameters()) for unit in units)
        fixed_bytes["gathered weights and gradients of two units"] = 2 * largest * (dtype.itemsize + 4)
    turns = {
        "estimator": network_activations(config, args, "estimator", dtype),
        "generator": network_activations(config, args, "generator", dtype),
    }
    if args.vae != "none" and (args.num_previews or args.encoder_type != "none"):
        micro = args.reward_micro_batch or args.batch_size
        parameters, decoder = decoder_cost(config, micro, dtype)
        fixed_bytes["decoder weights"] = dtype.itemsize * parameters
        if args.encoder_type == "dinov2":
            parameters, classifier = dinov2_cost(args, micro, dtype)
            fixed_bytes["classifier weights"] = dtype.itemsize * parameters
            told = " (an upper bound: --reward-checkpointing recomputes)" if args.reward_checkpointing else ""
            turns[f"generator, reward{told}"] = turns["generator"] + decoder + classifier
    fixed = sum(fixed_bytes.values())
    batch = effective_batch(args, processes)
    saved = 4 * (trained + 2 * trained + ema + 3 * lora)
    named = re.fullmatch(r"step-(\d+)\.pt", args.resume_ckpt.name) if args.resume_ckpt else None
    begin = int(named[1]) if named else 0
    kept = -(-(args.max_train_steps - begin) // args.checkpoint_steps)
    kept = min(kept, args.keep_checkpoints) if args.keep_checkpoints else kept
    lines = [f"{stage}, dry run: nothing is loaded or written", "", "arguments:"]
    lines += [f"  --{name.replace('_', '-')} {value}" for name, value in vars(args).items() if name != "dry_run"]
    lines += [
        "",
        f"effective batch: {batch} = {args.batch_size} a process x {args.gradient_accumulation_steps} accumulated "
        f"x {processes} process(es), precision {precision}",
        f"images that the generator is trained on, from step {begin} to {args.max_train_steps}: "
        f"{batch * (args.max_train_steps - begin):,}",
        f"parameters: generator {trained:,} trained of {count(generator):,}; estimator {lora:,} trained, "
        f"{count(estimator) - lora:,} frozen",
        f"checkpoints kept: {kept} (every {args.checkpoint_steps} updates), {saved / GIB:.2f} GiB each, "
        f"{kept * saved / GIB:.2f} GiB in all",
        "",
        f"memory per process{', sharded (FSDP2)' if sharded else ''}:",
        *[f"  {name}: {value / GIB:.2f} GiB" for name, value in fixed_bytes.items() if value],
        *[f"  activations, {name} turn: {value / GIB:.2f} GiB" for name, value in turns.items()],
        f"  peak, about: {(fixed + max(turns.values())) / GIB:.2f} GiB",
    ]
    return "\n".join(lines)
