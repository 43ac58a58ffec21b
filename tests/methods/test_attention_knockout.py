"""The knockout against the models' own weights, and models whose masks are changed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Look, shared
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import InputError
from saccade.probes.attention_knockout import AttentionKnockout

from .planted import blinded, question
from .shared import generated, two

EXAMPLE: dict[str, Any] = {}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_what_is_cut_weighs_nothing_and_rows_still_sum_to_one(name: str) -> None:
    model, inputs, look = shared(name), two(family(name)), Look(lambda call: call.weights())
    with sc.attach(
        model, AttentionKnockout(source="image", target="question|last", sites="text.1:3.self"), look
    ):
        run(model, inputs)
    ids = inputs["input_ids"]
    image = ids == model.config.image_token_id
    asked = (image.flip(1).cumsum(1).flip(1) == 0) & inputs["attention_mask"].bool()
    cut = (asked[:, :, None] & image[:, None, :])[:, None].expand(-1, 4, -1, -1)
    for layer in range(4):
        w = look.at(f"text.{layer}.self")[0]
        assert (w[cut] == 0).all() == (layer in (1, 2))
        real = inputs["attention_mask"].bool()[:, None, :, None].expand_as(w[..., :1])[..., 0]
        assert_close(w.sum(-1)[real], torch.ones_like(w.sum(-1)[real]), atol=1e-5, rtol=0)


def test_in_every_layer_it_is_the_model_with_those_tokens_out_of_view() -> None:
    model, inputs = shared("llava"), question().inputs(shared("llava"))
    image = inputs["input_ids"][0] == model.config.image_token_id
    last = torch.arange(len(image)) == len(image) - 1
    with blinded(model, range(4), last, image):
        expected = run(model, inputs)
    with sc.attach(model, AttentionKnockout(source="image", target="last")):
        assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)


def test_a_token_that_would_see_nothing_is_refused() -> None:
    model = shared("llava")
    with (
        sc.attach(model, AttentionKnockout(source="all", target="last")),
        pytest.raises(InputError, match="nothing at all"),
    ):
        run(model, family("llava").inputs())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_generated_tokens_are_cut_from_the_picture_and_nothing_else_is(name: str) -> None:
    model, inputs, look = shared(name), question(name).inputs(shared(name)), Look(lambda call: call.weights())
    with sc.attach(model, AttentionKnockout(source="image", target="generated", sites="text.1:3.self"), look):
        generated(model, inputs, 3)
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    for layer in range(4):
        prompt, *steps = look.at(f"text.{layer}.self")
        assert (prompt[0, :, -1, image] > 0).all()
        assert len(steps) == 2
        for w in steps:
            assert (w[..., image] == 0).all() == (layer in (1, 2))
            assert_close(w.sum(-1), torch.ones_like(w.sum(-1)))
