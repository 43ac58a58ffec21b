"""How many tokens stay."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.reduction._parts.choice import top


def apportioned(budget: int, shares: Tensor, sizes: list[int]) -> list[int]:
    """Whole numbers in proportion to the shares, none above its size, that add up to the budget."""
    limit = torch.tensor(sizes, device=shares.device)
    counts = torch.zeros_like(limit)
    while (left := budget - int(counts.sum())) > 0:
        room = counts < limit
        wanted = left * (shares + 1e-12) * room / ((shares + 1e-12) * room).sum()
        more = torch.minimum(wanted.long(), limit - counts)
        if not bool(more.any()):  # less than one each: the largest remainders
            more = top(wanted.masked_fill(~room, -1), left).long() * room
        counts += more
    return counts.tolist()
