"""The deep dive against models whose masks are changed by hand, and on one that is wired by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import shared
from torch import Tensor
from torch.testing import assert_close
from zoo import run

import saccade as sc
from saccade.core.errors import OptionError
from saccade.probes.attention_knockout import AttentionKnockout
from saccade.probes.vlm_deep_dive import VLMDeepDive, f1, named, pointing

from .planted import CONSTANT, IMAGE, OUT, SIGNAL, Route, planted, question
from .shared import generated

EXAMPLE: dict[str, Any] = {"cuts": (("image->question|generated", ":"),)}


def dive(model: Any, asked: sc.Question, **options: Any) -> Any:
    with sc.attach(model) as session:
        return session.run(VLMDeepDive(**options), asked).found["deep_dive"]


# ---- knockouts while it writes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_when_nobody_sees_the_picture_the_answer_does_not_depend_on_it(name: str) -> None:
    model, inputs = shared(name), question(name).inputs(shared(name))
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1) * -0.5}
    blind = [
        AttentionKnockout(source="image", target=target)
        for target in ("generated", "question", "text|special")
    ]

    def logits(given: dict[str, Tensor], *methods: AttentionKnockout) -> Tensor:
        with sc.attach(model, *methods):
            return torch.stack(generated(model, given, 3).logits, 1)

    assert_close(logits(dict(inputs), *blind), logits(other, *blind), atol=1e-5, rtol=0)
    assert (logits(dict(inputs)) - logits(other)).abs().max() > 0.1


def test_an_empty_set_is_the_model() -> None:
    model, asked = shared("llava"), question()
    with sc.attach(model) as session:
        said = str(asked.ask(session))
    found = dive(model, asked, cuts=(("video->generated", ":"), ("image->video", ":")))
    assert set(found.answers.values()) == {said}
    assert found.table.at(measure="f1").values.tolist() == [1, 1]
    assert dive(model, asked, cuts=()).answers == {}


def test_answers_are_those_of_a_model_that_is_cut() -> None:
    """Every step read anew, with masks made by hand."""
    model, asked = shared("llava"), question()
    inputs = asked.inputs(model)
    ids, start = inputs["input_ids"], inputs["input_ids"].shape[1]
    for _ in range(2):
        tokens = torch.arange(ids.shape[1])
        seen = tokens[:, None] >= tokens
        seen &= ~((tokens[:, None] >= start) & (ids[0] == model.config.image_token_id))
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]
        logits = run(
            model, {"input_ids": ids, "pixel_values": inputs["pixel_values"], "attention_mask": mask}
        )
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    made = asked.processor.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    assert dive(model, asked, cuts=(("image->generated", ":"),)).answers == {"image->generated in :": made}


# ---- what it says of them --------------------------------------------------------------------------------


def test_only_cuts_that_cover_the_wired_layer_lose_the_object() -> None:
    """Every token fetches from the picture in layer 2, and says cup where it has."""
    asked = question()
    tokenizer = asked.processor.tokenizer
    cup, box = (tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in ("cup", "box"))
    model = planted(Route(2, 1, CONSTANT, IMAGE, SIGNAL, OUT), answer=cup, otherwise=box)
    spans = (":", "2", "2:", ":2", "3", ":2|3:")
    found = dive(
        model,
        asked,
        cuts=tuple(("image->question|generated", span) for span in spans),
        objects=("cup", "box"),
    )
    scores = found.table.at(measure="f1").values.tolist()
    assert [score == 0 for score in scores] == [span in (":", "2", "2:") for span in spans]
    assert [score == 1 for score in scores] == [span in (":2", "3", ":2|3:") for span in spans]
    assert set(found.maps) == {"cup"}
    assert found.maps["cup"].shape == (6, 6)


def test_the_map_of_a_lost_word_is_the_models_own() -> None:
    """Mean over heads and layers of the row that said it first, over the picture."""
    eager, asked = shared("llava", torch.float32, "eager"), question()
    tokenizer = asked.processor.tokenizer
    spoken = {
        tokenizer.encode(f" {word}")[-1]: word for word in ("red", "cup", "table", "green", "cat", "door")
    }
    options = {"max_new_tokens": 6, "suppress_tokens": [i for i in range(512) if i not in spoken]}
    asked = sc.Question(asked.processor, asked.images, asked.text, options)
    inputs = asked.inputs(eager)
    answer = generated(eager, inputs, 6, output_attentions=True, suppress_tokens=options["suppress_tokens"])
    image = inputs["input_ids"][0] == eager.config.image_token_id
    said = [spoken[i] for i in answer.sequences[0, len(image) :].tolist()]
    found = dive(shared("llava"), asked, cuts=(("image->question|generated", ":"),), looked="1:3")
    assert found.maps
    for word, heat in found.maps.items():
        weights = answer.attentions[said.index(word)][1:3]
        made = torch.stack([w[0, :, -1, : len(image)][:, image].mean(0) for w in weights]).mean(0)
        assert_close(heat.float(), made.view(6, 6), atol=2e-4, rtol=0.02)


def test_f1_is_of_the_objects_that_are_named() -> None:
    assert named("A red cup, and a dog.", ("cup", "dog", "cat")) == {"cup", "dog"}
    assert named("A red cup.", ()) == {"a", "red", "cup"}
    assert f1({"a", "b", "c"}, {"b", "c", "d", "e"}) == pytest.approx(2 * 2 / 7)
    assert (f1(set(), set()), f1({"a"}, set())) == (1, 0)


def test_pointing_takes_the_middle_of_the_highest_cell() -> None:
    heat = torch.zeros(2, 4)
    heat[1, 2] = 1
    mask = torch.zeros(20, 40, dtype=torch.bool)
    mask[15, 25] = True
    assert pointing(heat, mask)
    assert not pointing(heat.flip(0), mask)


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(OptionError, match="'image'"):
        VLMDeepDive(cuts=(("image", ":"),))


def test_the_trained_model_describes_a_scene() -> None:
    """Where no word sees the picture, hardly any of what is there is named."""
    model, processor = sc.world.load("vlm")
    scene = sc.world.scene(9, "test")
    options = {"max_new_tokens": 24}
    asked = sc.Question(processor, [scene.picture()], "describe the image .", options)
    found = dive(
        model,
        asked,
        cuts=(("image->question|generated", ":"), ("video->generated", ":")),
        objects=tuple(sorted({thing.kind for thing in scene.things})),
    )
    blind, whole = found.table.at(measure="f1").values.tolist()
    assert blind < 0.7 and whole == 1
    assert found.maps
