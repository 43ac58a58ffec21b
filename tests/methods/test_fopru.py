"""FoPru against the tower's own q and k, and against a text tower that is run on the shorter prompt."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import Look, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import run

import saccade as sc
from saccade.core.importance import received
from saccade.reduction.fopru import FoPru, top_rows

from .embedded import said, seen
from .shared import generated
from .towers import (
    DOUBLE,
    PICTURES,
    attention,
    best,
    inputs_of,
    kept,
    layer_of,
    of_features,
    shortened,
    tiles,
)

EXAMPLE: dict[str, Any] = {}
DISCRETE = ("keep",)
NAMES = tuple(PICTURES)
CLASS = {"llava": 1, "llava_next": 1}
"""Class tokens ahead of the patches."""


def significance(name: str) -> list[list[float | None]]:
    """By hand: of every picture's features what they receive from patches."""
    w = attention(name, shared(name, DOUBLE), inputs_of(name))
    return of_features(name, torch.cat([m[CLASS.get(name, 0) :].sum(0) for m in w]).tolist())


def of_tiles(name: str) -> list[tuple[list[int], list[list[int]]]]:
    """Of every picture the separators and the features of every tile."""
    return [
        (
            [i for i, t in enumerate(tile) if t < 0],
            [[i for i, t in enumerate(tile) if t == n] for n in {*tile} - {-1}],
        )
        for tile in tiles(name)
    ]


@pytest.mark.parametrize("keep", [0.25, 0.4])
@pytest.mark.parametrize("name", NAMES)
def test_by_rank_the_k_largest_stay_in_their_order(name: str, keep: float) -> None:
    expected = []
    for values, (stays, parts) in zip(significance(name), of_tiles(name), strict=True):
        for mine in parts:
            stays = stays + [mine[i] for i in best([values[j] for j in mine], math.ceil(keep * len(mine)))]
        expected.append(sorted(stays))
    assert kept(name, shared(name, DOUBLE), inputs_of(name), FoPru(keep=keep)) == expected


@pytest.mark.parametrize("keep", [0.3, 0.5])
@pytest.mark.parametrize(
    ("name", "width"), [("llava", 6), ("llava_next", 4), ("qwen2_5_vl", 4), ("gemma3", 4)]
)
def test_by_row_the_rows_with_the_largest_sums_stay_whole(name: str, width: int, keep: float) -> None:
    """Tiles of the zoo are rectangles, and separators stand between their rows."""
    expected = []
    for values, (stays, parts) in zip(significance(name), of_tiles(name), strict=True):
        for mine in parts:
            rows = [mine[i : i + width] for i in range(0, len(mine), width)]
            sums: list[float | None] = [math.fsum(values[j] or 0 for j in row) for row in rows]
            count = max(1, math.ceil(keep * len(mine)) // width)
            stays = stays + [j for i in best(sums, count) for j in rows[i]]
        expected.append(sorted(stays))
    assert kept(name, shared(name, DOUBLE), inputs_of(name), FoPru(keep=keep, strategy="row")) == expected


@pytest.mark.parametrize(
    ("keep", "rank", "row"), [(0.25, 9, 6), (0.51, 19, 18), (0.75, 27, 24), (0.99, 36, 36)]
)
def test_how_many_stay(keep: float, rank: int, row: int) -> None:
    for strategy, count in (("rank", rank), ("row", row)):
        found = kept(
            "llava", shared("llava", DOUBLE), inputs_of("llava"), FoPru(keep=keep, strategy=strategy)
        )
        assert [len(picture) for picture in found] == [count] * 3


def test_without_a_class_token_significance_sums_to_one() -> None:
    for name, queries in (("gemma3", 64), ("llava", 36)):
        look = Look(tell=lambda call: received(call) / queries, sites="vision.1.self")  # noqa: B023
        with sc.attach(shared(name, DOUBLE), look):
            run(shared(name, DOUBLE), inputs_of(name))
        total = look.at("vision.1.self")[0].sum(1)
        assert_close(total, torch.ones_like(total))  # in LLaVA the class token's column completes it


def test_a_constant_factor_changes_nothing() -> None:
    scores, row = torch.rand(24, generator=torch.Generator().manual_seed(0)), torch.arange(24) // 6
    assert torch.equal(top_rows(scores, row, 13), top_rows(1000 * scores, row, 13))
    assert top_rows(scores, row, 13).view(4, 6).all(1).sum() == 2


def test_planted_patches_survive() -> None:
    """Their keys point where all queries do."""
    model, planted = shared("llava", DOUBLE), [0, 7, 20, 35]
    module: Any = layer_of("llava", model)
    common = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)

    def look_there(_: Any, __: Any, k: Tensor) -> Tensor:
        k = k.clone()
        for patch in planted:
            k[:, 1 + patch] = 5 * common
        return k

    hooks = [
        module.q_proj.register_forward_hook(lambda _, __, q: q + common),
        module.k_proj.register_forward_hook(look_there),
    ]
    try:
        assert kept("llava", model, inputs_of("llava"), FoPru(keep=4 / 36)) == [planted] * 3
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_answer_is_that_of_the_shorter_prompt(name: str) -> None:
    model, method = shared(name, DOUBLE), FoPru(keep=0.5, strategy="row")
    inputs = {n: v for n, v in inputs_of(name, (1,)).items() if n != "attention_mask"}
    image = inputs["input_ids"][0] == model.config.image_token_id
    keep = ~image
    keep[image.nonzero()[kept(name, model, inputs_of(name), method)[0], 0]] = True
    with sc.attach(model, method):
        got = generated(model, inputs, 3)
    written = got.sequences[0, len(keep) :]
    assert_close(
        torch.cat(got.logits), shortened(model, inputs, keep, written)[-4:-1].float(), atol=1e-5, rtol=0
    )
    assert got.past_key_values.layers[0].keys.shape[2] == int(keep.sum()) + 2


def test_of_the_world_it_sees_a_quarter_and_with_all_it_answers_as_ever() -> None:
    assert said(FoPru(keep=1.0)) == said()
    assert seen(FoPru(keep=0.25)) == [[36] * 4] * 8
    assert seen(FoPru(keep=0.25, strategy="row")) == [[3 * 12] * 4] * 8
