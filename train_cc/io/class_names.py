"""The names of the classes of known data sets, or of a file: what a person may give in place of a number."""

from pathlib import Path

from train_cc.io.errors import InputError
from train_cc.io.products import record_of
from train_cc.io.read import parsing, printable, require_file

KNOWN = {
    "digits": [str(digit) for digit in range(10)],
    "fashion-mnist": [
        *("T-shirt, top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ],
}
DATASETS = tuple(KNOWN)
IMAGENET_CLASSES = 1000
NAMES_FILE = "auto, none, digits, fashion-mnist, imagenet, or a text file with one class a line"


def class_names(
    source: str, num_classes: int, dataset: str | None = None, flag: str = "--class-names"
) -> list[str] | None:
    """A name, or several separated by ", ", of each class; None where there are none.

    ``source``: see `EXPECTED`; auto takes ``dataset``'s, which the model was trained on, else ImageNet's for 1000
    classes. ``flag`` gave it. Raises `InputError`.
    """
    if source == "auto":
        source = dataset if dataset in KNOWN else "imagenet" if num_classes == IMAGENET_CLASSES else "none"
        if source in KNOWN and len(KNOWN[source]) != num_classes:
            source = "none"
    if source == "none":
        return None
    if source == "imagenet":
        from timm.data import ImageNetInfo

        info = ImageNetInfo("imagenet-1k")
        names = [info.index_to_description(number) for number in range(info.num_classes())]
    elif source in KNOWN:
        names = KNOWN[source]
    else:
        expected = NAMES_FILE if flag == "--class-names" else "a text file with one class a line"
        path = require_file(Path(source), expected)
        with parsing(path, expected):
            names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) != num_classes:
        raise InputError(f"{flag} {source} has {len(names)} names; {num_classes} classes are expected")
    return names


def dataset_of(folder: Path) -> str | None:
    """The data set that the network of ``folder`` was trained on, as its record says."""
    dataset = record_of(folder).get("arguments", {}).get("dataset")
    return dataset if isinstance(dataset, str) else None


def order_of(folders: list[str]) -> str:
    """The first classes and the last with their numbers, for a person to compare with the model's."""
    words = [f"{k} is {printable(name)[:40]}" for k, name in enumerate(folders)]
    return f"class {', '.join(words if len(words) < 7 else [*words[:4], '...', words[-1]])}, by the folders' names"


def contradiction(folders: list[str], num_classes: int, dataset: str | None) -> str | None:
    """The first class folder that has the name or the number of another class of a model of ``dataset``, in words.

    None: there is no such folder.
    """
    if len(folders) != num_classes:
        return None
    names = class_names("auto", num_classes, dataset) or map(str, range(num_classes))
    own = [{str(j), _letters(name), *map(_letters, name.split(","))} for j, name in enumerate(names)]
    for k, folder in enumerate(folders):
        classes = [j for j, spellings in enumerate(own) if _letters(folder) in spellings]
        if classes and k not in classes:
            return f"the folder {printable(folder)[:40]} is its class {k}, but the model's class {classes[0]}"
    return None


def _letters(name: str) -> str:
    letters = "".join(c for c in name.lower() if c.isalnum())
    return str(int(letters)) if letters.isascii() and letters.isdecimal() else letters  # 0001 is 1
