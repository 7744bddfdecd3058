"""train_cc/rewards/statistics.py: what a file of statistics must hold, and of which space it is."""

import json

import numpy as np
import pytest

from train_cc.io.errors import InputError
from train_cc.rewards.statistics import read_statistics, require_space


@pytest.fixture(scope="module")
def arrays(real) -> dict[str, np.ndarray]:
    with np.load(real) as file:
        return dict(file)


def test_a_file_is_read_as_it_was_written(real, arrays):
    read = read_statistics(real)
    assert read.size == len(arrays["mu"]) and read.num_classes == 10 and read.classes is None
    for name in ("mu", "sigma", "class_mu", "class_count", "within"):
        assert np.allclose(getattr(read, name), arrays[name], rtol=1e-12) and np.abs(arrays[name]).max() > 0
    assert read.space["source"]["images"] == "digits" and read.class_count.sum() == read.space["images"] == 1797


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c.pop("mu"), "lacks mu"),
    (lambda c: c.pop("within"), "lacks within"),
    (lambda c: c.pop("space"), "lacks space"),
    (lambda c: c.update(space=np.array("{}")), "space lacks name, sha256, preprocessing"),
    (lambda c: c.update(mu=c["sigma"]), r"mu has shape .*\(D,\) is expected"),
    (lambda c: c.update(mu=c["mu"][1:]), "sigma has shape"),
    (lambda c: c.update(class_mu=c["class_mu"][:, 1:]), "class_mu has shape"),
    (lambda c: c.update(mu=c["mu"] * np.nan), "mu holds NaN or infinity"),
    (lambda c: c.update(sigma=np.triu(c["sigma"])), "sigma is not symmetric"),
    (lambda c: c.update(within=c["within"] - 0.1 * c["within"].max() * np.eye(len(c["mu"]))), "within has an eigenval"),
    (lambda c: c.update(class_count=-c["class_count"]), "whole numbers"),
    (lambda c: c.update(class_count=c["class_count"] + 0.5), "whole numbers"),
    (lambda c: c.update(class_count=c["class_count"] * 0), "whole numbers"),
])  # fmt: skip
def test_statistics_that_cannot_be_are_refused(arrays, tmp_path, change, message):
    content = dict(arrays)
    change(content)
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(InputError, match=message):
        read_statistics(tmp_path / "bad.npz")


def test_another_space_is_refused_by_both_hashes(arrays, tmp_path):
    own = json.loads(str(arrays["space"]))
    space = {name: own[name] for name in ("name", "sha256", "preprocessing")}
    require_space(own, space | {"name": "classifier:elsewhere"}, tmp_path)
    with pytest.raises(InputError, match=f"{own['sha256']}.*{'f' * 64}"):
        require_space(own, space | {"sha256": "f" * 64}, tmp_path)
    with pytest.raises(InputError, match="preprocessing"):
        require_space(own, space | {"preprocessing": space["preprocessing"] | {"image_size": 64}}, tmp_path)
