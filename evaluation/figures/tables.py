"""Figures as text: their tables, means over seeds, and who was rewarded where."""

import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

from train_cc.io.errors import InputError
from train_cc.io.figures import columns_of, markdown_table
from train_cc.io.read import read_json

HEADLINE = 50_000  # images of a figure that needs no suffix
OF_SETS = ("Recall", "Precision", "Density", "Coverage", "SW")  # their count is that of a set, not of all samples
OF_NO_COUNT = ("accuracy", "KID", "FDr", "SWr")
HELD_OUT = "held-out real"  # the name of the ceiling's row


def heads_of(columns: Iterable[str], count: int, size: int | None = None) -> list[str]:
    """The heads of the metrics' columns, such as FID-5k. ``size``: of the sets; None: ``count``."""
    counts = {name: size or count for name in OF_SETS} | dict.fromkeys(OF_NO_COUNT, HEADLINE)
    counts = {name: counts.get(name, count) for name in columns}
    return [name + ("" if images >= HEADLINE else f"-{images / 1000:g}k") for name, images in counts.items()]


def named_space(features: str) -> str:
    """A feature space as people call it: a classifier's folder by its last name, with its architecture."""
    kind, _, folder = features.partition(":")
    config = Path(folder) / "config.json"
    if kind != "classifier" or not config.is_file():
        return features
    return f"{Path(folder).name} ({read_json(config, 'a classifier').get('architecture')})"


def figure_text(metric: str, value: float) -> str:
    """KID and SW are of any size: three digits of them count."""
    if metric in ("KID", "SW"):
        return f"{value:.3g}"
    return f"{value:.{2 if metric in ('FID', 'IS', 'FDr', 'SWr') else 3}f}"


def cell_of(row: dict, metric: str) -> str:
    if metric not in row["figures"]:
        return "-"
    cell = figure_text(metric, row["figures"][metric])
    if metric in row.get("standard_errors", {}):
        cell += f" +- {row['standard_errors'][metric]:.1g}"
    elif metric in row.get("standard_deviations", {}):
        cell += f" +- {figure_text(metric, row['standard_deviations'][metric])}"
    elif metric in row.get("intervals", {}):
        cell += " ({} to {})".format(*(figure_text(metric, end) for end in row["intervals"][metric]))
    return cell


def table(rows: dict[str, dict], count: int, size: int | None = None) -> str:
    """A Markdown table, a line per row: figures with their spreads, and the number of seeds in rows of `means_of`."""
    columns, seeds = columns_of(rows.values()), [each for each in ("seeds",) if each in next(iter(rows.values()))]
    lines = [[name, *map(row.get, seeds), *(cell_of(row, each) for each in columns)] for name, row in rows.items()]
    return markdown_table(["", *seeds, *heads_of(columns, count, size)], lines)


# Rewards ----------------------------------------------------------------------------------------------------------


def rewarded_by(made_by: dict | None, features_sha256: str) -> bool:
    """True if the network of hash ``features_sha256`` rewarded the generator of the samples with that provenance."""
    rewards = (made_by or {}).get("rewards_sha256")
    return isinstance(rewards, list) and features_sha256 in rewards


def rewarded_here(made_by: Iterable[tuple[str, dict | None]], features_sha256: str) -> list[str]:
    """A line that names the rows, of (name, provenance), that the space of that hash rewarded; [] if there are none.

    A reward moves its own space first: figures there say little.
    """
    names = dict.fromkeys(name for name, each in made_by if rewarded_by(each, features_sha256))
    return [f"This space rewarded {', '.join(names)}: judge it in a space that no reward used."] if names else []


def rewarded_within(rows: dict[str, dict]) -> list[str]:
    """A line for each row of means over spaces that some of these spaces rewarded."""
    return [
        f"Spaces that rewarded it are in the mean of {name}: {', '.join(row['rewarded_in'])}."
        for name, row in rows.items()
        if row.get("rewarded_in")
    ]


# Seeds and classes ------------------------------------------------------------------------------------------------


def over_seeds(rows: dict[str, dict]) -> dict[str, list[dict]]:
    """Rows named "NAME, seed N", together by NAME, in their order. Raises `InputError` for another name."""
    groups: dict[str, list[dict]] = {}
    for name, row in rows.items():
        if not (match := re.fullmatch(rf"(.*), seed \d+|({HELD_OUT})", name)):
            raise InputError(f"--over-seeds: the row is named {name!r}; 'NAME, seed N' is expected")
        groups.setdefault(match[1] or match[2], []).append(row)
    return groups


def means_of(rows: dict[str, dict]) -> dict[str, dict]:
    """Rows named "NAME, seed N", by NAME: means, the standard deviations of one seed, and the number of seeds."""
    means = {}
    for name, group in over_seeds(rows).items():
        columns = columns_of(group)
        values = {each: [row["figures"][each] for row in group if each in row["figures"]] for each in columns}
        means[name] = {
            "figures": {metric: statistics.mean(each) for metric, each in values.items()},
            "standard_deviations": {m: statistics.stdev(each) for m, each in values.items() if len(each) > 1},
            "seeds": len(group),
            "images": group[0]["images"],
        }
    return means


def suffered(rows: dict[str, dict], together: bool = False, number: int = 3) -> list[str]:
    """A line per row: the classes whose recall fell most against the first row; without recall, their accuracy.

    ``together``: rows that differ by their seed are one, by the mean.
    """
    groups = over_seeds(rows) if together else {name: [row] for name, row in rows.items()}
    groups = {name: group for name, group in groups.items() if name != HELD_OUT}
    (first, base), *others = groups.items()
    which = next((each for each in ("recall", "accuracy") if base[0].get("classes", {}).get(each)), None)
    before = {} if which is None else means_of_classes(base, which)
    lines = []
    for name, group in others if before else ():
        if not (after := means_of_classes(group, which)):
            continue  # samples without labels
        change = sorted((after[k] - before[k], k) for k in before.keys() & after.keys())
        worst = ", ".join(f"{k} ({before[k]:.2f} to {before[k] + d:.2f})" for d, k in change[:number] if d < 0)
        lines.append(f"{name}: {which} against {first} fell most in class {worst}" if worst else f"{name}: in none")
    return lines


def means_of_classes(group: list[dict], which: str) -> dict[int, float]:
    """Class -> the mean over the rows of one name; {} if a row has none."""
    lists = [row.get("classes", {}).get(which) for row in group]
    if not all(lists):
        return {}
    return {k: statistics.mean(v) for k, v in enumerate(zip(*lists, strict=False)) if None not in v}


# All of them ------------------------------------------------------------------------------------------------------


def warning_lines(judged: list[dict]) -> Iterator[str]:
    """The warnings about all rows; ``judged``: a dict of "rows" for each space, as `spaces.judge_all` returns it."""
    for space in judged:
        made_by = [(name, row["generation"]) for name, row in space["rows"].items()]
        yield from (f"{space['features']}: {line}" for line in rewarded_here(made_by, space["features_sha256"]))
        for name, row in space["rows"].items():
            yield from (f"{name}, {space['features']}: {note}" for note in row["notes"])


def print_tables(judged: list[dict], means: dict[str, dict], size: int, seeds: bool) -> None:
    """Print the tables: of each space, and of all if there are several and something is held out."""
    count = next(iter(judged[0]["rows"].values()))["images"]
    for space in judged:
        print(table(space["rows"], count, size))
        if seeds:
            print(table(means_of(space["rows"]), count, size))
        sets = space.get("missing", f"sets of {size} images")
        print(f"features: {space['features']}; FID reference: {space['fid_reference']}; {sets}")
        print("".join(f"{line}\n" for line in suffered(space["rows"], seeds)))
    if means and len(judged) > 1:
        print(f"the mean over {len(judged)} spaces:\n{table(means_of(means) if seeds else means, count)}")
        print("".join(f"{line}\n" for line in rewarded_within(means)))
