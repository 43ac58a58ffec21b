"""Sink and offset heads against the weights that models return, entry by entry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import shared
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core import call as calls
from saccade.probes.position_heads import PositionHeads

from .copier import BACK, COPIER, PROMPT, copier
from .shared import two

EXAMPLE: dict[str, Any] = {}


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_the_mean_of_the_weights_that_the_model_returns(
    name: str, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two prompts, the second padded; in pieces of few rows."""
    inputs = two(family(name))
    with torch.no_grad():
        attentions = shared(name, implementation="eager")(**inputs, output_attentions=True).attentions
    monkeypatch.setattr(calls, "CHUNK", 2 * 4 * 24 * 5)
    with sc.attach(shared(name), PositionHeads(offset=offset)) as session:
        run(shared(name), inputs)
    found = session.results["position_heads"]
    assert found.sites == tuple(f"text.{layer}.self" for layer in range(4))
    for sample, first in enumerate((0, 7)):
        for layer, w in enumerate(attentions):
            rows = range(first + max(1, offset), 24)
            expected = sum(w[sample, :, i, i - offset if offset else first] for i in rows) / len(rows)
            assert_close(found.events[sample, layer], expected)


def test_a_head_made_to_look_back_is_found() -> None:
    with sc.attach(model := copier(), PositionHeads(offset=BACK - 1)) as session:
        run(model, {"input_ids": torch.tensor([PROMPT])})
    assert session.results["position_heads"].reaching(0.99) == COPIER
