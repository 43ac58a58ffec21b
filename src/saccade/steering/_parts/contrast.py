"""Saying what one prompt says and another does not."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def contrast(base: Tensor, other: Tensor, alpha: float | Tensor) -> Tensor:
    """(1 + alpha) * base - alpha * other, logits (batch, vocabulary)."""
    return (1 + alpha) * base - alpha * other


def plausible(logits: Tensor, base: Tensor, beta: float) -> Tensor:
    """Leave those tokens alone in the choice whose probability in `base` is at least beta of the largest."""
    if beta == 0:
        return logits
    least = base.amax(-1, keepdim=True) + math.log(beta)
    return torch.where(base >= least, logits, -torch.inf)
