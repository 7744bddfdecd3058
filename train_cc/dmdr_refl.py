"""Stage 2, DMDR (ReFL): distribution matching and a reward together (docs/method.md: reward), from a checkpoint.

Run by `scripts/dmdr_sitxl_refl.sh` and `scripts/dmdr_digits_refl.sh`; the defaults are the SiT-XL/2 recipe.
"""

import argparse

from train_cc.cold_start import run_or_plan
from train_cc.io.errors import exits_on_input_error
from train_cc.setup.arguments import build_parser


def stage_parser() -> argparse.ArgumentParser:
    parser = build_parser(__doc__)
    parser.set_defaults(
        encoder_type="dinov2",
        max_train_steps=22_000,
        batch_size=24,
        learning_rate_generator=1e-5,
        learning_rate_estimator=1e-5,
        reward_micro_batch=8,
        dynamic_steps=0,  # the dynamic phase belongs to the cold start, however short it was
        checkpoint_steps=500,
        sample_steps=50,
    )
    return parser


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    run_or_plan("dmdr_refl", stage_parser().parse_args(argv))


if __name__ == "__main__":
    main()
