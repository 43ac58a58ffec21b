"""What is done with weights, once it is known with which."""

from __future__ import annotations

import torch
from torch import Tensor


def redistribute(w: Tensor, source: Tensor, target: Tensor, share: float) -> Tensor:
    """Weights (..., keys) whose `source` columns keep a share, what is freed going to those of `target` in
    proportion to their own. Where the target has nothing, nothing moves."""
    on_target = (w * target).sum(-1, keepdim=True)
    freed = (1 - share) * (w * source).sum(-1, keepdim=True)
    moved = torch.where(source, share * w, w) + torch.where(target, freed * w / on_target, 0)
    return torch.where(on_target > 0, moved, w)


def scaled(w: Tensor, factor: Tensor | float) -> Tensor:
    """Weights (..., keys) times a factor, every row with the sum that it had."""
    new = w * factor
    return new * (w.sum(-1, keepdim=True) / new.sum(-1, keepdim=True))
