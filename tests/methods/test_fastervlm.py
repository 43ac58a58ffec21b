"""FasterVLM against the tower's own q and k, and against a text tower that is run on the shorter prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Look, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import run

import saccade as sc
from saccade.core.errors import InputError
from saccade.core.importance import tower_attention
from saccade.reduction.fastervlm import FasterVLM

from .shared import Inputs, generated
from .towers import (
    DOUBLE,
    HEADS,
    PICTURES,
    attention,
    best_of_tiles,
    inputs_of,
    kept,
    layer_of,
    scores,
    shortened,
    tiles,
)

EXAMPLE: dict[str, Any] = {}
DISCRETE = ("keep",)
NAMES = tuple(PICTURES)
"""Two with a class token, one of them with tiles; two without, in windows and with pooling."""


def chosen(name: str, model: Any, inputs: Inputs, keep: float) -> list[list[int]]:
    """By hand: of every tile the largest, and the separators."""
    pictures = zip(scores(name, model, inputs), tiles(name), strict=True)
    return [best_of_tiles(values, tile, keep) for values, tile in pictures]


# ---- what stays -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.05])
@pytest.mark.parametrize("name", NAMES)
def test_those_with_the_largest_scores_stay_in_their_order(name: str, keep: float) -> None:
    model, inputs = shared(name, DOUBLE), inputs_of(name)
    assert kept(name, model, inputs, FasterVLM(keep=keep)) == chosen(name, model, inputs, keep)


def test_k_is_n_less_what_the_ratio_takes() -> None:
    model, inputs = shared("llava", DOUBLE), inputs_of("llava")
    for ratio, left in ((0.5, 18), (0.75, 9), (0.9, 4), (0.95, 2)):
        found = kept("llava", model, inputs, FasterVLM(keep=1 - ratio))
        assert [len(picture) for picture in found] == [left] * 3 == [36 - round(ratio * 36)] * 3


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_scores_and_the_class_tokens_own_weight_sum_to_one(name: str) -> None:
    model, inputs = shared(name, DOUBLE), inputs_of(name)
    look = Look(tell=tower_attention, sites="vision.1.self")
    with sc.attach(model, look):
        run(model, inputs)
    (found,) = look.at("vision.1.self")
    by_hand = torch.stack([w[0] for w in attention(name, model, inputs)])
    assert_close(found, by_hand, atol=1e-6, rtol=0)
    assert_close(found[:, 1:].sum(1) + by_hand[:, 0], torch.ones(len(found), dtype=found.dtype))


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_the_choice_does_not_change_with_the_question(name: str) -> None:
    model, inputs = shared(name, DOUBLE), inputs_of(name)
    first = kept(name, model, inputs, FasterVLM())
    words = inputs["input_ids"] >= 100
    inputs["input_ids"] = torch.where(words, 399 - inputs["input_ids"], inputs["input_ids"])
    assert kept(name, model, inputs, FasterVLM()) == first


def test_planted_patches_survive() -> None:
    """Their keys point where the class token's query does."""
    model, inputs, planted = shared("llava", DOUBLE), inputs_of("llava"), [0, 7, 20, 35]
    module: Any = layer_of("llava", model)
    seen: list[Tensor] = []

    def look_there(_: Any, __: Any, k: Tensor) -> Tensor:
        k = k.clone()
        for patch in planted:
            k[:, 1 + patch] = 5 * seen[-1][:, 0]
        return k

    hooks = [
        module.q_proj.register_forward_hook(lambda _, __, q: seen.append(q) or None),
        module.k_proj.register_forward_hook(look_there),
    ]
    try:
        assert kept("llava", model, inputs, FasterVLM(keep=4 / 36)) == [planted] * 3
    finally:
        for hook in hooks:
            hook.remove()


def test_it_is_the_mean_over_heads_that_counts() -> None:
    """A patch on which one head rests loses against one that all heads like somewhat."""
    model, inputs = shared("llava", DOUBLE), inputs_of("llava")
    w = attention("llava", model, inputs)[0][0]
    found = kept("llava", model, inputs, FasterVLM(keep=1 / 36))[0]
    assert found == [int(w[1:].argmax())] and HEADS > 1


# ---- the answer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_the_answer_is_that_of_the_shorter_prompt(name: str) -> None:
    model = shared(name, DOUBLE)
    inputs = {n: v for n, v in inputs_of(name, (1,)).items() if n != "attention_mask"}
    image = inputs["input_ids"][0] == model.config.image_token_id
    keep = ~image
    keep[image.nonzero()[chosen(name, model, inputs_of(name), 0.25)[0], 0]] = True
    with sc.attach(model, FasterVLM(keep=0.25)):
        got = generated(model, inputs, 4)
    written = got.sequences[0, len(keep) :]
    expected = shortened(model, inputs, keep, written)[-5:-1]
    assert_close(torch.cat(got.logits), expected.float(), atol=1e-5, rtol=0)
    held = got.past_key_values.layers[0].keys.shape[2]
    assert held == int((~image).sum()) + int((keep & image).sum()) + 3  # text, K, and what was written


def test_everything_kept_is_the_model() -> None:
    model, inputs = shared("llava_next"), inputs_of("llava_next")
    inputs = {n: v.float() if v.is_floating_point() else v for n, v in inputs.items()}
    bare = run(model, inputs)
    with sc.attach(model, FasterVLM(keep=1.0)):
        assert torch.equal(run(model, inputs), bare)


def test_where_no_attention_was_seen_it_is_said() -> None:
    """Features come, and no attention was seen where it was looked for."""
    model, inputs = shared("llava", DOUBLE), inputs_of("llava")
    method = FasterVLM(sites={"observe": "text.0.self"})
    with sc.attach(model, method), pytest.raises(InputError, match="No attention was seen in the tower"):
        run(model, inputs)
