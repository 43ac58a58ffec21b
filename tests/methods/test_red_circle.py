"""Red circles against their geometry, a stub that reads the colour within one, and a CLIP's own logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shared
from PIL import Image, ImageDraw
from torch import Tensor
from torch.testing import assert_close
from zoo import family

import saccade as sc
from saccade.core.errors import InputError, OptionError
from saccade.steering._parts.detecting import Region, looked_at
from saccade.steering._parts.marks import ellipse
from saccade.steering.red_circle import RedCircle, keypoints, sinkhorn

from .clips import cosines, numbers_of, saved, tiny
from .lockstep import model_of, question

BOXES = ((10.0, 8.0, 50.0, 40.0), (60.0, 30.0, 120.0, 80.0), (5.0, 50.0, 40.0, 85.0))
EXAMPLE: dict[str, Any] = {"boxes": BOXES, "clip": (saved("clip"),), "thickness": 0.1}
MODELS = ("llava", "qwen2_5_vl")
ASKED = "is the cup red ?"
COLOURS = {"red": (200, 30, 30), "green": (20, 160, 30), "blue": (30, 40, 210)}


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    return (np.asarray(before) != np.asarray(after)).any(-1)


# ---- the ring --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [(10, 8, 51, 40), (0, 0, 130, 90), (60, 30, 71, 45)])
@pytest.mark.parametrize("width", [1, 3])
def test_only_the_ring_differs_and_it_touches_the_boxs_sides(box: tuple[int, ...], width: int) -> None:
    picture = question("llava").images[0]
    ring = changed(picture, ellipse(picture, box, width))
    assert (np.asarray(ellipse(picture, box, width))[ring] == (255, 0, 0)).all()
    y, x = np.nonzero(ring)
    assert (x.min(), y.min(), x.max() + 1, y.max() + 1) == box
    a, b = (box[2] - box[0]) / 2, (box[3] - box[1]) / 2
    across, down = x + 0.5 - (box[0] + box[2]) / 2, y + 0.5 - (box[1] + box[3]) / 2
    assert ((across / (a + 0.5)) ** 2 + (down / (b + 0.5)) ** 2 <= 1).all()
    inner = a - width - 1, b - width - 1
    assert ((across / inner[0]) ** 2 + (down / inner[1]) ** 2 >= 1).all()


@pytest.mark.parametrize("options", [{"thickness": 0.0}, {"opacity": 0.0}])
def test_a_line_that_is_not_seen_changes_neither_picture_nor_scores(options: dict[str, Any]) -> None:
    asked = question("llava", ASKED)
    with sc.attach(shared("llava")) as session:
        answer = session.run(RedCircle(boxes=BOXES, clip=(tiny(),), **options), asked)
        assert answer == asked.ask(session)
    assert answer.pictures["marked"].tobytes() == asked.images[0].tobytes()
    bare = cosines("clip", asked.images, [ASKED])[0, 0]
    assert_close(answer.found["scores"], bare.expand(3), atol=1e-5, rtol=0)


def test_half_seen_is_half_way() -> None:
    picture = question("llava").images[0]
    whole, half = (
        np.asarray(RedCircle(opacity=o).marked(picture, Region(BOXES[0]))[0], float) for o in (1.0, 0.5)
    )
    assert np.abs(half - (whole + np.asarray(picture, float)) / 2).max() <= 1


def test_outside_of_the_ellipse_it_is_grey_or_blurred() -> None:
    picture = question("llava").images[0]
    grey, blur = RedCircle(marks=("grey", "blur")).marked(picture, Region(BOXES[1]))
    y, x = np.mgrid[:90, :130] + 0.5
    distance = ((x - 90) / 30) ** 2 + ((y - 55) / 25) ** 2
    for copy in (grey, blur):
        assert not changed(picture, copy)[distance < 0.9].any()
        assert changed(picture, copy)[distance > 1.1].mean() > 0.9
    luma = (np.asarray(picture, float) @ (0.299, 0.587, 0.114))[..., None]
    assert np.abs(np.asarray(grey, float) - luma)[distance > 1.1].max() <= 1
    assert np.asarray(blur, float)[distance > 1.1].std() < 0.2 * np.asarray(picture, float).std()


# ---- the choice ------------------------------------------------------------------------------------------


def read_in_ring(pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
    """How near the mean colour within the ring is to the one that the text names."""
    found = []
    for picture in pictures:
        pixels = np.asarray(picture, float)
        y, x = np.nonzero((pixels == (255, 0, 0)).all(-1))
        within = pixels[(y.min() + y.max()) // 2, (x.min() + x.max()) // 2]
        named = [next((rgb for word, rgb in COLOURS.items() if word in text), (0, 0, 0)) for text in texts]
        found.append([-float(np.abs(within - rgb).sum()) for rgb in named])
    return torch.tensor(found)


def shapes() -> Image.Image:
    image = Image.new("RGB", (130, 90), (240, 240, 240))
    for box, colour in zip(BOXES, COLOURS.values(), strict=True):
        ImageDraw.Draw(image).rectangle(box, fill=colour)
    return image


@pytest.mark.parametrize(("text", "best"), [("the red one", 0), ("the green one", 1), ("the blue one", 2)])
@pytest.mark.parametrize("name", ["llava", "clip"])
def test_the_region_is_the_one_that_fits_the_words(name: str, text: str, best: int) -> None:
    asked = dataclasses.replace(question("llava", text), images=[shapes()])
    driver = RedCircle(boxes=BOXES, clip=(read_in_ring,), bank=("a dog",))
    with sc.attach(shared(name)) as session:
        answer = session.run(driver, asked)
        assert answer.found["best"] == best
        if name == "llava":
            assert answer == asked.ask(session, [driver.marked(shapes(), Region(BOXES[best]))[0]])
        else:
            assert answer == str(best)
    assert changed(shapes(), answer.pictures["marked"]).any()


def test_a_constant_of_every_region_is_taken_off_with_the_bank() -> None:
    def shifted(pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        return numbers_of(pictures, texts) + torch.arange(len(pictures))[:, None] ** 2

    found = []
    for like in (numbers_of, shifted):
        with sc.attach(shared("llava")) as session:
            driver = RedCircle(boxes=BOXES, clip=(like,), bank=("a dog", "two boats"))
            found.append(session.run(driver, question("llava", ASKED)).found["scores"])
    assert_close(*found)
    copies = [RedCircle().marked(question("llava").images[0], Region(box))[0] for box in BOXES]
    alike = numbers_of(copies, [ASKED, "a dog", "two boats"])
    assert_close(found[0], alike[:, 0] - (alike[:, 1] + alike[:, 2]) / 2)


def test_ways_of_marking_and_clips_count_alike() -> None:
    marks, likes = ("circle", "blur", "grey"), (tiny(), numbers_of)
    asked = question("llava", ASKED)
    with sc.attach(shared("llava")) as session:
        found = session.run(RedCircle(boxes=BOXES, marks=marks, clip=likes), asked).found["scores"]
    for box, score in zip(BOXES, found.tolist(), strict=True):
        each = [
            float(like(RedCircle(marks=(mark,)).marked(asked.images[0], Region(box)), [ASKED]))
            for mark in marks
            for like in likes
        ]
        assert score == pytest.approx(sum(each) / 6, abs=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_clip_answers_with_the_number_of_the_region(name: str) -> None:
    processor = family(name).processor()  # type: ignore[misc]
    asked = sc.Question(processor, question("llava").images, ASKED)
    with sc.attach(shared(name)) as session:
        answer = session.run(RedCircle(boxes=BOXES, thickness=0.1), asked)
    copies = [RedCircle(thickness=0.1).marked(asked.images[0], Region(box))[0] for box in BOXES]
    expected = cosines(name, copies, [ASKED])[:, 0]
    assert_close(answer.found["scores"], expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-4 and answer == str(int(expected.argmax()))


# ---- regions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "world/vlm"])
def test_where_no_region_is_named_it_is_what_the_model_looks_at(name: str) -> None:
    asked = question(name, ASKED)
    with sc.attach(model_of(name)) as session:
        answer = session.run(RedCircle(), asked)
        region = looked_at(session, asked, asked.images[0])
        assert answer == asked.ask(session, RedCircle().marked(asked.images[0], region))
    assert region.mask is not None and 0 < region.mask.mean() <= 0.101
    assert answer.found["boxes"] == [region.box] and "scores" not in answer.found


def test_a_detector_is_given_the_picture_and_the_words() -> None:
    def detect(picture: Image.Image, text: str) -> list[Region]:
        assert picture.size == (130, 90) and text == ASKED
        return [Region(box) for box in BOXES[:2]]

    with sc.attach(shared("llava")) as session:
        answer = session.run(RedCircle(detector=detect, clip=(numbers_of,)), question("llava", ASKED))
    assert answer.found["boxes"] == list(BOXES[:2])


def test_what_cannot_be_done_is_told() -> None:
    asked = question("llava", ASKED)

    def refused(name: str, driver: RedCircle, asking: sc.Question = asked) -> str:
        with sc.attach(shared(name)) as session, pytest.raises(InputError) as refusal:
            session.run(driver, asking)
        return str(refusal.value)

    assert "found nothing" in refused("llava", RedCircle(detector=lambda picture, text: []))
    assert "nobody to choose" in refused("llava", RedCircle(boxes=BOXES))
    assert "looks for none" in refused("clip", RedCircle())
    assert "the question has 0" in refused("llava", RedCircle(), dataclasses.replace(asked, images=[]))
    assert "the question has 2" in refused(
        "llava", RedCircle(), dataclasses.replace(asked, images=asked.images * 2)
    )
    with pytest.raises(OptionError, match="does not mark by star"):
        RedCircle(marks=("star",))


# ---- keypoints -------------------------------------------------------------------------------------------


def test_sinkhorn_sums_are_those_that_are_asked_for() -> None:
    scores = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1
    rows = torch.tensor([1.0, 2.0, 0.5, 2.5], dtype=torch.float64)
    shares = sinkhorn(scores, rows, torch.ones(6, dtype=torch.float64))
    assert_close(shares.sum(1), rows)
    assert_close(shares.sum(0), torch.ones(6, dtype=torch.float64))
    assert shares.min() >= 0
    assert_close(
        sinkhorn(0 * scores, rows, torch.ones(6, dtype=torch.float64)), rows[:, None].expand(4, 6) / 6
    )


def test_keypoints_are_where_their_colours_are_and_distinct_where_asked() -> None:
    """Two parts of one colour want the same place of 2 x 3."""
    image = Image.new("RGB", (120, 80), (240, 240, 240))
    ImageDraw.Draw(image).rectangle((0, 40, 39, 79), fill=COLOURS["green"])
    ImageDraw.Draw(image).rectangle((80, 0, 119, 39), fill=(60, 150, 60))
    ImageDraw.Draw(image).rectangle((40, 0, 79, 39), fill=COLOURS["blue"])

    def like(pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        assert texts[0] == "an image of a green head"
        return read_in_ring(pictures, texts) / 1000 + torch.tensor([0.0, 0.001, 0.0])

    parts = ["green head", "green tail", "blue foot"]
    assert keypoints(like, image, parts, (2, 3)) == [(20, 60), (20, 60), (60, 20)]
    apart = keypoints(like, image, parts, (2, 3), distinct=True)
    assert set(apart[:2]) == {(20, 60), (100, 20)} and apart[2] == (60, 20)
    with pytest.raises(InputError, match="no place of their own"):
        keypoints(like, image, parts, (1, 2), distinct=True)
