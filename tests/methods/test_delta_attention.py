"""Delta Attention against dense and windowed attention put together row by row."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.ops.blocks import attend
from saccade.ops.delta_attention import corrected, dense_at, dense_rows, streaming
from saccade.reduction.delta_attention import DeltaAttention

from .shared import two
from .sparse import DOUBLE, check_in_a_model, dense, noise, softmax_over

EXAMPLE = {"gamma": 4, "window": 3, "sinks": 1, "tail": 2}
DISCRETE = ("gamma",)


def by_hand(q: Tensor, k: Tensor, v: Tensor, mode: str = "delta", over: str = "window") -> Tensor:
    """Of one head, q scaled, with the example's options."""
    n = len(q)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    seen = torch.tensor([[j <= i and (j < 1 or i - j < 3) for j in range(n)] for i in range(n)])
    full = softmax_over(q, k, v, causal)
    sparse = softmax_over(q, k, v, seen if over == "window" else causal)
    out = sparse.clone()
    body = n - n % 4 - 4
    for i in range(n) if mode != "sparse" else ():
        start = i // 4 * 4
        if i >= body or (mode == "recompute" and i == start):
            out[i] = full[i]
        elif mode == "delta":
            out[i] = sparse[i] + full[start] - sparse[start]
    return out


def test_in_models() -> None:
    for name in ("llama", "gpt2"):
        check_in_a_model(name, "by_delta", by_hand, DeltaAttention(**EXAMPLE))


@pytest.mark.parametrize("mode", ["recompute", "sparse"])
def test_its_baselines(mode: str) -> None:
    method = DeltaAttention(**EXAMPLE, mode=mode)
    check_in_a_model("llama", f"by_{mode}", lambda q, k, v: by_hand(q, k, v, mode), method)


def test_over_dense_attention_nothing_changes() -> None:
    model, inputs = shared("llama", DOUBLE), two(family("llama"), DOUBLE)
    bare = run(model, inputs)
    with sc.attach(model, DeltaAttention(**EXAMPLE, over="below")):
        got = run(model, inputs)
    real = inputs["attention_mask"].bool()
    assert_close(got[real], bare[real], atol=1e-6, rtol=0)


def test_over_another_method_it_corrects_that_one() -> None:
    """Of which nothing is left where every query is sampled, and something where not."""
    model, inputs = shared("llama", DOUBLE), two(family("llama"), DOUBLE)
    real = inputs["attention_mask"].bool()
    below = sc.load("sampleattention(alpha=0.0, window=0.1, sample=0.5)")
    window = DeltaAttention(gamma=9, tail=0, mode="sparse", window=3, sinks=0)

    def got(*methods: object) -> Tensor:
        with sc.attach(model, *methods):
            return run(model, inputs)[real]

    bare = got()
    assert_close(got(*below, DeltaAttention(gamma=1, over="below")), bare, atol=1e-6, rtol=0)
    sparse, put_right = got(*below), got(*below, DeltaAttention(gamma=4, tail=0, over="below"))
    assert 1e-4 < float((put_right - bare).norm()) != float((sparse - bare).norm())
    assert not torch.allclose(sparse, got(window))


def test_with_every_query_sampled_it_is_dense() -> None:
    q, k, v = noise(50)
    sparse = attend(q, k, v, streaming(50, 3, 1, q.device))
    assert_close(corrected(q, k, v, sparse, gamma=1, tail=0), dense(q, k, v), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("gamma", "tail"), [(4, 0), (4, 10), (3, 8), (60, 0), (7, 1)])
def test_sampled_and_last_rows_are_dense_and_so_many(gamma: int, tail: int) -> None:
    q, k, v = noise(50)
    sparse = attend(q, k, v, streaming(50, 2, 0, q.device))
    last = min(50, 50 % gamma + max(tail, gamma))
    rows = sorted({*range(0, 50 - last, gamma), *range(50 - last, 50)})
    assert len(rows) == math.ceil((50 - last) / gamma) + last
    assert dense_rows(50, gamma, tail)[0].tolist() == rows
    for shift in (True, False):
        got, exact = corrected(q, k, v, sparse, gamma=gamma, tail=tail, shift=shift), dense(q, k, v)
        right = (got - exact).abs().amax((0, 1, 3)) < 1e-12
        assert [i for i in range(50) if right[i] and i > 1] == [
            i for i in rows if i > 1
        ]  # the first two see all


def test_dense_rows_may_be_answered_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saccade.ops.delta_attention.ROWS_TIMES_KEYS", 4 * 50 * 3)
    q, k, v = noise(50)
    rows = torch.arange(0, 50, 4)
    assert_close(dense_at(q, k, v, rows), dense(q, k, v)[:, :, rows], atol=1e-12, rtol=0)


def test_where_queries_change_slowly_it_comes_nearer_than_what_it_corrects() -> None:
    tokens = 256
    _, k, v = noise(tokens, heads=1, key_heads=1)
    knots = torch.randn(1, 8, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    q = 4 * F.interpolate(knots, size=tokens, mode="linear").mT[None]
    exact, sparse = dense(q, k, v), attend(q, k, v, streaming(tokens, 24, 4, q.device))
    near = [sparse, *(corrected(q, k, v, sparse, gamma=8, tail=8, shift=shift) for shift in (False, True))]
    plain, recomputed, shifted = (float(F.cosine_similarity(o, exact, dim=-1).mean()) for o in near)
    assert plain < recomputed < shifted and 1 - shifted < 0.5 * (1 - recomputed)
