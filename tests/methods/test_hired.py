"""HiRED against the tower's own q and k in two layers, tile by tile, and on LLaVA-NeXT's layout by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers import Look, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import run

import saccade as sc
from saccade.core.errors import InputError
from saccade.reduction._parts.budget import apportioned
from saccade.reduction.hired import HiRED, shown_by

from .embedded import said, seen
from .shared import Inputs, generated
from .towers import DOUBLE, best, inputs_of, kept, layers_of, scores, shortened, tiles

MODELS = ("llava_next", "llava_onevision")
EXAMPLE = {"keep": 0.3}  # by the default the random LLaVA-OneVision happens to write a picture's placeholder
DISCRETE = ("keep", "separators")
NEXT = "llava_next"
GRIDS = ((6, 8), (6, 8), (8, 4))
"""Rows and columns of the pictures' rasters of tiles; each tile is 4 wide, and the whole view is 4 x 4."""


def shares_by_hand(content: list[float | None], picture: int) -> dict[int, float]:
    """Of every tile, in order, the attention on those patches of the whole view whose middle it shows."""
    rows, columns = GRIDS[picture]
    tile = [t for t in tiles(NEXT)[picture] if t >= 0]
    found = dict.fromkeys(sorted(set(tile[16:])), 0.0)
    for patch in range(16):
        y, x = (patch // 4 + 0.5) / 4 * rows, (patch % 4 + 0.5) / 4 * columns
        found[tile[16 + int(y) * columns + int(x)]] += content[patch] or 0
    return found


def budgets(model: Any, inputs: Inputs, picture: int, keep: float, alpha: float) -> list[int]:
    """Before anything is shared out again: floors, the whole view first."""
    size = sum(t >= 0 for t in tiles(NEXT)[picture])
    budget = round(keep * size)
    shares = shares_by_hand(scores(NEXT, model, inputs, 0)[picture], picture)
    rest = budget - int(alpha * budget)
    return [int(alpha * budget), *(int(rest * s / sum(shares.values())) for s in shares.values())]


# ---- how many, and which ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "alpha"), [(0.2, 0.5), (0.4, 0.25)])
def test_of_every_view_those_with_the_largest_scores_stay(keep: float, alpha: float) -> None:
    model, inputs = shared(NEXT, DOUBLE), inputs_of(NEXT)
    found = kept(NEXT, model, inputs, HiRED(keep=keep, alpha=alpha))
    for picture, (values, tile) in enumerate(zip(scores(NEXT, model, inputs), tiles(NEXT), strict=True)):
        floors = budgets(model, inputs, picture, keep, alpha)
        assert len(found[picture]) == round(keep * sum(t >= 0 for t in tile))
        for view, floor in zip(sorted(set(tile) - {-1}), floors, strict=True):
            mine = [i for i, t in enumerate(tile) if t == view]
            stays = [i for i in found[picture] if i in mine]
            assert stays == [mine[i] for i in best([values[j] for j in mine], len(stays))]
            assert floor <= len(stays) <= floor + (view != tile[0])


@pytest.mark.parametrize("keep", [0.1, 0.37, 0.6, 0.9, 1.0])
def test_the_budget_is_spent_to_the_last_token(keep: float) -> None:
    model, inputs = shared(NEXT, DOUBLE), inputs_of(NEXT)
    patches = [[i for i, t in enumerate(tile) if t >= 0] for tile in tiles(NEXT)]
    for alpha in (0.0, 0.5, 1.0):
        found = kept(NEXT, model, inputs, HiRED(keep=keep, alpha=alpha))
        assert [len(f) for f in found] == [round(keep * len(p)) for p in patches]
        assert all(set(f) <= set(p) for f, p in zip(found, patches, strict=True))


def test_numbers_in_proportion_add_up_and_are_no_larger_than_a_tile() -> None:
    draw = random.Random(0)
    for _ in range(200):
        sizes = [draw.randint(1, 40) for _ in range(draw.randint(1, 9))]
        shares = [draw.random() ** 4 for _ in sizes]
        budget = draw.randint(0, sum(sizes))
        counts = apportioned(budget, torch.tensor(shares, dtype=DOUBLE), sizes)
        assert sum(counts) == budget and all(c <= s for c, s in zip(counts, sizes, strict=True))
        floors = [int(budget * share / sum(shares)) for share in shares]
        assert all(c >= min(f, s) for c, f, s in zip(counts, floors, sizes, strict=True))
    assert apportioned(10, torch.zeros(3, dtype=DOUBLE), [9, 9, 9]) in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
    equal = apportioned(58, torch.ones(4, dtype=DOUBLE), [16] * 4)
    assert sorted(equal) == [14, 14, 15, 15]


# ---- where tiles lie --------------------------------------------------------------------------------------


def side_by_side() -> tuple[Tensor, Tensor]:
    """A whole view of 4 x 4 and a raster of 4 rows of two tiles of 4 x 4, a separator behind each row."""
    tile = torch.tensor([0] * 16 + [*[1] * 4, *[2] * 4, -1] * 4)
    grid = torch.tensor([[0, i // 4, i % 4] for i in range(16)] + [[-1, -1, -1]] * 36)
    return tile, grid


def test_of_two_tiles_side_by_side_each_shows_a_half() -> None:
    """A cut of the raster into strips would give them the upper and the lower one."""
    assert shown_by(*side_by_side()).view(4, 4).tolist() == [[1, 1, 2, 2]] * 4


def test_where_nothing_tells_how_tiles_lie_it_is_said() -> None:
    tile, grid = side_by_side()
    with pytest.raises(InputError, match="how they lie"):
        shown_by(tile[tile >= 0], grid[tile >= 0])


@pytest.mark.parametrize("corner", range(4))
def test_a_tile_that_has_all_the_content_gets_the_largest_share(corner: int) -> None:
    """Keys of the whole view's patches in a corner point where the class token's query does, in the first layer."""
    model, inputs = shared(NEXT, DOUBLE), inputs_of(NEXT)
    module: Any = layers_of(NEXT, model)[0]
    patches = [1 + 4 * r + c for r in range(4) for c in range(4) if 2 * (r // 2) + c // 2 == corner]
    seen_: list[Tensor] = []

    def look_there(_: Any, __: Any, k: Tensor) -> Tensor:
        k = k.clone()
        k[:, patches] = 5 * seen_[-1][:, :1]
        return k

    hooks = [
        module.q_proj.register_forward_hook(lambda _, __, q: seen_.append(q)),
        module.k_proj.register_forward_hook(look_there),
    ]
    try:
        found = kept(NEXT, model, inputs, HiRED(keep=0.2))[0]
    finally:
        for hook in hooks:
            hook.remove()
    counts = [sum(tiles(NEXT)[0][i] == tile for i in found) for tile in (1, 2, 3, 4)]
    assert max(counts) == counts[corner] > sum(counts) / 2


# ---- the answer -------------------------------------------------------------------------------------------


def test_all_patches_without_separators_and_with_them_the_model() -> None:
    model, inputs = shared(NEXT, DOUBLE), inputs_of(NEXT)
    bare = run(model, inputs)
    with sc.attach(model, HiRED(keep=1.0, separators=True)):
        assert torch.equal(run(model, inputs), bare)
    patches = [[i for i, t in enumerate(tile) if t >= 0] for tile in tiles(NEXT)]
    assert kept(NEXT, model, inputs, HiRED(keep=1.0)) == patches


@pytest.mark.parametrize("keep", [0.2, 0.6])
def test_the_answer_is_that_of_the_shorter_prompt(keep: float) -> None:
    model, method = shared(NEXT, DOUBLE), HiRED(keep=keep)
    inputs = {n: v for n, v in inputs_of(NEXT, (1,)).items() if n != "attention_mask"}
    image = inputs["input_ids"][0] == model.config.image_token_id
    stays = ~image
    stays[image.nonzero()[kept(NEXT, model, inputs_of(NEXT), method)[0], 0]] = True
    with sc.attach(model, method):
        got = generated(model, inputs, 3)
    written = got.sequences[0, len(stays) :]
    expected = shortened(model, inputs, stays, written)[-4:-1]
    assert_close(torch.cat(got.logits), expected.float(), atol=1e-5, rtol=0)
    held = got.past_key_values.layers[0].keys.shape[2]
    assert held == int((~image).sum()) + round(keep * 64) + 2  # text, B, and what was written


def test_without_a_class_token_and_for_single_views_the_budget_is_kept() -> None:
    """In LLaVA-OneVision a picture beside others has one view, of 16, and a separator."""
    model, inputs = shared("llava_onevision", DOUBLE), inputs_of("llava_onevision")
    look = Look(tell=lambda call: call.columns("image").sum(-1).flatten().tolist(), sites="text.0.self")
    with sc.attach(model, HiRED(keep=0.25), look):
        run(model, inputs)
    assert look.seen[0][2] == [round(0.25 * 64), 2 * 4]


def test_of_the_world_it_sees_a_quarter_and_with_all_it_answers_as_ever() -> None:
    """Its pictures have one view."""
    assert said(HiRED(keep=1.0)) == said()
    assert seen(HiRED(keep=0.25)) == [[36] * 4] * 8
