"""train_cc/pretrain/data.py: a data set as an evaluation reference."""

import json

import numpy as np

from tests.conftest import refused, words
from train_cc.pretrain.data import main


def test_a_reference_is_whole_and_made_once(tmp_path, capsys):
    file = tmp_path / "deep" / "reference.npz"
    main(words("--output", file))
    with np.load(file) as content:
        assert content["arr_0"].shape == (1797, 8, 8, 1) and content["arr_1"].shape == (1797,)
        assert json.loads(str(content["provenance"]))["stage"] == "pretrain.data"
    whole = file.read_bytes()
    main(words("--output", file))
    assert "there already" in capsys.readouterr().out
    few = words("--output", file, "--num-images", 9)
    assert "exists" in refused(main, few, capsys=capsys) and file.read_bytes() == whole
    main([*few, "--overwrite"])
    with np.load(file) as content:
        assert len(content["arr_0"]) == len(content["arr_1"]) == 9
    assert [path.name for path in file.parent.iterdir()] == ["reference.npz"]


def test_what_cannot_be_written_or_made_is_refused(tmp_path, capsys):
    for output, more, message in (
        (tmp_path, (), "is a folder"),
        (tmp_path / "o.npz", ("--num-images", 1798), "--num-images is 1798; digits, train has 1797"),
        (tmp_path / "o.npz", ("--vae", tmp_path), "the images have 1 channel; three are needed"),
        (tmp_path / "o.npz", ("--split", "test"), "--split is test"),
    ):
        assert message in refused(main, words("--output", output, *more), capsys=capsys)
    assert not list(tmp_path.iterdir())
