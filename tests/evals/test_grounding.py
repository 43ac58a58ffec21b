"""Attention against masks, by counting pixels and pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import shared
from PIL import Image
from torch import Tensor
from zoo import family

from saccade.core.boxes import picture_boxes
from saccade.evals import grounding
from saccade.looking import look


def grid(rows: int, columns: int, side: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([x, y, x + 1, y + 1], -1).flatten(0, 1) * float(side)


@pytest.mark.parametrize("seed", range(3))
def test_shares_are_counted_in_pixels(seed: int) -> None:
    mask = torch.rand(24, 32, generator=torch.Generator().manual_seed(seed)) < 0.3
    found = grounding.shown(mask, torch.cat([grid(3, 4, 8), torch.full((1, 4), torch.nan)]))
    wanted = [mask[y : y + 8, x : x + 8].double().mean() for y in range(0, 24, 8) for x in range(0, 32, 8)]
    torch.testing.assert_close(found[:-1], torch.stack(wanted))
    assert found[-1].isnan()


def test_half_pixels_and_what_lies_outside() -> None:
    mask = torch.zeros(4, 4)
    mask[:, 2:] = 1
    boxes = torch.tensor([[0.5, 0, 2.5, 4], [2, -4, 8, 4], [0, 0, 4, 4]])
    torch.testing.assert_close(grounding.shown(mask, boxes), torch.tensor([0.25, 1, 0.5]).double())


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_many_maps_agree_with_counting(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, 6, (2, 3, 40), generator=draw).double() + 0.1  # with equal ones
    shares = torch.rand(40, generator=draw).double() * (torch.rand(40, generator=draw) < 0.5)
    inside, lift = grounding.inside(maps, shares), grounding.over_chance(maps, shares)
    hit, auc = grounding.pointing(maps, shares), grounding.auc(maps, shares)
    for at in np.ndindex(2, 3):
        w = maps[at].tolist()
        on = sum(a * s for a, s in zip(w, shares.tolist())) / sum(w)
        assert float(inside[at]) == pytest.approx(on)
        assert float(lift[at]) == pytest.approx(on / (sum(shares.tolist()) / 40))
        peaks = [s for a, s in zip(w, shares.tolist()) if a == max(w)]
        assert float(hit[at]) == pytest.approx(sum(peaks) / len(peaks))
        pairs = won = 0.0
        for a, s in zip(w, shares.tolist()):
            for b, t in zip(w, shares.tolist()):
                pairs += s * (1 - t)
                won += s * (1 - t) * ((a > b) + (a == b) / 2)
        assert float(auc[at]) == pytest.approx(won / pairs)


def test_known_maps() -> None:
    shares = torch.tensor([0.0, 0.0, 1.0, 1.0])
    even, on, off = torch.ones(4), torch.tensor([0.0, 0, 3, 1]), torch.tensor([2.0, 1, 0, 0])
    scores = (grounding.inside, grounding.over_chance, grounding.pointing, grounding.auc)
    found = [[float(score(m, shares)) for score in scores] for m in (even, on, off)]
    assert found == [[0.5, 1, 0.5, 0.5], [1, 2, 1, 1], [0, 0, 0, 0]]
    assert grounding.auc(even, torch.ones(4)).isnan() and grounding.auc(even, torch.zeros(4)).isnan()


def test_tokens_and_pixels_of_a_real_map_agree() -> None:
    """The same attention of a model, by its tokens' boxes and painted on the picture."""
    model, processor = shared("llava"), family("llava").processor()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8))
    seen = look(model, processor, image, "Where is the cup?", max_new_tokens=2).map("text.*.self")
    mask = torch.zeros(48, 48, dtype=torch.bool)
    mask[5:30, 11:40] = True
    pixels = torch.from_numpy(seen.on_picture()).flatten()
    visual = seen.recording.layouts[0].where("image:0")[0][: seen.tensor.shape[-1]]
    maps = seen.tensor[..., visual].mean((0, 1, 2))
    shares = grounding.shown(mask, picture_boxes(model, processor, (48, 48)))
    assert float(grounding.inside(maps, shares)) == pytest.approx(
        float(grounding.inside(pixels, mask.flatten().float())), rel=1e-3
    )
