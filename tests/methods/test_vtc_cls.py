"""VTC-CLS against the class token's own q and k in several layers, and against a text tower run on the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import shared
from torch.testing import assert_close

import saccade as sc
from saccade.reduction.fastervlm import FasterVLM
from saccade.reduction.vtc_cls import VTCCLS

from .embedded import said, seen
from .shared import generated
from .towers import DIM, DOUBLE, PICTURES, best_of_tiles, inputs_of, kept, layers_of, scores, shortened, tiles

EXAMPLE: dict[str, Any] = {}
DISCRETE = ("keep",)


NAMES = tuple(PICTURES)


def chosen(name: str, over: Callable[[list[float]], float], start: int, keep: float) -> list[list[int]]:
    """By hand."""
    model, inputs = shared(name, DOUBLE), inputs_of(name)
    by_layer = [scores(name, model, inputs, layer) for layer in range(start, len(layers_of(name, model)))]
    found = []
    for tile, *pictures in zip(tiles(name), *by_layer, strict=True):
        together = [over(values) if None not in values else None for values in zip(*pictures, strict=True)]
        found.append(best_of_tiles(together, tile, keep))
    return found


@pytest.mark.parametrize("keep", [0.25, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_those_with_the_largest_sums_over_the_layers_stay_in_their_order(name: str, keep: float) -> None:
    """Of Qwen's layers some attend in windows, which are seen one by one."""
    found = kept(name, shared(name, DOUBLE), inputs_of(name), VTCCLS(keep=keep))
    assert found == chosen(name, sum, 0, keep) != chosen(name, sum, 1, keep)


@pytest.mark.parametrize(("over", "by_hand"), [("min", min), ("max", max)])
def test_or_with_the_largest_least_or_largest_of_them(
    over: str, by_hand: Callable[[list[float]], float]
) -> None:
    found = kept("llava", shared("llava", DOUBLE), inputs_of("llava"), VTCCLS(over=over))
    assert found == chosen("llava", by_hand, 0, 0.25) != chosen("llava", sum, 0, 0.25)


@pytest.mark.parametrize("name", NAMES)
def test_from_the_features_own_layer_alone_it_is_fastervlm(name: str) -> None:
    model, inputs = shared(name, DOUBLE), inputs_of(name)
    last = "vision.-1:.self" if name in ("qwen2_5_vl", "gemma3") else "vision.-2:.self"
    found = kept(name, model, inputs, VTCCLS(keep=0.5, sites={"observe": last}))
    assert found == kept(name, model, inputs, FasterVLM(keep=0.5))


def test_heads_may_stand_in_any_order() -> None:
    model = shared("llava", DOUBLE)
    inputs = inputs_of("llava")
    found = kept("llava", model, inputs, VTCCLS())
    layer: Any = model.model.vision_tower.encoder.layers[0].self_attn
    order = torch.tensor([2, 0, 3, 1])[:, None] * DIM + torch.arange(DIM)
    hooks = [
        part.register_forward_hook(lambda _, __, out: out[..., order.flatten()])
        for part in (layer.q_proj, layer.k_proj, layer.v_proj)
    ]
    back = order.flatten().argsort()
    hooks.append(layer.out_proj.register_forward_pre_hook(lambda _, args: (args[0][..., back],)))
    try:
        assert kept("llava", model, inputs, VTCCLS()) == found
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_answer_is_that_of_the_shorter_prompt(name: str) -> None:
    model = shared(name, DOUBLE)
    inputs = {n: v for n, v in inputs_of(name, (1,)).items() if n != "attention_mask"}
    image = inputs["input_ids"][0] == model.config.image_token_id
    keep = ~image
    keep[image.nonzero()[kept(name, model, inputs_of(name), VTCCLS())[0], 0]] = True
    with sc.attach(model, VTCCLS()):
        got = generated(model, inputs, 3)
    written = got.sequences[0, len(keep) :]
    expected = shortened(model, inputs, keep, written)[-4:-1]
    assert_close(torch.cat(got.logits), expected.float(), atol=1e-5, rtol=0)
    held = got.past_key_values.layers[0].keys.shape[2]
    assert held == int((~image).sum()) + int((keep & image).sum()) + 2  # text, K, and what was written


def test_of_the_world_it_sees_a_quarter_and_with_all_it_answers_as_ever() -> None:
    assert said(VTCCLS(keep=1.0)) == said()
    assert seen(VTCCLS(keep=0.25)) == [[36] * 4] * 8 and seen() == [[144] * 4] * 8
