"""SampleAttention against columns found by loops, and with columns that were planted."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import method, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run
from zoo.base import words

import saccade as sc
from saccade.core.errors import InputError, OptionError
from saccade.ops.blocks import attend
from saccade.ops.sampleattention import column_scores, pattern, sampled
from saccade.reduction.sampleattention import SampleAttention

from .embedded import said
from .shared import alone, generated, two
from .sparse import DOUBLE, check_in_a_model, dense, noise, softmax_over

EXAMPLE = {"alpha": 0.6, "sample": 0.4, "window": 0.1}
DISCRETE = ("alpha",)  # a column stays or it does not


def chosen_by_hand(q: Tensor, k: Tensor, rows: list[int], alpha: float, block: int = 1) -> set[int]:
    """Of one head, q scaled: the blocks of columns."""
    blocks = math.ceil(len(k) / block)
    got = [0.0] * blocks
    for i in rows:
        for j, weight in enumerate((k[: i + 1] @ q[i]).softmax(0).tolist()):
            got[j // block] += weight
    chosen: set[int] = set()
    for b in sorted(range(blocks), key=lambda b: -got[b]):
        if sum(got[c] for c in chosen) >= alpha * sum(got):
            break
        chosen.add(b)
    assert sum(got[c] for c in chosen) >= alpha * sum(got)
    least = min(chosen, key=lambda c: got[c])
    assert sum(got[c] for c in chosen - {least}) < alpha * sum(got)
    return chosen


def answer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With the example's options, of which every second query from the last on is sampled."""
    n = len(q)
    columns = chosen_by_hand(q, k, [i for i in range(n) if (n - 1 - i) % 2 == 0], 0.6)
    seen = [[j <= i and (j in columns or i - j < math.ceil(0.1 * n)) for j in range(n)] for i in range(n)]
    return softmax_over(q, k, v, torch.tensor(seen))


def test_in_models() -> None:
    for name in ("llama", "gpt2"):
        check_in_a_model(name, "by_sample", answer, SampleAttention(**EXAMPLE))


def test_of_the_kept_columns_none_can_be_spared() -> None:
    """For runs of queries and blocks of keys too."""
    q, k, _ = noise(70)
    for length, block, alpha in ((1, 1, 0.9), (3, 1, 0.5), (1, 8, 0.8), (4, 16, 0.6)):
        got = pattern(q, k, sample=0.2, alpha=alpha, window=5, run=length, block=block, scale=0.9)
        rows = [i for i in range(70) if (69 - i) // length % 5 == 0]
        for h in range(4):
            expected = chosen_by_hand(0.9 * q[0, h], k[0, h // 2], rows, alpha, block)
            assert set(got.chosen[0, h, 0].nonzero()[:, 0].tolist()) == expected


def test_the_sample_may_be_scored_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = noise(70)
    rows = sampled(70, 0.2)
    at_once = column_scores(q, k, rows, 0.9)
    monkeypatch.setattr("saccade.ops.sampleattention.ROWS_TIMES_KEYS", 4 * 70 * 3)
    assert_close(column_scores(q, k, rows, 0.9), at_once, atol=1e-12, rtol=0)
    assert_close(at_once.sum(-1), torch.full((1, 4), 14.0, dtype=DOUBLE), atol=1e-12, rtol=0)


def test_with_all_columns_it_is_dense() -> None:
    """Also where the sampled queries see next to nothing of most."""
    q, k, v = noise(70)
    for strength in (1, 60):
        got = attend(strength * q, k, v, pattern(strength * q, k, sample=0.05, alpha=1.0, window=1))
        assert_close(got, dense(strength * q, k, v), atol=1e-12, rtol=0)


def planted(tokens: int, stripes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """One head whose queries look at the stripes, and at the last tokens up to themselves."""
    place = math.pi * torch.arange(tokens, dtype=DOUBLE) / tokens
    turns = torch.arange(1, tokens // 4 + 1, dtype=DOUBLE)
    around = torch.cat([(place[:, None] * turns).cos(), (place[:, None] * turns).sin()], 1)
    around *= 4 / around.norm(dim=1, keepdim=True)
    stripe = torch.zeros(tokens, 1, dtype=DOUBLE)
    stripe[stripes] = 1
    q = torch.cat([around, torch.full((tokens, 1), 17.0, dtype=DOUBLE)], 1)
    k = torch.cat([around * (1 - stripe), stripe], 1)
    v = torch.randn(tokens, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    return q[None, None], k[None, None], v[None, None]


def test_planted_stripes_are_found_and_they_alone() -> None:
    q, k, v = planted(200, [0, 3, 9])
    got = pattern(q, k, sample=0.1, alpha=0.6, window=24, scale=1.0)
    assert got.chosen[0, 0, 0].nonzero()[:, 0].tolist() == [0, 3, 9]
    out = attend(q, k, v, got, scale=1.0)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    assert float((out - exact).abs().max()) < 1e-2
    near = got.mask()[0, 0, -1] & ~got.chosen[0, 0, 0]
    weight = (q[0, 0, -1] @ k[0, 0].T).softmax(0)
    assert float(weight[near].sum()) > 0.05  # the band has its part
    without = attend(q, k, v, pattern(q, k, sample=0.1, alpha=0.0, window=24, scale=1.0), scale=1.0)
    assert float((without - exact).abs().max()) > 0.1


def test_for_the_same_stripes_longer_prompts_are_sparser_and_flat_heads_denser() -> None:
    densities = []
    for tokens in (100, 200, 400):
        q, k, _ = planted(tokens, [0, 3, 9])
        mask = pattern(q, k, sample=0.1, alpha=0.6, window=8, scale=1.0).mask()
        densities.append(float(mask.sum()) / (tokens * (tokens + 1) / 2))
    assert densities == sorted(densities, reverse=True) and densities[0] > 2 * densities[2]
    q, k, _ = planted(200, [0, 3, 9])
    flat, peaked = (
        pattern(s * q, k, sample=0.1, alpha=0.6, window=8, scale=1.0).chosen.sum() for s in (0, 1)
    )
    assert flat > 10 * peaked


def test_after_tokens_have_left_it_reads_those_that_are_left() -> None:
    """Of two samples with different counts: with all columns as if it were not there, with a few otherwise."""
    model, inputs = shared("llava", DOUBLE), two(family("llava"), DOUBLE)
    together = []
    for stack in ("fastervlm(keep=0.5)", "fastervlm(keep=0.5)+sampleattention(alpha=1.0)"):
        with sc.attach(model, sc.load(stack)):
            together.append(generated(model, inputs).logits[0])
    assert_close(*together, atol=1e-5, rtol=0)
    few = sc.load("fastervlm(keep=0.5)+sampleattention(alpha=0.3, window=0.05)")
    with sc.attach(model, few):
        batch = generated(model, inputs).logits[0]
        for sample in range(2):
            single = generated(model, alone(inputs, sample)).logits[0]
            assert_close(batch[sample], single[0], atol=1e-5, rtol=0)
    assert not torch.allclose(batch, together[0], atol=1e-3)


@pytest.mark.parametrize(
    ("name", "why"), [("gemma2", "soft cap"), ("mistral", "window|mask"), ("gpt_oss", "sinks")]
)
def test_attention_that_is_more_than_a_causal_softmax_is_refused(name: str, why: str) -> None:
    with sc.attach(shared(name), SampleAttention(**EXAMPLE)), pytest.raises(InputError, match=why) as refusal:
        run(shared(name), {"input_ids": words(1, 20)})
    assert "sites=" in refusal.value.remedy


def test_beside_a_term_for_the_scores_it_is_refused() -> None:
    louder = method(bias=lambda call: 0.3 * call.columns("last"))(sites="text.*.self")
    with (
        sc.attach(shared("llama"), louder, SampleAttention(**EXAMPLE)),
        pytest.raises(InputError, match="mask"),
    ):
        run(shared("llama"), {"input_ids": words(1, 20)})


def test_a_later_part_is_dense_or_refused() -> None:
    model, ids = shared("llama", DOUBLE), words(1, 24)

    def second(*methods: SampleAttention) -> Tensor:
        with torch.no_grad():
            first = model(input_ids=ids[:, :16], use_cache=True)
            with sc.attach(model, *methods):
                return model(input_ids=ids[:, 16:], past_key_values=first.past_key_values).logits

    assert torch.equal(second(SampleAttention(**EXAMPLE)), second())
    with pytest.raises(InputError, match="keys are not those"):
        second(SampleAttention(**EXAMPLE, phases=("prefill", "extend")))


def test_in_the_world_it_answers_from_the_prompt_that_it_read() -> None:
    bare = said()
    assert said(SampleAttention(alpha=1.0)) == bare
    assert said(SampleAttention(alpha=0.0, window=0.01)) != bare


@pytest.mark.parametrize("option", [{"alpha": 1.5}, {"sample": 0.0}, {"window": -0.1}])
def test_shares_outside_of_what_there_is_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="out of range"):
        SampleAttention(**option)
