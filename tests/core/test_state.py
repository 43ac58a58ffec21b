"""What methods remember: for a generation in `run.state`, for a conversation in `call.state`."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import Look, greedy, method, shared, unchanged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessor
from zoo import FAMILIES
from zoo.base import words

import saccade as sc
from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.core.layout import KINDS
from saccade.core.method import Method
from saccade.core.state import Sequence, Vocabulary

LLAMA = FAMILIES["llama"].inputs()


@dataclass(eq=False)
class History(Method):
    """Remembers the ids of every row, as plain tensors and inside of containers."""

    sites: Any = "text.1.self"

    def observe(self, call: AttentionCall) -> None:
        ids = call.pass_.inputs["input_ids"]
        state = call.state
        state["ids"] = torch.cat([state["ids"], ids], 1) if "ids" in state else ids
        state.setdefault("list", []).append(ids)
        state.setdefault("deep", {"one": ()})["one"] += (ids.clone(),)
        state["count"] = state.get("count", 0) + 1


class Seen(LogitsProcessor):
    """The history that generation itself keeps, in the order of the pass that has just run."""

    def __init__(self, method: History, runtime: Any) -> None:
        self.method, self.runtime, self.steps = method, runtime, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sequence = self.runtime._local.run.sequence
        state = sequence.state_of(self.method)
        assert torch.equal(state["ids"], input_ids)
        assert torch.equal(torch.cat(state["list"], 1), input_ids)
        assert torch.equal(torch.cat(state["deep"]["one"], 1), input_ids)
        assert torch.equal(sequence.ids_from(0), input_ids)
        self.steps += 1
        assert state["count"] == self.steps
        return scores


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4},
        {"num_beams": 4, "do_sample": True},
        {"num_return_sequences": 3, "do_sample": True},
        {"num_beams": 3, "early_stopping": True},
    ],
)
@pytest.mark.parametrize("name", ["llama", "mistral", "llava", "qwen2_5_vl"])
def test_states_follow_the_rows_of_the_cache(name: str, options: dict[str, Any]) -> None:
    model, inputs, method = shared(name), FAMILIES[name].inputs(), History()
    torch.manual_seed(1)
    with sc.attach(model, method) as session:
        seen = Seen(method, session._runtime)
        model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, logits_processor=[seen], **options)
    assert seen.steps == 6


def test_beams_really_change_places_in_that_test() -> None:
    """Else the test above could not fail."""
    look = Look(lambda call: call.pass_.sequence._ids[0].clone(), sites="text.1.self")
    with sc.attach(shared("llama"), look):
        shared("llama").generate(**LLAMA, max_new_tokens=6, min_new_tokens=6, num_beams=4)
    rows = [told for _, _, told in look.seen]
    assert any(not torch.equal(a, b[:, : a.shape[1]]) for a, b in pairwise(rows))


def test_run_state_is_new_for_every_generation_and_call_state_goes_on() -> None:
    model = shared("llama")

    @dataclass(eq=False)
    class Both(Method):
        sites: Any = "text.0.self"

        def observe(self, call: AttentionCall) -> None:
            for state in (call.state, call.run.state):
                state["n"] = state.get("n", 0) + 1
            told.append((call.run.state["n"], call.state["n"]))

    told: list[tuple[int, int]] = []
    with sc.attach(model, Both()):
        out = model.generate(**LLAMA, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, words(2, 4)], 1)
        model.generate(ids, past_key_values=out.past_key_values, max_new_tokens=2, min_new_tokens=2)
        greedy(model, LLAMA, 1)
    assert told == [(1, 1), (2, 2), (1, 3), (2, 4), (1, 1)]


def test_two_methods_do_not_share_a_state() -> None:
    def remember(name: str) -> Look:
        return Look(lambda call: call.state.setdefault("mine", name) == name, sites="text.*.self")

    one, two = remember("one"), remember("two")
    with sc.attach(shared("llama"), one, two):
        greedy(shared("llama"), LLAMA, 2)
    assert all(told for _, _, told in one.seen + two.seen)


class Thing:
    pass


@pytest.mark.parametrize("grad", [False, True])
def test_a_state_dies_with_its_cache_while_the_session_lives(grad: bool) -> None:
    model = shared("llama")
    things: list[weakref.ref[Thing]] = []

    def remember(call: AttentionCall) -> None:
        if "thing" not in call.state:
            call.state["thing"] = Thing()
            things.append(weakref.ref(call.state["thing"]))

    with sc.attach(model, Look(remember, sites="text.0.self")):
        with torch.set_grad_enabled(grad):
            cache = model(**LLAMA, use_cache=True).past_key_values
        caches = weakref.ref(cache)
        gc.collect()
        assert things[0]() is not None
        del cache
        gc.collect()
        assert caches() is None
        if not grad:
            assert things[0]() is None
        greedy(model, LLAMA, 2)
        gc.collect()
        assert [thing() for thing in things[-1:]] == [None]


def test_a_cropped_or_reset_cache_takes_its_sequence_along() -> None:
    model = shared("llama")
    look = Look(
        lambda call: (call.klayout.shape[1], call.klayout.where("text").sum(1).tolist()), sites="text.0.self"
    )
    ids = words(2, 10)
    with sc.attach(model, look), torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        cache.crop(-4)
        length = cache.get_seq_length()
        model(input_ids=ids[:, :3], past_key_values=cache)
        assert look.seen[-1][2] == (length + 3, [length + 3] * 2)
        cache.reset()
        model(input_ids=ids[:, :5], past_key_values=cache)
        assert look.seen[-1][2] == (5, [5, 5])


def test_a_pass_that_fails_is_forgotten() -> None:
    model = shared("llama")

    def tell(call: AttentionCall) -> Any:  # at the last layer, when all have updated the cache
        if call.pass_.inputs["input_ids"].shape[1] == 3:
            raise ZeroDivisionError
        return call.pass_.sequence.length, call.pass_.sequence.ids_from(0)

    look = Look(tell, sites="text.-1.self")
    ids = words(2, 10)
    with sc.attach(model, look), torch.no_grad():
        cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids[:, 6:9], past_key_values=cache)
        cache.crop(-3)
        model(input_ids=ids[:, 6:], past_key_values=cache)
    length, seen = look.seen[-1][2]
    assert length == 10
    assert torch.equal(seen, ids)


def test_tokens_from_before_the_session_are_known_where_the_conversation_is_given() -> None:
    model = shared("llava")
    inputs = FAMILIES["llava"].inputs()
    out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    ids = torch.cat([out.sequences, words(2, 4)], 1)
    look = Look(lambda call: call.columns("image")[:, 0, 0], sites="text.0.self")
    with sc.attach(model, look):
        model.generate(ids, past_key_values=out.past_key_values, max_new_tokens=2, min_new_tokens=2)
    for _, phase, image in look.seen:
        assert torch.equal(
            image, (ids == 3) if phase == "extend" else torch.nn.functional.pad(ids == 3, (0, 1))
        )


# ---- the sequence by itself --------------------------------------------------------------------------------


VOCABULARY = Vocabulary({"image": 3}, frozenset({1, 2}))


@settings(max_examples=60)
@given(data=st.data())
def test_a_sequence_is_what_its_rows_are(data: st.DataObject) -> None:
    """Random growth, beams, and cropping, against lists."""
    rows = data.draw(st.integers(1, 3))
    sequence = Sequence(VOCABULARY)
    sample = list(range(rows))
    kept: list[list[tuple[int, bool]]] = [[] for _ in range(rows)]
    owner: Any = object()
    for _ in range(data.draw(st.integers(1, 6))):
        what = data.draw(st.sampled_from(["grow", "grow", "decode", "reorder", "crop", "look"]))
        if what in ("grow", "decode") or not sequence.length:
            tokens = 1 if what == "decode" else data.draw(st.integers(1, 4))
            row_of_ids = st.lists(st.sampled_from([1, 3, 7]), min_size=tokens, max_size=tokens)
            ids = torch.tensor(data.draw(st.lists(row_of_ids, min_size=rows, max_size=rows)))
            sequence.extend(ids, (rows, tokens), ids.device, generated=what == "decode", samples=rows)
            for row, new in zip(kept, ids.tolist()):
                row += [(i, what == "decode") for i in new]
            sequence.state_of(owner)["rows"] = torch.tensor([[len(r), r[-1][0]] for r in kept])
        elif what == "reorder":
            index = data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
            before = sequence.state_of(owner)["rows"]
            sequence.reorder(torch.tensor(index))
            kept, sample = [list(kept[i]) for i in index], [sample[i] for i in index]
            assert torch.equal(sequence.state_of(owner)["rows"], before[index])
        elif what == "crop":
            length = data.draw(st.integers(1, sequence.length))
            sequence.crop(length)
            kept = [row[:length] for row in kept]
        layout = sequence.layout() if what == "look" or data.draw(st.booleans()) else None
        if layout is not None:
            names = {1: "special", 3: "image", 7: "text"}
            expected = [[KINDS.index("generated" if g else names[i]) for i, g in row] for row in kept]
            assert layout.kind.tolist() == expected
    assert sequence.length == len(kept[0])
    assert sequence.layout().sample.tolist() == sample
    ids = sequence.ids_from(0)
    assert ids is not None
    assert ids.tolist() == [[i for i, _ in row] for row in kept]


def test_generated_tokens_that_are_cropped_are_forgotten() -> None:
    sequence = Sequence(VOCABULARY)
    grown = [([7, 7], False), ([7], True), ([7], True)]
    for ids, generated in grown:
        sequence.extend(
            torch.tensor([ids]), (1, len(ids)), torch.device("cpu"), generated=generated, samples=1
        )
    sequence.crop(3)
    sequence.extend(torch.tensor([[3, 7]]), (1, 2), torch.device("cpu"), generated=False, samples=1)
    layout = sequence.layout()
    assert layout.kind[0].tolist() == [KINDS.index(k) for k in ("text", "text", "generated", "image", "text")]
    assert layout.turn[0].tolist() == [0, 0, 0, 1, 1]
    sequence.crop(2)
    sequence.extend(torch.tensor([[7]]), (1, 1), torch.device("cpu"), generated=False, samples=1)
    assert sequence.layout().kind[0].tolist() == [0, 0, 0]
    assert sequence.layout().turn[0].tolist() == [0, 0, 0]


def test_a_state_without_a_row_for_each_row_is_an_error_and_not_a_guess() -> None:
    sequence = Sequence(VOCABULARY)
    sequence.extend(torch.tensor([[7], [7]]), (2, 1), torch.device("cpu"), generated=False, samples=2)
    owner: Any = object()
    sequence.state_of(owner)["heads"] = torch.arange(8)
    with pytest.raises(InputError, match=r"call.state\['heads'\] holds a tensor of shape \(8,\)"):
        sequence.reorder(torch.tensor([1, 0]))


@pytest.mark.parametrize("option", ["prompt_lookup_num_tokens", "assistant_early_exit", "assistant_model"])
def test_what_is_remembered_cannot_be_of_tokens_that_may_be_taken_back(option: str) -> None:
    model, ids = shared("llama"), {"input_ids": words(1, 4).repeat(1, 6)}
    asked = {option: FAMILIES["llama"].build().eval() if option == "assistant_model" else 3}
    keeps = method(weights=lambda call, w: w * call.state.setdefault("gain", 1.0))
    marks = method(hidden=lambda call, h: h * call.state.setdefault("gain", 1.0))
    for one, sites in ((keeps, "text.1.self"), (marks, "text.1.layer")):
        with unchanged(model), sc.attach(model, one(sites=sites)):
            with pytest.raises(InputError, match=rf"Edit remembers .*{option}=.* taken back"):
                greedy(model, ids, 6, **asked)
            greedy(model, ids, 2)
    with sc.attach(model, method(weights=lambda call, w: w * 1.5)(sites="text.*.self")):
        assert torch.equal(greedy(model, ids, 6, **asked), greedy(model, ids, 6))
