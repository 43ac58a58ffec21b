"""Every thing as a small picture that takes any colour, and the letters of signs.

A drawing is a list of shapes in the unit square, each of a material, painted one over the other. It is sampled
finely and averaged, by arithmetic alone, so that it is the same with every library and on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from saccade.world.kinds import KINDS, PARTNERS

FINE = 8  # samples of a pixel's side
OUTLINE = 7  # of them: the width of the line around a thing

NOTHING, MAIN, SHADE, DEEP, LIGHT, INK, GLASS, WOOD, LEAF, CREAM = range(10)
# How much of the thing's own colour a material takes, and what it adds.
TINT = np.array([0, 1, 0.76, 0.5, 0.55, 0, 0, 0, 0, 0], np.float32)
OWN = np.array(
    [
        *[(0, 0, 0)] * 4,
        (112, 112, 112),
        (38, 32, 44),
        (206, 228, 236),
        (122, 88, 62),
        (66, 96, 60),
        (250, 240, 214),
    ],
    np.float32,
)

SIZES = dict.fromkeys(KINDS, (22, 28)) | dict.fromkeys(PARTNERS, (11, 14)) | {"sign": (28, 32)}
"""The two widths of each kind, in pixels."""

Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Sprite(NamedTuple):
    """`drawn = below * (1 - alpha) + colour * tint + own`; `mask` says which pixels are the thing's."""

    alpha: np.ndarray  # (height, width, 1)
    tint: np.ndarray  # (height, width, 1)
    own: np.ndarray  # (height, width, 3)
    mask: np.ndarray  # (height, width)
    box: tuple[int, int, int, int]  # of the mask


def rect(x0: float, y0: float, x1: float, y1: float) -> Shape:
    return lambda x, y: (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


def oval(x0: float, y0: float, x1: float, y1: float) -> Shape:
    cx, cy, rx, ry = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
    return lambda x, y: ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1


def polygon(*points: tuple[float, float]) -> Shape:
    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        crossed = np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
            if y0 != y1:
                crossed ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
        return crossed

    return inside


DRAWINGS: dict[str, list[tuple[int, Shape]]] = {
    "table": [
        (SHADE, rect(0.10, 0.40, 0.25, 0.98)),
        (SHADE, rect(0.75, 0.40, 0.90, 0.98)),
        (SHADE, rect(0.06, 0.40, 0.94, 0.54)),
        (MAIN, rect(0.00, 0.22, 1.00, 0.43)),
    ],
    "chair": [
        (SHADE, rect(0.18, 0.60, 0.33, 1.00)),
        (SHADE, rect(0.70, 0.60, 0.85, 1.00)),
        (MAIN, rect(0.16, 0.00, 0.36, 0.66)),
        (MAIN, rect(0.16, 0.48, 0.90, 0.68)),
    ],
    "car": [
        (MAIN, polygon((0.20, 0.48), (0.34, 0.20), (0.68, 0.20), (0.84, 0.48))),
        (GLASS, polygon((0.29, 0.47), (0.38, 0.29), (0.48, 0.29), (0.48, 0.47))),
        (GLASS, polygon((0.54, 0.47), (0.54, 0.29), (0.64, 0.29), (0.74, 0.47))),
        (MAIN, polygon((0.00, 0.50), (0.05, 0.44), (0.92, 0.44), (1.00, 0.54), (1.00, 0.74), (0.00, 0.74))),
        (SHADE, rect(0.00, 0.62, 1.00, 0.74)),
        (CREAM, rect(0.89, 0.52, 0.97, 0.60)),
        (INK, oval(0.10, 0.58, 0.38, 0.86)),
        (INK, oval(0.62, 0.58, 0.90, 0.86)),
        (CREAM, oval(0.19, 0.67, 0.29, 0.77)),
        (CREAM, oval(0.71, 0.67, 0.81, 0.77)),
    ],
    "tree": [
        (WOOD, rect(0.41, 0.55, 0.59, 1.00)),
        (MAIN, oval(0.04, 0.26, 0.56, 0.74)),
        (MAIN, oval(0.44, 0.26, 0.96, 0.74)),
        (MAIN, oval(0.20, 0.00, 0.80, 0.56)),
        (SHADE, oval(0.54, 0.46, 0.86, 0.68)),
        (LIGHT, oval(0.32, 0.10, 0.52, 0.26)),
    ],
    "dog": [
        (MAIN, polygon((0.00, 0.20), (0.10, 0.16), (0.20, 0.44), (0.20, 0.60), (0.10, 0.56))),
        (SHADE, rect(0.12, 0.60, 0.26, 0.98)),
        (SHADE, rect(0.58, 0.60, 0.72, 0.98)),
        (MAIN, rect(0.12, 0.42, 0.72, 0.70)),
        (MAIN, oval(0.52, 0.06, 0.90, 0.48)),
        (MAIN, rect(0.74, 0.24, 1.00, 0.44)),
        (DEEP, oval(0.50, 0.04, 0.66, 0.38)),
        (INK, rect(0.76, 0.17, 0.83, 0.25)),
        (INK, rect(0.93, 0.22, 1.00, 0.31)),
    ],
    "boat": [
        (INK, rect(0.43, 0.00, 0.49, 0.64)),
        (MAIN, polygon((0.52, 0.02), (0.94, 0.56), (0.52, 0.56))),
        (LIGHT, polygon((0.40, 0.14), (0.40, 0.56), (0.10, 0.56))),
        (MAIN, polygon((0.00, 0.62), (1.00, 0.62), (0.82, 0.94), (0.18, 0.94))),
        (SHADE, polygon((0.09, 0.78), (0.91, 0.78), (0.82, 0.94), (0.18, 0.94))),
    ],
    "shelf": [
        (MAIN, rect(0.08, 0.00, 0.92, 1.00)),
        (DEEP, rect(0.20, 0.11, 0.80, 0.30)),
        (DEEP, rect(0.20, 0.41, 0.80, 0.60)),
        (DEEP, rect(0.20, 0.71, 0.80, 0.90)),
    ],
    "house": [
        (SHADE, rect(0.70, 0.06, 0.82, 0.36)),
        (MAIN, rect(0.12, 0.40, 0.88, 1.00)),
        (DEEP, polygon((0.50, 0.00), (1.00, 0.46), (0.00, 0.46))),
        (WOOD, rect(0.56, 0.62, 0.74, 1.00)),
        (GLASS, rect(0.24, 0.58, 0.44, 0.78)),
    ],
    "cup": [
        (MAIN, oval(0.46, 0.20, 1.00, 0.76)),
        (NOTHING, oval(0.60, 0.37, 0.83, 0.59)),
        (MAIN, polygon((0.00, 0.05), (0.73, 0.05), (0.66, 0.97), (0.07, 0.97))),
        (SHADE, polygon((0.48, 0.05), (0.73, 0.05), (0.66, 0.97), (0.44, 0.97))),
    ],
    "lamp": [
        (SHADE, rect(0.40, 0.50, 0.60, 0.90)),
        (SHADE, rect(0.20, 0.82, 0.80, 1.00)),
        (MAIN, polygon((0.30, 0.00), (0.70, 0.00), (1.00, 0.58), (0.00, 0.58))),
    ],
    "ball": [
        (MAIN, oval(0.00, 0.00, 1.00, 1.00)),
        (DEEP, oval(0.30, -0.10, 0.70, 1.10)),
        (MAIN, oval(0.42, -0.10, 0.58, 1.10)),
    ],
    "fish": [
        (SHADE, polygon((0.54, 0.50), (1.00, 0.08), (1.00, 0.92))),
        (MAIN, oval(0.00, 0.12, 0.78, 0.88)),
        (INK, oval(0.16, 0.32, 0.30, 0.46)),
    ],
    "book": [
        (MAIN, rect(0.06, 0.02, 0.94, 0.98)),
        (DEEP, rect(0.06, 0.02, 0.30, 0.98)),
        (CREAM, rect(0.30, 0.78, 0.94, 0.92)),
    ],
    "bird": [
        (MAIN, polygon((0.00, 0.30), (0.14, 0.28), (0.44, 0.60), (0.24, 0.80))),
        (MAIN, oval(0.08, 0.34, 0.84, 0.90)),
        (MAIN, oval(0.44, 0.02, 0.90, 0.50)),
        (CREAM, polygon((0.84, 0.16), (1.00, 0.27), (0.84, 0.38))),
        (DEEP, oval(0.22, 0.46, 0.58, 0.72)),
        (INK, oval(0.66, 0.15, 0.78, 0.27)),
        (INK, rect(0.36, 0.86, 0.44, 1.00)),
        (INK, rect(0.52, 0.86, 0.60, 1.00)),
    ],
    "flower": [
        (LEAF, rect(0.37, 0.60, 0.63, 1.00)),
        (LEAF, polygon((0.50, 0.98), (0.96, 0.70), (0.92, 0.98))),
        (MAIN, oval(0.27, 0.00, 0.73, 0.42)),
        (MAIN, oval(0.27, 0.36, 0.73, 0.78)),
        (MAIN, oval(0.00, 0.17, 0.52, 0.61)),
        (MAIN, oval(0.48, 0.17, 1.00, 0.61)),
        (CREAM, oval(0.37, 0.27, 0.63, 0.51)),
    ],
}

LETTER = (6, 8)  # width, height
PITCH = 7
GLYPHS = {
    letter: np.array([[c == "#" for c in row] for row in rows.split()])
    for letter, rows in {
        "A": "..##.. .####. ##..## ##..## ###### ##..## ##..## ##..##",
        "C": ".####. ##..## ##.... ##.... ##.... ##.... ##..## .####.",
        "E": "###### ##.... ##.... #####. ##.... ##.... ##.... ######",
        "H": "##..## ##..## ##..## ###### ###### ##..## ##..## ##..##",
        "I": ".####. ..##.. ..##.. ..##.. ..##.. ..##.. ..##.. .####.",
        "L": "##.... ##.... ##.... ##.... ##.... ##.... ##.... ######",
        "M": "#....# ##..## ###### #.##.# #....# #....# #....# #....#",
        "O": ".####. ##..## ##..## ##..## ##..## ##..## ##..## .####.",
        "P": "#####. ##..## ##..## ##..## #####. ##.... ##.... ##....",
        "R": "#####. ##..## ##..## #####. ####.. ##.##. ##..## ##..##",
        "T": "###### ###### ..##.. ..##.. ..##.. ..##.. ..##.. ..##..",
        "Y": "##..## ##..## ##..## .####. ..##.. ..##.. ..##.. ..##..",
    }.items()
}
BOARD = 16  # height of a sign's board


@cache
def sprite(kind: str, width: int) -> Sprite:
    material = _sign(width) if kind == "sign" else _painted(DRAWINGS[kind], width)
    tint, own, alpha = TINT[material], OWN[material], (material != NOTHING).astype(np.float32)
    tint, own, alpha = (_averaged(fine) for fine in (tint[..., None], own, alpha[..., None]))
    mask = alpha[..., 0] > 0.5
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Sprite(alpha, tint, own, mask, box)


def lettering(width: int) -> tuple[int, int]:
    """Where the first letter begins on a sign."""
    return (width - 2 * PITCH - LETTER[0]) // 2, (BOARD - LETTER[1]) // 2


def _painted(drawing: list[tuple[int, Shape]], width: int) -> np.ndarray:
    """The material of every sample, with an outline inside."""
    at = (np.arange(width * FINE) + 0.5) / (width * FINE)
    material = np.zeros((at.size, at.size), np.uint8)
    for paint, shape in drawing:
        material[shape(at[None], at[:, None])] = paint
    return _outlined(material)


def _sign(width: int) -> np.ndarray:
    """A board on a post; the panel is light, so that letters are legible in every colour."""
    pixels = np.zeros((BOARD + 6, width), np.uint8)
    pixels[BOARD:, width // 2 - 2 : width // 2 + 2] = WOOD
    pixels[:BOARD] = MAIN
    x, y = lettering(width)
    pixels[y - 1 : y + LETTER[1] + 1, x - 1 : width - x + 1] = LIGHT
    return _outlined(pixels.repeat(FINE, 0).repeat(FINE, 1))


def _outlined(material: np.ndarray) -> np.ndarray:
    inside = material != NOTHING
    for axis in (0, 1):
        wide = np.pad(inside, OUTLINE)
        inside = np.logical_and.reduce([np.roll(wide, shift, axis) for shift in range(-OUTLINE, OUTLINE + 1)])
        inside = inside[OUTLINE:-OUTLINE, OUTLINE:-OUTLINE]
    return np.where((material != NOTHING) & ~inside, INK, material)


def _averaged(fine: np.ndarray) -> np.ndarray:
    height, width, channels = fine.shape
    cells = fine.reshape(height // FINE, FINE, width // FINE, FINE, channels)
    return cells.mean((1, 3), dtype=np.float32)
