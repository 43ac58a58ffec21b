"""Parts of pictures as masks: (rows, columns), bool."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

Box = Sequence[float]
"""x0 y0 x1 y1 in pixels; the last ones are outside."""


def inside(region: Box, size: tuple[int, int]) -> np.ndarray:
    """A box as a mask of a picture of `size` (width, height): (rows, columns), bool."""
    x0, y0, x1, y1 = whole(region, size)
    mask = np.zeros((size[1], size[0]), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def inside_ellipse(region: Box, size: tuple[int, int]) -> np.ndarray:
    """What the ellipse of a box encloses, its line among it."""
    x0, y0, x1, y1 = whole(region, size)
    mask = Image.new("1", size)
    ImageDraw.Draw(mask).ellipse((x0, y0, x1 - 1, y1 - 1), fill=1)
    return np.asarray(mask)


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The box of a mask, which is not empty."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def whole(region: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box in whole pixels of a picture of `size` (width, height), at least one."""
    corners = []
    for low, high, limit in ((region[0], region[2], size[0]), (region[1], region[3], size[1])):
        start = min(max(0, round(low)), limit - 1)
        corners.append((start, max(start + 1, min(limit, round(high)))))
    (x0, x1), (y0, y1) = corners
    return x0, y0, x1, y1


# ---- of maps ---------------------------------------------------------------------------------------------


def stretched(heat: Tensor, size: tuple[int, int]) -> Tensor:
    """A map over the pixels of a picture of `size` (width, height)."""
    return F.interpolate(heat[None, None], (size[1], size[0]), mode="bilinear")[0, 0]


def kept(heat: Tensor, p: float) -> np.ndarray:
    """The share p of the pixels that is hottest: (rows, columns), bool."""
    return heat.numpy() >= np.percentile(heat.numpy(), 100 * (1 - p))


def strongest(heat: Tensor, mask: np.ndarray, k: int) -> np.ndarray:
    """The k connected regions of a mask with the most heat."""
    numbers = regions(mask)
    sums = np.bincount(numbers.ravel(), heat.numpy().ravel())[1:]
    return np.isin(numbers, 1 + np.argsort(-sums, kind="stable")[:k])


def regions(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask that touch by a side have one number, from 1 on; the others 0."""
    numbers = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    before = np.zeros_like(numbers)
    while not np.array_equal(before, numbers):  # the largest number walks through its region
        before = numbers.copy()
        for lines in (numbers, numbers[::-1], numbers.T, numbers.T[::-1]):
            for last, this in itertools.pairwise(lines):
                np.maximum(this, last, out=this, where=this > 0)
    return np.unique(np.append(0, numbers), return_inverse=True)[1][1:].reshape(mask.shape)


# ---- of boxes --------------------------------------------------------------------------------------------


def area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def shared(a: Box, b: Box) -> float:
    """The area that both have."""
    return area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))


def iou(a: Box, b: Box) -> float:
    return shared(a, b) / (area(a) + area(b) - shared(a, b))


def around(boxes: Sequence[Box]) -> tuple[float, float, float, float]:
    """The smallest box that holds all."""
    low, high = ([f(box[i] for box in boxes) for i in at] for f, at in ((min, (0, 1)), (max, (2, 3))))
    return low[0], low[1], high[0], high[1]
