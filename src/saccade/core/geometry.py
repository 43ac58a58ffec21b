"""Weights of tokens on the picture that the tokens were cut from."""

from __future__ import annotations

import torch
from torch import Tensor


def on_picture(weights: Tensor, boxes: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Weights (tokens,) with boxes (tokens, 4) in a picture of `size` (width, height), as (rows, columns).

    Each is spread evenly over the part of its box that lies in the picture, so the sum stays; what overlaps
    adds up, and tokens without a box are left out.
    """
    placed = boxes.isfinite().all(-1)
    y, x = _shares(boxes[placed], size, shape)
    return (y * weights[placed].double()[:, None]).T @ x


def spread(boxes: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """What `on_picture` makes of a weight of one, for every token: (tokens, rows, columns)."""
    y, x = _shares(boxes.where(boxes.isfinite().all(-1, keepdim=True), 0), size, shape)
    return y[:, :, None] * x[:, None, :]


def _shares(boxes: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of every box the shares in rows (tokens, rows) and in columns (tokens, columns)."""
    boxes = boxes.double()
    y = _overlap(boxes[:, 1], boxes[:, 3], size[1], shape[0])
    x = _overlap(boxes[:, 0], boxes[:, 2], size[0], shape[1])
    return y / y.sum(1, keepdim=True).clamp_min(1e-12), x / x.sum(1, keepdim=True).clamp_min(1e-12)


def of_picture(values: Tensor, boxes: Tensor) -> Tensor:
    """The mean of a picture's values (height, width) within every box, (tokens,): NaN for tokens without one."""
    height, width = values.shape
    x = _overlap(boxes[:, 0].double(), boxes[:, 2].double(), width, width)
    y = _overlap(boxes[:, 1].double(), boxes[:, 3].double(), height, height)
    return ((y @ values.double()) * x).sum(1) / (x.sum(1) * y.sum(1))


def covered(boxes: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """The cells (rows, columns) most of which boxes cover, bool."""
    return cover(boxes, size, shape).sum(0) > 0.5


def cover(boxes: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """How much of every cell each box covers, 0 to 1: (boxes, rows, columns)."""
    boxes = boxes.where(boxes.isfinite().all(-1, keepdim=True), 0).double()
    x = _overlap(boxes[:, 0], boxes[:, 2], size[0], shape[1]) * (shape[1] / size[0])
    y = _overlap(boxes[:, 1], boxes[:, 3], size[1], shape[0]) * (shape[0] / size[1])
    return y[:, :, None] * x[:, None, :]


def cells(boxes: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that are as coarse as the tokens are."""
    placed = boxes[boxes.isfinite().all(-1)].double()
    rows, columns = (
        max(1, round(size[i] / max(1.0, float((placed[:, i + 2] - placed[:, i]).quantile(0.25)))))
        for i in (1, 0)
    )
    return rows, columns


def _overlap(low: Tensor, high: Tensor, size: int, count: int) -> Tensor:
    """Length of every interval inside of every cell that `size` is divided into: (intervals, cells)."""
    edges = torch.linspace(0, size, count + 1, dtype=low.dtype, device=low.device)
    return (torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])).clamp_min(0)
