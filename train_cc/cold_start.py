"""Stage 1, cold start: distribution matching with the two dynamic schedules (docs/method.md: one iteration, schedules).

Run by `scripts/cold_start_sitxl.sh` and `scripts/cold_start_digits.sh`; the defaults are the SiT-XL/2 recipe.
"""

import argparse

from train_cc.arguments import build_parser, validate
from train_cc.distill import run_stage
from train_cc.io.errors import exits_on_input_error


def stage_parser() -> argparse.ArgumentParser:
    return build_parser(__doc__)


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = stage_parser().parse_args(argv)
    run_stage("cold_start", args, validate(args))


if __name__ == "__main__":
    main()
