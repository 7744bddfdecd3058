"""Stage 1, cold start: distribution matching with the two dynamic schedules (docs/method.md: one iteration, schedules).

Run by `scripts/cold_start_sitxl.sh` and `scripts/cold_start_digits.sh`; the defaults are the SiT-XL/2 recipe.
"""

import argparse

from train_cc.io.errors import exits_on_input_error, saying
from train_cc.setup.arguments import build_parser, validate


def stage_parser() -> argparse.ArgumentParser:
    return build_parser(__doc__)


def run_or_plan(stage: str, args: argparse.Namespace) -> None:
    """The stage of a command line, or its plan. A run imports nothing of the plan."""
    args, notes = validate(args)
    with saying("loading libraries"):  # torch takes seconds: a wrong flag is told before
        if args.dry_run:
            from train_cc.planning.plan import print_plan as start
        else:
            from train_cc.setup.stage import run_stage as start
    start(stage, args, notes)


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    run_or_plan("cold_start", stage_parser().parse_args(argv))


if __name__ == "__main__":
    main()
