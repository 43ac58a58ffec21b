"""Patch Matters with made-up captions and scores, boxes by hand, and the models' own probabilities."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from helpers import shared
from PIL import Image

import saccade as sc
from saccade.core.errors import InputError, OptionError
from saccade.core.question import Answer, Question
from saccade.steering._parts.detecting import Region
from saccade.steering._parts.editing import Groups, Plain, Written, statements
from saccade.steering._parts.masks import iou
from saccade.steering._parts.matching import blip_score
from saccade.steering.patch_matters import Part, PatchMatters, quadrants

from .lockstep import model_of, question
from .test_agla import EXAMPLE as AGLA_EXAMPLE
from .test_agla import tiny_blip

EXAMPLE: dict[str, Any] = {"tries": 1}
SIZE = (100, 80)
QUARTERS = [(0, 0, 50, 40), (50, 0, 100, 40), (0, 40, 50, 80), (50, 40, 100, 80)]


# ---- boxes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(100, 80), (7, 9)])
def test_without_detections_the_four_tile_the_picture(size: tuple[int, int]) -> None:
    count = {(x, y): 0 for x in range(size[0]) for y in range(size[1])}
    for x0, y0, x1, y1 in quadrants(size, [], 0.3):
        for at in itertools.product(range(int(x0), int(x1)), range(int(y0), int(y1))):
            count[at] += 1
    assert set(count.values()) == {1}


@pytest.mark.parametrize(
    ("left", "extended"),
    [
        (30, [(0, 0, 70, 40), (30, 0, 100, 40)]),
        (36, [(0, 0, 76, 40), (36, 0, 100, 40)]),
        (38, [QUARTERS[0], (38, 0, 100, 40)]),
    ],
)
def test_a_detection_extends_every_box_that_holds_more_than_a_share_of_it(
    left: int, extended: list[Any]
) -> None:
    """40 wide in the first row: of the second, 14 of 40 pixels are over 0.3, 12 of 40 are not."""
    found = quadrants(SIZE, [Region((left, 5, left + 40, 35))], 0.3)
    assert found == [*extended, *QUARTERS[2:]]
    at_the_threshold = quadrants(SIZE, [Region((38, 5, 78, 35))], 12 / 40)
    assert at_the_threshold[0] == QUARTERS[0]
    assert quadrants(SIZE, [Region((38, 5, 78, 35))], 0.29)[0] == (0, 0, 78, 40)


def test_the_main_box_is_around_what_the_short_caption_names() -> None:
    regions = [
        Region((5, 5, 20, 20), score=0.9, label="cup"),
        Region((60, 50, 90, 70), score=0.5, label="red car"),
        Region((0, 70, 5, 80), score=0.9, label="dog"),
        Region((95, 0, 100, 5), score=0.3, label="cup"),
    ]
    asked = MadeUp(None, [Image.new("RGB", SIZE)], "Describe.")
    driver = PatchMatters(detector=lambda picture, text: regions, short="short")
    with sc.attach(shared("llava")) as session:
        quarters, main = driver.divide(session, asked)
    assert main == (5, 5, 90, 70)
    assert quarters == [QUARTERS[0], QUARTERS[1], QUARTERS[2], QUARTERS[3]]


# ---- statements ------------------------------------------------------------------------------------------

SCORES = {"a red cup": 0.8, "a blue cup": 0.6, "a dog": 0.3, "a cat": 0.31, "a table": 0.0}
SCORES |= {"a green car": 0.2, "a white car": 0.1}


def score(picture: Image.Image, text: str) -> float:
    return SCORES[text]


def test_what_all_say_stays_and_the_rest_must_hold() -> None:
    captions = [
        "There is a red cup, a table, and a dog.",
        "A table, a blue cup, a green car.",
        "There is a table. There is a cat, and a white car.",
    ]
    assert Plain().group(captions) == Groups(
        ["a table"], [["a red cup", "a blue cup"], ["a green car", "a white car"]], ["a dog", "a cat"]
    )
    part = PatchMatters().part(Plain(), score, Image.new("RGB", SIZE), QUARTERS[0], captions)
    assert part.kept == ("a table", "a red cup", "a cat") and part.caption == "a table. a red cup. a cat."


def test_statements_end_at_stops_and_commas() -> None:
    text = "This is a kitchen . there is a red table with a blue cup , two dogs , and a ball ."
    assert statements(text) == ["this is a kitchen", "a red table with a blue cup", "two dogs", "a ball"]


def test_what_parts_say_corrects_the_whole() -> None:
    said = [("a red cup. a dog.", (0, 0, 1, 1)), ("a dog.", (0, 0, 1, 1))]
    assert Plain().fuse("a blue cup, a table.", said) == "a table. a red cup. a dog."


# ---- merging ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "merged"), [(40, 2), (41, 1)])
def test_boxes_are_merged_above_the_threshold(width: int, merged: int) -> None:
    """Of 100 pixels in both together, 40 are shared at the threshold."""
    a, b = (0, 0, 70 if width == 40 else 71, 10), (30, 0, 100, 10)
    assert iou(a, b) == pytest.approx(width / 100) and (iou(a, b) > 0.4) == (merged == 1)
    parts = [Part(a, "a red cup.", ("a red cup",)), Part(b, "a blue cup.", ("a blue cup",))]
    found = PatchMatters().merge(Plain(), score, Image.new("RGB", (100, 10)), parts)
    assert len(found) == merged
    if merged == 1:
        assert found == [Part((0, 0, 100, 10), "a red cup.", ("a red cup",))]


class MadeUp(Question):
    """A model that says the same of every crop of a size, but for the third time."""

    def ask(self, session: Any, images: Any = None, text: str | None = None) -> Answer:
        if text == "short":
            return Answer("A red car and a cup .")
        (picture,) = images or self.images
        said = {SIZE: "a blue cup, a table", (50, 40): "a dog, a table", (40, 80): "a cat, a red cup"}
        return Answer(said.get(picture.size, "a red cup"))


@pytest.mark.parametrize(("right", "enters"), [(40, False), (39, True)])
def test_the_main_box_enters_the_caption_below_the_threshold(right: int, enters: bool) -> None:
    """At 40 of 100 its IoU with the picture is 0.4."""
    regions = [Region((0, 0, right, 80), score=0.9, label="cup")]
    driver = PatchMatters(
        detector=lambda picture, text: regions, scorer=score, short="short", share=1.0, sure=0.5, overlap=0.4
    )
    with sc.attach(shared("llava")) as session:
        answer = session.run(driver, MadeUp(None, [Image.new("RGB", SIZE)], "Describe."))
    assert answer.found["main"].box == (0, 0, right, 80)
    assert ("a red cup" in answer) == enters and ("a blue cup" in answer) != enters
    assert {p.box for p in answer.found["parts"]} == set(QUARTERS)


def test_every_statement_that_is_kept_was_said_of_its_region() -> None:
    said: dict[Any, list[str]] = {}

    class Told(MadeUp):
        def ask(self, session: Any, images: Any = None, text: str | None = None) -> Answer:
            told = super().ask(session, images, text)
            said.setdefault((images or self.images)[0].tobytes(), []).append(str(told))
            return told

    asked = question("llava")
    picture = asked.images[0].resize(SIZE)
    with sc.attach(shared("llava")) as session:
        answer = session.run(PatchMatters(scorer=score), Told(asked.processor, [picture], "Describe."))
    for part in (*answer.found["parts"], answer.found["main"]):
        region = said[picture.crop([round(edge) for edge in part.box]).tobytes()]
        assert part.kept and all(any(one in caption for caption in region) for one in part.kept)
    assert len([*answer.pictures]) == 5


# ---- who helps -------------------------------------------------------------------------------------------


def test_a_language_models_lines_are_read() -> None:
    asked: list[str] = []

    def say(prompt: str) -> str:
        asked.append(prompt)
        return "Sure!\nSAME: a table\n- CONTRADICTORY: a red cup | a blue cup\nUNIQUE: a dog.\nOTHER: no"

    groups = Written(say).group(["one", "two"])
    assert groups == Groups(["a table"], [["a red cup", "a blue cup"]], ["a dog."])
    assert Written(say).rewrite(["one", "two"], ["a dog"]).startswith("Sure!")
    Written(say).fuse("whole", [("part", (0, 0.25, 0.5, 1))])
    assert (
        "- one\n- two" in asked[0] and "- a dog" in asked[1] and "(0.00, 0.25, 0.50, 1.00) part" in asked[2]
    )
    with pytest.raises(InputError, match="sorted no statements"):
        Written(lambda prompt: "I cannot.").group(["one", "two"])


@pytest.mark.parametrize("name", ["llava", "world/vlm"])
def test_the_asked_model_scores_by_its_yes_and_no(name: str) -> None:
    asked = question(name)
    driver = PatchMatters(verify="is there {statement} ?")
    model, tokenizer = model_of(name), asked.processor.tokenizer
    with sc.attach(model) as session:
        found = driver._score(session, asked)(asked.images[0], "a cup")
    with torch.no_grad():
        p = model(**asked.inputs(model, text="is there a cup ?")).logits[0, -1].softmax(-1)
    yes, no = (
        sum(p[i] for i in {tokenizer.encode(form, add_special_tokens=False)[0] for form in forms})
        for forms in (("yes", "Yes", " yes", " Yes"), ("no", "No", " no", " No"))
    )
    assert found == pytest.approx(float(yes / (yes + no)), rel=1e-4)


def test_blip_scores_by_both_its_heads() -> None:
    model, processor = tiny_blip()
    picture = question("llava").images[0]
    given = processor(images=picture, text="a cup", return_tensors="pt")
    with torch.no_grad():
        logits = model(**given).itm_score[0]
        image = model.vision_proj(model.vision_model(given["pixel_values"]).last_hidden_state[0, 0])
        words = model.text_proj(model.text_encoder(given["input_ids"]).last_hidden_state[0, 0])
    expected = (torch.sigmoid(logits[1] - logits[0]) + image @ words / image.norm() / words.norm()) / 2
    assert blip_score(AGLA_EXAMPLE["matcher"])(picture, "a cup") == pytest.approx(float(expected), abs=1e-5)


# ---- the answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "world/vlm"])
def test_captions_are_those_of_the_crops(name: str) -> None:
    asked = question(name, "describe the image .")
    driver = PatchMatters(tries=1, temperature=0.0, calm=0.0, scorer=lambda picture, text: 0.0)
    with sc.attach(model_of(name)) as session:
        assert session.run(PatchMatters(tries=0), asked) == asked.ask(session)
        answer = session.run(driver, asked)
        assert answer.found["whole"] == asked.ask(session)
        picture = asked.images[0]
        for part in answer.found["parts"]:
            assert part.kept == tuple(statements(asked.ask(session, [picture.crop(part.box)])))
    boxes = [part.box for part in answer.found["parts"]]
    assert boxes == quadrants(picture.size, [], 0.3)
    assert answer == Plain().fuse(
        Plain().fuse(answer.found["whole"], [(answer.found["main"].caption, (0, 0, 1, 1))]),
        [(part.caption, (0, 0, 1, 1)) for part in answer.found["parts"]],
    )


def test_what_cannot_be_done_is_told() -> None:
    asked = question("llava")
    with sc.attach(shared("llava")) as session, pytest.raises(InputError, match="the question has 2"):
        session.run(PatchMatters(), dataclasses.replace(asked, images=asked.images * 2))
    with pytest.raises(OptionError, match="No editor is called"):
        PatchMatters(editor="nobody")
