"""Which tokens of the tower features are made of, against mappings written by hand."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from helpers import shared, unchanged
from mappings import BY_HAND, Made, squares
from torch import Tensor, nn
from zoo import family, run

import saccade as sc
from saccade.core import sources as module
from saccade.core.errors import InputError
from saccade.core.features import Item
from saccade.core.sources import sources

SITE = "vision.1.self"


def pixels_of(name: str, images: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    """What the vision tower is given."""
    inputs = family(name).inputs(images=images)
    return {key: value for key, value in inputs.items() if key.startswith(("pixel", "image"))}


def asked(model: Any, inputs: dict[str, Any], site: str = SITE) -> tuple[Tensor, int]:
    with sc.attach(model) as session:
        place = next(s for s in session.sites if s.name == site)
        return sources(session._runtime, inputs, "image", place)


def lists(made_of: Tensor) -> Made:
    return [[token for token in row if token >= 0] for row in made_of.tolist()]


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_known", type(module._known)())


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("name", BY_HAND)
def test_features_are_made_of_the_tokens_of_the_mapping_by_hand(name: str) -> None:
    made_of, tokens = asked(shared(name), pixels_of(name))
    expected = BY_HAND[name]()
    assert lists(made_of) == expected
    assert tokens >= 1 + max(max(row) for row in expected if row)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_in_small_pieces_it_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    assert lists(asked(shared(name), pixels_of(name))[0]) == BY_HAND[name]()


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("level", [0.0, 0.7])
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_it_does_not_depend_on_what_the_picture_shows(name: str, level: float) -> None:
    """Not even where it shows nothing but one colour."""
    inputs = pixels_of(name)
    if name == "llava_next" and level == 0:
        return  # tiles of zeros are those that some models take for none
    inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], level)
    assert lists(asked(shared(name), inputs)[0]) == BY_HAND[name]()


# ---- values ---------------------------------------------------------------------------------------------


def item(name: str, session: Any, first: int, count: int) -> Item:
    class Run:
        runtime = session._runtime

    run: Any = Run()
    x = torch.zeros(count, 8)
    return Item("image", 0, 0, x, torch.zeros(0), pixels_of(name), None, run, first)


@pytest.mark.parametrize("name", BY_HAND)
def test_values_are_means_over_the_tokens_and_tiles_are_told(name: str) -> None:
    model, made = shared(name), BY_HAND[name]()
    first, count = 10, len(made) - 10  # one picture's features among all
    total = asked(model, pixels_of(name))[1]
    tiles = {"llava": 3, "llava_next": 13, "internvl": 7, "gemma3": 3}.get(name, 1)
    values = torch.rand(tiles, total // tiles, dtype=torch.float64)
    calls = [values[:1], values[1:]] if tiles > 1 else list(values.split(16, 1))  # window by window
    with sc.attach(model) as session:
        site = next(s for s in session.sites if s.name == SITE)
        mean, tile = item(name, session, first, count).from_tower(site, calls)
    flat = values.flatten().tolist()
    for at, tokens in enumerate(made[first:]):
        if tokens:
            assert float(mean[at]) == pytest.approx(sum(flat[t] for t in tokens) / len(tokens), abs=1e-12)
            assert int(tile[at]) == tokens[0] // (total // tiles)
        else:
            assert mean[at].isnan() and int(tile[at]) == -1


def grid_by_hand(name: str) -> list[tuple[int, int, int]]:
    """Tile, row and column, from the mappings: tiles of the zoo are 4 x 4 or 6 x 6 features behind a class token, or
    8 x 8 patches."""
    made = BY_HAND[name]()
    if name == "qwen2_5_vl":
        return [(0, i // 4, i % 4) for size in (16, 16, 8) for i in range(size)]
    tokens, ahead, side, block = {
        "llava": (37, 1, 6, 1),
        "llava_next": (17, 1, 4, 1),
        "gemma3": (64, 0, 8, 2),
    }[name]
    places = []
    for first in (row[0] if row else None for row in made):
        if first is None:
            places.append((-1, -1, -1))
        else:
            patch = first % tokens - ahead
            places.append((first // tokens, patch // side // block, patch % side // block))
    return places


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "gemma3"])
def test_features_stand_in_rows_and_columns_of_their_tiles(name: str) -> None:
    """Of the first picture's tiles in LLaVA-NeXT the padding's rows are not there: the first is 3 x 4, from 0 on."""
    count = {"llava": 36, "llava_next": 70, "qwen2_5_vl": 16, "gemma3": 16}[name]
    with sc.attach(shared(name)) as session:
        found = item(name, session, 0, count).grid().tolist()
    expected = grid_by_hand(name)[:count]
    if name == "llava_next":
        expected = [(t, r - (t in (1, 2)), c) for t, r, c in expected]
    assert [tuple(place) for place in found] == expected


def test_values_of_another_number_of_tokens_are_refused() -> None:
    model = shared("llava")
    with sc.attach(model) as session:
        site = next(s for s in session.sites if s.name == SITE)
        with pytest.raises(InputError, match="74 tokens, and features are made of 111"):
            item("llava", session, 0, 36).from_tower(site, [torch.zeros(2, 37)])


def test_features_that_come_from_everywhere_are_refused() -> None:
    model, inputs = shared("instructblip"), family("instructblip").inputs(images=(1,))
    with sc.attach(model, sc.FasterVLM(keep=0.5)), pytest.raises(InputError, match="queries"):
        model.generate(**inputs, max_new_tokens=1)


# ---- the cache, and what is left behind --------------------------------------------------------------------


def forwards(module_: nn.Module, calls: list[int]) -> Any:
    return module_.register_forward_hook(lambda *_: calls.append(1))


@pytest.mark.usefixtures("forgetful")
def test_it_is_asked_of_one_picture_once() -> None:
    model = family("llava").build()
    counts: list[int] = []
    hook = forwards(model.model.vision_tower, counts)
    asked(model, pixels_of("llava"))
    assert len(counts) > 5
    counts.clear()
    other = pixels_of("llava")
    other["pixel_values"] = torch.rand_like(other["pixel_values"])
    asked(model, other)
    asked(model, pixels_of("llava", (1, 1)))
    assert not counts
    asked(model, pixels_of("llava"), "vision.0.self")
    assert counts
    hook.remove()


@pytest.mark.usefixtures("forgetful")
def test_sizes_that_are_told_beside_the_pixels_count_too() -> None:
    model, inputs = shared("llava_next"), pixels_of("llava_next")
    turned = {**inputs, "image_sizes": inputs["image_sizes"][[2, 0, 1]]}
    assert lists(asked(model, inputs)[0]) != lists(asked(model, turned)[0])
    assert lists(asked(model, inputs)[0]) == BY_HAND["llava_next"]()


@pytest.mark.usefixtures("forgetful")
def test_pictures_that_are_left_empty_count_too() -> None:
    """Idefics3 takes a picture of zeros for none, in pixels of the same shape."""
    model, inputs = shared("idefics3"), pixels_of("idefics3")
    assert inputs["pixel_values"].shape[:2] == (2, 2)  # one of them empty
    full = {"pixel_values": torch.rand_like(inputs["pixel_values"])}
    assert lists(asked(model, inputs)[0]) == squares_of(3)
    assert lists(asked(model, full)[0]) == squares_of(4)
    assert lists(asked(model, inputs)[0]) == squares_of(3)


def squares_of(pictures: int) -> Made:
    return squares(tiles=pictures, side=8, block=2, before=0)


@pytest.mark.usefixtures("forgetful")
def test_a_model_that_is_gone_is_forgotten() -> None:
    model = family("llava").build()
    asked(model, pixels_of("llava"))
    assert len(module._known) == 1
    del model
    gc.collect()
    assert len(module._known) == 0


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = family(name).build()
    run(model, family(name).inputs())  # the library leaves marks of its own the first time
    model.train()
    parts = {path: m.training for path, m in model.named_modules()}
    inputs = pixels_of(name)
    before = inputs["pixel_values"].clone()
    with unchanged(model):
        asked(model, inputs)
    assert {path: m.training for path, m in model.named_modules()} == parts
    assert torch.equal(inputs["pixel_values"], before)


@pytest.mark.usefixtures("forgetful")
def test_also_where_asking_fails() -> None:
    model = family("llava").build()
    run(model, family("llava").inputs())

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    hook = model.model.multi_modal_projector.register_forward_hook(fail)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        asked(model, pixels_of("llava"))
    hook.remove()
    assert not any(module._known.get(model, {}).values())
    assert lists(asked(model, pixels_of("llava"))[0]) == BY_HAND["llava"]()
