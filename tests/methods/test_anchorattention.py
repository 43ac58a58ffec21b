"""AnchorAttention against its three stages written out key by key."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.testing import assert_close

from saccade.ops.anchorattention import pattern
from saccade.ops.blocks import attend
from saccade.reduction.anchorattention import AnchorAttention

from .sparse import check_in_a_model, dense, noise, softmax_over

EXAMPLE = {"theta": 0.0, "block": 2, "group": 2}
DISCRETE = ("theta",)  # a column stays or it does not
BFLOAT16 = {"theta": -1e30}


def columns_by_hand(q: Tensor, k: Tensor, theta: float, block: int, step: int) -> list[set[int]]:
    """Of one head, q scaled: what each group sees beside its own part."""
    found, group = [], block * step
    for start in range(0, len(q), group):
        chosen = {*range(min(block, start))}
        for first in range(start, min(start + group, len(q)), block):
            rows = range(first, min(first + block, len(q)))
            seen = {i: [*range(min(block, start)), *range(start, i + 1)] for i in rows}
            anchor = sum(max(float(q[i] @ k[j]) for j in seen[i]) for i in rows) / len(rows)
            mean = torch.stack([q[i] for i in rows]).mean(0)
            chosen |= {j for j in range(block, start) if anchor - float(mean @ k[j]) <= theta}
        found.append(chosen)
    return found


def mask_by_hand(q: Tensor, k: Tensor, theta: float, block: int, step: int) -> Tensor:
    columns, group = columns_by_hand(q, k, theta, block, step), block * step
    n = len(q)
    return torch.tensor(
        [
            [j <= i and (j in columns[i // group] or j // group == i // group) for j in range(n)]
            for i in range(n)
        ]
    )


def answer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_over(q, k, v, mask_by_hand(q, k, 0.0, 2, 2))


def test_in_models() -> None:
    for name in ("llama", "gpt2"):
        check_in_a_model(name, "by_anchor", answer, AnchorAttention(**EXAMPLE))


def test_the_output_is_one_softmax_over_what_the_stages_leave() -> None:
    q, k, v = noise(45)
    for theta, block, step in ((0.5, 4, 2), (1.5, 4, 3), (0.0, 8, 1)):
        found = pattern(q, k, block=block, group=step, theta=theta)
        out = attend(q, k, v, found)
        for h in range(4):
            scaled, keys, values = q[0, h] / math.sqrt(8), k[0, h // 2], v[0, h // 2]
            seen = mask_by_hand(scaled, keys, theta, block, step)
            assert torch.equal(found.mask()[0, h], seen)
            assert_close(out[0, h], softmax_over(scaled, keys, values, seen), atol=1e-12, rtol=0)


def test_at_the_ends_it_is_dense_and_the_anchors_alone() -> None:
    q, k, v = noise(45)
    everything = pattern(q, k, block=4, group=2, theta=math.inf)
    assert_close(attend(q, k, v, everything), dense(q, k, v), atol=1e-12, rtol=0)
    at = torch.arange(45)
    anchors = (at <= at[:, None]) & ((at < 4) | (at // 8 == at[:, None] // 8))
    assert torch.equal(pattern(q, k, block=4, group=2, theta=-math.inf).mask(), anchors.expand(1, 4, -1, -1))


def test_it_grows_denser_with_theta_and_its_first_group_always_is() -> None:
    q, k, v = noise(45)
    masks = [
        pattern(q, k, block=4, group=2, theta=theta).mask() for theta in (-3.0, -1.0, 0.0, 0.5, 1.0, 4.0)
    ]
    counts = [int(mask.sum()) for mask in masks]
    assert counts == sorted(counts) and len(set(counts)) > 4
    assert all(not bool((a & ~b).any()) for a, b in itertools.pairwise(masks))
    out = attend(q, k, v, pattern(q, k, block=4, group=2, theta=-math.inf))
    assert_close(out[:, :, :8], dense(q, k, v)[:, :, :8], atol=1e-12, rtol=0)
    assert not torch.allclose(out[:, :, 20:], dense(q, k, v)[:, :, 20:])


def test_a_planted_column_is_seen_by_all_queries_of_the_group_whose_block_looks_there() -> None:
    q, k, _ = noise(64, heads=1, key_heads=1)
    q, k = 0.1 * q, 0.1 * k
    k[0, 0, 9, 0] = 50.0
    q[0, 0, 52:56, 0] = 1.0  # the second block of the fourth group
    found = pattern(q, k, block=4, group=4, theta=-5.0)
    assert [int(row.sum()) for row in found.chosen[0, 0]] == [16, 20, 20, 21]
    assert found.mask()[0, 0, 48:, 9].all() and not found.mask()[0, 0, 16:48, 9].any()


def test_by_single_queries_every_key_within_theta_of_the_anchor_is_kept_and_no_other() -> None:
    q, k, _ = noise(40, heads=1, key_heads=1)
    s = q[0, 0] @ k[0, 0].T / math.sqrt(8)
    mask = pattern(q, k, block=1, group=1, theta=0.7).mask()[0, 0]
    for i in range(40):
        anchor = max(s[i, 0], s[i, i])
        assert mask[i].tolist() == [
            j in (0, i) or (j < i and bool(anchor - s[i, j] <= 0.7)) for j in range(40)
        ]
