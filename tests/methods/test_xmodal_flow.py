"""The flow against models whose masks are changed by hand, and on one that is wired by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import shared
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import InputError, OptionError
from saccade.probes._parts.knockout import Cut, Cuts
from saccade.probes.xmodal_flow import XmodalFlow, around, average

from .planted import IMAGE, LAST, MIDDLE, OUT, QUESTION, SIGNAL, WORD, Route, blinded, planted, question

EXAMPLE: dict[str, Any] = {"pairs": ("image->question", "image->last")}
PAIRS = ("image->question", "question->last", "image->last", "last->last")


def flow(model: Any, asked: sc.Question, **options: Any) -> Any:
    with sc.attach(model) as session:
        return session.run(XmodalFlow(**options), asked).found["flow"]


# ---- the flow --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_changes_are_those_of_a_model_whose_masks_are_changed_by_hand(name: str) -> None:
    model, asked = shared(name), question(name)
    inputs = asked.inputs(model)
    ids = inputs["input_ids"][0]
    tokenizer = asked.processor.tokenizer
    own = tokenizer.encode(QUESTION, add_special_tokens=False)
    start = next(i for i in range(len(ids)) if ids[i : i + len(own)].tolist() == own)
    places = torch.arange(len(ids))
    where = {
        "image": ids == model.config.image_token_id,
        "question": (places >= start) & (places < start + len(own)),
        "last": places == len(ids) - 1,
    }
    p = run(model, inputs)[0, -1].softmax(-1)
    token = int(p.argmax())
    found = flow(model, asked, window="2", rows=5)
    assert found.token == tokenizer.decode([token])
    assert found.p == pytest.approx(float(p[token]), rel=1e-4)
    assert found.change.axes == {"layer": ("0", "1", "2", "3"), "pair": PAIRS}
    for layer in range(4):
        for pair in PAIRS:
            source, target = pair.split("->")
            with blinded(model, range(max(0, layer - 1), layer + 1), where[target], where[source]):
                blocked = run(model, inputs)[0, -1].softmax(-1)[token]
            made = 100 * (float(blocked) / float(p[token]) - 1)
            assert float(found.change.at(layer=layer, pair=pair)) == pytest.approx(made, abs=0.02), (
                layer,
                pair,
            )


def test_without_the_question_in_view_of_the_last_the_answer_does_not_depend_on_it() -> None:
    model = shared("llava")
    inputs = {"pixel_values": family("llava").inputs(images=(1,))["pixel_values"]}
    logits = []
    for words in ([150, 151, 152], [250, 251, 252]):
        ids = torch.tensor([[1, *[3] * 36, *words, 120]])
        asked = torch.tensor([False] * 37 + [True] * 3 + [False])
        last = torch.tensor([False] * 40 + [True])
        with sc.attach(model, Cuts(sites="text.*.self", cuts=[Cut(asked, last, range(4))])):
            logits.append(run(model, {**inputs, "input_ids": ids})[0, -1])
    assert_close(*logits, atol=1e-6, rtol=0)


def test_nothing_changes_where_there_is_nothing_to_cut() -> None:
    found = flow(shared("llava"), question(), pairs=("video->last", "image->video"))
    assert found.change.values.abs().max() < 1e-3


def test_only_the_wired_route_matters() -> None:
    """Words fetch from the picture in layer 1, the last token from them in layer 3."""
    model = planted(Route(1, 0, WORD, IMAGE, SIGNAL, MIDDLE), Route(3, 2, LAST, WORD, MIDDLE, OUT))
    found = flow(model, question(), window="1")
    wired = {(1, "image->question"), (3, "question->last")}
    for layer in range(4):
        for pair in PAIRS:
            change = float(found.change.at(layer=layer, pair=pair))
            assert (change < -90) if (layer, pair) in wired else (abs(change) < 0.5), (layer, pair, change)


def test_objects_and_the_rest_share_the_picture() -> None:
    """A box over the left half of the picture: half of its tokens, cut together they are the picture's."""
    model, asked = shared("llava"), question()
    pairs = ("object->last", "rest->last", "image->last")
    half = flow(model, asked, boxes=((0, 0, 24, 48),), pairs=pairs, window="4")
    whole = flow(model, asked, boxes=((0, 0, 48, 48),), pairs=pairs, window="4")
    inputs = asked.inputs(model)
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].view(6, 6)
    left = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool)
    left[image[:, :3].flatten()] = True
    last = torch.arange(len(left)) == len(left) - 1
    p = run(model, inputs)[0, -1].softmax(-1)
    with blinded(model, range(4), last, left):
        blocked = run(model, inputs)[0, -1].softmax(-1)[p.argmax()]
    made = 100 * (float(blocked) / float(p.max()) - 1)
    assert float(half.change.at(layer=2, pair="object->last")) == pytest.approx(made, abs=0.02)
    for pair, other in (("object->last", "image->last"), ("rest->last", None)):
        expected = whole.change.at(layer=2, pair=other).values if other else torch.zeros(()).double()
        assert_close(whole.change.at(layer=2, pair=pair).values, expected, atol=1e-3, rtol=0)


def test_windows_are_those_of_the_paper() -> None:
    assert [*around(10, 9, 32)] == list(range(6, 15))
    assert [*around(1, 9, 32)] == list(range(6))
    assert [*around(30, 9, 32)] == list(range(26, 32))
    assert [*around(4, 2, 8)] == [3, 4]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_words_are_read_from_every_layer_and_only_the_last_is_normalised(name: str) -> None:
    model, asked = shared(name), question(name)
    with torch.no_grad():
        out = model(**asked.inputs(model), output_hidden_states=True)
    found = flow(model, asked, answer="cup").words
    for spelling in ("cup", "Cup"):
        token = asked.processor.tokenizer.encode(spelling, add_special_tokens=False)[0]
        made = [model.lm_head(h[0, -1]).softmax(-1)[token].item() for h in out.hidden_states[1:]]
        assert found.at(spelling=spelling).values.tolist() == pytest.approx(made, rel=1e-3)


def test_only_right_answers_are_averaged() -> None:
    model, asked = shared("llava"), question()
    with sc.attach(model) as session:
        said = str(asked.ask(session))
    right = flow(model, asked, answer=said.upper(), **EXAMPLE)
    wrong = flow(model, asked, answer="no such word", **EXAMPLE)
    assert (right.right, wrong.right) == (True, False)
    assert_close(average([right, wrong]).values, right.change.values)
    with pytest.raises(InputError, match="rightly"):
        average([wrong])


def test_what_is_no_pair_or_has_no_box_is_refused() -> None:
    with pytest.raises(OptionError, match="image-question"):
        XmodalFlow(pairs=("image-question",))
    with pytest.raises(InputError, match="boxes="):
        flow(shared("llava"), question(), pairs=("object->last",))


def test_the_trained_model_speaks_of_a_scene() -> None:
    """Its picture reaches the answer: in all layers together the question's tokens need it."""
    model, processor = sc.world.load("vlm")
    scene = sc.world.scene(9, "test")
    asked = sc.Question(processor, [scene.picture()], "what colour is the car ?", {"max_new_tokens": 3})
    found = flow(model, asked, answer="yellow", window="8", pairs=("image->question|last", "video->last"))
    assert found.right and found.token == "yellow"
    assert float(found.change.at(layer=4, pair="image->question|last")) < -50
    assert "image->question|last" in repr(found)
