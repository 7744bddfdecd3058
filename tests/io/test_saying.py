"""No command is silent: what takes long says so, and what is quick says nothing."""

import time

import pytest

from train_cc.io import errors
from train_cc.io.errors import beating


def test_what_lasts_is_told_again_and_again_until_it_ends():
    told = []
    with beating(told.append, first=0.05, every=0.05):
        time.sleep(0.5)
    count = len(told)
    time.sleep(0.2)
    assert 3 <= count == len(told) and told == sorted(told)


@pytest.mark.parametrize("rank,first,shown", [("0", 0.01, True), ("1", 0.01, False), ("0", 5, False)])
def test_the_main_process_alone_says_it_and_not_at_once(monkeypatch, capsys, rank, first, shown):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(errors.beating.__wrapped__, "__defaults__", (first, 10.0))
    with pytest.raises(KeyError), errors.saying("reading"):
        time.sleep(0.2)
        raise KeyError
    assert capsys.readouterr().err == "reading, 0 s\n" * shown
