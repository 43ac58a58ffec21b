"""What is kept of weights (..., rows, columns) in place of all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SEGMENTS = ("first", "image", "question", "answer", "rest")


def segments(where: Callable[[str], Tensor]) -> Tensor:
    """Every token in one of SEGMENTS, on a new last axis, from masks by name. Padding is in none."""
    left, found = where("all"), []
    for name in ("first", "visual", "question", "generated"):
        found.append(where(name) & left)
        left = left & ~found[-1]
    return torch.stack([*found, left], -1)


def entropy(w: Tensor) -> Tensor:
    """Of what every row gives to these columns, in nats: (..., rows, 1)."""
    tiny = torch.finfo(w.dtype).tiny
    p = w / w.sum(-1, keepdim=True).clamp_min(tiny)
    return -(p * p.clamp_min(tiny).log()).sum(-1, keepdim=True)
