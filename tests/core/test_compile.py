"""Compiled as one graph, then attached: what was compiled is compiled anew, with the method in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import method
from torch import Tensor
from zoo import FAMILIES

import saccade as sc
from saccade.core.method import Method


def fade(call: Any) -> Tensor:
    return -0.5 * torch.arange(call.k.shape[2]) / call.k.shape[2]


EVENTS: dict[str, Callable[[], Method]] = {
    "bias": lambda: method(bias=fade)(sites="*.*.self"),
    "weights": lambda: method(weights=lambda call, w: 0.5 * w)(sites="*.*.self", rows="last"),
    "a row": lambda: method(weights=lambda call, w: 0.5 * w)(sites="*.*.self", rows=3),
    "output": lambda: method(output=lambda call, o: 0.5 * o)(sites="*.*.self"),
    "hidden": lambda: method(hidden=lambda call, h: 0.9 * h)(sites="*.1.layer"),
}
ONCE = {("llama", "bias"), ("timm_vit", "weights")}


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(*inputs) if isinstance(inputs, tuple) else model(**inputs, use_cache=False).logits


def check(family: str, event: str, backend: str, close: float) -> None:
    if event in ("weights", "a row") and torch.__version__ < (2, 13):
        pytest.skip("torch 2.9 cannot trace id(), 2.13 can")
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    with sc.attach(model, EVENTS[event]()):
        wanted = run(model, inputs)
    bare = run(model, inputs)
    assert float((wanted - bare).abs().max()) > 1e-3
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    first = run(compiled, inputs)
    assert float((first - bare).abs().max()) <= close
    with sc.attach(compiled, EVENTS[event]()):
        assert float((run(compiled, inputs) - wanted).abs().max()) <= close
    assert torch.equal(run(compiled, inputs), first)


@pytest.mark.parametrize(
    ("family", "event"),
    [
        pytest.param(family, event, marks=() if (family, event) in ONCE else pytest.mark.slow)
        for family in ("llama", "timm_vit")
        for event in EVENTS
    ],
)
def test_as_one_graph(family: str, event: str) -> None:
    check(family, event, "eager", 0.0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor makes C++, and there is no compiler here")
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("family", ["llama", "timm_vit"])
def test_by_inductor(family: str, event: str) -> None:
    check(family, event, "inductor", 1e-5)


@pytest.mark.slow
def test_what_is_read_in_a_graph() -> None:
    if torch.__version__ < (2, 13):
        pytest.skip("torch 2.9 cannot trace id(), 2.13 can")
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    seen: list[Tensor] = []
    look = method(observe=lambda call: seen.append(call.weights("last")))(sites="text.*.self")
    with sc.attach(model, look):
        bare = run(model, inputs)
    wanted, compiled = list(seen), torch.compile(model, fullgraph=True, backend="eager")
    seen.clear()
    with sc.attach(compiled, look):
        assert torch.equal(run(compiled, inputs), bare)
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
