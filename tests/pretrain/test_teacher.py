"""Stage 0's teacher: what it is trained on."""

import sys

import torch

from train_cc.models import SiT
from train_cc.pretrain import teacher


def test_labels_are_dropped_at_the_rate_asked_for(tmp_path, monkeypatch):
    """Null class in place of a fifth of the labels, every class among the others: the teacher learns v_null too."""
    seen, forward = [], SiT.forward
    monkeypatch.setattr(SiT, "forward", lambda self, x, t, y: seen.append((t, y)) or forward(self, x, t, y))
    words = ["teacher", "--dataset", "digits", "--output-dir", tmp_path / "teacher", "--hidden-size", 16, "--depth", 1]
    words += ["--max-train-steps", 20, "--batch-size", 128, "--label-dropout", 0.2]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    teacher.main()
    assert len(seen) == 21  # the last is the loss at the end, of images with their labels
    labels = torch.cat([y for _, y in seen[:-1]])
    assert len(labels) == 20 * 128 and 10 not in seen[-1][1]
    assert 0.15 < (labels == 10).float().mean() < 0.25
    assert set(labels.tolist()) == set(range(11))
    times = torch.cat([t for t, _ in seen]).double()
    normal = torch.logit(times)  # logit-normal times: t = sigmoid(N(0, 1))
    assert abs(normal.mean()) < 0.1 and abs(normal.std() - 1) < 0.1
