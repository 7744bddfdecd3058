"""A run: its settings, the parts that the turns work with, and the roles of its estimator."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from train_cc.models.backbone import Network
from train_cc.models.estimator import ScoreEstimator
from train_cc.rewards.frechet import Frechet
from train_cc.rewards.terms import Reward, Tilt
from train_cc.run.session import Learner, Session
from train_cc.run.states import Average
from train_cc.samplers import apply_guidance, guided_rows, with_null_rows
from train_cc.schedules import dynamic_guidance_scale
from train_cc.settings import Method, Optimisation, Output


@dataclass(frozen=True)
class LoraScores:
    """``estimator`` as its accelerator prepared it. Each role is one call of it, so that DDP and FSDP2 see one module.

    x_t (B, C, H, W), t (B,), y (B,) -> v (B, C, H, W).
    """

    estimator: nn.Module
    method: Method
    num_classes: int

    def fake(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The score of the generator's distribution, which is trained."""
        return self.estimator(x_t, t, y, lora_scale=self.method.lora_scale_fake)

    def teacher(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The frozen teacher, bit for bit."""
        return self.estimator(x_t, t, y, lora_scale=0.0)

    @torch.no_grad()
    def both(self, x_t: Tensor, t_cpu: Tensor, t: Tensor, y: Tensor, c: float) -> tuple[Tensor, Tensor]:
        """(v_fake, v_real) by one network call; the real one at the annealing c(k).

        ``t_cpu`` and ``t`` are the same times on the CPU and on the device. Guidance applies to the real score only,
        and finds its rows in ``t_cpu`` without asking the device.
        """
        method, batch = self.method, len(x_t)
        rows = guided_rows(t_cpu, method.real_guidance_scale, method.real_guidance_interval)
        rows = rows.to(x_t.device, non_blocking=True)
        x_t, t, y = (torch.cat([each, each]) for each in (x_t, t, y))
        x_t, t, y = with_null_rows(x_t, t, y, rows + batch, self.num_classes)
        v_fake, v_real, v_null = self.read(x_t, t, y, batch, c).split([batch, batch, len(rows)])
        return v_fake, apply_guidance(v_real, v_null, rows, method.real_guidance_scale)

    def read(self, x_t: Tensor, t: Tensor, y: Tensor, fakes: int, c: float) -> Tensor:
        """The fake score of the first ``fakes`` rows, the real one of the others, each row at its own LoRA scale."""
        real = dynamic_guidance_scale(self.method.lora_scale_real, c)
        scales = [t.new_full((fakes,), self.method.lora_scale_fake), t.new_full((len(t) - fakes,), real)]
        return self.estimator(x_t, t, y, lora_scale=torch.cat(scales))


class FullScores(LoraScores):
    """The scores of a `FullEstimator`: the real score is always the teacher, without dynamic guidance."""

    def fake(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.estimator(x_t, t, y, len(x_t))

    def teacher(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.estimator(x_t, t, y, 0)

    def read(self, x_t: Tensor, t: Tensor, y: Tensor, fakes: int, c: float) -> Tensor:
        return self.estimator(x_t, t, y, fakes)


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
    arguments: dict = field(default_factory=dict)  # of the command line, for records only
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
    def plain_generator(self) -> Network:
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
