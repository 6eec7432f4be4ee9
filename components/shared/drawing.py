"""Drawing boxes on pictures for people: class and score, readable on any background."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["PALETTE", "draw_boxes"]

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]

# Okabe and Ito's colours (2008), which colour-blind people tell apart, without black.
PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


def draw_boxes(pixels: Pixels, labels: Sequence[tuple[str, Sequence[float]]], colour: Colour | None = None) -> Pixels:
    """Draw boxes with their names on a copy of a picture.

    Args:
        pixels: RGB uint8 (height, width, 3).
        labels: texts such as `person 0.93` with corners x1, y1, x2, y2 in pixels; later ones lie on top. The colour
            follows from the text before the last space, so that a class has the same in every picture.
        colour: one colour for all boxes instead, to tell two sets apart.

    Returns:
        RGB uint8 of the same shape.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels))
    pen = ImageDraw.Draw(image)
    # Line and letters keep their share of the picture from thumbnails to 4K.
    line = max(1, round(max(image.size) / 400))
    font = _font(max(11, round(max(image.size) / 55)))
    for text, box in labels:
        ink = colour or PALETTE[zlib.crc32(text.rpartition(" ")[0].encode() or text.encode()) % len(PALETTE)]
        x1, y1, x2, y2 = (round(float(value)) for value in box)
        right, bottom = max(x1, x2), max(y1, y2)
        # A dark rim on both sides parts the line from a background of its own colour.
        pen.rectangle((x1 - 1, y1 - 1, right + 1, bottom + 1), outline=(0, 0, 0), width=line + 2)
        pen.rectangle((x1, y1, right, bottom), outline=ink, width=line)
        _label(pen, image.size, (x1, y1), text, font, ink)
    return np.asarray(image)


def _label(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corner: tuple[int, int],
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    ink: Colour,
) -> None:
    """The name on a filled strip above the box; inside it where there is no room, and never beyond the picture."""
    _, _, width, height = pen.textbbox((0, 0), text, font=font)
    width, height = int(width) + 6, int(height) + 4
    x = max(0, min(corner[0], size[0] - width))
    y = corner[1] - height if corner[1] >= height else max(0, min(corner[1], size[1] - height))
    pen.rectangle((x, y, x + width, y + height), fill=ink, outline=(0, 0, 0))
    # Rec. 601 luma decides between black and white letters.
    dark = 0.299 * ink[0] + 0.587 * ink[1] + 0.114 * ink[2] < 128
    pen.text((x + 3, y + 1), text, fill=(255, 255, 255) if dark else (0, 0, 0), font=font)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
