"""A grid of titled pictures, as one picture for a file or a page."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pane = tuple[str, NDArray[np.uint8]]
"""A title and an (h, w, 3) picture."""

_GAP, _TITLE_PX, _LETTER_PX = 8, 18, 13


def picture_grid(rows: Sequence[Sequence[Pane]], *, legend: Sequence[tuple[str, str]] = ()) -> Image.Image:
    """Return rows of pictures, each under its title, on white.

    A title longer than its picture is cut. An empty grid is one white pixel.

    Args:
        rows: titles and pictures (h, w, 3), of any sizes.
        legend: names and colours (#rrggbb), below all rows.
    """
    font = ImageFont.load_default(_LETTER_PX)
    widths = [sum(picture.shape[1] + _GAP for _, picture in row) for row in rows]
    heights = [max((picture.shape[0] for _, picture in row), default=0) + _TITLE_PX + _GAP for row in rows]
    # A legend needs room for a few names, even below one small picture.
    width = max([*widths, 1 if not legend else 480]) + _GAP
    lines = _legend_lines(legend, font, width - 2 * _GAP)
    canvas = Image.new("RGB", (width, sum(heights) + _GAP + _TITLE_PX * len(lines)), "white")
    draw = ImageDraw.Draw(canvas)
    y = _GAP
    for row, height in zip(rows, heights, strict=True):
        x = _GAP
        for title, picture in row:
            draw.text((x, y), _cut(title, font, picture.shape[1]), fill="#333333", font=font)
            canvas.paste(Image.fromarray(picture), (x, y + _TITLE_PX))
            x += picture.shape[1] + _GAP
        y += height
    for line in lines:
        for x, name, colour in line:
            draw.rectangle((x, y + 2, x + 11, y + 13), fill=colour)
            draw.text((x + 16, y), name, fill="#333333", font=font)
        y += _TITLE_PX
    return canvas


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _legend_lines(
    legend: Sequence[tuple[str, str]], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[list[tuple[int, str, str]]]:
    """Return lines of (x, name, colour) that fit the width."""
    lines: list[list[tuple[int, str, str]]] = []
    # Beyond the width, so that the first entry starts a line.
    x = width + 1
    for name, colour in legend:
        # The name, its colour square and the gaps around them.
        length = int(font.getlength(name)) + 32
        if not lines or x + length > width:
            lines.append([])
            x = _GAP
        lines[-1].append((x, name, colour))
        x += length
    return lines
