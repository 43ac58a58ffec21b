"""A heat map over a picture."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# From dark to light at an even pace, so that a step of strength looks the same everywhere.
STOPS = (
    (8, 8, 40),
    (72, 12, 100),
    (146, 30, 104),
    (212, 62, 66),
    (246, 132, 28),
    (250, 206, 60),
    (252, 255, 190),
)
SMALLEST = 512  # pixels of the longer side: smaller pictures are enlarged
VEIL = 0.7  # of the colour at full strength
STRIPE = 1 / 24  # of a removed place's side, the distance of its stripes being six times that


def colours(strength: np.ndarray) -> np.ndarray:
    """Strength 0 to 1 as colours (..., 3), 0 to 255."""
    at = np.linspace(0, 1, len(STOPS))
    stops = np.array(STOPS, float)
    return np.stack([np.interp(strength, at, stops[:, i]) for i in range(3)], -1)


def veil(strength: np.ndarray) -> np.ndarray:
    """How much of a picture the colours cover."""
    return VEIL * strength**0.85


def enlarged(heat: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A heat map at another `size` (width, height), without corners."""
    smooth = Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(smooth)


def blend(picture: Image.Image, heat: np.ndarray, top: float | None = None) -> Image.Image:
    """The picture, fainter where the heat is low, under colours where it is high; `top` is full strength."""
    top = float(heat.max()) if top is None else top
    strength = np.clip(enlarged(heat, picture.size) / top, 0, 1) if top > 0 else np.zeros(picture.size[::-1])
    pixels = np.asarray(picture.convert("RGB"), float)
    grey = pixels.mean(-1, keepdims=True)
    faint = 0.65 * (0.5 * pixels + 0.5 * grey) + 20
    cover = veil(strength)[..., None]
    return Image.fromarray((faint * (1 - cover) + colours(strength) * cover).round().astype(np.uint8))


def overlay(
    picture: Image.Image,
    heat: np.ndarray,
    caption: str = "",
    *,
    top: float | None = None,
    legend: bool = True,
    gone: np.ndarray | None = None,
) -> Image.Image:
    """The picture with `heat` (rows, columns) over it, and a scale below. Small pictures are enlarged. Places that
    are `gone` (rows, columns) are hatched."""
    factor = max(1.0, SMALLEST / max(picture.size))
    width, height = (max(1, round(side * factor)) for side in picture.size)
    large = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    top = float(heat.max()) if top is None else top
    drawn = blend(large, heat, top)
    if gone is not None and gone.any():
        drawn = hatched(drawn, gone)
    if not legend:
        return drawn
    size = max(11, round(max(width, height) / 36))
    page = Image.new("RGB", (width, height + 2 * size + size // 2), (18, 18, 22))
    page.paste(drawn)
    _scale(page, height + size // 2, size, top, caption)
    return page


def hatched(picture: Image.Image, gone: np.ndarray) -> Image.Image:
    """The picture, grey and striped in the places (rows, columns) that are gone."""
    pixels = np.asarray(picture, float)
    y, x = np.ogrid[: picture.height, : picture.width]
    rows, columns = gone.shape
    there = gone[y * rows // picture.height, x * columns // picture.width]
    wide = max(1, round(STRIPE * min(picture.height / rows, picture.width / columns)))
    stripe = (x + y) % (6 * wide) < wide
    grey = 0.5 * pixels.mean(-1, keepdims=True) + 30
    struck = np.where(stripe[..., None], 170, grey)
    return Image.fromarray(np.where(there[..., None], struck, pixels).round().astype(np.uint8))


def _scale(page: Image.Image, y: int, size: int, top: float, caption: str) -> None:
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size)
    length, margin, ink = page.width // 4, size // 2, (225, 225, 230)
    bar = colours(np.linspace(0, 1, length))[None].repeat(size, 0).astype(np.uint8)
    number = f"{top:.1%} of attention per token"
    draw.text((margin, y), "0", ink, font)
    start = margin + size
    page.paste(Image.fromarray(bar), (start, y + size // 6))
    draw.text((start + length + size // 2, y), number, ink, font)
    room = page.width - (start + length + size) - draw.textlength(number, font) - margin
    while caption and draw.textlength(caption, font) > room:
        caption = caption[:-2].rstrip("…") + "…" if len(caption) > 2 else ""
    draw.text((page.width - margin - draw.textlength(caption, font), y), caption, ink, font)
