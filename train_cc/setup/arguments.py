"""The command line of both stages: flags with the SiT-XL/2 recipe as defaults, validation before any loading."""

import argparse
import importlib.util
import os
from pathlib import Path

from train_cc.io import flags
from train_cc.io.errors import InputError
from train_cc.io.flags import Parser
from train_cc.io.write import record_of
from train_cc.rewards.spec import RewardSpec, require_sense
from train_cc.setup.reward_arguments import add_reward_arguments

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"


def build_parser(description: str) -> Parser:
    """Every flag that both stages have; the defaults are the SiT-XL/2 cold start's (DMDR paper)."""
    parser = Parser(description=description)
    run = parser.add_argument_group("run")
    run.add_argument("--output-dir", type=flags.path, required=True, help="the run's folder")
    run.add_argument("--overwrite", action="store_true", help="delete an earlier run in --output-dir")
    run.add_argument("--dry-run", action="store_true", help="print what would be done and the memory it needs, and end")
    run.add_argument("--peak-tflops", type=flags.PEAK, default=312.0, help="of a GPU, for the hours of --dry-run")
    run.add_argument("--resume-ckpt", type=flags.path, help="a torch_units/step-N.pt to start from, here or elsewhere")
    run.add_argument(
        "--auto-resume", action="store_true", help="continue from the newest checkpoint in --output-dir, if any"
    )
    run.add_argument(
        "--max-train-steps", type=flags.COUNT, default=20_000, help="generator updates, counted over both stages"
    )
    run.add_argument(
        "--checkpoint-steps", type=flags.COUNT, default=5_000, help="generator updates between checkpoints"
    )
    run.add_argument(
        "--keep-checkpoints", type=flags.COUNT_OR_0, default=0, help="newest checkpoints that are kept; 0 keeps all"
    )
    run.add_argument("--sample-steps", type=flags.COUNT, default=1_000, help="generator updates between previews")
    run.add_argument(
        "--num-previews", type=flags.integer(0, 4096), default=16, help="images in a preview; 0 turns previews off"
    )
    run.add_argument(
        "--teacher-preview-steps",
        type=flags.integer(0, 10_000),
        default=50,
        help="of Euler, in a preview; 0: no such row",
    )
    run.add_argument(
        "--report-to",
        default="none",
        choices=["none", "tensorboard", "wandb"],
        help="tracker beside the jsonl logs; tensorboard: into the folder dmdr of the output folder.",
    )
    run.add_argument("--seed", type=flags.SEED, default=30, help="of every draw: noise, labels, times, first LoRA")

    model = parser.add_argument_group("models")
    model.add_argument(
        "--teacher",
        type=flags.path,
        required=True,
        help="model folder (convert_weight/sit_convert.py makes one), or org/name[@revision] on the hub",
    )
    model.add_argument(
        "--teacher-is-distilled",
        action="store_true",
        help="permission for a --teacher that is itself a distilled generator of few steps",
    )
    model.add_argument(
        "--num-classes", type=flags.COUNT, help="checked against the teacher's; without it, the teacher's"
    )
    model.add_argument("--vae", default=DEFAULT_VAE, help="decoder: a hub name or folder; 'none' for pixel space")
    model.add_argument("--use-lora-gen", action="store_true", help="train a LoRA of the generator, not all of it")
    model.add_argument(
        "--lora-rank",
        type=flags.integer(1, 4096, "at rank 0 real and fake would be the same network, and learn nothing"),
        default=32,
        help="of the estimator; the generator's is twice it",
    )
    model.add_argument(
        "--lora-init-spread",
        type=flags.number(1e-6, 1e3),
        default=1.0,
        help="standard deviation of the estimator's first LoRA A",
    )

    method = parser.add_argument_group("method")
    method.add_argument("--num-steps", type=flags.integer(1, 1000), default=1, help="steps K of the generator")
    method.add_argument("--timestep-shift", type=flags.SHIFT, default=1.0, help="shift s of the generator's time grid")
    method.add_argument(
        "--ratio-update", type=flags.integer(1, 10_000), default=5, help="estimator turns per generator turn"
    )
    method.add_argument(
        "--lora-scale-fake",
        type=flags.number(1e-6, 1e3, why="at 0 the fake score would be the teacher's, and learn nothing"),
        default=2.0,
        help="LoRA scale of the fake score",
    )
    method.add_argument(
        "--lora-scale-real", type=flags.number(0, 1e3), default=0.75, help="LoRA scale of the real score at step 0"
    )
    method.add_argument(
        "--dynamic-steps", type=flags.COUNT_OR_0, default=10_000, help="generator updates D of both schedules"
    )
    method.add_argument("--renoise-alpha", type=flags.BETA_PARAMETER, default=4.0, help="a of t ~ Beta(a, b) at step 0")
    method.add_argument("--renoise-beta", type=flags.BETA_PARAMETER, default=1.5, help="b of t ~ Beta(a, b) at step 0")
    method.add_argument(
        "--real-guidance-scale", type=flags.GUIDANCE, default=1.0, help="of the real score; at most 1 is off"
    )
    method.add_argument(
        "--real-guidance-interval",
        action=flags.TimeInterval,
        nargs=2,
        default=[0.0, 1.0],
        metavar=("LOW", "HIGH"),
        help="times guided",
    )

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--batch-size", type=flags.BATCH, default=64, help="samples per process and turn")
    optimisation.add_argument(
        "--gradient-accumulation-steps",
        type=flags.integer(1, 2**16),
        default=1,
        help="batches a turn, of --batch-size each",
    )
    optimisation.add_argument("--learning-rate-generator", type=flags.LEARNING_RATE, default=2e-5, help="constant")
    optimisation.add_argument(
        "--learning-rate-estimator", type=flags.LEARNING_RATE, default=2e-5, help="constant; the most sensitive setting"
    )
    optimisation.add_argument(
        "--optimizer",
        default="adamw",
        choices=["adamw", "adamw8bit"],
        help="adamw8bit: torchao's, both moments in 8 bits",
    )
    optimisation.add_argument(
        "--adam-beta1", type=flags.DECAY, default=0.9, help="decay of the first moment, both networks"
    )
    optimisation.add_argument(
        "--adam-beta2", type=flags.DECAY, default=0.999, help="decay of the second moment, both networks"
    )
    optimisation.add_argument(
        "--adam-epsilon", type=flags.number(1e-30, 1), default=1e-8, help="of AdamW's denominator"
    )
    optimisation.add_argument(
        "--weight-decay-generator", type=flags.WEIGHT_DECAY, default=0.01, help="of AdamW, times the learning rate"
    )
    optimisation.add_argument(
        "--weight-decay-estimator", type=flags.WEIGHT_DECAY, default=0.0, help="of AdamW, times the learning rate"
    )
    optimisation.add_argument(
        "--max-grad-norm", type=flags.number(1e-30, 1e30), default=1.0, help="norm at which gradients are clipped"
    )
    optimisation.add_argument("--ema-decay", type=flags.DECAY, default=0.0, help="of the generator's average; 0 is off")

    add_reward_arguments(parser)

    hardware = parser.add_argument_group("hardware")
    hardware.add_argument(
        "--mixed-precision",
        default="auto",
        choices=["auto", "no", "fp16", "bf16"],
        help="auto: fp16 on a GPU, no on a CPU; a teacher that overflows in fp16 needs bf16",
    )
    hardware.add_argument(
        "--shard-over",
        default="node",
        choices=["node", "all"],
        help="FSDP2 on several nodes: a copy of the weights on each node, or one over all of them",
    )
    hardware.add_argument("--gradient-checkpointing", action="store_true", help="of both networks' blocks")
    hardware.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default="auto",
        help="torch.compile of both networks' blocks; auto: on CUDA, where a compiler is found",
    )
    return parser


def validate(args: argparse.Namespace) -> list[str]:
    """Raise `InputError` on an impossible value or a contradiction; -> one line for each flag that is set aside."""
    inputs = (
        "teacher",
        "resume_ckpt",
        "vae",
        "reward_classifier",
        "holdout_classifier",
        "dinov2_backbone",
        "dinov2_head",
    )
    written = {os.path.realpath(args.output_dir / name) for name in ("", "checkpoints", "generator")}
    for name in inputs if args.overwrite else ():
        path = getattr(args, name)
        if path is not None and os.path.exists(path):
            real = Path(os.path.realpath(path))
            if written & {str(each) for each in (real, *real.parents)}:
                raise InputError(f"--overwrite would delete --{name.replace('_', '-')} {path}")
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if args.optimizer == "adamw8bit" and sharded and os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            "--optimizer adamw8bit under FSDP2 (ACCELERATE_USE_FSDP): moments that are sharded and in 8 bits cannot be "
            "saved; allowed: adamw, whose moments FSDP2 shards, or an accelerate config that does not shard "
            "(scripts/accelerate/ddp.yaml)"
        )
    if args.optimizer == "adamw8bit" and not installed("torchao"):
        raise InputError("--optimizer adamw8bit needs torchao, which is not installed: pip install torchao")
    if args.report_to != "none" and not installed(args.report_to):
        raise InputError(f"--report-to {args.report_to}: it is not installed: pip install {args.report_to}")
    notes = []
    if args.auto_resume and args.overwrite:
        restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        args.auto_resume = restarted and record_of(args.output_dir).get("job") == os.environ.get("SLURM_JOB_ID")
        args.overwrite = not args.auto_resume
        notes.append(
            "Slurm queued this job again: its run continues, and --overwrite is set aside"
            if args.auto_resume
            else "--overwrite starts anew: --auto-resume is set aside"
        )
    if args.real_guidance_scale <= 1 and args.real_guidance_interval != [0.0, 1.0]:
        notes.append(
            f"--real-guidance-scale is {args.real_guidance_scale} (off): --real-guidance-interval is set aside"
        )
    if args.encoder_type == "classifier" and not args.reward_classifier:
        raise InputError("--encoder-type classifier needs --reward-classifier: a classifier folder or a timm name")
    rewards = rewards_of(args)
    require_sense(rewards, args.tilt)
    if not rewards and (args.reward_classifier or args.reward_micro_batch or args.reward_checkpointing):
        notes.append("--encoder-type is none: the reward's flags are set aside")
    return notes


def installed(library: str) -> bool:
    """Whether ``library`` can be imported. A mere folder of its name is none: wandb writes one where it is run."""
    spec = importlib.util.find_spec(library)
    return spec is not None and spec.origin is not None


def rewards_of(args: argparse.Namespace) -> list[RewardSpec]:
    """All rewards of a command: that of --encoder-type with --reward-weight, and each --reward."""
    if args.encoder_type == "none":
        return list(args.reward)
    source = args.reward_classifier if args.encoder_type == "classifier" else None
    return [RewardSpec(args.encoder_type, args.reward_weight, source), *args.reward]
