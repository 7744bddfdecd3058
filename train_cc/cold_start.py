"""Stage 1, cold start: distribution matching with the two dynamic schedules (docs/method.md: one iteration, schedules).

Run by `scripts/cold_start_sitxl.sh` and `scripts/cold_start_digits.sh`; the defaults are the SiT-XL/2 recipe.
"""

import argparse

from train_cc.io.errors import exits_on_input_error
from train_cc.io.saying import saying
from train_cc.setup.arguments import build_parser, validate


def stage_parser() -> argparse.ArgumentParser:
    return build_parser(__doc__)


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args, notes = validate(stage_parser().parse_args(argv))
    with saying("loading libraries"):
        from train_cc.setup.stage import run_stage  # torch takes seconds: a wrong flag is told before

    run_stage("cold_start", args, notes)


if __name__ == "__main__":
    main()
