"""The parts of a run, and how they are built from the command line."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from timm.layers import Attention
from torch import Tensor, nn

from train_cc.io.errors import InputError
from train_cc.io.read import sha256
from train_cc.models.classifier import ImageClassifier
from train_cc.models.estimator import ScoreEstimator
from train_cc.models.generator import build_generator, generator_lora_rank
from train_cc.models.latents import LATENT_CHANNELS, PINNED_REVISIONS, load_decoder, require_decoder_kind
from train_cc.models.lora import hold_frozen_in
from train_cc.models.reward import DINOv2Classifier, RewardResult, reward_gradient
from train_cc.models.sit import WEIGHTS_NAME, SiT
from train_cc.run.session import COMPUTE_DTYPES, Session, require_compiler


@dataclass
class Run:
    """Everything that the two turns need. ``generator`` and ``estimator`` are prepared by their accelerators."""

    session: Session
    generator: nn.Module
    estimator: nn.Module
    generator_optimizer: torch.optim.Optimizer
    estimator_optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor] | None  # of the generator's trainable parameters, by plain name
    decode: Callable[[Tensor], Tensor]  # x0 -> images in [0, 1]
    model_config: dict
    sample_shape: tuple[int, int, int]
    num_classes: int
    reward: Callable[[Tensor, Tensor], RewardResult] | None = None  # (x0, y) -> loss, accuracy, gradient at x0
    judges: dict[str, nn.Module] = field(default_factory=dict)  # score the previews: the reward's, the held-out one
    step: int = 0
    samples_seen: int = 0  # by the generator, over all stages
    hashes: dict[str, str] = field(default_factory=dict)  # SHA-256 of what was loaded from outside

    @property
    def plain_generator(self) -> SiT:
        return self.session.generator.unwrap_model(self.generator)

    @property
    def plain_estimator(self) -> ScoreEstimator:
        return self.session.estimator.unwrap_model(self.estimator)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def averaged_weights(run: Run) -> Iterator[None]:
    """The generator with its EMA weights, where there is an EMA; the raw ones come back afterwards, bit for bit."""

    def swap():
        with torch.no_grad():
            for name, p in trainable(run.plain_generator).items():
                held = p.clone()
                p.copy_(run.ema[name])
                run.ema[name].copy_(held)

    if run.ema is not None:
        swap()
    try:
        yield
    finally:
        if run.ema is not None:
            swap()


def effective_batch(args: argparse.Namespace, processes: int) -> int:
    """Samples of one update, over accumulation and processes."""
    return args.batch_size * args.gradient_accumulation_steps * processes


def load_classifier(source: str) -> ImageClassifier:
    """A folder of pretrain/classifier.py, or a timm name with published weights."""
    return ImageClassifier.from_pretrained(source) if Path(source).exists() else ImageClassifier.from_timm(source)


def load_judges(
    args: argparse.Namespace, config: dict, device: torch.device, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """ "reward": the classifier that rewards; "holdout": one that does not, and shows where the reward is hacked."""
    judges = {}
    if args.encoder_type == "dinov2":
        judges["reward"] = DINOv2Classifier.from_official(args.dinov2_backbone, args.dinov2_head)
    elif args.encoder_type == "classifier":
        judges["reward"] = load_classifier(args.reward_classifier)
    if args.holdout_classifier:
        judges["holdout"] = load_classifier(args.holdout_classifier)
    shown = 3 if config["in_channels"] == LATENT_CHANNELS else config["in_channels"]
    for name, judge in judges.items():
        if judge.num_classes != config["num_classes"]:
            told = f"{judge.num_classes} classes, the generator {config['num_classes']}"
            raise InputError(f"the {name} classifier has {told}")
        if judge.in_channels != shown:
            raise InputError(f"the {name} classifier takes {judge.in_channels} channels, the images have {shown}")
        judge.to(device, dtype)
    return judges


def input_hashes(args: argparse.Namespace) -> dict[str, str]:
    """SHA-256 of every weights file that was loaded from outside, by the flag that named it."""
    files = {"teacher": args.teacher / WEIGHTS_NAME}
    if args.vae != "none":
        if Path(args.vae).is_dir():
            files["vae"] = Path(args.vae) / WEIGHTS_NAME
        else:
            revision = PINNED_REVISIONS.get(args.vae, "main")
            files["vae"] = try_to_load_from_cache(args.vae, WEIGHTS_NAME, revision=revision)
    if args.encoder_type == "dinov2":
        for flag in ("dinov2_backbone", "dinov2_head"):
            source = getattr(args, flag)
            downloaded = Path(torch.hub.get_dir()) / "checkpoints" / source.rsplit("/", 1)[-1]
            files[flag] = downloaded if source.startswith("http") else Path(source)
    for flag in ("reward_classifier", "holdout_classifier"):
        if getattr(args, flag):
            files[flag] = Path(getattr(args, flag)) / "model.safetensors"
    return {flag: sha256(Path(path)) for flag, path in files.items() if path and Path(path).is_file()}


def build_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, args: argparse.Namespace
) -> torch.optim.Optimizer:
    """AdamW in one fused kernel, or torchao's with both moments in 8 bits, over what is trained of ``model``."""
    options = {
        "lr": learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": weight_decay,
    }
    if args.optimizer == "adamw8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(trainable(model).values(), **options)
    return torch.optim.AdamW(trainable(model).values(), fused=True, **options)


def choose_attention(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """In half precision on a CPU plain attention is about 2.5 times faster than the fused kernel, its backward 3."""
    fused = not (device.type == "cpu" and dtype != torch.float32)
    for module in network.modules():
        if isinstance(module, Attention):
            module.fused_attn = fused


def build(args: argparse.Namespace, session: Session) -> Run:
    """Load the teacher twice: as the estimator's frozen base, and as the generator's start.

    Frozen weights are held in the dtype that autocast computes in; the generator's, where trained, stay fp32: an Adam
    step at 2e-5 is below half a unit in the last place of bf16.
    """
    if args.compile:
        require_compiler()  # before anything is loaded
    dtype = COMPUTE_DTYPES[session.generator.mixed_precision]
    teacher = SiT.from_pretrained(args.teacher)
    config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    if args.num_classes not in (None, config["num_classes"]):
        raise InputError(f"--num-classes is {args.num_classes}, but {args.teacher} has {config['num_classes']} classes")
    shape, num_classes = teacher.sample_shape, teacher.null_class
    require_decoder_kind(config["in_channels"], args.vae, args.teacher)
    judges = load_judges(args, config, session.device, dtype)
    estimator = ScoreEstimator(teacher, args.lora_rank, args.lora_init_spread, args.seed)
    hold_frozen_in(estimator, dtype)  # before the generator is loaded: two copies in fp32 are never held
    generator = build_generator(args.teacher, generator_lora_rank(args.use_lora_gen, args.lora_rank), args.seed)
    hold_frozen_in(generator, dtype)
    for network in (generator, estimator.network, *judges.values()):
        choose_attention(network, session.device, dtype)
    for network in (generator, estimator.network):
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if args.compile:
            for block in network.blocks:  # one graph for all of them: compile time does not grow with the depth
                block.compile()
    decoded = args.num_previews or "reward" in judges
    decode = load_decoder(args.vae if decoded and args.vae != "none" else None, session.device, dtype)
    reward = None
    if "reward" in judges:
        if args.reward_checkpointing:
            for model in (judges["reward"], decode):
                if isinstance(model, nn.Module):  # pixel space has no decoder network
                    model.enable_gradient_checkpointing()
        reward = partial(reward_gradient, judges["reward"], decode, micro_batch=args.reward_micro_batch)
    # Placed first: sharding replaces the parameters, and EMA and optimizers belong to those that are trained.
    generator = session.place(session.generator, generator, generator.blocks)
    estimator = session.place(session.estimator, estimator, estimator.network.blocks)
    plain = session.generator.unwrap_model(generator)
    ema = {name: p.detach().clone() for name, p in trainable(plain).items()} if args.ema_decay else None
    generator_optimizer = build_optimizer(generator, args.learning_rate_generator, args.weight_decay_generator, args)
    estimator_optimizer = build_optimizer(estimator, args.learning_rate_estimator, args.weight_decay_estimator, args)
    generator_optimizer = session.generator.prepare_optimizer(generator_optimizer)
    estimator_optimizer = session.estimator.prepare_optimizer(estimator_optimizer)
    return Run(
        session=session,
        generator=generator,
        estimator=estimator,
        generator_optimizer=generator_optimizer,
        estimator_optimizer=estimator_optimizer,
        ema=ema,
        decode=decode,
        model_config=config,
        sample_shape=shape,
        num_classes=num_classes,
        reward=reward,
        judges=judges,
        hashes=input_hashes(args),
    )
