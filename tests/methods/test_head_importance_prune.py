"""Importance against heads' outputs and their gradients at the output projection, and pruned heads against matrices
with zeros."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import shared
from torch import Tensor
from torch.testing import assert_close
from zoo import run
from zoo.base import words

import saccade as sc
from saccade.core.errors import InputError
from saccade.reduction.head_importance_prune import (
    HeadImportancePrune,
    ablations,
    importance,
    least,
    without_heads,
)

from .measured import home
from .shared import Inputs

EXAMPLE: dict[str, Any] = {"pruned": {"text.1.self": (0, 3), "vision.1.self": (0, 3)}}
DOUBLE = torch.float64
HEADS = 4
OUT = {
    "llama": {f"text.{i}.self": f"model.layers.{i}.self_attn.o_proj" for i in range(4)},
    "bart": {
        **{f"encoder.{i}.self": f"model.encoder.layers.{i}.self_attn.out_proj" for i in range(2)},
        **{f"text.{i}.self": f"model.decoder.layers.{i}.self_attn.out_proj" for i in range(3)},
        **{f"text.{i}.cross": f"model.decoder.layers.{i}.encoder_attn.out_proj" for i in range(3)},
    },
}
"""By site the linear layer that is given the heads' outputs side by side."""
SITES = {"llama": "*.self", "bart": "*.self|*.cross"}


def examples(name: str) -> list[Inputs]:
    made = []
    for seed in range(3):
        inputs: Inputs = {"input_ids": words(1, 12 + seed, seed=seed)}
        if name == "bart":
            inputs["decoder_input_ids"] = words(1, 7, seed=seed + 10)
        made.append({**inputs, "labels": words(1, 7 if name == "bart" else 12 + seed, seed=seed)})
    return made


def by_hand(name: str) -> dict[str, Tensor]:
    """Mean of |sum over tokens of a head's output times its gradient|, each layer's of length one."""
    model, totals = shared(name, DOUBLE), {site: torch.zeros(HEADS, dtype=DOUBLE) for site in OUT[name]}
    given: dict[str, Tensor] = {}

    def keep(site: str, args: tuple[Tensor]) -> None:
        args[0].retain_grad()
        given[site] = args[0]

    for inputs in examples(name):
        hooks = [
            model.get_submodule(path).register_forward_pre_hook(lambda _, args, site=site: keep(site, args))
            for site, path in OUT[name].items()
        ]
        model(**inputs).loss.backward()
        for hook in hooks:
            hook.remove()
        for site, x in given.items():
            assert x.grad is not None
            product = (x.detach() * x.grad).view(-1, HEADS, x.shape[-1] // HEADS)
            totals[site] += product.sum((0, 2)).abs()
    model.zero_grad()
    return {site: total / total.square().sum().sqrt() for site, total in totals.items()}


@pytest.mark.parametrize("name", list(OUT))
def test_importance_is_the_product_of_outputs_and_gradients(name: str) -> None:
    with sc.attach(shared(name, DOUBLE)) as session:
        found = importance(session, examples(name), SITES[name])
    expected = by_hand(name)
    assert found.keys() == expected.keys()
    for site, scores in found.items():
        assert_close(scores, expected[site].float(), atol=1e-5, rtol=0)


def test_of_a_loss_that_is_linear_in_the_gates_it_is_the_finite_difference() -> None:
    """What the last attention gives, times numbers, at its last layer's heads, which no other head follows."""
    model, (inputs, *_) = shared("llama", DOUBLE), examples("llama")
    seen: list[Tensor] = []
    weights = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    hook = model.model.layers[3].self_attn.o_proj.register_forward_hook(lambda _, __, out: seen.append(out))

    def loss(_: Any = None) -> Tensor:
        return (seen[-1] * weights).sum()

    changes = []
    try:
        with sc.attach(model) as session:
            found = importance(session, [{**inputs, "loss": loss}], "text.3.self")["text.3.self"]
        with torch.no_grad():
            model(**inputs)
            whole = loss()
            for head in range(HEADS):
                with sc.attach(model, HeadImportancePrune(pruned={"text.3.self": (head,)})):
                    model(**inputs)
                changes.append(float((whole - loss()).abs()))
    finally:
        hook.remove()
    expected = torch.tensor(changes)
    assert_close(found, expected / expected.norm(), atol=1e-5, rtol=0)


def zeroed(name: str, pruned: dict[str, tuple[int, ...]]) -> Any:
    """A copy whose output projections do not read these heads."""
    model = copy.deepcopy(shared(name, DOUBLE))
    with torch.no_grad():
        for site, heads in pruned.items():
            matrix = model.get_submodule(OUT[name][site]).weight
            matrix.view(matrix.shape[0], HEADS, -1)[:, list(heads)] = 0
    return model


def loss_of(model: Any, name: str) -> float:
    with torch.no_grad():
        return sum(float(model(**inputs).loss) for inputs in examples(name))


@pytest.mark.parametrize("name", list(OUT))
def test_dead_heads_go_first_and_leave_the_loss_unchanged(name: str) -> None:
    sites = list(OUT[name])
    dead = {sites[0]: (1,), sites[-1]: (0, 2)}
    model = zeroed(name, dead)
    before = loss_of(model, name)
    with home(), sc.attach(model) as session:
        for portion in (1.0, 0.25):
            method, share = HeadImportancePrune(portion=portion, sites=SITES[name]), 3 / (HEADS * len(sites))
            assert least(method.calibrate(session, examples(name)), share) == dead
            session.calibrate(method, examples(name))
            with sc.attach(model, HeadImportancePrune(share=share, sites=SITES[name])):
                assert loss_of(model, name) == pytest.approx(before, abs=1e-9)
            with sc.attach(model, HeadImportancePrune(share=2 * share, sites=SITES[name])):
                assert loss_of(model, name) != pytest.approx(before, abs=1e-6)


def test_each_step_ranks_by_what_is_left() -> None:
    """Three heads at a time, those of before taken out of the matrices."""
    with sc.attach(shared("llama", DOUBLE)) as session:
        found = HeadImportancePrune(portion=3 / 16).calibrate(session, examples("llama"))
    gone: dict[str, tuple[int, ...]] = {}
    for done in range(0, 16, 3):
        with sc.attach(zeroed("llama", gone)) as session:
            scores = importance(session, examples("llama"), "text.*.self")
        left = [(float(scores[s][h]), s, h) for s in scores for h in range(HEADS) if h not in gone.get(s, ())]
        for place, (_, site, head) in enumerate(sorted(left)[:3]):
            assert int(found[site][head]) == done + place
            gone[site] = (*gone.get(site, ()), head)


@pytest.mark.parametrize("alone", [False, True])
def test_ablations_are_the_losses_without_each_head(alone: bool) -> None:
    model, sites = shared("bart", DOUBLE), ("encoder.0.self", "text.1.cross")
    found = ablations(model, lambda: loss_of(model, "bart"), "|".join(sites), alone=alone)
    before = loss_of(model, "bart")
    assert tuple(found) == sites
    for site in sites:
        for head in range(HEADS):
            off = tuple(h for h in range(HEADS) if h != head) if alone else (head,)
            expected = loss_of(zeroed("bart", {site: off}), "bart") - before
            assert float(found[site][head]) == pytest.approx(expected, abs=1e-9)


# ---- matrices that have lost them ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("llama", {"text.0.self": (2, 3), "text.3.self": (0, 1)}),
        ("bert", {"text.0.self": (1,), "text.1.self": (0, 3)}),
    ],
)
def test_taken_out_is_switched_off(name: str, gone: dict[str, tuple[int, ...]]) -> None:
    model, inputs = shared(name), {"input_ids": words(2, 12)}
    smaller = without_heads(model, gone)
    with sc.attach(model, HeadImportancePrune(pruned=gone)):
        expected = run(model, inputs)
    assert_close(run(smaller, inputs), expected, atol=1e-5, rtol=0)
    assert float((run(model, inputs) - expected).abs().max()) > 1e-3
    sizes = [sum(p.numel() for p in each.parameters()) for each in (smaller, model)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("name", "heads", "says"), [("llama", (0,), "share a key head"), ("gpt2", (0,), "linear layer each")]
)
def test_what_cannot_be_taken_out_is_refused(name: str, heads: tuple[int, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        without_heads(shared(name), {"text.1.self": heads})


def test_a_forward_without_a_loss_is_refused() -> None:
    with sc.attach(shared("llama")) as session, pytest.raises(InputError, match="without a loss"):
        importance(session, [{"input_ids": words(1, 5)}], "text.*.self")
    with sc.attach(shared("llama")) as session, pytest.raises(InputError, match="No example"):
        importance(session, [], "text.*.self")


def test_a_head_that_is_switched_off_gives_nothing() -> None:
    gone = {"text.1.self": (0, 2)}
    ids = words(2, 9)
    with torch.no_grad(), sc.attach(shared("llama", DOUBLE), HeadImportancePrune(pruned=gone)):
        found = shared("llama", DOUBLE)(input_ids=ids).logits
    with torch.no_grad():
        assert_close(found, zeroed("llama", gone)(input_ids=ids).logits, atol=1e-9, rtol=0)
