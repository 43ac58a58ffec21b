"""Rows and edits at lengths that no kernel likes, alone and in a batch."""

from __future__ import annotations

import pytest
import torch
from helpers import method, shared
from torch import Tensor
from zoo.base import words

import saccade as sc

CLOSE = 1e-5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 63, 100, 1000])
def test_rows_are_those_of_eager_attention_and_edits_act_on_them(length: int, batch: int) -> None:
    model, eager = (shared("llama", implementation=name) for name in ("sdpa", "eager"))
    ids, seen = words(batch, length), list[Tensor]()
    look = method(observe=lambda call: seen.append(call.weights("last")))(sites="text.*.self")
    fade = torch.arange(length).flip(0) / length
    edit = method(weights=lambda call, w: w * (1 - 0.5 * fade))(sites="text.1.self", rows="last")
    with torch.no_grad():
        with sc.attach(model, look):
            model(ids)
        attentions = eager(ids, output_attentions=True).attentions
        for mine, theirs in zip(seen, attentions, strict=True):
            assert (mine - theirs[:, :, -1:]).abs().max() < CLOSE
        with sc.attach(model, edit), sc.attach(eager, edit):
            changed, by_eager = model(ids).logits, eager(ids).logits
    assert (changed - by_eager).abs().max() < CLOSE
    assert torch.equal(changed[:, :-1], model(ids).logits[:, :-1])
    assert length == 1 or (changed[:, -1] - model(ids).logits[:, -1]).abs().max() > 10 * CLOSE
