"""Backgrounds: muted, softly textured, none like another, and small clutter that is no thing."""

from __future__ import annotations

import numpy as np

from saccade.world.kinds import SIZE

GROUND = {  # above and below the horizon
    "kitchen": ((216, 202, 178), (186, 162, 136)),
    "office": ((178, 187, 194), (136, 141, 152)),
    "street": ((184, 199, 210), (128, 128, 134)),
    "park": ((172, 202, 216), (138, 168, 118)),
    "beach": ((178, 208, 222), (216, 200, 164)),
}
JITTER = 10
CLUTTER = 6  # marks, at most
MARK = 28
ACROSS = np.arange(SIZE)
"""Pixels of a row."""


def background(place: str, rng: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE, 3), float."""
    horizon = int(rng.integers(34, 54))
    image = np.empty((SIZE, SIZE, 3), np.float32)
    above, below = image[:horizon], image[horizon:]
    above[:], below[:] = GROUND[place]
    _TEXTURES[place](above, below, rng)
    image += rng.integers(-JITTER, JITTER + 1, 3)
    _clutter(below, rng)
    return image


def _kitchen(wall: np.ndarray, floor: np.ndarray, rng: np.random.Generator) -> None:
    tile, shift = (int(v) for v in rng.integers((9, 0), (13, 8)))
    wall[(np.arange(len(wall)) + shift) % tile == 0] -= 12
    wall[:, (ACROSS + shift) % tile == 0] -= 12
    down = np.arange(len(floor))[:, None]
    floor[(down // tile + (ACROSS + shift) // tile) % 2 == 0] -= 9


def _office(wall: np.ndarray, floor: np.ndarray, rng: np.random.Generator) -> None:
    panel, shift = (int(v) for v in rng.integers((18, 0), (27, 18)))
    wall[:, (ACROSS + shift) % panel < 2] += 11
    wall[-3:] -= 16
    _speckle(floor, rng, 22)


def _street(sky: np.ndarray, road: np.ndarray, rng: np.random.Generator) -> None:
    edge = 0
    while edge < SIZE:
        width, height = (int(v) for v in rng.integers((8, 4), (20, 18)))
        sky[-height:, edge : edge + width] -= (20, 18, 14)
        edge += width
    road[:5] += 30
    middle = len(road) // 2 + 2
    road[middle : middle + 2, (ACROSS + int(rng.integers(16))) % 16 < 9] += 34
    _speckle(road, rng, 12)


def _park(sky: np.ndarray, grass: np.ndarray, rng: np.random.Generator) -> None:
    for _ in range(2):
        middle, height = (int(v) for v in rng.integers((0, 6), (SIZE, 15)))
        hill = np.maximum(height - (ACROSS - middle) ** 2 // 90, 0)
        sky[np.arange(len(sky), 0, -1)[:, None] <= hill] = (152, 180, 158)
    _speckle(grass, rng, 34)


def _beach(sky: np.ndarray, sand: np.ndarray, rng: np.random.Generator) -> None:
    sea = sky[-int(rng.integers(12, 20)) :]
    sea[:] = (136, 178, 194)
    down, shift = np.arange(len(sea))[:, None], int(rng.integers(12))
    sea[((ACROSS + shift + 5 * (down // 3)) % 12 < 6) & (down % 3 == 1)] += 20
    _speckle(sand, rng, 20)


_TEXTURES = {"kitchen": _kitchen, "office": _office, "street": _street, "park": _park, "beach": _beach}


def _speckle(ground: np.ndarray, rng: np.random.Generator, strength: float) -> None:
    """Grain of one by two pixels."""
    height, width, _ = ground.shape
    grain = np.frombuffer(rng.bytes(height * width // 2), np.uint8).reshape(height, -1).repeat(2, 1)
    ground += (grain.astype(np.float32)[..., None] - 127.5) * (strength / 255)


def _clutter(ground: np.ndarray, rng: np.random.Generator) -> None:
    """Faint marks without outline: pebbles, crumbs, leaves."""
    for _ in range(int(rng.integers(CLUTTER + 1))):
        x, y = (int(v) for v in rng.integers((SIZE - 4, len(ground) - 2)))
        width, height, sign = (int(v) for v in rng.integers((2, 1, 0), (5, 3, 2)))
        ground[y : y + height, x : x + width] += MARK if sign else -MARK
