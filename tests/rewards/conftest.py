"""Two functions of a user's file: one with a gradient, one on arrays."""

import pytest

SHARP = """
def sharpness(images, labels):
    across = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    return across + down
"""
INK = """
IMAGES = "uint8"


def ink(images, labels):
    assert images.dtype.name == "uint8" and images.shape[-1] == 1 and labels.shape == (len(images),)
    return [float((image > 127).sum()) / 64 for image in images]
"""


@pytest.fixture
def sharp(tmp_path) -> str:
    (tmp_path / "sharp.py").write_text(SHARP)
    return f"{tmp_path / 'sharp.py'}:sharpness"


@pytest.fixture
def ink(tmp_path) -> str:
    (tmp_path / "ink.py").write_text(INK)
    return f"{tmp_path / 'ink.py'}:ink"
