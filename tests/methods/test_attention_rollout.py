"""Rollout against the sum over all paths, flow against cuts, both against the models' own weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import cast, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import InputError
from saccade.probes.attention_rollout import AttentionRollout, flow, rollout, with_residual

from .shared import generated, two

EXAMPLE: dict[str, Any] = {}


def stochastic(layers: int, tokens: int, seed: int = 0, causal: bool = False) -> list[Tensor]:
    """W of every layer: rows that sum to one."""
    noise = torch.Generator().manual_seed(seed)
    scores = torch.randn(layers, tokens, tokens, generator=noise, dtype=torch.float64)
    if causal:
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    return [*scores.softmax(-1)]


def halved(weights: Sequence[Tensor]) -> list[Tensor]:
    """(W + I) / 2, entry by entry."""
    made = [torch.empty_like(w) for w in weights]
    for a, w in zip(made, weights):
        for i, j in itertools.product(range(len(w)), repeat=2):
            a[i, j] = (w[i, j] + (i == j)) / 2
    return made


def over_all_paths(matrices: Sequence[Tensor], i: int, j: int) -> float:
    """From output i down to input j: the product of the edges, summed over all ways."""
    top, tokens = len(matrices), range(len(matrices[0]))
    total = 0.0
    for between in itertools.product(tokens, repeat=top - 1):
        way = (i, *between, j)  # from the last layer to the input
        total += math.prod(float(matrices[top - 1 - k][way[k], way[k + 1]]) for k in range(top))
    return total


def smallest_cut(matrices: Sequence[Tensor], i: int, j: int) -> float:
    """Over every set of nodes that holds the output and not the input: what leaves the set."""
    top, tokens = len(matrices), len(matrices[0])
    source, sink = (top, i), (0, j)
    free = [(layer, at) for layer in range(1, top) for at in range(tokens)]
    best = math.inf
    for inside in itertools.product((False, True), repeat=len(free)):
        near = {source} | {node for node, chosen in zip(free, inside) if chosen}
        cut = sum(  # the other inputs lead nowhere: they stand on the near side
            float(matrices[layer - 1][at, to])
            for layer, at in near
            for to in range(tokens)
            if (layer - 1, to) not in near and ((layer - 1, to) == sink or layer > 1)
        )
        best = min(best, cut)
    return best


# ---- rollout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_rows_sum_to_one(causal: bool) -> None:
    found = rollout([with_residual(w) for w in stochastic(5, 6, causal=causal)])
    assert_close(found.sum(-1), torch.ones(6, dtype=torch.float64))
    assert (found.triu(1) == 0).all() == causal


def test_one_layer_gives_half_attention_and_half_identity() -> None:
    weights = stochastic(1, 4)
    assert_close(rollout([with_residual(w) for w in weights]), halved(weights)[0])


def test_identity_attention_gives_the_identity_at_any_depth() -> None:
    for depth in (1, 3, 9):
        assert torch.equal(rollout([with_residual(torch.eye(5))] * depth), torch.eye(5))


def test_an_entry_is_the_sum_over_all_paths() -> None:
    weights = stochastic(3, 4)
    found = rollout([with_residual(w) for w in weights])
    for i, j in itertools.product(range(4), repeat=2):
        assert float(found[i, j]) == pytest.approx(over_all_paths(halved(weights), i, j), abs=1e-12)


def test_layers_of_different_lengths_are_refused() -> None:
    with pytest.raises(InputError, match="3, 4"):
        rollout([torch.eye(3), torch.eye(4)])


# ---- flow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "tokens", "causal"), [(2, 3, False), (3, 3, False), (3, 3, True), (2, 5, False)]
)
def test_flow_is_the_smallest_cut(layers: int, tokens: int, causal: bool) -> None:
    matrices = halved(stochastic(layers, tokens, seed=layers, causal=causal))
    found = flow(matrices, range(tokens), normalise=False)
    for i, j in itertools.product(range(tokens), repeat=2):
        assert float(found[i, j]) == pytest.approx(smallest_cut(matrices, i, j), abs=1e-9)


def test_flow_lies_between_the_best_paths_bottleneck_and_one() -> None:
    matrices = halved(stochastic(3, 4))
    found = flow(matrices, range(4), normalise=False)
    for i, j in itertools.product(range(4), repeat=2):
        best = max(
            min(float(matrices[2][i, a]), float(matrices[1][a, b]), float(matrices[0][b, j]))
            for a, b in itertools.product(range(4), repeat=2)
        )
        assert best - 1e-12 <= float(found[i, j]) <= 1 + 1e-12


def test_normalised_flows_of_an_output_sum_to_one() -> None:
    found = flow(halved(stochastic(3, 4)), [1, 3])
    assert found.shape == (2, 4)
    assert_close(found.sum(1), torch.ones(2, dtype=torch.float64))


def test_with_one_layer_the_normalised_flow_is_its_matrix() -> None:
    matrices = halved(stochastic(1, 5))
    assert_close(flow(matrices, range(5)), matrices[0])


# ---- on models ----------------------------------------------------------------------------------------


def by_hand(attentions: Sequence[Tensor], heads: Sequence[int] | None = None) -> Tensor:
    """Of the weights (batch, heads, tokens, tokens) that a model returns."""
    relevance = torch.eye(attentions[0].shape[-1])[None]
    for w in attentions:
        mean = sum(w[:, h] for h in heads) / len(heads) if heads else w.mean(1)
        relevance = (mean + torch.eye(w.shape[-1])) / 2 @ relevance
    return relevance


@pytest.mark.parametrize("heads", [None, (1,), (0, 3)])
@pytest.mark.parametrize(
    ("name", "tower"),
    [("llama", "text"), ("gpt2", "text"), ("bert", "text"), ("vit", "vision"), ("deberta_v2", "text")],
)
def test_it_follows_the_weights_that_the_model_returns(
    name: str, tower: str, heads: tuple[int, ...] | None
) -> None:
    model, inputs = shared(name, torch.float32, "eager"), family(name).inputs()
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    with sc.attach(model, AttentionRollout(heads=heads)) as session:
        run(model, inputs)
    found = session.results["attention_rollout"]
    assert list(found) == [tower]
    assert_close(found[tower], by_hand(attentions, heads), atol=1e-5, rtol=0)


def test_the_fused_kernel_gives_the_same() -> None:
    inputs = family("llama").inputs()
    eager = shared("llama", torch.float32, "eager")
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
    fused = shared("llama")
    with sc.attach(fused, AttentionRollout()) as session:
        run(fused, inputs)
    assert_close(session.results["attention_rollout"]["text"], by_hand(attentions), atol=1e-5, rtol=0)


def test_a_decoders_relevance_stays_causal_and_is_of_the_prompt() -> None:
    model, inputs = shared("llama"), family("llama").inputs()
    with sc.attach(model, AttentionRollout()) as session:
        generated(model, inputs, 4)
    found = session.results["attention_rollout"]["text"]
    length = inputs["input_ids"].shape[1]
    assert found.shape == (2, length, length)
    assert (found.triu(1) == 0).all()
    assert_close(found.sum(-1), torch.ones(2, length), atol=1e-5, rtol=0)


def test_every_tower_has_a_map_of_its_own() -> None:
    model, inputs = shared("llava"), two(family("llava"))
    with sc.attach(model, AttentionRollout()) as session:
        generated(model, inputs)
    found = session.results["attention_rollout"]
    assert {tower: tuple(relevance.shape) for tower, relevance in found.items()} == {
        "vision": (3, 37, 37),
        "text": (2, 87, 87),
    }
    for relevance in found.values():
        assert_close(relevance.sum(-1), torch.ones(relevance.shape[:2]), atol=1e-5, rtol=0)


def test_pictures_that_go_in_one_by_one_have_a_map_each() -> None:
    model, inputs = shared("qwen2_vl"), two(family("qwen2_vl"))
    with sc.attach(model, AttentionRollout(sites="vision.*.self")) as session:
        run(model, cast(inputs, torch.float32))
    maps = session.results["attention_rollout"]["vision"]
    assert [m.shape[-1] for m in (maps if isinstance(maps, list) else [maps])] == [64, 64, 32]


def test_a_pooling_head_beside_the_layers_is_refused_with_a_way_out() -> None:
    model, inputs = shared("siglip_vision"), family("siglip_vision").inputs()
    with sc.attach(model, AttentionRollout()), pytest.raises(InputError, match=r"vision\.:\.self"):
        run(model, inputs)
    with sc.attach(model, AttentionRollout(sites="vision.:.self")) as session:
        run(model, inputs)
    assert session.results["attention_rollout"]["vision"].shape == (2, 36, 36)
