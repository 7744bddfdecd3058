"""Messages: errors of the machine are one sentence, and what takes long says so."""

import time

import pytest
import torch

from train_cc.io import errors
from train_cc.io.errors import beating, message_of


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


def test_memory_that_is_missing_is_a_message_and_a_bug_is_not():
    for error in (MemoryError(), MemoryError("9 GiB"), torch.OutOfMemoryError("9 GiB\nmore")):
        detail = " (9 GiB)" if str(error) else ""
        assert message_of(error).startswith(f"out of memory{detail}; lower --batch-size")
    assert message_of(RuntimeError("[enforce fail] can't allocate memory: 9")).startswith("out of memory ([enforce")
    assert message_of(RuntimeError("shapes")) is None
