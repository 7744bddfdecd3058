"""A run: its settings, fixed once from the command line, and the parts that the turns work with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from train_cc.distillation.scores import LoraScores
from train_cc.models.estimator import ScoreEstimator
from train_cc.models.sit import SiT
from train_cc.rewards.frechet import Frechet
from train_cc.rewards.terms import Reward, Tilt
from train_cc.run.ema import Average
from train_cc.run.session import Learner, Session
from train_cc.settings import Method, Optimisation, Output


@dataclass
class Run:
    """Everything that the two turns need. Networks in training are as their accelerators prepared them."""

    session: Session
    method: Method
    optimisation: Optimisation
    output: Output
    learners: dict[str, Learner]  # "generator", "estimator", and those of further losses
    decode: Callable[[Tensor], Tensor]  # x0 -> images in [0, 1]
    model_config: dict
    teacher: Path
    roles: type[LoraScores] = LoraScores  # of the estimator
    parts: list = field(default_factory=list)  # `distillation.parts.Part`: what a checkpoint holds
    generator_terms: list[Callable] = field(default_factory=list)  # (run, draws, x0, y, c, terms before) -> [Term]
    estimator_terms: list[Callable] = field(default_factory=list)  # (run, draws, x0, y, c, weights (B,) | None) -> Term
    ema: Average | None = None  # of the generator's trained parameters
    rewards: list[Reward] = field(default_factory=list)
    tilts: list[Tilt] = field(default_factory=list)  # experimental: rewards without gradient
    reward_micro_batch: int = 0  # samples decoded at once; 0: the whole batch
    judges: dict[str, nn.Module] = field(default_factory=dict)  # score the previews
    lora_rank_generator: int | None = None  # None: the whole generator is trained
    arguments: dict = field(default_factory=dict)  # of the command line, for records alone
    latent_space: str | None = None  # SHA-256, as the teacher records it
    hashes: dict[str, str] = field(default_factory=dict)  # SHA-256 of what was loaded from outside, by flag
    rewards_sha256: set[str] = field(default_factory=set)  # of the networks that rewarded, in all stages
    teacher_row: np.ndarray | None = None  # of the previews, uint8 (N, H, W, C), once it is drawn
    step: int = 0  # generator updates done
    samples_seen: int = 0  # by the generator, over all stages
    overflows: dict[str, int] = field(default_factory=dict)  # in fp16, in a row, by the log's column that shows them

    @property
    def scaled(self) -> bool:
        """True in fp16: losses are scaled, and what is not finite may be an overflow."""
        return self.session.generator_accelerator.scaler is not None

    @property
    def scores(self) -> LoraScores:
        """Fake score, real score and teacher: calls of the estimator."""
        return self.roles(self.estimator, self.method, self.num_classes)

    def learners_of(self, accelerator: Accelerator) -> dict[str, Learner]:
        """The networks that one turn trains."""
        return {name: learner for name, learner in self.learners.items() if learner.accelerator is accelerator}

    @property
    def generator(self) -> nn.Module:
        return self.learners["generator"].network

    @property
    def estimator(self) -> nn.Module:
        return self.learners["estimator"].network

    @property
    def plain_generator(self) -> SiT:
        return self.learners["generator"].plain

    @property
    def plain_estimator(self) -> ScoreEstimator:
        return self.learners["estimator"].plain

    @property
    def generator_optimizer(self) -> torch.optim.Optimizer:
        return self.learners["generator"].optimizer

    @property
    def estimator_optimizer(self) -> torch.optim.Optimizer:
        return self.learners["estimator"].optimizer

    @property
    def memories(self) -> dict[str, Frechet]:
        """Statistics of the rewards on a distribution, by the rewards' names."""
        return {reward.name: reward.memory for reward in self.rewards if reward.memory is not None}

    @property
    def num_classes(self) -> int:
        return self.model_config["num_classes"]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        side = self.model_config["input_size"]
        return self.model_config["in_channels"], side, side


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
