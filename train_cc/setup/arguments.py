"""The command line of both stages, made of `train_cc.settings`: validated before anything is loaded."""

import argparse
import importlib.util
import os
from pathlib import Path

from train_cc import settings
from train_cc.io.errors import InputError
from train_cc.io.fields import Arguments, Parser, add_flags, flag_of, marked, replaced
from train_cc.io.products import record_of
from train_cc.rewards.spec import Rewards, require_sense, rewards_of

GROUPS = {
    "run": settings.Output,
    "models": settings.Models,
    "method": settings.Method,
    "optimisation": settings.Optimisation,
    "reward": Rewards,
    "hardware": settings.Hardware,
}


def build_parser(description: str) -> Parser:
    """Every flag that both stages have."""
    parser = Parser(description=description)
    add_flags(parser, **GROUPS)
    return parser


def validate(args: argparse.Namespace) -> tuple[Arguments, list[str]]:
    """Raise `InputError` on a contradiction; return the arguments that count, and a line for each ignored flag."""
    written = {os.path.realpath(args.output_dir / name) for name in ("", "checkpoints", "generator")}
    for name in marked("reads", *GROUPS.values()) if args.overwrite else ():
        path = getattr(args, name)
        if path is not None and os.path.exists(path):
            real = Path(os.path.realpath(path))
            if written & {str(each) for each in (real, *real.parents)}:
                raise InputError(f"--overwrite would delete {flag_of(name)} {path}")
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
        resume = restarted and record_of(args.output_dir).get("job") == os.environ.get("SLURM_JOB_ID")
        args = replaced(args, auto_resume=resume, overwrite=not resume)
        notes.append(
            "Slurm queued this job again: its run continues, and --overwrite is ignored"
            if resume
            else "--overwrite starts anew: --auto-resume is ignored"
        )
    if args.real_guidance_scale <= 1 and args.real_guidance_interval != [0.0, 1.0]:
        notes.append(f"--real-guidance-scale is {args.real_guidance_scale} (off): --real-guidance-interval is ignored")
    if args.encoder_type == "classifier" and not args.reward_classifier:
        raise InputError("--encoder-type classifier needs --reward-classifier: a classifier folder or a timm name")
    rewards = rewards_of(args)
    require_sense(rewards, args.tilt)
    if not rewards and (args.reward_classifier or args.reward_micro_batch or args.reward_checkpointing):
        notes.append("--encoder-type is none: the reward's flags are ignored")
    return args, notes


def installed(library: str) -> bool:
    """True if ``library`` can be imported. A folder of its name does not count: wandb writes one."""
    spec = importlib.util.find_spec(library)
    return spec is not None and spec.origin is not None
