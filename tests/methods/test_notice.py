"""NOTICE against models that are patched by hand, one forward for every patch, and on one with a planted head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import shared
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import run

import saccade as sc
from saccade.core.errors import InputError
from saccade.core.session import Session
from saccade.core.site import match
from saccade.probes._parts.asked import placed, read
from saccade.probes._parts.tracing import Patch, trace
from saccade.probes.notice import Notice, Noticed, universal

from .planted import LAST, OUT, QUESTION, SIGNAL, WORD, Route, planted, question

EXAMPLE: dict[str, Any] = {
    "correct": " red", "incorrect": " blue", "word": "red", "instead": "blue", "parts": ("layer",), "rows": 64,
}  # fmt: skip
DOUBLE = torch.float64
NAMES = pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])


def noticed(model: Any, asked: sc.Question, **options: Any) -> Noticed:
    with sc.attach(model) as session:
        return session.run(Notice(**{**EXAMPLE, "parts": ("layer", "self", "mlp"), **options}), asked).found[
            "notice"
        ]


def pair(model: Any, asked: sc.Question) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return asked.inputs(model), replace(asked, text=QUESTION.replace("red", "blue")).inputs(model)


@contextmanager
def watched(module: nn.Module, inside: bool, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What goes into a module, or comes out of it, changed."""

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (change(args[0]), *args[1:])

    def after(_: nn.Module, __: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    hook = module.register_forward_pre_hook(before) if inside else module.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


def by_hand(
    model: Any, clean: Any, corrupted: Any, part: str, layer: int, place: int, columns: slice
) -> Tensor:
    """Next logits of the corrupted prompt with one state of the clean one."""
    block = model.model.language_model.layers[layer]
    module = {"layer": block, "mlp": block.mlp, "self": block.self_attn.o_proj}[part]
    kept: list[Tensor] = []

    def keep(h: Tensor) -> Tensor:
        kept.append(h)
        return h

    def put_back(h: Tensor) -> Tensor:
        h = h.clone()
        h[:, place, columns] = kept[0][:, place, columns]
        return h

    with watched(module, part == "self", keep):
        run(model, clean)
    with watched(module, part == "self", put_back):
        return run(model, corrupted)[0, -1]


def difference(logits: Tensor, asked: sc.Question) -> Tensor:
    tokenizer = getattr(asked.processor, "tokenizer", asked.processor)
    red, blue = (tokenizer.encode(word)[-1] for word in (" red", " blue"))
    return logits[..., red] - logits[..., blue]


@pytest.mark.slow
def test_the_trained_model_notices_another_picture() -> None:
    """Cars of two colours: what differs enters by the picture and ends at the last token."""
    model, processor = sc.world.load("vlm")
    pictures: dict[str, Any] = {}
    for scene in sc.world.scenes(40, "test"):
        for thing in scene.unique():
            if thing.kind == "car":
                pictures.setdefault(thing.colour, scene.picture())
    (red, one), (blue, other) = list(pictures.items())[:2]
    asked = sc.Question(processor, [one], "what colour is the car ?", {"max_new_tokens": 2})
    found = noticed(
        model,
        asked,
        correct=red,
        incorrect=blue,
        word="",
        instead="",
        picture=other,
        parts=("layer",),
        at="last",
    )
    assert found.clean > 0 > found.corrupted
    last = found.states.axes["token"][-1]
    effects = found.states.at(measure="effect", part="layer", token=last).values
    assert float(effects[-1]) == pytest.approx(1, abs=1e-3)
    assert abs(float(effects[0])) < 0.5
    assert "effects" in repr(found)


# ---- the effect --------------------------------------------------------------------------------------------


@NAMES
def test_effects_are_those_of_patches_by_hand(name: str) -> None:
    model, asked = shared(name, DOUBLE), question(name)
    clean, corrupted = pair(model, asked)
    found = noticed(model, asked, at="cup", rows=50)
    before, after = (difference(run(model, inputs)[0, -1], asked) for inputs in (clean, corrupted))
    assert (found.clean, found.corrupted) == (pytest.approx(float(before)), pytest.approx(float(after)))
    red = asked.processor.tokenizer.encode(" red")[-1]
    ids = clean["input_ids"][0].tolist()
    names = {int(told.split()[0]): told for told in found.states.axes["token"]}
    assert set(names) == {
        i for i, token in enumerate(ids) if token > 10 and token != model.config.image_token_id
    }
    for part, layer, place in [
        ("layer", 1, -1),
        ("self", 2, -3),
        ("mlp", 0, ids.index(red)),
        ("layer", 2, 45),
    ]:
        place %= len(ids)
        logits = by_hand(model, clean, corrupted, part, layer, place, slice(None))
        change = difference(logits, asked) - after
        p, q = (x.softmax(-1)[red] for x in (logits, run(model, corrupted)[0, -1]))
        at = found.states.at(part=part, layer=layer, token=names[place]).values.double()
        assert_close(at, torch.stack([change / (before - after), change, p - q]), atol=1e-5, rtol=1e-3)
    cup = next(place for place, told in names.items() if told.endswith("cup"))
    for layer, head in ((0, 0), (1, 3), (2, 2)):
        logits = by_hand(model, clean, corrupted, "self", layer, cup, slice(16 * head, 16 * head + 16))
        effect = (difference(logits, asked) - after) / (before - after)
        got = found.heads.at(measure="effect", layer=layer, head=head).values.double()
        assert_close(got, effect, atol=1e-5, rtol=1e-3)


def traced(session: Session, asked: sc.Question, patches: list[Patch]) -> Tensor:
    clean, corrupted = pair(session.model, asked)
    return trace(session, clean, corrupted, patches, lambda logits: difference(logits, asked), 8).recovery


@NAMES
def test_nothing_restores_nothing_and_the_last_layer_restores_all(name: str) -> None:
    model, asked = shared(name, DOUBLE), question(name)
    length = asked.inputs(model)["input_ids"].shape[1]
    everywhere, nowhere = torch.ones(length, dtype=torch.bool), torch.zeros(length, dtype=torch.bool)
    last = torch.arange(length) == length - 1
    with sc.attach(model) as session:
        (top,), (low,) = (match(f"text.{i}.layer", session.sites) for i in (3, 0))
        found = traced(
            session,
            asked,
            [Patch(low, nowhere), *(Patch(s, everywhere) for s in (low, top)), Patch(top, last)],
        )
    assert_close(found, torch.tensor([0.0, 1, 1, 1], dtype=DOUBLE), atol=1e-5, rtol=0)


@NAMES
def test_all_heads_together_are_the_whole_context(name: str) -> None:
    model, asked = shared(name, DOUBLE), question(name)
    length = asked.inputs(model)["input_ids"].shape[1]
    place = torch.arange(length) == length - 3
    with sc.attach(model) as session:
        sites = match("text.:.self", session.sites)
        whole, heads = (
            traced(session, asked, [Patch(site, place, chosen) for site in sites])
            for chosen in (None, (0, 1, 2, 3))
        )
    assert_close(whole, heads, atol=1e-9, rtol=0)
    assert whole.abs().max() > 1e-3


def test_a_planted_head_ranks_first() -> None:
    """The last token fetches in layer 2, by head 3, what tells red from blue."""
    model, asked = planted(Route(2, 3, LAST, WORD, SIGNAL, OUT)), question()
    red, blue = (asked.processor.tokenizer.encode(word)[-1] for word in (" red", " blue"))
    with torch.no_grad():
        for token, sign in ((red, 1.0), (blue, -1.0)):
            model.model.language_model.embed_tokens.weight[token, [WORD, SIGNAL]] = torch.tensor([1.0, sign])
            model.lm_head.weight[token, OUT] = sign
    found = noticed(model, asked, at="last")
    effect = found.heads.at(measure="effect").values
    assert found.scores.top(1) == {"text.2.self": (3,)}
    assert float(effect[2, 3]) == pytest.approx(1, abs=1e-3)
    assert effect.abs().sum() - effect[2, 3] < 1e-2


# ---- what is compared ----------------------------------------------------------------------------------------


def test_a_replaced_word_is_the_only_difference() -> None:
    model, asked = shared("llava"), question()
    clean, corrupted = (q.inputs(model)["input_ids"][0] for q in (asked, Notice(**EXAMPLE).corrupted(asked)))
    red, blue = (asked.processor.tokenizer.encode(word)[-1] for word in (" red", " blue"))
    assert len(clean) == len(corrupted)
    assert (clean[clean != corrupted].tolist(), corrupted[clean != corrupted].tolist()) == ([red], [blue])


def test_heads_are_patched_at_the_last_token_of_what_is_named() -> None:
    model, asked = shared("llava"), question()
    inputs = asked.inputs(model)
    cup = inputs["input_ids"][0] == asked.processor.tokenizer.encode(" cup")[-1]
    with sc.attach(model) as session:
        layout, counts = read(session, asked, inputs)
    assert counts == {f"text.{layer}.self": 4 for layer in range(4)}
    assert torch.equal(placed(asked, "red cup", inputs, layout), cup)
    assert placed(asked, "last", inputs, layout).nonzero().tolist() == [[len(cup) - 1]]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"instead": "red"}, "nothing to recover"),
        ({"instead": "red and blue"}, "tokens"),
        ({"word": "dog"}, "'dog'"),
        ({"word": "", "instead": ""}, "neither"),
        ({"picture": question().images[0]}, "both"),
        ({"correct": "an elephant", "at": "last"}, "not one token"),
        ({"at": "dog"}, "'dog' is not said"),
    ],
)
def test_what_cannot_be_compared_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        noticed(shared("llava"), question(), **options)


def test_a_sweep_takes_a_forward_for_many_patches() -> None:
    """And the size of its batches changes nothing."""
    model, asked = shared("llava", DOUBLE), question()
    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        count += 1

    hook = model.get_input_embeddings().register_forward_hook(note)
    try:
        found = noticed(model, asked, parts=("layer",))
    finally:
        hook.remove()
    patches = found.states.values[0].numel() + found.heads.values[0].numel()
    assert patches > 64
    assert count == 1 + 2 + -(-patches // 64) + 2  # the layout, two runs, the patches, the answer
    other = noticed(model, asked, parts=("layer",), rows=30)
    assert_close(other.states.values, found.states.values, atol=1e-5, rtol=1e-4)


def test_universal_heads_are_strong_in_each() -> None:
    model = shared("llava")
    found = noticed(model, question(), at="last")
    flipped = replace(found, heads=replace(found.heads, values=-found.heads.values))
    assert universal([found, found], 3) == found.scores.top(3)
    assert universal([found, flipped], 3) == {}
