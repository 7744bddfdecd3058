"""Samples of a generator or a teacher as an ADM-style .npz: arr_0 uint8 (N, H, W, C), arr_1 labels, provenance.

`python -m evaluation.generate --generator runs/digits/cold_start/generator --num-images 1800 --output s.npz`

Image i depends on (seed, i) only: noise and label are the same for any batch size and number of processes, and the
images equal within one grey level. Values are rounded to nearest. `--sampler few-step` is the generator's own, with the
steps and the shift that its folder or checkpoint records; `euler`, `heun` and `sde` treat the model as a multi-step
teacher. `sde` is Euler-Maruyama, as the published figures of SiT and REPA are made.
Runs under `accelerate launch` or `torchrun` too. Finished parts are kept in OUTPUT.tmp until the output is whole: the
same command continues after a stop, and changes nothing if it had finished.
"""

import argparse

from train_cc.io import fields
from train_cc.io.errors import InputError, exits_on_input_error, saying
from train_cc.io.products import apart, check_output_file

MULTI_STEPS = 50  # of euler and heun, unless told otherwise: a teacher in one step is not what they are for
SDE_STEPS = 250  # as published


def build_parser() -> fields.Parser:
    parser = fields.Parser(description=__doc__)
    parser.add_argument(
        "--generator",
        type=fields.path,
        required=True,
        help="a run's generator/, a teacher folder, a torch_units/step-N.pt, or org/name[@revision] on the hub",
    )
    parser.add_argument("--output", type=fields.output_file, required=True, help="the .npz to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an --output and --png-dir of this command")
    parser.add_argument("--png-dir", type=fields.path, help="also write the images as PNG files there")
    parser.add_argument("--num-images", type=fields.COUNT, default=50_000, help="images in all")
    parser.add_argument("--batch-size", type=fields.BATCH, default=250, help="images at once, per process")
    parser.add_argument(
        "--shard-size", type=fields.BATCH, default=1_000, help="images written at once, and kept on interruption"
    )
    parser.add_argument(
        "--labels", choices=["balanced", "random"], default="balanced", help="equal numbers per class, or drawn"
    )
    parser.add_argument("--classes", nargs="+", help="only these, numbers or names, each once; without it all")
    parser.add_argument("--names", type=fields.path, help="for --classes: a file with the classes' names, a line each")
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=fields.SEED, default=0, help="of noise and labels")
    return parser


def add_sampling_arguments(parser: fields.Parser) -> None:
    parser.add_argument(
        "--trust-teacher-code",
        action="store_true",
        help="permission to run the network.py of --generator, or of a checkpoint's teacher",
    )
    parser.add_argument(
        "--weights",
        choices=["auto", "ema", "raw"],
        default="auto",
        help="of a checkpoint; auto: EMA, if it has one",
    )
    parser.add_argument(
        "--sampler",
        choices=["few-step", "euler", "heun", "sde"],
        default="few-step",
        help="the generator's, or a teacher's solver: of the ODE (euler, heun) or of the SDE",
    )
    parser.add_argument(
        "--num-steps",
        type=fields.STEPS,
        help=f"without it few-step: what --generator records, else 1; euler and heun: {MULTI_STEPS}; sde: {SDE_STEPS}",
    )
    parser.add_argument(
        "--timestep-shift",
        type=fields.SHIFT,
        help="of the few-step sampler's time grid: without it what --generator records, else 1",
    )
    parser.add_argument("--guidance-scale", type=fields.GUIDANCE, default=1.0, help="at most 1 is off")
    parser.add_argument(
        "--guidance-interval",
        action=fields.TimeInterval,
        nargs=2,
        default=[0.0, 1.0],
        metavar=("LOW", "HIGH"),
        help="times guided, of 0 (data) to 1 (noise)",
    )
    parser.add_argument(
        "--guidance-channels",
        type=fields.integer(1, 1024),
        metavar="N",
        help="guide the first N channels only (published scales of DiT and SiT: 3 of 4); without it all",
    )
    parser.add_argument("--vae", default="none", help="decoder of latent models: hub name or folder; none: pixel space")
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        default="fp32",
        help="of the network; the decoder chooses: fp16 on a GPU where that does not show, else fp32",
    )


def check_sampling(args: argparse.Namespace) -> argparse.Namespace:
    """``args`` with the number of steps of a teacher's solver. Raises `InputError` for a shift without a grid."""
    if args.sampler == "few-step":
        return args
    if args.timestep_shift is not None:
        raise InputError(f"--timestep-shift is of the few-step sampler's grid; --sampler {args.sampler} has none")
    steps = args.num_steps or (SDE_STEPS if args.sampler == "sde" else MULTI_STEPS)
    if args.sampler == "sde" and steps < 2:
        raise InputError(f"--num-steps is {steps}; --sampler sde takes 2 at the least: its last adds no noise")
    return fields.replaced(args, num_steps=steps)


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = check_sampling(build_parser().parse_args(argv))
    if args.names is not None and args.classes is None:
        raise InputError(f"--names is {args.names}, but no --classes are given: names choose classes")
    check_output_file(args.output, True)
    apart((("--output", args.output), ("--png-dir", args.png_dir)))
    with saying("loading libraries"):
        from evaluation.samples.sampling import write_samples  # torch takes seconds

    write_samples(args)


if __name__ == "__main__":
    main()
