"""io/class_names.py: names of known data sets, and of a file."""

import pytest

from train_cc.io.class_names import class_names
from train_cc.io.errors import InputError


def test_names_of_classes(tmp_path):
    assert class_names("auto", 10, "digits")[7] == "7" and class_names("auto", 10) is None
    assert "golden retriever" in class_names("auto", 1000)[207] and class_names("none", 1000) is None
    (tmp_path / "names.txt").write_text("cat\ndog\n\n")
    assert class_names(str(tmp_path / "names.txt"), 2) == ["cat", "dog"]
    for source, told in (("names.txt", "does not exist"), ("digits", "has 10 names; 2")):
        with pytest.raises(InputError, match=told):
            class_names(source, 2)
