"""HyLRA against whole forwards in which unread keys are masked, and its plan against all plans there are."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from dense import readers
from helpers import shared
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from zoo import family
from zoo.base import words

import saccade as sc
from saccade.core.errors import InputError
from saccade.reduction.hylra import HyLRA, policy

from .measured import home
from .shared import Inputs, alone, generated, two
from .unread import stepwise, told

EXAMPLE: dict[str, Any] = {"keep": 0.1, "sinks": 1, "recent": 2, "refresh": (0, 2)}
DISCRETE = ("keep",)
DOUBLE = torch.float64
NAMES = ("llama", "gpt2")


def sample(name: str) -> Inputs:
    return alone(two(family(name), DOUBLE), 0)


def keys_by_hand(w: Tensor, keep: float, sinks: int, recent: int) -> tuple[list[int], list[int]]:
    """Of weights (heads, keys), the keys that are always read, and the chosen ones."""
    n = w.shape[1]
    always = [*range(min(sinks, n)), *range(max(sinks, n - recent), n)]
    score = [sum(float(w[h, j]) for h in range(w.shape[0])) for j in range(n)]
    others = sorted(set(range(n)) - set(always), key=lambda j: -score[j])
    return always, others[: max(1, round(keep * n))]


# ---- what is read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "refresh"), [("llama", (0, 2)), ("gpt2", (0,))])
def test_layers_read_what_the_refresh_layer_before_them_chose(name: str, refresh: tuple[int, ...]) -> None:
    inputs, options = sample(name), {"keep": 0.2, "sinks": 2, "recent": 3}
    prompt = inputs["input_ids"].shape[1]
    last: dict[str, list[int]] = {}

    def choose(step: int, layer: int, w: Tensor) -> Tensor | None:
        if step == 0 or layer in refresh:
            always, own = keys_by_hand(w, **options)  # type: ignore[arg-type]
            last["keys"] = always + own
            return None
        seen = torch.zeros(1, w.shape[1], dtype=torch.bool)
        seen[0, last["keys"]] = True
        return seen

    got, counted = told(shared(name, DOUBLE), inputs, HyLRA(**options, refresh=refresh), tokens=5)  # type: ignore[arg-type]
    logits, reads = stepwise(shared(name, DOUBLE, "eager"), inputs, got.sequences[0, prompt:], choose)
    assert_close(torch.cat(got.logits), logits.float(), atol=1e-5, rtol=0)
    assert counted == reads
    for step, counts in enumerate(counted[1:], 1):
        exactly = round(0.2 * (prompt + step)) + 2 + 3
        assert counts == [prompt + step if layer in refresh else exactly for layer in range(4)]


def test_layers_between_refresh_layers_read_few_keys() -> None:
    inputs = sample("llama")
    prompt = inputs["input_ids"].shape[1]
    _, counted = told(shared("llama", DOUBLE), inputs, HyLRA(**EXAMPLE), tokens=2)
    few = round(0.1 * (prompt + 1)) + 1 + 2
    assert counted == [[prompt] * 4, [prompt + 1, few, prompt + 1, few]]


@pytest.mark.parametrize("options", [{"keep": 1.0, "refresh": (0,)}, {"keep": 0.1, "refresh": (0, 1, 2, 3)}])
@pytest.mark.parametrize("name", NAMES)
def test_all_keys_or_all_layers_is_the_model(name: str, options: dict[str, Any]) -> None:
    inputs = sample(name)
    bare = generated(shared(name, DOUBLE), inputs, 5)
    got, _ = told(shared(name, DOUBLE), inputs, HyLRA(sinks=1, recent=1, **options), tokens=5)
    assert_close(torch.cat(got.logits), torch.cat(bare.logits), atol=1e-6, rtol=0)


# ---- the plan --------------------------------------------------------------------------------------------


def cost_of(plan: tuple[int, ...], overlap: Tensor) -> float:
    return sum(
        1 - float(overlap[max(p for p in plan if p < m), m]) for m in range(len(overlap)) if m not in plan
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10), st.sets(st.integers(0, 9), max_size=4))
def test_the_plan_is_the_best_of_all(seed: int, budget: int, forced: set[int]) -> None:
    overlap = torch.rand(10, 10, generator=torch.Generator().manual_seed(seed))
    found = policy(overlap, forced, budget)
    allowed = max(budget, len(forced | {0}))
    plans = [
        (0, *rest)
        for size in range(allowed)
        for rest in itertools.combinations(range(1, 10), size)
        if forced <= {0, *rest}
    ]
    best = min(cost_of(plan, overlap) for plan in plans)
    assert tuple(found) in plans
    assert cost_of(tuple(found), overlap) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_is_what_eager_attention_gives_and_a_plan_is_made_of_it(name: str) -> None:
    model, eager = shared(name, DOUBLE), shared(name, DOUBLE, "eager")
    options: dict[str, Any] = {"keep": 0.2, "sinks": 1, "recent": 2}
    prompts = [{"input_ids": words(1, 20 + seed, seed=seed)} for seed in range(2)]
    errors, overlap = torch.zeros(4), torch.zeros(4, 4)
    values: dict[int, Tensor] = {}
    for prompt in prompts:
        hooks = []
        for layer, module in readers(eager).items():
            linear = module.v_proj if name == "llama" else module.c_attn  # type: ignore[union-attr]
            hooks.append(
                linear.register_forward_hook(
                    lambda _, __, out, layer=layer: values.update(
                        {layer: out[0] if name == "llama" else out[0, :, -64:]}
                    )
                )
            )
        with torch.no_grad():
            attentions = eager(**prompt, output_attentions=True).attentions
        for hook in hooks:
            hook.remove()
        chosen = []
        for layer, weights in enumerate(attentions):
            w = weights[0, :, -1]
            always, own = keys_by_hand(w, **options)
            v = values[layer].unflatten(-1, (-1, 16)).transpose(0, 1)  # (key heads, keys, dim)
            v = v.repeat_interleave(4 // len(v), 0)
            dense = torch.cat([w[h] @ v[h] for h in range(4)])
            read = always + own
            sparse = torch.cat([(w[h, read] / w[h, read].sum()) @ v[h, read] for h in range(4)])
            errors[layer] += (1 - torch.cosine_similarity(dense, sparse, dim=0)).float() / 2
            chosen.append(set(own))
        for a, b in itertools.combinations(range(4), 2):
            overlap[a, b] += len(chosen[a] & chosen[b]) / len(chosen[a]) / 2
    method = HyLRA(**options, threshold=float(errors.sort().values[-2:].mean()), budget=0.5)
    with home(), sc.attach(model) as session:
        session.calibrate(method, prompts)
        found = method.calibrate(session, prompts)
        assert_close(found["errors"], errors, atol=1e-5, rtol=0)
        assert_close(found["overlap"].triu(1), overlap, atol=1e-6, rtol=0)
        _, counted = told(model, sample(name), method, tokens=2)
    length = sample(name)["input_ids"].shape[1] + 1
    plan = policy(overlap, {int(errors.argmax())}, 2)
    assert [layer for layer, count in enumerate(counted[1]) if count == length] == plan


# ---- refusals --------------------------------------------------------------------------------------------


def test_what_cannot_be_reused_is_refused() -> None:
    model, inputs = shared("llama", DOUBLE), sample("llama")
    with sc.attach(model, HyLRA(refresh=(1,))), pytest.raises(InputError, match="there is none"):
        generated(model, inputs)
    with home(), sc.attach(model, HyLRA()), pytest.raises(InputError, match="calibrate"):
        generated(model, inputs)
    with sc.attach(model) as session, pytest.raises(InputError, match="no prompt"):
        HyLRA().calibrate(session, [])
