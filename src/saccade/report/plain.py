"""Pictures and numbers for a terminal, legible without colour."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from saccade.core.errors import InputError
from saccade.report.overlay import blend, enlarged

if TYPE_CHECKING:
    from saccade.core.record import Recording, Words

SHADES = " ·░▒▓█"
GONE = "╱"  # a place whose tokens were removed
WIDEST = 48  # characters of a picture
BAR = 30
HALF = "▀"  # two pixels: the letter's colour above the ground's


def safe(text: str) -> str:
    """Without anything that would steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def picture(heat: np.ndarray, gone: np.ndarray, size: tuple[int, int], width: int = WIDEST) -> str:
    """Heat (rows, columns) over a picture of that size (width, height), in shades; places that are gone are struck."""
    columns, rows = _cells(size, width)
    fine = enlarged(heat, (columns, rows))
    strength = np.clip(fine / fine.max(), 0, 1) if fine.max() > 0 else np.zeros_like(fine)
    level = (strength * (len(SHADES) - 1)).round().astype(int)
    struck = _at(gone, rows, columns)
    letters = np.where(struck, GONE, np.array([*SHADES])[level])
    lines = ["│" + "".join(row) + "│" for row in letters]
    return "\n".join(["┌" + "─" * columns + "┐", *lines, "└" + "─" * columns + "┘"])


def coloured(image: Image.Image, heat: np.ndarray, gone: np.ndarray, width: int = WIDEST) -> str:
    """The picture itself under the heat, in 24-bit colours; places that are gone are struck."""
    columns, rows = _cells(image.size, width)
    small = image.convert("RGB").resize((columns, 2 * rows), Image.Resampling.BOX)
    pixels = np.asarray(blend(small, heat)).reshape(rows, 2, columns, 3)
    lines = []
    for (upper, lower), struck in zip(pixels, _at(gone, rows, columns), strict=True):
        cells = (
            f"\033[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m{GONE if out else HALF}"
            for a, b, out in zip(upper, lower, struck, strict=True)
        )
        lines.append("".join(cells) + "\033[0m")
    return "\n".join(lines)


def shares(named: dict[str, float], width: int = 80) -> str:
    """A bar for every share."""
    longest, room = max(map(len, named)), min(BAR, width - 20)
    return "\n".join(
        f"{name:<{longest}}  {'█' * round(value * room) + '░' * (room - round(value * room))}  {value:4.0%}"
        for name, value in named.items()
    )


def recording(seen: Recording, word: Words, width: int, *, colour: bool = False, sample: int = 0) -> str:
    """What was asked and answered, what was looked at for it, and the shares of attention."""
    texts = [safe(text) for text in (seen.prompt, seen.answer(sample)) if text]
    blocks = [textwrap.fill(text, width, initial_indent="» " if i else "") for i, text in enumerate(texts)]
    found = seen.seen(word, sample)
    for item in range(seen.pictures_of(sample)):
        try:
            heat, gone, image = found.grid(item), found.absent(item), found.picture(item)
        except InputError:  # of this picture nothing was recorded
            continue
        room = min(WIDEST, width - 2)
        drawn = coloured(image, heat, gone, room) if colour else picture(heat, gone, image.size, room)
        blocks.append(drawn + told_gone(gone))
    layers, heads = (len(found.labels[axis]) for axis in ("layer", "head"))
    what = f"while saying: {safe(found.caption)}" if found.caption else "in all recorded rows"
    blocks.append(f"attention {what} (mean of {layers} layers, {heads} heads)")
    if measured := seen.measured(word, sample):
        blocks.append(textwrap.fill(str(measured), width))
    try:
        by_layer = seen.share(word, sample)
    except InputError:  # only some columns were recorded
        return "\n".join(blocks)
    names = next(iter(by_layer.values()))
    blocks.append(shares({n: sum(s[n] for s in by_layer.values()) / len(by_layer) for n in names}, width))
    return "\n".join(blocks)


def told_gone(gone: np.ndarray) -> str:
    return f"\n{GONE} {int(gone.sum())} of {gone.size} places were removed" if gone.any() else ""


def _at(gone: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Places in rows and columns of characters."""
    return gone[np.arange(rows) * gone.shape[0] // rows][:, np.arange(columns) * gone.shape[1] // columns]


def _cells(size: tuple[int, int], width: int) -> tuple[int, int]:
    """Characters across and down: a character is twice as high as wide."""
    columns = max(2, min(width, WIDEST))
    return columns, max(1, round(columns * size[1] / size[0] / 2))
