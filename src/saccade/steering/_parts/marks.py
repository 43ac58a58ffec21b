"""Marks on pictures: each takes a picture and gives another."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from saccade.steering._parts.masks import Box, whole

RED, GREEN = (255, 0, 0), (0, 255, 0)


def crop(picture: Image.Image, box: Box) -> Image.Image:
    return picture.crop(whole(box, picture.size))


def box(picture: Image.Image, region: Box, width: int = 2) -> Image.Image:
    """Its outline in red, inwards from its border."""
    return _drawn(picture, "rectangle", region, width)


def ellipse(picture: Image.Image, region: Box, width: int = 2) -> Image.Image:
    """In red, inwards from where it touches the sides of the region."""
    return _drawn(picture, "ellipse", region, width)


def _drawn(picture: Image.Image, shape: str, region: Box, width: int) -> Image.Image:
    copy = picture.copy()
    if width:
        x0, y0, x1, y1 = whole(region, picture.size)
        getattr(ImageDraw.Draw(copy), shape)((x0, y0, x1 - 1, y1 - 1), outline=RED, width=width)
    return copy


def outside(picture: Image.Image, mask: np.ndarray, instead: Image.Image) -> Image.Image:
    """The picture within a mask (rows, columns), another around it."""
    return Image.fromarray(np.where(mask[..., None], np.asarray(picture), np.asarray(instead)))


def blur_outside(picture: Image.Image, mask: np.ndarray, sigma: float) -> Image.Image:
    return outside(picture, mask, picture.filter(ImageFilter.GaussianBlur(sigma)))


def grey_outside(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    return outside(picture, mask, picture.convert("L").convert("RGB"))


def black_outside(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    return outside(picture, mask, Image.new("RGB", picture.size))


def contour(picture: Image.Image, mask: np.ndarray, width: int = 2) -> Image.Image:
    """The border of a mask in red, inwards from its edge."""
    inner = Image.fromarray(np.pad(mask, width).astype(np.uint8)).filter(ImageFilter.MinFilter(2 * width + 1))
    within = np.asarray(inner)[width:-width, width:-width] > 0
    return outside(picture, ~mask | within, Image.new("RGB", picture.size, RED))


def coloured(
    picture: Image.Image, mask: np.ndarray, colour: tuple[int, int, int] = GREEN, alpha: float = 0.5
) -> Image.Image:
    """The mask in a colour through which the picture is seen."""
    return outside(picture, ~mask, Image.blend(picture, Image.new("RGB", picture.size, colour), alpha))
