"""Clusters and their means by hand, the baselines each by its own rule, and a text tower run on what is left."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import Look, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from zoo import run

import saccade as sc
from saccade.core.errors import InputError
from saccade.reduction._parts.clusters import aggregates, clusters
from saccade.reduction.cluster_aggregate import ClusterAggregate, uniform

from .embedded import said, seen
from .shared import Inputs
from .towers import DOUBLE, PICTURES, best, inputs_of, kept, scores, tiles

EXAMPLE: dict[str, Any] = {}
DISCRETE = ("keep",)
BFLOAT16 = {"choice": "random"}
NAMES = tuple(PICTURES)
CHOICES = ("aggregate", "nearest", "random", "grid", "class", "question")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def error(x: Tensor, cluster: Tensor, k: int) -> float:
    """Within clusters, by hand."""
    return sum(
        float((x[cluster == c] - x[cluster == c].mean(0)).square().sum())
        for c in range(k)
        if (cluster == c).any()
    )


# ---- clusters ---------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(1, 30), st.data())
def test_no_cluster_is_empty_and_they_stand_in_the_order_of_their_mean_places(
    n: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n))
    distinct = data.draw(st.integers(1, n))
    x = noise(distinct, 4)[torch.arange(n) % distinct]
    cluster = clusters(x, k, 20, 1, seed=n)
    members = [[i for i in range(n) if cluster[i] == c] for c in range(k)]
    assert all(members) and sum(map(len, members)) == n
    places = [sum(part) / len(part) for part in members]
    assert places == sorted(places)
    if distinct <= k:
        assert error(x, cluster, k) < 1e-20


def test_each_output_is_its_members_mean_and_together_they_keep_the_mean_of_all() -> None:
    x, k = noise(60, 8), 7
    cluster = clusters(x, k, 20, 1, 0)
    means = aggregates(x, cluster, k)
    counts = torch.tensor([int((cluster == c).sum()) for c in range(k)])
    for c in range(k):
        assert_close(means[c], torch.stack([x[i] for i in range(60) if cluster[i] == c]).mean(0))
    assert_close((counts[:, None] * means).sum(0) / 60, x.mean(0))


def test_after_enough_iterations_every_token_is_with_its_nearest_mean() -> None:
    x = noise(80, 5)
    cluster = clusters(x, 9, 100, 1, 3)
    means = aggregates(x, cluster, 9)
    assert [min(range(9), key=lambda c: float((token - means[c]).norm())) for token in x] == cluster.tolist()
    assert error(x, cluster, 9) < error(x, clusters(x, 9, 0, 1, 3), 9)


def test_the_error_falls_with_k_and_is_below_that_of_random_tokens() -> None:
    x, errors = noise(100, 6), []
    for k in (1, 5, 20, 50, 100):
        errors.append(error(x, clusters(x, k, 20, 5, 0), k))
        means = x[torch.randperm(100, generator=torch.Generator().manual_seed(0))[:k]]
        by_random = float(torch.cdist(x, means).min(1).values.square().sum())
        assert errors[-1] < by_random or k == 100
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0


def test_of_several_starts_the_best_counts() -> None:
    x = noise(40, 3)
    assert error(x, clusters(x, 8, 2, 8, 0), 8) <= error(x, clusters(x, 8, 2, 1, 0), 8)


def test_each_for_itself_is_the_original_in_its_order() -> None:
    x = noise(36, 4)
    assert torch.equal(aggregates(x, clusters(x, 36, 20, 1, 0), 36), x)


# ---- in a model -------------------------------------------------------------------------------------------


def visual(model: Any, inputs: Inputs, *methods: Any) -> list[Tensor]:
    """Of every sample the visual rows that come to the first layer's attention, before its norm."""
    got: list[Tensor] = []
    look = Look(tell=lambda call: call.queries("visual"), sites="text.0.self")
    hook = model.model.language_model.layers[0].input_layernorm.register_forward_pre_hook(
        lambda _, args: got.append(args[0])
    )
    with sc.attach(model, *methods, look):
        run(model, inputs)
    hook.remove()
    return [h[rows] for h, rows in zip(got[0], look.seen[0][2], strict=True)]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_text_tower_is_given_the_means(name: str) -> None:
    model, inputs = shared(name, DOUBLE), inputs_of(name)
    bare = visual(model, inputs)
    pictures = [*bare[0].split(PICTURES[name][:1]), *bare[1].split(PICTURES[name][1:])]
    got = torch.cat(visual(model, inputs, ClusterAggregate(keep=0.25, seed=4)))
    expected = [aggregates(x, clusters(x, len(x) // 4, 20, 1, 4), len(x) // 4) for x in pictures]
    assert_close(got, torch.cat(expected), atol=1e-9, rtol=0)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", NAMES)
def test_there_are_exactly_k_tokens_and_the_separators(name: str, choice: str) -> None:
    found = kept(name, shared(name, DOUBLE), inputs_of(name), ClusterAggregate(keep=0.3, choice=choice))
    for picture, tile in zip(found, tiles(name), strict=True):
        assert {i for i, t in enumerate(tile) if t < 0} <= set(picture)
        assert sum(tile[i] >= 0 for i in picture) == round(0.3 * sum(t >= 0 for t in tile))


# ---- what it is compared with -----------------------------------------------------------------------------


def test_nearest_keeps_the_member_nearest_to_each_mean() -> None:
    model, inputs = shared("llava", DOUBLE), inputs_of("llava", (1, 2))
    x = visual(model, inputs)[0]
    cluster = clusters(x, 9, 20, 1, 0)
    found = kept("llava", model, inputs, ClusterAggregate(choice="nearest"))[0]
    for c in range(9):
        members = [i for i in range(36) if cluster[i] == c]
        far = {i: float((x[i] - x[members].mean(0)).norm()) for i in members}
        (chosen,) = set(found) & set(members)
        assert far[chosen] < min(far.values()) + 1e-9  # of two members both are as near


def test_random_tokens_follow_the_seed() -> None:
    model, inputs = shared("llava", DOUBLE), inputs_of("llava")
    found = {
        seed: kept("llava", model, inputs, ClusterAggregate(choice="random", seed=seed))[0]
        for seed in range(3)
    }
    assert len({tuple(picture) for picture in found.values()}) == 3
    assert found[1] == kept("llava", model, inputs, ClusterAggregate(choice="random", seed=1))[0]


def test_a_grid_spreads_evenly() -> None:
    square = torch.tensor([[0, i // 6, i % 6] for i in range(36)])
    assert uniform(square, 9).tolist() == [6 * r + c for r in (1, 3, 5) for c in (1, 3, 5)]
    assert uniform(square, 36).tolist() == list(range(36))
    for k in range(1, 37):
        chosen = uniform(square, k).tolist()
        assert len(set(chosen)) == k
        halves = [sum(i < 18 for i in chosen), sum(i % 6 < 3 for i in chosen)]
        assert all(abs(2 * half - k) <= max(2, k // 2) for half in halves)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_by_class_those_with_the_largest_scores_stay(name: str) -> None:
    model, inputs = shared(name, DOUBLE), inputs_of(name)
    expected = [best(values, round(0.25 * len(values))) for values in scores(name, model, inputs)]
    assert kept(name, model, inputs, ClusterAggregate(choice="class")) == expected


def test_by_question_those_that_its_words_look_at_stay() -> None:
    model, inputs = shared("llava", DOUBLE), inputs_of("llava")
    x, ids = visual(model, inputs)[0], inputs["input_ids"][0]
    words = [
        int(i)
        for i, real in zip(ids, inputs["attention_mask"][0])
        if real and i != model.config.image_token_id
    ]
    table = model.get_input_embeddings().weight
    score = sum((x @ table[word] / math.sqrt(64)).softmax(0) for word in words)
    assert kept("llava", model, inputs, ClusterAggregate(choice="question"))[0] == best(score.tolist(), 9)


@torch.no_grad()
def test_inside_of_the_tower_the_most_alike_pairs_merge() -> None:
    """LLaVA's features are those of its second layer, so all merging is before that."""
    model, inputs = shared("llava", DOUBLE), inputs_of("llava")
    first, second = model.model.vision_tower.encoder.layers[:2]
    outs: dict[str, Tensor] = {}
    hooks = [
        first.self_attn.k_proj.register_forward_hook(lambda _, __, out: outs.update(k=out)),
        second.register_forward_pre_hook(
            lambda _, args, kwargs: outs.update(h=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
    ]
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    rows, expected = [], []
    for k, h in zip(outs["k"].unflatten(-1, (4, 8)).mean(2), outs["h"], strict=True):
        groups = {j: [j] for j in range(36)}
        likely = []
        for a in range(0, 36, 2):
            near = [float(torch.cosine_similarity(k[1 + a], k[1 + b], dim=0)) for b in range(1, 36, 2)]
            likely.append((max(near), a, 2 * near.index(max(near)) + 1))
        for _, a, b in sorted(likely, reverse=True)[:14]:
            groups[b] += groups.pop(a)
        left = torch.stack(
            [h[0], *(h[[1 + j for j in members]].mean(0) for _, members in sorted(groups.items()))]
        )
        rows.append(sorted(groups))
        out = second(left[None], attention_mask=None)
        expected.append(model.model.multi_modal_projector((out[0] if isinstance(out, tuple) else out)[0, 1:]))
    method = ClusterAggregate(keep=22 / 36, choice="merge")
    assert kept("llava", model, inputs, method) == rows
    assert_close(torch.cat(visual(model, inputs, method)), torch.cat(expected), atol=1e-9, rtol=0)
    with (
        sc.attach(model, ClusterAggregate(choice="merge")),
        pytest.raises(InputError, match="pairs are fewer"),
    ):
        run(model, inputs)


@pytest.mark.parametrize("choice", [*CHOICES, "merge"])
def test_all_kept_is_the_model(choice: str) -> None:
    model, inputs = shared("llava", DOUBLE), inputs_of("llava")
    bare = run(model, inputs)
    with sc.attach(model, ClusterAggregate(keep=1.0, choice=choice)):
        assert_close(run(model, inputs), bare)


def test_of_the_world_it_sees_a_quarter_and_with_all_it_answers_as_ever() -> None:
    assert said(ClusterAggregate(keep=1.0)) == said()
    for choice in ("aggregate", "merge"):
        assert seen(ClusterAggregate(keep=0.25, choice=choice)) == [[36] * 4] * 8
