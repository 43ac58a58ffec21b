"""Block attention against loops over queries and blocks, in every form and precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_good_as
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.testing import assert_close

from saccade.ops.blocks import BlockPattern
from saccade.ops.moba import block_means, choose, moba, pattern, reference, routed

DOUBLE = torch.float64


def made(
    keys: int, queries: int | None = None, *, batch: int = 1, heads: int = 4, key_heads: int = 2
) -> list[Tensor]:
    noise = torch.Generator().manual_seed(keys)
    shapes = ((heads, queries or keys, 8), (key_heads, keys, 8), (key_heads, keys, 6))
    return [torch.randn(batch, *shape, generator=noise, dtype=DOUBLE) for shape in shapes]


def blocks_of(q: Tensor, k: Tensor, i: int, block: int, top: int) -> list[int]:
    """For one query (dim,) at position i and its keys (keys, dim)."""
    own = i // block
    score = {b: float(q @ k[b * block : (b + 1) * block].mean(0)) for b in range(own)}
    return sorted([own, *sorted(score, key=lambda b: -score[b])[: top - 1]])


def by_hand(q: Tensor, k: Tensor, v: Tensor, block: int, top: int, rows: list[int] | None = None) -> Tensor:
    """One query of one head at a time: (batch, heads, rows, dim)."""
    batch, heads, queries, dim = q.shape
    start, groups = k.shape[2] - queries, heads // k.shape[1]
    rows = list(range(queries)) if rows is None else rows
    out = q.new_zeros(batch, heads, len(rows), v.shape[3])
    for b, h, (n, row) in itertools.product(range(batch), range(heads), enumerate(rows)):
        i, keys, values = start + row, k[b, h // groups], v[b, h // groups]
        chosen = blocks_of(q[b, h, row], keys, i, block, top)
        seen = [j for c in chosen for j in range(c * block, (c + 1) * block) if j <= i]
        out[b, h, n] = (keys[seen] @ q[b, h, row] / math.sqrt(dim)).softmax(0) @ values[seen]
    return out


# ---- the operator ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize(("length", "batch"), [(1, 3), (63, 3), (100, 1), (1000, 1), (1000, 3)])
def test_both_forms_are_the_softmax_over_the_union(length: int, batch: int, key_heads: int) -> None:
    q, k, v = made(length, batch=batch, key_heads=key_heads)
    rows = sorted({*range(0, length, max(1, length // 20)), length - 1})
    expected = by_hand(q, k, v, 16, 3, rows)
    assert_close(reference(q, k, v, block=16, top=3)[:, :, rows], expected, atol=1e-12, rtol=0)
    assert_close(moba(q, k, v, block=16, top=3)[:, :, rows], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("queries", [1, 2, 5, 37, 90])
@pytest.mark.parametrize(("block", "top"), [(16, 3), (7, 2), (16, 1), (100, 3), (512, 2), (1, 4)])
def test_a_later_part_and_single_steps(queries: int, block: int, top: int) -> None:
    q, k, v = made(100, queries)
    assert_close(moba(q, k, v, block=block, top=top), by_hand(q, k, v, block, top), atol=1e-12, rtol=0)


def test_a_step_that_may_choose_more_blocks_than_there_are() -> None:
    """At the end of a block, whose own mean is known already."""
    q, k, v = made(64, 1, key_heads=4)
    assert_close(moba(q, k, v, block=16, top=99), by_hand(q, k, v, 16, 99), atol=1e-12, rtol=0)


def test_a_scale_of_ones_own() -> None:
    q, k, v = made(63)
    expected = by_hand(q * 0.7 * math.sqrt(8), k, v, 16, 2)
    assert_close(moba(q, k, v, block=16, top=2, scale=0.7), expected, atol=1e-12, rtol=0)
    assert_close(reference(q, k, v, block=16, top=2, scale=0.7), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("block", "top"), [(16, 7), (16, 99), (100, 1), (100, 5), (1000, 2)])
def test_all_blocks_or_one_are_dense_attention(block: int, top: int) -> None:
    q, k, v = made(100)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_close(moba(q, k, v, block=block, top=top), dense, atol=1e-12, rtol=0)


@pytest.mark.parametrize("top", [1, 2, 3, 50])
def test_a_query_chooses_as_many_blocks_as_it_may_and_its_own(top: int) -> None:
    q, k, _ = made(100, batch=3)
    chosen = pattern(q, k, block=16, top=top).chosen
    for i in range(100):
        so_far = i // 16 + 1
        assert (chosen[:, :, i].sum(-1) == min(top, so_far)).all()
        assert chosen[:, :, i, i // 16].all()
        assert not chosen[:, :, i, so_far:].any()


@pytest.mark.parametrize("at", [20, 31, 32, 50])
def test_what_comes_later_changes_nothing(at: int) -> None:
    """The mean of the own block, which holds later keys, takes no part."""
    q, k, v = made(100)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, :, at + 1 :] *= -9
    changed_v[:, :, at + 1 :] += 5
    before, after = (moba(q, *kv, block=16, top=2) for kv in ((k, v), (changed_k, changed_v)))
    assert torch.equal(before[:, :, : at + 1], after[:, :, : at + 1])
    assert not torch.equal(before[:, :, at + 1 :], after[:, :, at + 1 :])


def test_kept_means_are_those_of_full_blocks() -> None:
    _, k, _ = made(100)
    expected = torch.stack([k[:, :, b * 16 : (b + 1) * 16].mean(2) for b in range(6)], 2)
    known = None
    for length in (5, 16, 40, 41, 100):
        known = block_means(k[:, :, :length], 16, known)
        assert_close(known, expected[:, :, : length // 16])


# ---- padding and missing keys ----------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1, 2, 3, 50])
def test_routing_by_numbers_of_blocks(top: int) -> None:
    """Left padding, and keys that are missing: the rest of a block speaks for it."""
    q, k, _ = made(40)
    missing = [0, 1, 2, 11, 12, 20, 21, 22, 23, 24, 25, 26, 27]  # padding; some; all of block 2
    number = torch.tensor([(j - 3) // 8 if j not in missing else -1 for j in range(40)])
    rows = torch.where(torch.arange(40) < 3, -1, (torch.arange(40) - 3) // 8)
    got = routed(q, k, rows[None], number[None, None], top=top)
    for h, i in itertools.product(range(4), range(3, 40)):
        own = (i - 3) // 8
        score = {
            b: float(q[0, h, i] @ k[0, h // 2][number == b].mean(0))
            for b in range(own)
            if bool((number == b).any())
        }
        chosen = {own, *sorted(score, key=lambda b: -score[b])[: top - 1]}
        assert got[0, h, i].tolist() == [int(b) in chosen for b in number], (h, i)
    assert not got[:, :, :3].any()


# ---- the pattern -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [16, 128])
@pytest.mark.parametrize(
    ("queries", "block", "top"), [(60, 16, 3), (60, 32, 2), (1, 16, 3), (37, 16, 2), (60, 7, 4)]
)
def test_its_block_mask_is_its_mask(queries: int, block: int, top: int, tile: int) -> None:
    q, k, v = made(60, queries)
    found = pattern(q, k, block=block, top=top)
    mask, fast = found.mask(), found.block_mask(tile)
    assert_close(flex_attention(q, k, v, block_mask=fast, enable_gqa=True), by_hand(q, k, v, block, top))
    at = (torch.arange(n) for n in (1, 4, queries, 60))
    assert torch.equal(fast.mask_mod(*torch.meshgrid(*at, indexing="ij")), mask)
    tiles, columns = -(-queries // tile), -(-60 // block)
    listed = torch.zeros(1, 4, tiles, columns, dtype=torch.int)
    for counts, index, kind in (
        (fast.kv_num_blocks, fast.kv_indices, 1),
        (fast.full_kv_num_blocks, fast.full_kv_indices, 2),
    ):
        for at in itertools.product(range(1), range(4), range(tiles)):
            listed[at][index[at][: int(counts[at])].long()] += kind
    for at in itertools.product(range(1), range(4), range(tiles), range(columns)):
        b, h, t, c = at
        part = mask[b, h, t * tile : (t + 1) * tile, c * block : (c + 1) * block]
        whole = bool(part.all()) and part.shape[1] == block
        assert int(listed[at]) == (2 if whole else int(part.any())), at


@pytest.mark.parametrize("tile", [16, 128])
def test_a_pattern_that_is_not_causal(tile: int) -> None:
    q, k, v = made(60, 37, key_heads=4)
    chosen = torch.rand(1, 4, 37, 4, generator=torch.Generator().manual_seed(0)) < 0.9
    chosen[..., 0] = True
    found = BlockPattern(chosen, 16, 60, causal=False)
    expected = torch.stack([chosen[..., j // 16] for j in range(60)], -1)
    assert torch.equal(found.mask(), expected)
    fast = found.block_mask(tile)
    assert_close(
        flex_attention(q, k, v, block_mask=fast), F.scaled_dot_product_attention(q, k, v, attn_mask=expected)
    )
    for h, t in itertools.product(range(4), range(-(-37 // tile))):
        part = chosen[0, h, t * tile : (t + 1) * tile]
        full = {c for c in range(3) if part[:, c].all()}  # the fourth block is short
        counts, index = fast.full_kv_num_blocks[0, h, t], fast.full_kv_indices[0, h, t]
        assert set(index[: int(counts)].tolist()) == full


@pytest.mark.slow
def test_compiled_flex_attention_takes_the_pattern() -> None:
    q, k, v = (t.float() for t in made(1000, batch=2))
    got = torch.compile(flex_attention)(
        q, k, v, block_mask=pattern(q, k, block=128, top=3).block_mask(), enable_gqa=True
    )
    assert_close(got, reference(q, k, v, block=128, top=3), atol=1e-5, rtol=0)


# ---- numbers ---------------------------------------------------------------------------------------------


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody has filled is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def results(form: Any, qkv: list[Tensor]) -> list[Tensor]:
    """Output, and gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in qkv]
    out = form(*leaves, block=16, top=3)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=DOUBLE)
    return [out.detach(), *torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)]


@pytest.mark.parametrize("queries", [None, 1, 5])
@pytest.mark.parametrize(("length", "batch"), [(1, 1), (63, 3), (100, 1), (1000, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_are_as_exact_as_the_plain_form(
    dtype: torch.dtype, length: int, batch: int, queries: int | None
) -> None:
    low = []
    for t in made(length, min(queries or length, length), batch=batch):
        buffer = torch.full((*t.shape[:2], t.shape[2] + 9, t.shape[3]), torch.nan, dtype=dtype)
        buffer[:, :, 4 : 4 + t.shape[2]] = t
        low.append(buffer[:, :, 4 : 4 + t.shape[2]])
    exact = results(reference, [t.double() for t in low])
    plain = results(reference, low)
    with poisoned():
        got = results(moba, low)
    for ours, theirs, true in zip(got, plain, exact, strict=True):
        assert ours.dtype == dtype
        assert_as_good_as(ours, theirs, true)


def test_gradients_are_those_of_small_differences() -> None:
    inputs = [t.requires_grad_() for t in made(9, 6, key_heads=1, heads=2)]
    assert torch.autograd.gradcheck(lambda *qkv: moba(*qkv, block=2, top=3), inputs, fast_mode=True)


def test_it_is_deterministic() -> None:
    q, k, v = (t.float() for t in made(100))
    assert torch.equal(moba(q, k, v, block=16, top=3), moba(q, k, v, block=16, top=3))


def test_no_query_is_routed_to_its_own_or_a_later_block() -> None:
    q, k, _ = made(100)
    chosen = choose(q, block_means(k, 16), block=16, top=4, keys=100)
    own = torch.arange(100)[:, None] // 16
    assert (chosen < own).all()
    assert ((chosen >= 0).sum(-1) == own[:, 0].clamp_max(3)).all()
