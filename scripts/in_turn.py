"""One command several times in one process, since Python and torch take seconds to start:

`python -m scripts.in_turn MODULE COMMON-FLAGS , FLAGS , FLAGS ...`
"""

import importlib
import sys

from train_cc.io.errors import InputError, exits_on_input_error


def split(words: list[str]) -> list[list[str]]:
    """The words between commas."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == ",":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


@exits_on_input_error
def main(words: list[str] | None = None) -> None:
    (common, *runs) = split(sys.argv[1:] if words is None else words)
    if not common or not runs:
        raise InputError("a module, its common flags, and after each comma the flags of one run are expected")
    command = importlib.import_module(common[0]).main
    for flags in runs:
        command([*common[1:], *flags])


if __name__ == "__main__":
    main()
