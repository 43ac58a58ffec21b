"""Patterns of blocks against a rule written out key by key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.testing import assert_close

from saccade.ops import blocks
from saccade.ops.blocks import BlockPattern, attend

DOUBLE = torch.float64

PATTERNS = {
    "stripes": {"size": 1, "tile": 60, "window": 7},
    "stripes for all heads": {"size": 1, "tile": 60, "window": 7, "heads": 1, "batch": 1},
    "stripes of a group": {"size": 1, "tile": 16},
    "blocks": {"size": 8, "tile": 16},
    "blocks and a window": {"size": 7, "tile": 25, "window": 3},
    "a later part": {"size": 8, "tile": 10, "window": 1, "tiles": 3},
    "query by query": {"size": 16, "tile": 1, "window": 1},
    "both ways": {"size": 8, "tile": 16, "causal": False},
}


def made(*, tiles: int = 0, heads: int = 4, batch: int = 2, **options: int) -> BlockPattern:
    """Of 60 keys, a third of the blocks, for all tiles unless told otherwise, the first block always."""
    shape = (batch, heads, tiles or -(-60 // options["tile"]), -(-60 // options["size"]))
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.33
    chosen[..., 0] = True
    return BlockPattern(chosen, keys=60, **options)


def rule(p: BlockPattern) -> Tensor:
    chosen = p.chosen.expand(2, 4, -1, -1)
    queries = min(chosen.shape[2] * p.tile, 60)
    mask = torch.zeros(2, 4, queries, 60, dtype=torch.bool)
    for i in range(queries):
        for j in range(60):
            position = 60 - queries + i
            seen = chosen[:, :, i // p.tile, j // p.size].clone()
            if p.causal:
                seen |= torch.tensor(position - j < p.window)
                seen &= torch.tensor(j <= position)
            mask[:, :, i, j] = seen
    return mask


def inputs(p: BlockPattern) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values, and one softmax over what the rule lets them see."""
    noise = torch.Generator().manual_seed(1)
    mask = rule(p)
    shapes = ((4, mask.shape[2], 8), (2, 60, 8), (2, 60, 6))
    q, k, v = (torch.randn(2, *shape, generator=noise, dtype=DOUBLE) for shape in shapes)
    s = q @ k.repeat_interleave(2, 1).mT * 0.7
    return q, k, v, s.masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("limit", [2**26, 2 * 4 * 60 * 5])
def test_the_gather_form_is_the_softmax_over_what_is_seen(
    name: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in pieces of five rows."""
    monkeypatch.setattr(blocks, "ROWS_TIMES_KEYS", limit)
    p = made(**PATTERNS[name])
    q, k, v, expected = inputs(p)
    assert torch.equal(p.mask().expand(2, 4, -1, -1), rule(p))
    assert_close(attend(q, k, v, p, scale=0.7), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["blocks", "blocks and a window", "a later part", "both ways"])
@pytest.mark.parametrize("tile", [16, 128])
def test_for_flex_attention(name: str, tile: int) -> None:
    p = made(**PATTERNS[name])
    q, k, v, expected = inputs(p)
    fast = p.block_mask(tile)
    got = flex_attention(q, k, v, block_mask=fast, enable_gqa=True, scale=0.7)
    assert_close(got, expected, atol=1e-12, rtol=0)
    listed = []
    for counts, index in (
        (fast.kv_num_blocks, fast.kv_indices),
        (fast.full_kv_num_blocks, fast.full_kv_indices),
    ):
        kind = torch.zeros(2, 4, counts.shape[2], -(-60 // p.size), dtype=torch.bool)
        for at in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
            kind[tuple(at)][index[tuple(at)][: int(counts[tuple(at)])].long()] = True
        listed.append(kind)
    for b, part in enumerate(rule(p).split(p.size, -1)):
        for t, rows in enumerate(part.split(tile, 2)):
            whole = rows.flatten(2).all(-1) & (part.shape[-1] == p.size)
            some = rows.flatten(2).any(-1) & ~whole
            got_some, got_whole = (kind[:, :, t, b] for kind in listed)
            assert not (got_whole & ~whole).any()
            if tile == p.tile and not p.window:  # else a block may be walked through for nothing
                assert torch.equal(got_some, some) and torch.equal(got_whole, whole)


def test_keys_that_nobody_sees_are_not_read() -> None:
    p = made(size=1, tile=60, heads=1, batch=1)
    q, k, v, expected = inputs(p)
    unseen = ~p.chosen[0, 0, 0]
    k[:, :, unseen] = v[:, :, unseen] = torch.nan
    assert_close(attend(q, k, v, p, scale=0.7), expected, atol=1e-12, rtol=0)
