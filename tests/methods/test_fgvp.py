"""FGVP against pixels within and outside of masks, a blur by hand, and a CLIP's own logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from helpers import shared
from PIL import Image
from torch.testing import assert_close
from zoo import family

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering._parts.detecting import Region, looked_at
from saccade.steering._parts.marks import blur_outside, coloured, contour, grey_outside
from saccade.steering.fgvp import FGVP, resized

from .clips import cosines, numbers_of, saved
from .lockstep import model_of, question
from .test_red_circle import BOXES, changed

EXAMPLE: dict[str, Any] = {"boxes": BOXES, "clip": (saved("clip"),), "side": 96}
MODELS = ("llava", "qwen2_5_vl")
ASKED = "is the cup red ?"


def picture() -> Image.Image:
    return question("llava").images[0]


def blob(seed: int = 0) -> np.ndarray:
    """A mask that is no box: (90, 130)."""
    y, x = np.mgrid[:90, :130]
    return ((x - 50 - 10 * seed) ** 2 / 900 + (y - 40) ** 2 / 400 < 1) | ((x > 100) & (y > 70))


def marked(mask: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The marked picture, what it was made of, and the mask at its size."""
    driver = FGVP(**{"side": 65, **options})
    (copy,) = driver.marked(picture(), Region((10, 10, 90, 60), mask))
    small, within, _ = resized(picture(), mask, (10, 10, 90, 60), 65)
    assert copy.size == (65, 45)
    return np.asarray(copy), np.asarray(small), within


# ---- the mask --------------------------------------------------------------------------------------------


def test_a_mask_of_everything_returns_the_resized_picture() -> None:
    copy, small, _ = marked(np.ones((90, 130), bool))
    assert np.array_equal(copy, small)
    assert np.array_equal(small, np.asarray(picture().resize((65, 45), Image.Resampling.BICUBIC)))


def test_without_a_blur_every_mask_returns_it() -> None:
    copy, small, within = marked(blob(), sigma=0.0)
    assert np.array_equal(copy, small) and 0 < within.mean() < 1


def test_within_the_mask_it_is_the_picture_to_the_bit_and_outside_the_blur() -> None:
    copy, small, within = marked(blob(), sigma=3.0)
    everywhere = np.asarray(blur_outside(Image.fromarray(small), np.zeros_like(within), 3.0))
    assert np.array_equal(copy[within], small[within]) and np.array_equal(copy[~within], everywhere[~within])
    bell = np.array([math.exp(-x * x / 18) for x in range(-12, 13)])
    framed = np.pad(small.astype(float), ((12, 12), (12, 12), (0, 0)), mode="edge")
    rows = sum(b * framed[i : i + 45] for i, b in enumerate(bell / bell.sum()))
    expected = sum(b * rows[:, i : i + 65] for i, b in enumerate(bell / bell.sum()))
    assert np.abs(everywhere - expected).mean() < 1  # the library's is made of three means
    assert everywhere.std() < 0.3 * small.std()


def test_the_mask_is_resized_with_the_picture() -> None:
    mask = np.zeros((90, 130), bool)
    mask[20:60, 40:100] = True
    _, within, edges = resized(picture(), mask, (40, 20, 100, 60), 65)
    y, x = np.nonzero(within)
    assert (x.min(), y.min(), x.max() + 1, y.max() + 1) == tuple(edges) == (20, 10, 50, 30)
    assert within.sum() == 30 * 20


# ---- other marks -----------------------------------------------------------------------------------------


def test_a_contour_is_the_masks_border_of_two_pixels() -> None:
    mask = blob()
    ring = changed(picture(), contour(picture(), mask))
    framed = np.pad(mask, 2)
    inner = np.ones_like(mask)
    for dy in range(5):
        for dx in range(5):
            inner &= framed[dy : dy + 90, dx : dx + 130]
    assert np.array_equal(ring, mask & ~inner)
    assert (np.asarray(contour(picture(), mask))[ring] == (255, 0, 0)).all()


def test_colour_and_grey() -> None:
    mask, pixels = blob(), np.asarray(picture(), float)
    green = np.asarray(coloured(picture(), mask), float)
    assert np.abs(green - (pixels + (0, 255, 0)) / 2)[mask].max() <= 1
    assert np.array_equal(green[~mask], pixels[~mask])
    grey = np.asarray(grey_outside(picture(), mask), float)
    assert np.array_equal(grey[mask], pixels[mask])
    assert np.abs(grey - (pixels @ (0.299, 0.587, 0.114))[..., None])[~mask].max() <= 1


def test_marks_that_know_the_box_alone() -> None:
    region = Region((20, 20, 60, 60), blob())
    ways = ("box", "circle", "keypoint", "crop")
    square, circle, point, crop = FGVP(marks=ways, side=None).marked(picture(), region)
    outline = changed(picture(), square)
    expected = np.zeros((90, 130), bool)
    expected[20:60, 20:60] = True
    expected[22:58, 22:58] = False
    assert np.array_equal(outline, expected)
    assert changed(picture(), circle)[20:60, 20:60].sum() == changed(picture(), circle).sum() > 0
    columns = np.flatnonzero(changed(picture(), point).any(0))
    assert (columns[0] + columns[-1] + 1) / 2 == 40 and len(columns) == pytest.approx(2 * 0.06 * 130, abs=1)
    assert crop.tobytes() == picture().crop((20, 20, 60, 60)).tobytes()


# ---- the choice ------------------------------------------------------------------------------------------


def test_scores_follow_the_regions_in_any_order() -> None:
    order, found = [2, 0, 1], []
    for boxes in (BOXES, tuple(BOXES[i] for i in order)):
        with sc.attach(shared("llava")) as session:
            found.append(session.run(FGVP(boxes=boxes, clip=(numbers_of,)), question("llava", ASKED)).found)
    assert_close(found[1]["scores"], found[0]["scores"][order])
    assert order[found[1]["best"]] == found[0]["best"]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_clip_scores_what_is_marked(name: str) -> None:
    """With a segmenter, and "a photo of" before the words."""
    asked = sc.Question(family(name).processor(), [picture()], ASKED)  # type: ignore[misc]
    segment = lambda image, region: blob(int(region[0]) % 7)  # noqa: E731
    driver = FGVP(boxes=BOXES, segmenter=segment, side=96)
    with sc.attach(shared(name)) as session:
        answer = session.run(driver, asked)
    copies = []
    for region in BOXES:
        small, within, _ = resized(picture(), segment(None, region), region, 96)
        copies.append(blur_outside(small, within, 100.0))
    expected = cosines(name, copies, [f"a photo of {ASKED}"])[:, 0]
    assert_close(answer.found["scores"], expected, atol=1e-5, rtol=0)
    assert answer == str(int(expected.argmax()))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "world/vlm"])
def test_where_no_region_is_named_it_is_what_the_model_looks_at(name: str) -> None:
    asked = question(name, ASKED)
    with sc.attach(model_of(name)) as session:
        answer = session.run(FGVP(side=None), asked)
        region = looked_at(session, asked, asked.images[0])
        assert region.mask is not None
        assert answer == asked.ask(session, [blur_outside(asked.images[0], region.mask, 100.0)])


def test_a_mask_of_nothing_is_refused() -> None:
    nothing = lambda image, region: np.zeros((90, 130), bool)  # noqa: E731
    with sc.attach(shared("llava")) as session, pytest.raises(InputError, match="is empty"):
        session.run(FGVP(boxes=BOXES[:1], segmenter=nothing), question("llava", ASKED))
