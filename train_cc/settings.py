"""Every number of the method and of a run, once: name, default, range, meaning. Defaults are the SiT-XL/2 cold start's.

Flag, field and documentation have one name each. Needs no torch.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from train_cc.io.fields import TimeInterval, setting

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"


@dataclass(frozen=True)
class Output:
    """Start, output folder, and the times at which a run writes."""

    output_dir: Path = setting(help="the run's folder", start=True)
    overwrite: bool = setting(False, "delete an earlier run in --output-dir", start=True)
    dry_run: bool = setting(False, "print what would be done and the memory it needs, and end", start=True)
    peak_tflops: float = setting(
        312.0, "of a GPU, for the hours of --dry-run", low=0, high=1e6, low_open=True, start=True
    )
    resume_ckpt: Path | None = setting(
        None, "a torch_units/step-N.pt to start from, here or elsewhere", reads=True, start=True
    )
    auto_resume: bool = setting(False, "continue from the newest checkpoint in --output-dir, if any", start=True)
    max_train_steps: int = setting(20_000, "generator updates, counted over both stages", recipe=True)
    checkpoint_steps: int = setting(5_000, "generator updates between checkpoints")
    keep_checkpoints: int = setting(
        0, "newest checkpoints that are kept, beside the best by evaluation.checkpoints; 0: all", low=0
    )
    sample_steps: int = setting(1_000, "generator updates between previews")
    num_previews: int = setting(16, "images in a preview; 0 turns previews off", low=0, high=4096)
    teacher_preview_steps: int = setting(50, "of Euler, in a preview; 0: no such row", low=0, high=10_000)
    report_to: str = setting(
        "none",
        "tracker beside the jsonl logs; tensorboard: into the folder dmdr of the output folder.",
        choices=("none", "tensorboard", "wandb"),
    )

    @property
    def checkpoints(self) -> Path:
        return self.output_dir / "checkpoints"


@dataclass(frozen=True)
class Models:
    """The networks that a run starts from, and the LoRA."""

    teacher: Path = setting(
        help="model folder (convert_weight/sit_convert.py makes one), or org/name[@revision] on the hub", reads=True
    )
    trust_teacher_code: bool = setting(
        False, "permission to run the network.py of --teacher, a network of your own", start=True
    )
    teacher_is_distilled: bool = setting(
        False, "permission for a --teacher that is itself a distilled generator of few steps"
    )
    num_classes: int | None = setting(None, "checked against the teacher's; without it, the teacher's")
    vae: str = setting(DEFAULT_VAE, "decoder: a hub name or folder; 'none' for pixel space", reads=True)
    use_lora_gen: bool = setting(False, "train a LoRA of the generator, not all of it", recipe=True)
    lora_rank: int = setting(
        32,
        "of the estimator; the generator's is twice it",
        high=4096,
        why="at rank 0 real and fake would be the same network, and learn nothing",
        recipe=True,
    )
    fake_score: str = setting(
        "lora",
        "the fake score is the teacher and a LoRA, or a trained copy of it; then the real score is the teacher itself",
        choices=("lora", "full"),
        lasting=True,
    )
    gan_data: str | None = setting(
        None,
        "real images with labels for --gan-weight: digits, fashion-mnist, .npz or folder",
        reads=True,
        recipe=True,
    )
    lora_init_spread: float = setting(1.0, "standard deviation of the estimator's first LoRA A", low=1e-6, high=1e3)


@dataclass(frozen=True)
class Method:
    """Numbers of the method (docs/method.md)."""

    num_steps: int = setting(1, "steps K of the generator", high=1000, recipe=True)
    timestep_shift: float = setting(1.0, "shift s of the generator's time grid", low=1e-3, high=1e3, recipe=True)
    ratio_update: int = setting(5, "estimator turns per generator turn", high=10_000, recipe=True)
    lora_scale_fake: float = setting(
        2.0,
        "LoRA scale of the fake score",
        low=1e-6,
        high=1e3,
        why="at 0 the fake score would be the teacher's, and learn nothing",
        recipe=True,
    )
    lora_scale_real: float = setting(0.75, "LoRA scale of the real score at step 0", low=0, high=1e3, recipe=True)
    dynamic_steps: int = setting(10_000, "generator updates D of both schedules", low=0, recipe=True)
    renoise_alpha: float = setting(4.0, "a of t ~ Beta(a, b) at step 0", low=1e-2, high=1e3)
    renoise_beta: float = setting(1.5, "b of t ~ Beta(a, b) at step 0", low=1e-2, high=1e3)
    real_guidance_scale: float = setting(1.0, "of the real score; at most 1 is off", low=-1e3, high=1e3, recipe=True)
    real_guidance_interval: tuple[float, float] = setting(
        (0.0, 1.0),
        "times guided",
        options={"action": TimeInterval, "nargs": 2, "metavar": ("LOW", "HIGH")},
        recipe=True,
    )
    gan_weight: float = setting(0.0, "of DMD2's GAN in the generator's loss; 0 is off", low=0, high=1e6, recipe=True)
    frechet_observe: int = setting(0, "estimator turns a cycle that enter; 0: all", low=0, high=10_000, group="reward")


@dataclass(frozen=True)
class Optimisation:
    """Updates of the networks."""

    batch_size: int = setting(64, "samples per process and turn", high=2**20, recipe=True)
    gradient_accumulation_steps: int = setting(1, "batches a turn, of --batch-size each", high=2**16, recipe=True)
    learning_rate_generator: float = setting(2e-5, "constant", low=0, high=1e3, low_open=True, recipe=True)
    learning_rate_estimator: float = setting(
        2e-5, "constant; the most sensitive setting", low=0, high=1e3, low_open=True, recipe=True
    )
    learning_rate_gan: float = setting(1e-4, "constant, of the GAN's head", low=0, high=1e3, low_open=True)
    optimizer: str = setting(
        "adamw", "adamw8bit: torchao's, both moments in 8 bits", choices=("adamw", "adamw8bit"), lasting=True
    )
    adam_beta1: float = setting(
        0.9, "decay of the first moment, all networks", low=0, high=1, high_open=True, recipe=True
    )
    adam_beta1_generator: float | None = setting(None, "the generator's, if another", low=0, high=1, high_open=True)
    adam_beta1_estimator: float | None = setting(None, "the estimator's, if another", low=0, high=1, high_open=True)
    adam_beta2: float = setting(0.999, "decay of the second moment, all networks", low=0, high=1, high_open=True)
    adam_epsilon: float = setting(1e-8, "of AdamW's denominator", low=1e-30, high=1)
    weight_decay_generator: float = setting(0.01, "of AdamW, times the learning rate", low=0, high=1e3, recipe=True)
    weight_decay_estimator: float = setting(0.0, "of AdamW, times the learning rate", low=0, high=1e3)
    max_grad_norm: float = setting(1.0, "norm at which gradients are clipped", low=1e-30, high=1e30)
    ema_decay: float = setting(0.0, "of the generator's average; 0 is off", low=0, high=1, high_open=True, recipe=True)
    seed: int = setting(
        30, "of every draw: noise, labels, times, first LoRA", low=0, high=2**63 - 1, group="run", recipe=True
    )

    def effective_batch(self, processes: int) -> int:
        """Samples of one update, over accumulation and processes."""
        return self.batch_size * self.gradient_accumulation_steps * processes


@dataclass(frozen=True)
class Hardware:
    """Precision, processes and compilation."""

    mixed_precision: str = setting(
        "auto",
        "auto: fp16 on a GPU, no on a CPU; a teacher that overflows in fp16 needs bf16",
        choices=("auto", "no", "fp16", "bf16"),
        recipe=True,
    )
    shard_over: str = setting(
        "node",
        "FSDP2 on several nodes: a copy of the weights on each node, or one over all of them",
        choices=("node", "all"),
    )
    gradient_checkpointing: bool = setting(False, "of both networks' blocks")
    compile: bool | str = setting(
        "auto",
        "torch.compile of both networks' blocks; auto: on CUDA, where a compiler is found",
        options={"action": argparse.BooleanOptionalAction},
    )
