"""A reward of its own file: --reward python 0.05 scripts/rewards/sharpness.py:sharpness"""


def sharpness(images, labels):
    """Mean absolute difference of neighbouring pixels. images (B, C, H, W) in [0, 1], with gradient -> (B,)."""
    across = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    return across + down
