"""Whatever stays, wherever it leaves, however the prompt is padded and cut: the oracle's logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import CLOSE, F64, generate, oracle, recompute, subject
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo.base import words

import saccade as sc
from core.missing import FORMS, Evict, Leave, entries, evicted, gone, staying, together
from core.test_branches import Thin, by_hand, mixed
from core.test_evict import spread_to
from saccade.core.branch import Branch
from saccade.core.cache import TrackedLayer
from saccade.core.method import Method
from saccade.core.tokens import Removal, Tokens, dense_rank

NAMES = ("llama", "mistral", "gpt_oss", "qwen3")
SEEDS = st.integers(0, 10_000)
QUIET = {"suppress_health_check": list(HealthCheck), "derandomize": True}


@st.composite
def conversations(draw: Any) -> dict[str, Any]:
    """Prompts, paddings, keep sets, budgets, chunks and turns."""
    tokens, batch = draw(st.integers(8, 30)), draw(st.integers(1, 3))
    paddings = draw(st.lists(st.integers(0, tokens - 5), min_size=batch, max_size=batch))
    paddings[draw(st.integers(0, batch - 1))] = 0
    return {
        "name": draw(st.sampled_from(NAMES)),
        "tokens": tokens,
        "paddings": paddings,
        "drops": draw(st.dictionaries(st.integers(0, 3), st.tuples(SEEDS, st.floats(0.2, 0.95)), max_size=3)),
        "evicts": draw(
            st.dictionaries(st.integers(0, 3), st.tuples(SEEDS, st.sampled_from(FORMS)), max_size=3)
        ),
        "chunk": draw(st.none() | st.integers(2, 12)),
        "turns": draw(st.lists(st.integers(1, 5), max_size=2)),
        "seed": draw(SEEDS),
    }


def padded(tokens: int, paddings: list[int], seed: int) -> dict[str, Tensor]:
    mask = (torch.arange(tokens) >= torch.tensor(paddings)[:, None]).long()
    return {"input_ids": words(len(paddings), tokens, seed=seed) * mask, "attention_mask": mask}


def a_conversation_equals_the_oracle(case: dict[str, Any]) -> None:
    inputs = padded(case["tokens"], case["paddings"], case["seed"])
    model, plain, prompt = subject(case["name"]), oracle(case["name"]), case["tokens"]
    leave = {layer: staying(inputs, seed, share) for layer, (seed, share) in case["drops"].items()}
    keep = {layer: entries(inputs, form, seed) for layer, (seed, form) in case["evicts"].items()}
    evicts = [
        Evict(keep={layer: keep[layer]}, form="ragged", sites=f"text.{layer}.self")
        for layer in case["evicts"]
    ]
    masks = together(gone(leave), spread_to(evicted(keep, prompt, case["chunk"]), prompt))
    options = {} if case["chunk"] is None else {"prefill_chunk_size": case["chunk"]}
    with sc.attach(model, Leave(keep=leave), *evicts):
        out = generate(model, inputs, 3, **options)
        check(out, plain, inputs, prompt, prompt, masks)
        for turn, count in enumerate(case["turns"]):
            ids = torch.cat([out.sequences, words(len(case["paddings"]), count, seed=turn)], 1)
            mask = nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - prompt), value=1)
            out = generate(
                model, {"input_ids": ids, "attention_mask": mask}, 2, past_key_values=out.past_key_values
            )
            check(out, plain, inputs, prompt, ids.shape[1], masks)


def check(
    out: Any, plain: Any, inputs: dict[str, Tensor], prompt: int, start: int, masks: dict[int, Tensor]
) -> None:
    wanted = recompute(plain, inputs, out.sequences[:, prompt:], masks)
    got = torch.stack(list(out.logits), 1)
    assert float((got - wanted[:, start - 1 : start - 1 + got.shape[1]]).abs().max()) < CLOSE


@settings(max_examples=100, **QUIET)
@given(conversations())
def test_any_conversation_equals_the_oracle(case: dict[str, Any]) -> None:
    a_conversation_equals_the_oracle(case)


@pytest.mark.slow
@settings(max_examples=2000, **QUIET)
@given(conversations())
def test_thousands_of_conversations_equal_the_oracle(case: dict[str, Any]) -> None:
    a_conversation_equals_the_oracle(case)


# ---- branches ------------------------------------------------------------------------------------


@st.composite
def branched(draw: Any) -> dict[str, Any]:
    batch = draw(st.integers(1, 2))

    def prompt() -> dict[str, Tensor]:
        tokens = draw(st.integers(4, 30))
        paddings = draw(st.lists(st.integers(0, tokens - 3), min_size=batch, max_size=batch))
        return padded(tokens, [*paddings[:-1], 0], draw(SEEDS))

    count = draw(st.integers(1, 3))
    return {
        "name": draw(st.sampled_from((*NAMES, "gpt2"))),
        "prompts": [prompt() for _ in range(1 + count)],
        "steps": [draw(st.integers(0, 3)) for _ in range(count)],
        "thin": draw(st.booleans()),
        "chunk": draw(st.none() | st.integers(3, 12)),
    }


class Follow(Method):
    def __init__(self, prompts: list[Any], steps: list[int]) -> None:
        super().__init__()
        self.prompts, self.steps = prompts, steps

    def branches(self, run: Any) -> list[Branch]:
        return [Branch(p, from_step=s) for p, s in zip(self.prompts, self.steps, strict=True)]

    def prediction(self, base: Tensor, branches: list[Tensor], p: Any) -> Tensor:
        return mixed(base, branches)


def branches_equal_the_oracle(case: dict[str, Any]) -> None:
    inputs, *others = case["prompts"]
    model, prompt = subject(case["name"]), inputs["input_ids"].shape[1]
    thin, chunk = case["thin"], None if case["thin"] else case["chunk"]
    methods = [*([Thin()] if thin else []), Follow(others, case["steps"])]
    with sc.attach(model, *methods):
        out = generate(model, inputs, 4, **({} if chunk is None else {"prefill_chunk_size": chunk}))
    batch = inputs["input_ids"].shape[0]
    masks = [
        {layer: t[:batch] for layer, t in Thin.masks(p).items()} if thin else None for p in case["prompts"]
    ]
    wanted = by_hand(case["name"], case["prompts"], out.sequences[:, prompt:], case["steps"], masks)
    assert float((torch.stack(list(out.logits), 1) - wanted).abs().max()) < CLOSE
    held = out.past_key_values.layers[0]
    assert held.keys.shape[0] == batch and held.get_seq_length() == prompt + 3


@settings(max_examples=20, **QUIET)
@given(branched())
def test_any_branches_equal_the_oracle(case: dict[str, Any]) -> None:
    branches_equal_the_oracle(case)


@pytest.mark.slow
@settings(max_examples=500, **QUIET)
@given(branched())
def test_five_hundred_branches_equal_the_oracle(case: dict[str, Any]) -> None:
    branches_equal_the_oracle(case)


# ---- the parts -----------------------------------------------------------------------------------


@st.composite
def happenings(draw: Any) -> list[tuple[str, Any]]:
    kinds = st.sampled_from(("update", "evict", "thin update", "select", "crop"))
    return [(kind, draw(SEEDS)) for kind in draw(st.lists(kinds, min_size=1, max_size=8))]


def a_layer_holds_what_a_dictionary_holds(window: int | None, events: list[tuple[str, Any]]) -> None:
    """Against rows of heads of dictionaries from position to key."""
    layer, heads = TrackedLayer(window), 2
    layer.attended = True
    model: list[list[dict[int, Tensor]]] = [[{} for _ in range(heads)] for _ in range(3)]
    seen = forgot = 0

    def update(seed: int, thin: bool) -> None:
        nonlocal seen
        noise = torch.Generator().manual_seed(seed)
        tokens = 1 + seed % 5
        left = torch.rand(len(model), tokens, generator=noise) < (0.6 if thin else 2)
        index = Tokens(left).index(*left.shape, empty=True)
        keys = torch.randn(len(model), heads, index.shape[1], 3, generator=noise, dtype=F64)
        layer.incoming = (tokens, index) if thin else None
        layer.update(keys, keys + 1)
        for row in range(len(model)):
            for slot, place in enumerate(index[row].tolist()):
                for head in range(heads):
                    if place >= 0:
                        model[row][head][seen + place] = keys[row, head, slot]
        seen += tokens

    update(7, False)
    for kind, seed in events:
        noise = torch.Generator().manual_seed(seed)
        if kind in ("update", "thin update"):
            update(seed, kind == "thin update")
        elif kind == "evict" and (slots := layer.keys.shape[2]):  # a window may have left none
            keep = torch.rand(len(model), heads, slots, generator=noise) < 0.7
            keep[:, :, -1] = True
            pos = layer.positions()
            pos = (pos[:, None] if pos.ndim == 2 else pos).expand(-1, heads, -1)
            order = keep.long().sort(dim=-1, stable=True).indices[..., -int(keep.sum(-1).max()) :]
            layer.evict(torch.where(keep.gather(-1, order), order, -1))
            for row in range(len(model)):
                for head in range(heads):
                    for slot in (~keep[row, head]).nonzero()[:, 0].tolist():
                        model[row][head].pop(int(pos[row, head, slot]), None)
        elif kind == "select":
            rows = torch.randint(0, len(model), (3,), generator=noise)
            layer.batch_select_indices(rows)
            model = [[dict(head) for head in model[r]] for r in rows.tolist()]
        elif kind == "crop" and window is None and seen > 2:
            count = 1 + seed % 2
            layer.crop(-count)
            seen -= count
            model = [[{p: k for p, k in head.items() if p < seen} for head in row] for row in model]
        forgot = max(forgot, seen - window + 1) if window is not None else 0
    pos = layer.positions()
    pos = (pos[:, None] if pos.ndim == 2 else pos).expand(-1, heads, -1)
    assert layer.get_seq_length() == seen
    for row in range(len(model)):
        for head in range(heads):
            places = pos[row, head].tolist()
            held = {p: layer.keys[row, head, i] for i, p in enumerate(places) if p >= 0}
            assert len(held) == sum(p >= 0 for p in places)  # none twice
            needed = {p: k for p, k in model[row][head].items() if p >= forgot}
            assert needed.keys() <= held.keys() <= model[row][head].keys()
            assert all(torch.equal(held[p], model[row][head][p]) for p in held)
            assert all(
                torch.equal(layer.values[row, head, i], layer.keys[row, head, i] + 1)
                for i, p in enumerate(places)
                if p >= 0
            )


@settings(max_examples=60, **QUIET)
@given(st.none() | st.integers(2, 9), happenings())
def test_any_history_of_a_layer(window: int | None, events: list[tuple[str, Any]]) -> None:
    a_layer_holds_what_a_dictionary_holds(window, events)


@pytest.mark.slow
@settings(max_examples=1000, **QUIET)
@given(st.none() | st.integers(2, 9), happenings())
def test_a_thousand_histories_of_a_layer(window: int | None, events: list[tuple[str, Any]]) -> None:
    a_layer_holds_what_a_dictionary_holds(window, events)


@settings(max_examples=60, **QUIET)
@given(st.integers(1, 4), st.integers(1, 12), SEEDS)
def test_scattered_states_are_those_that_stay_each_as_far_as_the_next(
    batch: int, tokens: int, seed: int
) -> None:
    noise = torch.Generator().manual_seed(seed)
    keep = torch.rand(batch, tokens, generator=noise) < 0.5
    keep[:, seed % tokens] = True
    index = Tokens(keep).index(batch, tokens)
    h = torch.randn(batch, index.shape[1], 2, generator=noise)
    whole = Removal(index, tokens).scatter(h)
    for row in range(batch):
        own = h[row][index[row] >= 0]
        last = 0
        for t in range(tokens):
            last = max(0, int(keep[row, : t + 1].sum()) - 1)
            assert torch.equal(whole[row, t], own[last])


@settings(max_examples=60, **QUIET)
@given(st.integers(1, 3), st.integers(1, 10), st.integers(1, 3), SEEDS)
def test_closed_positions_keep_their_order_and_have_no_gaps(
    batch: int, tokens: int, sections: int, seed: int
) -> None:
    noise = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 15, (sections, batch, tokens), generator=noise)
    real = torch.rand(batch, tokens, generator=noise) < 0.7
    real[:, 0] = True
    new, gap = dense_rank(ids, real)
    for row in range(batch):
        a, b = ids[:, row][:, real[row]].flatten(), new[:, row][:, real[row]].flatten()
        assert torch.equal(a[:, None] < a, b[:, None] < b)
        assert set(b.tolist()) == set(range(int(b.min()), int(b.max()) + 1))
        assert int(b.min()) == int(a.min()) and int(a.max() - b.max()) == int(gap[row])
