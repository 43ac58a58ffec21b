"""Attend to the keys near by, and to the fewest columns that answer a sample of the queries.

    c_j = sum over sampled queries i of softmax_j(q_i . k_j)        exact rows, causal
    columns   the fewest, largest first, whose c add up to alpha of all
    a query attends to the columns and to the last `window` keys, its own included

SampleAttention (Zhu et al., 2024). Every head has columns of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.blocks import ROWS_TIMES_KEYS, BlockPattern, scores


@torch.no_grad()
def pattern(
    q: Tensor,
    k: Tensor,
    *,
    sample: float,
    alpha: float,
    window: int,
    run: int = 1,
    block: int = 1,
    scale: float | None = None,
) -> BlockPattern:
    """Of a whole prompt, as many queries as keys. Columns are chosen in blocks of `block`."""
    rows = sampled(q.shape[2], sample, run).to(q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = fewest(in_blocks(column_scores(q, k, rows, scale), block), alpha)
    return BlockPattern(chosen[:, :, None], block, k.shape[2], tile=q.shape[2], window=window)


def sampled(queries: int, sample: float, run: int = 1) -> Tensor:
    """Every so-many-th run of queries, the last one among them: (rows,)."""
    from_end = torch.arange(queries).flip(0) // run
    return (from_end % int(1 / sample) == 0).nonzero()[:, 0]


def column_scores(q: Tensor, k: Tensor, rows: Tensor, scale: float) -> Tensor:
    """What the rows give to every key together: (batch, heads, keys)."""
    at = torch.arange(k.shape[2], device=k.device)
    total = q.new_zeros(*q.shape[:2], k.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))
    for part in rows.split(max(1, ROWS_TIMES_KEYS // (q.shape[0] * q.shape[1] * k.shape[2]))):
        s = scores(q[:, :, part], k, scale).masked_fill(at > part[:, None], -torch.inf)
        total += s.softmax(-1).sum(2)
    return total


def in_blocks(column: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(column, (0, -column.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def fewest(column: Tensor, alpha: float) -> Tensor:
    """The fewest that reach a share `alpha` of the sum, as bool; at 1 all, however little they have."""
    values, order = column.double().sort(dim=-1, descending=True, stable=True)
    sums = values.cumsum(-1)
    kept = (sums - values < alpha * sums[..., -1:]) | (alpha == 1)
    return torch.zeros_like(column, dtype=torch.bool).scatter(-1, order, kept)
