"""Pictures of a run: rows of images, the same noise and labels a column, enlarged without smoothing."""

from pathlib import Path

import numpy as np
from PIL import Image


def save_grid(rows: list[np.ndarray], path: Path, cell: int = 64, gap: int = 4) -> None:
    """``rows``: each (N, H, W, C) uint8 with C of 1 or 3. Small images are enlarged to about ``cell`` pixels."""
    factor = max(1, cell // rows[0].shape[1])
    rows = [row.repeat(factor, axis=1).repeat(factor, axis=2) for row in rows]
    count, side = max(len(row) for row in rows), rows[0].shape[1]
    pitch = side + gap
    channels = rows[0].shape[3]
    canvas = np.full((len(rows) * pitch + gap, count * pitch + gap, channels), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = gap + i * pitch, gap + j * pitch
            canvas[top : top + side, left : left + side] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas).save(path)
