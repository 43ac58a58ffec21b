"""Attend to the own block of keys, and to the past blocks whose mean key answers the query best.

    s_b = q . mean(K_b)                               a gate without parameters
    a query attends to    its own block, causally
                          the top - 1 blocks before it with the largest s_b
    o = softmax over all keys of these blocks

Mixture of Block Attention (Lu et al., 2025). Heads that share a key head choose for themselves. The last
query stands at the last key, so that the same functions serve a prompt, a later part of one, and a step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.blocks import BlockPattern


def moba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    top: int,
    scale: float | None = None,
    means: Tensor | None = None,
) -> Tensor:
    """The fast form: the own block and the chosen ones apart, put together by log-sum-exp.

    q (batch, heads, queries, dim), k and v (batch, key heads, keys, dim), keys never fewer than queries.
    `means` as `block_means` gives them, where they are kept.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose(
        q, block_means(k, block) if means is None else means, block=block, top=top, keys=k.shape[2]
    )
    dtype = v.dtype
    q, k, v = (t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v))
    q = q * scale
    own, own_lse = _own_block(q, k, v, block)
    if chosen.shape[-1] == 0:
        return own.to(dtype)
    gathered = chosen[0, 0].numel() * (q.shape[1] // k.shape[1]) <= k.shape[2] // block
    past, past_lse = (_gathered if gathered else _by_block)(q, k, v, chosen, block)
    share = torch.cat([own_lse[..., None], past_lse], -1).softmax(-1)[..., None]
    return (own * share[..., 0, :] + (past * share[..., 1:, :]).sum(-2)).to(dtype)


def reference(q: Tensor, k: Tensor, v: Tensor, *, block: int, top: int, scale: float | None = None) -> Tensor:
    """The plain form: one softmax over the union, with every score made."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = pattern(q, k, block=block, top=top).mask()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def pattern(q: Tensor, k: Tensor, *, block: int, top: int) -> BlockPattern:
    """Which blocks each query attends to."""
    keys = k.shape[2]
    chosen = choose(q, block_means(k, block), block=block, top=top, keys=keys)
    at = torch.arange(-(-keys // block), device=q.device)
    own = (torch.arange(keys - q.shape[2], keys, device=q.device) // block)[:, None] == at
    return BlockPattern((chosen[..., None] == at).any(-2) | own, block, keys)


@torch.no_grad()
def block_means(k: Tensor, block: int, known: Tensor | None = None) -> Tensor:
    """Mean keys of the blocks that are full, (batch, key heads, blocks, dim): a query is never routed to the
    block that it stands in. `known` are those of the first blocks."""
    done, full = 0 if known is None else known.shape[2], k.shape[2] // block
    fresh = k[:, :, done * block : full * block].to(torch.promote_types(k.dtype, torch.float32))
    means = fresh.reshape(*k.shape[:2], full - done, block, k.shape[3]).mean(3)
    return means if known is None else torch.cat([known, means], 2)


@torch.no_grad()
def choose(q: Tensor, means: Tensor, *, block: int, top: int, keys: int) -> Tensor:
    """Blocks before its own to which each query is routed: (batch, heads, queries, at most top - 1), -1 for
    none."""
    own = torch.arange(keys - q.shape[2], keys, device=q.device) // block
    past = torch.arange(means.shape[2], device=q.device) < own[:, None]
    return _best(_gate(q, means).masked_fill(~past, -torch.inf), top - 1)


@torch.no_grad()
def routed(q: Tensor, k: Tensor, q_block: Tensor, k_block: Tensor, *, top: int) -> Tensor:
    """The choice where blocks are no runs of neighbours (padding, keys that are missing): which keys lie in a
    block that a query attends to, (batch, heads, queries, keys), the causal rule left to the caller.

    `q_block` (batch, queries) and `k_block` (batch, 1 or key heads, keys) are numbers of blocks, -1 for none.
    """
    heads = k.shape[1]
    k_block = k_block.expand(-1, heads, -1)
    blocks = int(max(k_block.amax(), q_block.amax())) + 1
    wide = k.to(torch.promote_types(k.dtype, torch.float32))
    place = torch.where(k_block < 0, blocks, k_block)
    sums = wide.new_zeros(k.shape[0], heads, blocks + 1, k.shape[3])
    sums = sums.scatter_add(
        2, place[..., None].expand_as(wide), wide.masked_fill((k_block < 0)[..., None], 0)
    )
    counts = wide.new_zeros(k.shape[0], heads, blocks + 1).scatter_add(
        2, place, torch.ones_like(place, dtype=wide.dtype)
    )
    means = (sums / counts.clamp_min(1)[..., None])[:, :, :blocks]
    at = torch.arange(blocks, device=q.device)
    groups = q.shape[1] // heads
    there = (counts[:, :, None, :blocks] > 0).repeat_interleave(groups, 1)
    past = at < q_block[:, None, :, None]
    chosen = _best(_gate(q, means).masked_fill(~(past & there), -torch.inf), top - 1)
    blocks_of = (chosen[..., None] == at).any(-2) | (q_block[:, None, :, None] == at)
    columns = k_block.repeat_interleave(groups, 1)[:, :, None, :].expand(-1, -1, q.shape[2], -1)
    return blocks_of.gather(3, columns.clamp_min(0)) & (columns >= 0)


def _gate(q: Tensor, means: Tensor) -> Tensor:
    """(batch, heads, queries, blocks), in float32 or better."""
    return (
        _by_key_head(q.to(means.dtype), means.shape[1]).matmul(means.transpose(-1, -2)).view(*q.shape[:3], -1)
    )


def _best(gate: Tensor, count: int) -> Tensor:
    values, index = gate.topk(min(count, gate.shape[-1]), -1)
    return torch.where(values == -torch.inf, -1, index)


def _by_key_head(t: Tensor, heads: int) -> Tensor:
    """(batch, heads, rows, dim) as (batch, key heads, rows of the heads that share it, dim)."""
    return t.reshape(t.shape[0], heads, -1, t.shape[3])


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the scores; q is scaled."""
    scores = q @ k.transpose(-1, -2)
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ v, lse


def _own_block(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Causal attention inside the block in which each query stands: (batch, heads, queries, dim), and its
    lse."""
    (batch, heads, queries, dim), key_heads, keys = q.shape, k.shape[1], k.shape[2]
    groups = heads // key_heads
    before = (keys - queries) % block  # keys of the first query's block that stand before it
    k, v = k[:, :, keys - queries - before :], v[:, :, keys - queries - before :]
    if before + queries <= block:  # all in one
        at = torch.arange(before + queries, device=q.device)
        mask = (at <= at[before:, None]).repeat(groups, 1)
        out, lse = _attend(_by_key_head(q, key_heads), k, v, mask)
        return out.view(batch, heads, queries, -1), lse.view(batch, heads, queries)
    after = -(before + queries) % block
    k, v = (F.pad(t, (0, 0, 0, after)).unflatten(2, (-1, block)) for t in (k, v))
    q = F.pad(q, (0, 0, before, after)).view(batch, key_heads, groups, -1, block, dim).transpose(2, 3)
    mask = torch.ones(block, block, dtype=torch.bool, device=q.device).tril()
    out, lse = _attend(
        q, k[:, :, :, None], v[:, :, :, None], mask
    )  # (batch, key heads, blocks, groups, block, dim)
    out = out.transpose(2, 3).reshape(batch, heads, -1, v.shape[-1])
    lse = lse.transpose(2, 3).reshape(batch, heads, -1)
    return out[:, :, before : before + queries], lse[:, :, before : before + queries]


def _by_block(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Attention to each chosen block, block after block with the queries that chose it: (batch, heads,
    queries, chosen, dim), and its lse, -inf for none."""
    (batch, heads, queries, count), key_heads = chosen.shape, k.shape[1]
    order, index = chosen.flatten(2).sort(dim=-1, stable=True)  # pairs of a query and a block, by block
    blocks = k.shape[2] // block
    starts = torch.searchsorted(
        order, torch.arange(blocks + 1, device=q.device).expand(batch, heads, -1).contiguous()
    )
    most = (starts[..., 1:] - starts[..., :-1]).amax((0, 1)).tolist()
    pairs, outs, lses = [], [], []
    for b, size in enumerate(most):
        if size == 0:
            continue
        place = starts[..., b, None] + torch.arange(size, device=q.device)
        pair = index.gather(2, place.clamp_max(index.shape[2] - 1))
        rows = q.gather(2, (pair // count)[..., None].expand(-1, -1, -1, q.shape[3]))
        at = slice(b * block, (b + 1) * block)
        out, lse = _attend(_by_key_head(rows, key_heads), k[:, :, at], v[:, :, at])
        pairs.append(
            torch.where(place < starts[..., b + 1, None], pair, queries * count)
        )  # the others into one more
        outs.append(out.view(batch, heads, size, -1))
        lses.append(lse.view(batch, heads, size))
    out = q.new_zeros(batch, heads, queries * count + 1, v.shape[3])
    lse = q.new_full((batch, heads, queries * count + 1), -torch.inf)
    if pairs:
        pair = torch.cat(pairs, 2)
        out = out.scatter(2, pair[..., None].expand(-1, -1, -1, v.shape[3]), torch.cat(outs, 2))
        lse = lse.scatter(2, pair, torch.cat(lses, 2))
    return out[:, :, :-1].unflatten(2, (queries, count)), lse[:, :, :-1].unflatten(2, (queries, count))


def _gathered(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The same for few queries: no key is read but those of chosen blocks."""
    batch, heads = q.shape[:2]
    full = k.shape[2] // block
    k, v = (t[:, :, : full * block].unflatten(2, (full, block)) for t in (k, v))
    rows = torch.arange(batch, device=q.device)[:, None, None, None]
    shared = (torch.arange(heads, device=q.device) // (heads // k.shape[1]))[:, None, None]
    at = (rows, shared, chosen.clamp_min(0))
    out, lse = _attend(q[:, :, :, None, None], k[at], v[at])  # (batch, heads, queries, chosen, 1, dim)
    return out.squeeze(-2), lse.squeeze(-1).masked_fill(chosen < 0, -torch.inf)
