"""Entries of a cache that stay."""

from __future__ import annotations

import torch
from torch import Tensor


def slots(keep: Tensor) -> Tensor:
    """Indices of what stays (..., kept), in order, -1 on the left of those that keep fewer."""
    most = int(keep.sum(-1).max())
    index = keep.long().sort(dim=-1, stable=True).indices[..., -most:]
    return torch.where(keep.gather(-1, index), index, -1)
