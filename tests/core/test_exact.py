"""A model is what it was: while it is only observed, after detaching, and after an exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    MHA,
    Exact,
    Look,
    assert_as_good_as,
    cast,
    discover,
    everywhere,
    greedy,
    heads_input,
    method,
    outcome,
    outputs_of,
    shared,
    unchanged,
)
from torch import Tensor
from zoo import FAMILIES, Family, run, select

import saccade as sc
from saccade.core.errors import InputError
from saccade.core.method import Method
from saccade.core.plan import REACH


def assert_same(name: str, got: Tensor, bare: Tensor) -> None:
    if name in MHA:
        torch.testing.assert_close(got, bare, atol=2e-6, rtol=2e-6)
    else:
        assert torch.equal(got, bare)


@pytest.mark.parametrize("f", select())
def test_observing_changes_nothing_and_detaching_leaves_nothing(f: Family) -> None:
    model, inputs = shared(f.name), f.inputs()
    bare = run(model, inputs)
    sites = [site for site in discover(model) if site.seam != "module"]
    look = Look(sites="|".join(site.name for site in sites))
    with unchanged(model):
        with sc.attach(model, look):
            ran = {
                path for path, _ in outputs_of(model, lambda: assert_same(f.name, run(model, inputs), bare))
            }
        assert torch.equal(run(model, inputs), bare)
    assert {name for name, _, _ in look.seen} == {site.name for site in sites if site.path in ran}
    assert len(look.seen) >= 1
    if "sinks" not in f.tags:
        for _, _, weights in look.seen:
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize("f", select("generates"))
def test_a_generation_is_the_same_while_observed_and_after(f: Family) -> None:
    model, inputs = shared(f.name), f.inputs()
    bare = greedy(model, inputs)
    with unchanged(model):
        with sc.attach(model, Look(sites=everywhere(model))):
            assert torch.equal(greedy(model, inputs), bare)
        assert torch.equal(greedy(model, inputs), bare)


def last_to_run(model: Any, forward: Callable[[], Any]) -> str:
    """The attention that is called last: not every tower has something to do."""
    look = Look(lambda call: None, sites=everywhere(model))
    with sc.attach(model, look):
        forward()
    return look.seen[-1][0]


class Trip(Exception):
    pass


def tripping(after: int) -> Callable[..., None]:
    left = [after]

    def observe(call: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Trip

    return observe


@pytest.mark.parametrize("f", select())
def test_an_exception_in_the_middle_leaves_nothing(f: Family) -> None:
    model, inputs = shared(f.name), f.inputs()
    bare = run(model, inputs)
    with unchanged(model):
        with sc.attach(
            model, method(observe=tripping(1))(sites=last_to_run(model, lambda: run(model, inputs)))
        ):
            with pytest.raises(Trip):
                run(model, inputs)
            assert_same(f.name, run(model, inputs), bare)
        assert torch.equal(run(model, inputs), bare)


@pytest.mark.parametrize("f", select("generates"))
def test_an_exception_inside_generate_leaves_nothing(f: Family) -> None:
    model, inputs = shared(f.name), f.inputs()
    bare = greedy(model, inputs)
    last = last_to_run(model, lambda: greedy(model, inputs, 2))
    with unchanged(model):
        with sc.attach(model, method(observe=tripping(3))(sites=last)):
            with pytest.raises(Trip):
                greedy(model, inputs)
            assert torch.equal(greedy(model, inputs), bare)
        assert torch.equal(greedy(model, inputs), bare)


IDENTITY: dict[str, Callable[..., Any]] = {
    "inputs": lambda call, q, k, v: (q * 1.0, k * 1.0, v * 1.0),
    "bias": lambda call: torch.zeros(1, 1, 1, call.k.shape[2]),
    "scores": lambda call, s: s * 1.0,
    "weights": lambda call, w: w * 1.0,
    "replace": lambda call: call.next(),
    "output": lambda call, o: o * 1.0,
    "hidden": lambda call, h: h * 1.0,
}


def counted(event: str, sites: str, **options: Any) -> tuple[Method, list[Any]]:
    calls: list[Any] = []

    def edit(call: Any, *args: Any) -> Any:
        calls.append(call.site.name)
        return IDENTITY[event](call, *args)

    return method(**{event: edit})(sites=sites, **options), calls


@pytest.mark.parametrize("f", select())
def test_an_edit_that_is_the_identity_is_within_the_rule(f: Family) -> None:
    model, inputs = shared(f.name), f.inputs()
    plain = outcome(model, inputs)
    with Exact():
        exact = outcome(shared(f.name, torch.float64), cast(inputs, torch.float64))
    sites = discover(model)
    ran = {path for path, _ in outputs_of(model, lambda: slowly(model, inputs))}
    for event in IDENTITY:
        mine = [site.name for site in sites if event in REACH[site.seam] and site.path in ran]
        if not mine:
            continue
        edit, calls = counted(event, "|".join(mine))
        with sc.attach(model, edit):
            got = outcome(model, inputs)
        assert set(calls) == set(mine), event
        assert_as_good_as(got, plain, exact)


def slowly(model: Any, inputs: Any) -> None:
    """Every module calls its parts, also those of torch that can do without."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        run(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("rows", ["last", 0, -2])
@pytest.mark.parametrize("f", [f for f in select("llm") if f.id != "bloom"])
def test_an_identity_on_some_rows_leaves_the_others_to_the_bit(f: Family, rows: Any) -> None:
    model, inputs = shared(f.name), f.inputs()
    site = next(s for s in discover(model) if s.name.startswith("text.") and s.kind == "self")
    bare = dict(outputs_of(model, lambda: run(model, inputs)))[site.path]
    edit, _ = counted("weights", site.name, rows=rows)
    with sc.attach(model, edit):
        got = dict(outputs_of(model, lambda: run(model, inputs)))[site.path]
    row = {"last": -1}.get(rows, rows) % bare.shape[1]
    others = [i for i in range(bare.shape[1]) if i != row]
    assert torch.equal(got[:, others], bare[:, others])
    torch.testing.assert_close(got[:, row], bare[:, row], atol=1e-5, rtol=1e-5)


CHANGE: dict[str, Callable[..., Any]] = {
    "inputs": lambda call, q, k, v: (q * 1.5, k, v),
    "bias": lambda call: torch.linspace(0, 2, call.k.shape[2]),
    "scores": lambda call, s: s * 1.5,
    "weights": lambda call, w: w * 0.5,
    "replace": lambda call: call.native(q=call.q * 1.5),
    "output": lambda call, o: o * 0.5,
    "hidden": lambda call, h: h * 0.5,
}


@pytest.mark.parametrize("f", select())
def test_a_real_edit_acts_at_its_site_and_not_before(f: Family) -> None:
    model, inputs = shared(f.name), f.inputs()
    bare = outputs_of(model, lambda: slowly(model, inputs))
    order = [path for path, _ in bare]
    for event, change in CHANGE.items():
        sites = [
            s for s in discover(model) if event in REACH[s.seam] and s.kind != "embed" and s.path in order
        ]
        if not sites:
            continue
        site = sites[len(sites) // 2]
        with sc.attach(model, method(**{event: change})(sites=site.name)):
            got = outputs_of(model, lambda: slowly(model, inputs))
        assert [path for path, _ in got] == order
        same = [torch.equal(a, b) for (_, a), (_, b) in zip(bare, got)]
        at = order.index(site.path)
        assert not same[at], event
        before = [i for i in range(at) if not order[i].startswith(site.path + ".")]
        assert all(same[i] for i in before), event


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gpt_oss", "gemma2", "t5"])
@pytest.mark.parametrize("event", ["weights", "scores"])
def test_only_chosen_heads_and_rows_differ(name: str, event: str) -> None:
    model, inputs = shared(name), FAMILIES[name].inputs()
    site = next(s for s in discover(model) if s.name == "text.1.self")
    leaf = {"gpt2": "c_proj", "t5": "o"}.get(name, "o_proj")
    path = f"{site.path}.{leaf}"
    bare = heads_input(model, path, lambda: run(model, inputs))[0]
    heads = 4
    edit = method(**{event: CHANGE[event]})(sites=site.name, heads=(1, -1), rows=-2)
    with sc.attach(model, edit):
        got = heads_input(model, path, lambda: run(model, inputs))[0]
    differs = (bare != got).view(*bare.shape[:2], heads, -1).any(-1)  # (batch, rows, heads)
    expected = torch.zeros_like(differs)
    expected[:, -2, [1, 3]] = True
    assert torch.equal(differs, expected)


@pytest.mark.parametrize("heads", [(4,), (-5,), (0, 9)])
@pytest.mark.parametrize("other", [None, (0,)])
def test_a_head_that_is_not_there_is_named(heads: tuple[int, ...], other: Any) -> None:
    model, inputs = shared("llama"), FAMILIES["llama"].inputs()
    edits = [method(weights=lambda call, w: w)(heads=h) for h in (heads, other)]
    with sc.attach(model, edits), pytest.raises(InputError, match=r"no head -?\d among 4"):
        run(model, inputs)
