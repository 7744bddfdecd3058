"""Pictures of a run: rows of images, the same noise and labels a column, enlarged without smoothing."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train_cc.io.products import write_atomically

CELL, GAP = 64, 4  # pixels of an image and between images


def save_grid(
    rows: list[np.ndarray], path: Path, names: list[str] | None = None, columns: list[str] | None = None
) -> None:
    """``rows``: each (N, H, W, C) uint8 with C of 1 or 3. Small images are enlarged to about ``CELL`` pixels.

    ``names``: what is written to the left of each row; ``columns``: above each column.
    """
    picture = grid(rows)
    pitch = (picture.height - GAP) // len(rows)
    height = picture.height
    if columns:
        picture = above(picture, columns)
    if names:
        picture = beside(picture, names, pitch, picture.height - height)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png_bytes(picture))


def grid(rows: list[np.ndarray]) -> Image.Image:
    """``rows``: each (N, H, W, C) uint8, drawn with ``GAP`` white pixels between images of about ``CELL``."""
    factor, gap = max(1, CELL // rows[0].shape[1]), GAP
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
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def beside(picture: Image.Image, names: list[str], pitch: int, top: int = 0) -> Image.Image:
    """``picture`` with a column of row names on its left; ``pitch`` pixels from row to row, the first below ``top``."""
    font = ImageFont.load_default(size=15)
    margin = 2 * GAP + 8 + max(int(font.getlength(name)) for name in names)
    wide = Image.new(picture.mode, (picture.width + margin, picture.height), "white")
    wide.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(wide)
    for i, name in enumerate(names):
        draw.text((GAP + 4, top + GAP + i * pitch + pitch // 2), name, fill="black", font=font, anchor="lm")
    return wide


def above(picture: Image.Image, names: list[str]) -> Image.Image:
    """``picture`` with a name above each column of images; what is too long for a column is broken, then cut."""
    font, pitch = ImageFont.load_default(size=13), (picture.width - GAP) // len(names)
    texts = [lines_of(name, font, pitch - GAP) for name in names]
    height = 16 * max(map(len, texts)) + 6
    tall = Image.new(picture.mode, (picture.width, picture.height + height), "white")
    tall.paste(picture, (0, height))
    draw = ImageDraw.Draw(tall)
    for i, lines in enumerate(texts):
        for j, line in enumerate(lines):
            draw.text((GAP + i * pitch + (pitch - GAP) // 2, 4 + 16 * j), line, fill="black", font=font, anchor="ma")
    return tall


def lines_of(name: str, font: ImageFont.ImageFont, width: int, most: int = 4) -> list[str]:
    """``name`` in lines of at most ``width`` pixels."""
    lines: list[str] = []
    for word in name.split() or [""]:
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while font.getlength(word) > width and len(word) > 2:
            word = word[:-2] + "."
        lines.append(word)
    return lines[:most]
