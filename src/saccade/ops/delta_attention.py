"""Correct a sparse attention by what it misses at every so-many-th query.

    d_j  = dense_j - sparse_j                     at queries j = 0, gamma, 2 gamma, ...
    o_i  = sparse_i + d_(gamma floor(i / gamma))
    o_i  = dense_i                                for the last   N mod gamma + max(tail, gamma)   queries

Delta Attention (Willette et al., 2025).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.blocks import ROWS_TIMES_KEYS, BlockPattern


def streaming(keys: int, window: int, sinks: int, device: torch.device) -> BlockPattern:
    """The first keys and the last ones, the same for every head."""
    first = torch.arange(keys, device=device) < sinks
    return BlockPattern(first[None, None, None], 1, keys, tile=keys, window=window)


def dense_rows(queries: int, gamma: int, tail: int) -> tuple[Tensor, int]:
    """The queries that are answered densely (rows,), and at which the tail begins."""
    body = max(0, queries - queries % gamma - max(tail, gamma))
    return torch.cat([torch.arange(0, body, gamma), torch.arange(body, queries)]), body


def dense_at(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention of some queries of a whole prompt: (batch, heads, rows, dim)."""
    outs = []
    for part in rows.split(max(1, ROWS_TIMES_KEYS // (q.shape[0] * q.shape[1] * k.shape[2]))):
        seen = int(part[-1]) + 1
        mask = torch.arange(seen, device=q.device) <= part[:, None]
        out = F.scaled_dot_product_attention(
            q[:, :, part], k[:, :, :seen], v[:, :, :seen], attn_mask=mask, scale=scale, enable_gqa=True
        )
        outs.append(out)
    return torch.cat(outs, 2)


def corrected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparse: Tensor,
    *,
    gamma: int,
    tail: int,
    shift: bool = True,
    scale: float | None = None,
) -> Tensor:
    """`sparse` (batch, heads, queries, dim) put right; without `shift` at the sampled queries and the tail alone."""
    rows, body = dense_rows(q.shape[2], gamma, tail)
    rows = rows.to(q.device)
    dense = dense_at(q, k, v, rows, scale)
    if shift and body:
        sampled = rows < body
        delta = (dense[:, :, sampled] - sparse[:, :, rows[sampled]]).repeat_interleave(gamma, 2)
        sparse = torch.cat([sparse[:, :, :body] + delta[:, :, :body], sparse[:, :, body:]], 2)
    return sparse.index_copy(2, rows, dense)
