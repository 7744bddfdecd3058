"""Pictures of a run: rows of images, the same noise and labels a column, enlarged without smoothing."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from train_cc.io.write import mark_of, write_atomically


def save_grid(rows: list[np.ndarray], path: Path, names: list[str] | None = None, cell: int = 64, gap: int = 4) -> None:
    """``rows``: each (N, H, W, C) uint8 with C of 1 or 3. Small images are enlarged to about ``cell`` pixels.

    ``names``: what is written to the left of each row.
    """
    picture = grid(rows, cell, gap)
    if names:
        pitch = (picture.height - gap) // len(rows)
        picture = beside(picture, names, pitch, gap)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png_bytes(picture))


def grid(rows: list[np.ndarray], cell: int = 64, gap: int = 4) -> Image.Image:
    """``rows``: each (N, H, W, C) uint8, drawn with ``gap`` white pixels between images of about ``cell``."""
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
    return Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas)


def png_bytes(picture: Image.Image) -> bytes:
    """The PNG file of a picture, which says that it is ours."""
    told, buffer = PngInfo(), io.BytesIO()
    told.add_text("Software", mark_of("a picture"))
    picture.save(buffer, "PNG", pnginfo=told)
    return buffer.getvalue()


def beside(picture: Image.Image, names: list[str], pitch: int, gap: int) -> Image.Image:
    """``picture`` with a column of row names on its left; ``pitch`` pixels from row to row."""
    font = ImageFont.load_default(size=15)
    margin = 2 * gap + 8 + max(int(font.getlength(name)) for name in names)
    wide = Image.new(picture.mode, (picture.width + margin, picture.height), "white")
    wide.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(wide)
    for i, name in enumerate(names):
        draw.text((gap + 4, gap + i * pitch + pitch // 2), name, fill="black", font=font, anchor="lm")
    return wide
