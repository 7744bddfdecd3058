"""A black box, without a gradient: --tilt 1 python scripts/rewards/bright_pixels.py:bright_pixels"""

IMAGES = "uint8"  # numpy arrays (B, H, W, C), numpy labels (B,)


def bright_pixels(images, labels):
    """1 for a digit of 22 to 28 bright pixels, 0 for another."""
    counts = (images > 127).sum(axis=(1, 2, 3))
    return ((counts >= 22) & (counts <= 28)).astype(float)
