"""The names of the classes of known data sets, or of a file: what a person may give in place of a number."""

from pathlib import Path

from train_cc.io.errors import InputError
from train_cc.io.read import parsing, require_file

KNOWN = {
    "digits": [str(digit) for digit in range(10)],
    "fashion-mnist": [
        *("T-shirt, top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ],
}
IMAGENET_CLASSES = 1000
EXPECTED = "auto, none, digits, fashion-mnist, imagenet, or a text file with one class a line"


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
        path = require_file(Path(source), EXPECTED)
        with parsing(path, EXPECTED):
            names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) != num_classes:
        raise InputError(f"{flag} {source} has {len(names)} names; {num_classes} classes are expected")
    return names
