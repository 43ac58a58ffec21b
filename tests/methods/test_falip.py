"""FALIP against patches that are counted by hand, and against the tower's own maps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import Look, shared
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering.falip import FALIP, rank

from .shared import numbers

BOX = (9.0, 4.0, 30.0, 24.0)
"""Of 6 x 6 patches of 8 pixels it touches columns 1 to 3 and rows 0 to 2."""
EXAMPLE = {"boxes": (BOX,), "v": 3.0}
MODELS = ("vit", "dinov2")

LAYER = 2  # the last of three
TOUCHED = [(row, column) for row in range(3) for column in range(1, 4)]


def by_hand(touched: list[tuple[int, int]], v: float, sigma: float = 100.0) -> dict[int, float]:
    """What is added for every token, patches following the class token."""
    rows, columns = zip(*touched, strict=True)
    cy, cx = (min(rows) + max(rows)) / 2, (min(columns) + max(columns)) / 2
    bell = {(r, c): math.exp(-0.5 * (math.hypot(r - cy, c - cx) / sigma) ** 2) for r, c in touched}
    low, high = min(bell.values()), max(bell.values())
    return {1 + r * 6 + c: (b - low + 1e-6) / (high - low + 1e-6) * v for (r, c), b in bell.items()}


def maps(name: str, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the first masked layer without and with it, and the scores without: (batch, heads, rows, keys)."""
    model, inputs, look = (
        shared(name),
        family(name).inputs(),
        Look(lambda call: (call.scores(), call.weights())),
    )
    look.sites = "vision.2.self"
    with sc.attach(model, look):
        run(model, inputs)
    with sc.attach(model, FALIP(**{**EXAMPLE, **options}), look):
        run(model, inputs)
    (scores, before), (_, after) = (told for _, _, told in look.seen)
    return before, after, scores


@pytest.mark.parametrize("name", ["clip", "vit", "dinov2"])
def test_the_class_tokens_row_is_that_of_raised_scores(name: str) -> None:
    before, after, scores = maps(name)
    for token, more in by_hand(TOUCHED, 3.0).items():
        scores[:, :, 0, token] += more
    assert_close(after[:, :, 0], scores[:, :, 0].softmax(-1), atol=1e-6, rtol=1e-5)
    assert (after - before)[:, :, 0].abs().max() > 0.1


def test_every_picture_has_its_own_box() -> None:
    other = (33.0, 41.0, 47.0, 48.0)  # columns 4 and 5 of row 5
    before, after, scores = maps("clip", boxes=(BOX, other))
    for sample, touched in enumerate((TOUCHED, [(5, 4), (5, 5)])):
        for token, more in by_hand(touched, 3.0).items():
            scores[sample, :, 0, token] += more
    assert_close(after[:, :, 0], scores[:, :, 0].softmax(-1), atol=1e-6, rtol=1e-5)
    assert before.shape == after.shape


# ---- the statements -----------------------------------------------------------------------------------


def test_v_of_zero_gives_the_same_features() -> None:
    model, inputs = shared("clip"), family("clip").inputs()
    with torch.no_grad():
        bare = model(**inputs)
        with sc.attach(model, FALIP(boxes=(BOX,), v=0.0)):
            out = model(**inputs)
        with sc.attach(model, FALIP(**EXAMPLE)):
            other = model(**inputs)
    assert torch.equal(out.image_embeds, bare.image_embeds)
    assert (other.image_embeds - bare.image_embeds).abs().max() > 1e-3
    assert torch.equal(other.text_embeds, bare.text_embeds)


def test_only_the_class_tokens_row_changes_and_rows_sum_to_one() -> None:
    before, after, _ = maps("clip")
    assert torch.equal(after[:, :, 1:], before[:, :, 1:])
    assert_close(after.sum(-1), torch.ones_like(after.sum(-1)))
    model = shared("clip")
    with sc.attach(model, FALIP(**EXAMPLE)) as session:
        assert [site.name for site, plan in session.plans.items() if plan.bias] == ["vision.2.self"]


def test_two_patches_of_the_box_differ_by_their_masks_difference() -> None:
    before, after, _ = maps("clip")
    masks = by_hand(TOUCHED, 3.0)
    middle, corner = 1 + 1 * 6 + 2, 1 + 0 * 6 + 1
    moved = (after.log() - before.log())[:, :, 0]
    assert_close(
        moved[..., middle] - moved[..., corner],
        torch.full((2, 4), masks[middle] - masks[corner]),
        atol=1e-4,
        rtol=0,
    )


def test_attention_on_the_box_rises_with_v() -> None:
    tokens = [1 + r * 6 + c for r, c in TOUCHED]
    masses = [maps("clip", v=v)[1][:, :, 0, tokens].sum(-1) for v in (0.0, 0.2, 1.0, 4.0)]
    assert (torch.stack(masses).diff(dim=0) > 0).all()


def test_vit_b16_is_changed_in_its_last_four_layers() -> None:
    sites = FALIP().sites.replace("vision", "text")
    assert numbers(sites, depth=12) == [8, 9, 10, 11]


# ---- pictures that are located, and a choice among boxes ----------------------------------------------


def test_boxes_lie_in_the_located_picture_crops_and_all() -> None:
    """Of 96 x 48 pixels the processor sees the middle 48 x 48."""
    f = family("clip")
    model, processor = shared("clip"), f.processor()
    picture = Image.new("RGB", (96, 48), (120, 30, 200))
    inputs = {**f.inputs(1), **processor(images=picture, return_tensors="pt")}
    shifted = (BOX[0] + 24, BOX[1], BOX[2] + 24, BOX[3])
    answers = []
    for box, located in ((BOX, []), (shifted, [picture])):
        with sc.attach(model, FALIP(boxes=(box,), v=3.0)) as session, torch.no_grad():
            session.locate(processor, located)
            answers.append(model(**inputs).image_embeds)
            session.locate(processor, [])
    assert_close(*answers)


def test_boxes_are_ranked_by_their_own_passes() -> None:
    f = family("clip")
    model, processor = shared("clip"), f.processor()
    noise = torch.randint(0, 255, (48, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture, boxes = Image.fromarray(noise.numpy()), [BOX, (0.0, 30.0, 12.0, 48.0), (20.0, 20.0, 40.0, 44.0)]
    got = rank(model, processor, picture, boxes, "a red cup", ["a dog", "the sky"], v=3.0)
    fits = []
    for box in boxes:
        inputs = processor(
            text=["a red cup", "a dog", "the sky"], images=picture, padding=True, return_tensors="pt"
        )
        with sc.attach(model, FALIP(boxes=(box,), v=3.0)), torch.no_grad():
            one = model(**inputs).logits_per_image[0].tolist()
        fits.append(one[0] - (one[1] + one[2]) / 2)
    assert_close(got, torch.tensor(fits), atol=1e-4, rtol=0)
    assert len({round(fit, 5) for fit in fits}) == 3


@pytest.mark.parametrize(
    ("name", "boxes", "match"),
    [
        ("clip", (BOX,) * 3, "3 boxes for 2"),
        ("clip", ((60.0, 0.0, 70.0, 9.0),), "outside"),
        ("siglip", (BOX,), "none"),
    ],
)
def test_what_it_cannot_do_is_refused(name: str, boxes: Any, match: str) -> None:
    model = shared(name)
    with sc.attach(model, FALIP(boxes=boxes)), pytest.raises(InputError, match=match):
        run(model, family(name).inputs())
