"""A table of numbers as coloured squares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from saccade.report.overlay import colours

CELL, SIZE = 18, 11  # pixels of a square, and of letters
GROUND, INK = (18, 18, 22), (225, 225, 230)


def grid(table: np.ndarray, rows: Sequence[str], title: str) -> Image.Image:
    """Values (rows, columns) from dark, the lowest, to light, the highest; both are written below."""
    font = ImageFont.load_default(SIZE)
    low, high = float(table.min()), float(table.max())
    strength = (table - low) / (high - low) if high > low else np.zeros_like(table)
    squares = colours(strength).round().astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1)
    margin = SIZE + round(max(font.getlength(row) for row in rows))
    below = f"{title}: {low:.3g} to {high:.3g}"
    width = max(margin + squares.shape[1], round(font.getlength(below)) + SIZE) + SIZE
    page = Image.new("RGB", (width, squares.shape[0] + 2 * CELL + SIZE), GROUND)
    page.paste(Image.fromarray(squares), (margin, CELL))
    draw = ImageDraw.Draw(page)
    for column in range(table.shape[1]):
        draw.text((margin + (column + 0.5) * CELL, CELL / 2), str(column), INK, font, anchor="mm")
    for row, name in enumerate(rows):
        draw.text((margin - SIZE / 2, (row + 1.5) * CELL), name, INK, font, anchor="rm")
    draw.text((SIZE / 2, CELL + squares.shape[0] + SIZE), below, INK, font)
    return page
