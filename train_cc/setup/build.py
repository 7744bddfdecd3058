"""A run from the command line: networks, judges, rewards, optimizers, each placed on its device."""

import argparse
import json
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from timm.layers import Attention
from torch import Tensor, nn

from train_cc.distillation.settings import Method, Optimisation, Output, Run, trainable
from train_cc.io.errors import InputError
from train_cc.io.read import sha256
from train_cc.models.classifier import ImageClassifier
from train_cc.models.dinov2 import DINOv2Classifier
from train_cc.models.estimator import ScoreEstimator
from train_cc.models.generator import build_generator, generator_lora_rank
from train_cc.models.lora import hold_frozen_in
from train_cc.models.sit import SiT
from train_cc.models.vae import load_decoder, require_decoder
from train_cc.rewards.at_x0 import Reward
from train_cc.rewards.classifier import classifier_losses
from train_cc.run.ema import Average
from train_cc.run.session import COMPUTE_DTYPES, Session, require_compiler


def settings_of(kind: type, args: argparse.Namespace, **more: object) -> object:
    """A frozen dataclass of settings, each field the flag of its name, or of ``more``."""
    values = {field.name: getattr(args, field.name) for field in fields(kind) if field.name not in more}
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}, **more)


def load_classifier(source: str) -> ImageClassifier:
    """A folder of pretrain/classifier.py, or a timm name with published weights."""
    return ImageClassifier.from_pretrained(source) if Path(source).exists() else ImageClassifier.from_timm(source)


def load_judges(args: argparse.Namespace, num_classes: int, shown: int) -> dict[str, nn.Module]:
    """ "reward": the classifier that rewards; "holdout": one that does not, and shows where the reward is hacked.

    Raises `InputError` where one does not fit the generator's classes or images of ``shown`` channels.
    """
    judges = {}
    if args.encoder_type == "dinov2":
        judges["reward"] = DINOv2Classifier.from_official(args.dinov2_backbone, args.dinov2_head)
    elif args.encoder_type == "classifier":
        judges["reward"] = load_classifier(args.reward_classifier)
    if args.holdout_classifier:
        judges["holdout"] = load_classifier(args.holdout_classifier)
    for name, judge in judges.items():
        require_judge_fits(name, judge, num_classes, shown)
    return judges


def require_judge_fits(name: str, judge: nn.Module, num_classes: int, shown: int) -> None:
    """``judge`` has the generator's classes, and takes images of ``shown`` channels. Raises `InputError`."""
    if judge.num_classes != num_classes:
        told = f"{judge.num_classes} classes, the generator {num_classes}"
        raise InputError(f"the {name} classifier has {told}")
    if judge.in_channels != shown:
        raise InputError(f"the {name} classifier takes {judge.in_channels} channels, the images have {shown}")


def input_hashes(teacher: SiT, decode: Callable[[Tensor], Tensor], judges: dict[str, nn.Module]) -> dict[str, str]:
    """SHA-256 of every weights file that was read, by the flag that named it."""
    flags = {"teacher": teacher.files, "vae": getattr(decode, "files", [])}
    for name, judge in judges.items():
        if isinstance(judge, DINOv2Classifier):
            flags |= {"dinov2_backbone": judge.files[:1], "dinov2_head": judge.files[1:]}
        else:
            flags[f"{name}_classifier"] = judge.files
    return {flag: sha256(file) for flag, files in flags.items() for file in files}


def build_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, how: Optimisation
) -> torch.optim.Optimizer:
    """AdamW in one fused kernel, or torchao's with both moments in 8 bits, over what is trained of ``model``."""
    options = {
        "lr": learning_rate,
        "betas": (how.adam_beta1, how.adam_beta2),
        "eps": how.adam_epsilon,
        "weight_decay": weight_decay,
    }
    if how.optimizer == "adamw8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(trainable(model).values(), **options)
    return torch.optim.AdamW(trainable(model).values(), fused=True, **options)


def choose_attention(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """In half precision on a CPU plain attention is about 2.5 times faster than the fused kernel, its backward 3."""
    fused = not (device.type == "cpu" and dtype != torch.float32)
    for module in network.modules():
        if isinstance(module, Attention):
            module.fused_attn = fused


def load_teacher(args: argparse.Namespace) -> tuple[SiT, dict, int]:
    """-> the teacher, its config, and the channels of an image; the other flags fit them. Raises `InputError`."""
    teacher = SiT.from_pretrained(args.teacher)
    config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    if args.num_classes not in (None, config["num_classes"]):
        raise InputError(f"--num-classes is {args.num_classes}, but {args.teacher} has {config['num_classes']} classes")
    return teacher, config, require_decoder(config["in_channels"], args.vae, args.teacher)


def prepare_network(network: nn.Module, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Frozen weights in the compute dtype, the attention that is fast, recomputation and compilation as asked.

    ``network``: the generator or the estimator. What is trained stays fp32: an Adam step at 2e-5 is below half a unit
    in the last place of bf16.
    """
    hold_frozen_in(network, dtype)
    choose_attention(network, device, dtype)
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if args.compile:
        blocks = network.network.blocks if isinstance(network, ScoreEstimator) else network.blocks
        for block in blocks:  # one graph for all of them: compile time does not grow with the depth
            block.compile()


def build_rewards(args: argparse.Namespace, judges: dict[str, nn.Module], decode: object) -> list[Reward]:
    if "reward" not in judges:
        return []
    if args.reward_checkpointing:
        for model in (judges["reward"], decode):
            if isinstance(model, nn.Module):  # pixel space has no decoder network
                model.enable_gradient_checkpointing()
    return [Reward(args.encoder_type, args.reward_weight, partial(classifier_losses, judges["reward"]))]


def build(args: argparse.Namespace, session: Session) -> Run:
    """Load the teacher twice: as the estimator's frozen base, and as the generator's start."""
    if args.compile:
        require_compiler()  # before anything is loaded
    device, dtype = session.device, COMPUTE_DTYPES[session.generator_accelerator.mixed_precision]
    how = settings_of(Optimisation, args)
    teacher, config, shown = load_teacher(args)
    judges = load_judges(args, config["num_classes"], shown)
    for judge in judges.values():
        choose_attention(judge.to(device, dtype), device, dtype)
    estimator = ScoreEstimator(teacher, args.lora_rank, args.lora_init_spread, args.seed)
    prepare_network(estimator, args, device, dtype)  # before the generator is loaded: never two copies in fp32
    rank = generator_lora_rank(args.use_lora_gen, args.lora_rank)
    generator = build_generator(args.teacher, rank, args.seed)
    prepare_network(generator, args, device, dtype)
    decoded = args.vae != "none" and (args.num_previews or "reward" in judges)
    decode = load_decoder(args.vae if decoded else None, device, dtype)
    # Placed first: sharding replaces the parameters, and EMA and optimizers belong to those that are trained.
    of_generator, of_estimator = session.generator_accelerator, session.estimator_accelerator
    generator = session.place(of_generator, generator, generator.blocks)
    estimator = session.place(of_estimator, estimator, estimator.network.blocks)
    weights = trainable(of_generator.unwrap_model(generator))
    generator_optimizer = build_optimizer(generator, how.learning_rate_generator, how.weight_decay_generator, how)
    estimator_optimizer = build_optimizer(estimator, how.learning_rate_estimator, how.weight_decay_estimator, how)
    return Run(
        session=session,
        method=settings_of(Method, args),
        optimisation=how,
        output=settings_of(Output, args, protected=args.resume_ckpt),
        generator=generator,
        estimator=estimator,
        generator_optimizer=of_generator.prepare_optimizer(generator_optimizer),
        estimator_optimizer=of_estimator.prepare_optimizer(estimator_optimizer),
        ema=Average.of(weights, args.ema_decay) if args.ema_decay else None,
        decode=decode,
        model_config=config,
        teacher=args.teacher,
        rewards=build_rewards(args, judges, decode),
        reward_micro_batch=args.reward_micro_batch,
        judges=judges,
        lora_rank_generator=rank,
        arguments=json.loads(json.dumps(vars(args), default=str)),
        hashes=input_hashes(teacher, decode, judges),
    )
