"""Which tokens stay, once it is known how much each of them matters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def top(scores: Tensor, count: int) -> Tensor:
    """The `count` highest (tokens,), as bool."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.topk(min(count, scores.shape[0])).indices] = True
    return chosen


def of_each(group: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """What `pick` says (bool) of the tokens (indices) of every group; those of no group (-1) stay: (tokens,), bool."""
    chosen = group < 0
    for number in group[group >= 0].unique().tolist():
        mine = (group == number).nonzero()[:, 0]
        chosen[mine[pick(mine)]] = True
    return chosen


def top_of_each(scores: Tensor, group: Tensor, keep: float) -> Tensor:
    """The highest share `keep` of every group, at least one; tokens of no group (-1) stay: (tokens,), bool."""
    return of_each(group, lambda mine: top(scores[mine], max(1, round(keep * len(mine)))))


def highest(scores: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Of the tokens `among` (..., tokens) the highest `count` (..., 1), the earlier of equals, as bool."""
    order = scores.masked_fill(~among, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    return among & (order.argsort(-1) < count)
