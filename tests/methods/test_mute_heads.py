"""Muted heads against weights and values written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Look, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.call import AttentionCall
from saccade.probes.mute_heads import MuteHeads

from .shared import two

EXAMPLE: dict[str, Any] = {"heads": (0, 2), "to": "context", "rows": "all"}


def seen(name: str, site: str, *methods: Any) -> dict[str, Tensor]:
    """Weights, values by head and outputs of a site, of a padded batch."""

    def tell(call: AttentionCall) -> dict[str, Tensor]:
        there = call.columns("all")[:, 0, 0]
        values = call.v.repeat_interleave(call.groups, 1)
        return {"w": call.weights(), "v": values, "out": call.out, "there": there}  # type: ignore[dict-item]

    look = Look(tell=tell, sites=site)
    with sc.attach(shared(name), *methods, look):
        run(shared(name), two(family(name)))
    return look.at(site)[0]


@pytest.mark.parametrize(("name", "site"), [("llama", "text.1.self"), ("gpt2", "text.1.self")])
def test_context_is_the_causal_mean_of_the_values_and_leaves_the_other_heads(name: str, site: str) -> None:
    bare, muted = seen(name, site), seen(name, site, MuteHeads(heads=(1, 2), to="context", sites=site))
    there = bare["there"].double()
    for sample, real in enumerate(there):
        for row in range(len(real)):
            if not real[row]:
                continue
            keys = real[: row + 1]
            mean = (bare["v"][sample, :, : row + 1] * keys[:, None]).sum(1) / keys.sum()
            assert_close(muted["out"][sample, 1:3, row], mean[1:3].float())
    assert torch.equal(muted["out"][:, [0, 3]], bare["out"][:, [0, 3]])


def test_all_is_the_mean_of_all_values() -> None:
    site = "text.1.self"
    bare, muted = seen("llama", site), seen("llama", site, MuteHeads(heads=(1,), to="all", sites=site))
    there = bare["there"][:, None, :, None]
    mean = (bare["v"] * there).sum(2) / there.sum(2)
    real = bare["there"]
    assert_close(muted["out"][:, 1][real], mean[:, 1, None].expand_as(muted["out"][:, 1])[real])


def test_zero_is_a_model_without_the_heads_columns_of_its_output_layer() -> None:
    model = family("llama").build()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 16:48] = 0
    inputs = two(family("llama"))
    with sc.attach(shared("llama"), MuteHeads(heads={"text.1.self": (1, 2)})):
        assert_close(run(shared("llama"), inputs), run(model, inputs))


@pytest.mark.parametrize("beta", [0.4, 0.0])
def test_rest_keeps_beta_of_the_first_and_shares_the_other_weight(beta: float) -> None:
    site = "text.0.self"
    bare = seen("llama", site)["w"]
    muted = seen("llama", site, MuteHeads(heads=(1,), to="rest", strength=1 - beta, sites=site))["w"][:, 1]
    for sample, first in enumerate((0, 7)):  # the second is padded
        before, after = bare[sample, 1, first + 1 :, first:], muted[sample, first + 1 :, first:]
        assert_close(after.sum(-1), torch.ones(len(after)))
        assert_close(after[:, 0], beta * before[:, 0])
        assert_close(after[:, 1:], before[:, 1:] / (1 - before[:, :1]) * (1 - beta * before[:, :1]))
        assert muted[sample, first, first] == 1  # it sees nothing else


def test_a_row_with_all_its_weight_on_the_first_spreads_evenly() -> None:
    heads = {"text.0.self": (1,)}
    sunk = Sunk(sites="text.0.self")
    found = seen("llama", "text.0.self", sunk, MuteHeads(heads=heads, to="rest", strength=0.6))["w"][0, 1]
    for row in range(1, 24):
        assert_close(found[row, 0], torch.tensor(0.4))
        assert_close(found[row, 1 : row + 1], torch.full((row,), 0.6 / row))


class Sunk(sc.Method):
    def weights(self, call: AttentionCall, w: Tensor) -> Tensor:
        return call.columns("first").expand(w.shape).to(w.dtype)


def test_strength_zero_changes_nothing() -> None:
    bare, muted = seen("gpt2", "text.1.self"), seen("gpt2", "text.1.self", MuteHeads(strength=0.0))
    assert_close(muted["w"], bare["w"])
