"""Attend to the first keys and the own group, and to the columns whose scores come near the largest there.

    m_i       = largest score of query i over the first block and its own group, causally: its anchor
    column j  is chosen for a group when   mean(m) - mean(q) . k_j / sqrt(dim) <= theta
              for the means over any one of the group's blocks of queries
    a query attends to the first block, to its group causally, and to the group's columns between them

AnchorAttention (2025). No sorting: columns are compared with the anchor alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.blocks import BlockPattern, scores


@torch.no_grad()
def pattern(
    q: Tensor, k: Tensor, *, block: int, group: int, theta: float, scale: float | None = None
) -> BlockPattern:
    """Of a whole prompt, as many queries as keys, in groups of `group` blocks."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tile, keys = block * group, k.shape[2]
    starts = range(0, keys, tile)
    chosen = torch.zeros(*q.shape[:2], len(starts), keys, dtype=torch.bool, device=q.device)
    chosen[..., :block] = True
    for g, start in enumerate(starts):
        chosen[:, :, g, start : start + tile] = True
        for first in range(start, min(start + tile, keys), block) if start > block else ():
            rows = q[:, :, first : first + block]
            anchor = _anchor(rows, k, first, start, block, scale).mean(2)
            far = scores(rows.mean(2, keepdim=True), k[:, :, block:start], scale)[:, :, 0]
            chosen[:, :, g, block:start] |= anchor[..., None] - far <= theta
    return BlockPattern(chosen, 1, keys, tile=tile)


def _anchor(rows: Tensor, k: Tensor, first: int, start: int, block: int, scale: float) -> Tensor:
    """(batch, heads, rows)"""
    last = first + rows.shape[2]
    at = torch.arange(first, last, device=k.device)
    own = scores(rows, k[:, :, start:last], scale)
    own = own.masked_fill(torch.arange(start, last, device=k.device) > at[:, None], -torch.inf)
    return torch.maximum(own.amax(-1), scores(rows, k[:, :, :block], scale).amax(-1))
