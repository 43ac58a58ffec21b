"""The cache layer that knows its positions, and the mask for what it still holds, by themselves."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import shared
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from zoo import FAMILIES
from zoo.base import noise, words

import saccade as sc
from core.missing import Evict, as_indices, draw, entries
from saccade.core.branch import join, strip
from saccade.core.cache import TrackedLayer, fit_mask, track
from saccade.core.errors import InputError

F = {
    "queries": 1,
    "groups": 2,
    "keep": None,
    "start": 0,
    "ragged": False,
    "causal": True,
    "dtype": torch.float32,
}


def filled(tokens: int = 10, window: int | None = None, batch: int = 2, seed: int = 0) -> TrackedLayer:
    layer = TrackedLayer(window)
    layer.attended = True
    layer.update(*(noise(batch, 2, tokens, 4, seed=seed + i) for i in range(2)))
    return layer


def real(layer: TrackedLayer) -> list[list[dict[int, Tensor]]]:
    """Keys by logical position, for every row and head."""
    pos = layer.positions()
    pos = (pos[:, None] if pos.ndim == 2 else pos).expand(-1, layer.keys.shape[1], -1)
    found = []
    for row in range(pos.shape[0]):
        heads = [
            {p: layer.keys[row, head, slot] for slot, p in enumerate(pos[row, head].tolist()) if p >= 0}
            for head in range(pos.shape[1])
        ]
        found.append(heads)
    return found


def same(a: list[list[dict[int, Tensor]]], b: list[list[dict[int, Tensor]]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[p], y[p]) for p in x)
        for r, s in zip(a, b)
        for x, y in zip(r, s)
    )


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_untouched_it_holds_what_the_librarys_own_layer_holds(kind: str) -> None:
    window = 5 if kind == "window" else None
    theirs = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    mine = TrackedLayer(window)
    for step, tokens in enumerate((3, 1, 4, 1, 1)):
        k, v = noise(2, 2, tokens, 4, seed=step), noise(2, 2, tokens, 4, seed=50 + step)
        sizes = mine.get_mask_sizes(tokens)
        assert sizes == theirs.get_mask_sizes(tokens)
        a, b = mine.update(k, v), theirs.update(k, v)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
        assert mine.get_seq_length() == theirs.get_seq_length()
    assert mine.get_max_length() == theirs.get_max_length() or window


@pytest.mark.parametrize("shape", [(), (2,), (2, 2)])
def test_evicting_twice_is_evicting_the_rest_once(shape: tuple[int, ...]) -> None:
    once, twice = filled(), filled()
    keep = draw(*shape, 10, seed=1, share=0.6)
    keep[..., -1] = True
    first = keep | draw(*shape, 10, seed=2)
    slots = as_indices(first)
    twice.evict(slots)
    left = (first & keep).gather(-1, slots.clamp_min(0)) & (slots >= 0)
    twice.evict(as_indices(left))
    once.evict(as_indices(keep))
    assert same(real(once), real(twice))
    assert once.seen == twice.seen == 10


def test_slots_may_come_in_any_order() -> None:
    a, b = filled(), filled()
    a.evict(torch.tensor([7, 0, 9, 3]))
    b.evict(torch.tensor([0, 3, 7, 9]))
    assert torch.equal(a.keys, b.keys) and torch.equal(a.positions(), b.positions())


@pytest.mark.parametrize("form", ["shared", "heads", "ragged"])
def test_taking_back_is_as_if_it_had_not_come(form: str) -> None:
    shape = (2, 2, 10)
    keep = draw(*shape, seed=3) if form != "shared" else draw(10, seed=3).expand(shape)
    keep = keep.clone()
    keep[..., 9] = True
    for count in (1, 3, 6):
        layer, wanted = filled(), filled()
        layer.evict(as_indices(keep))
        wanted.evict(as_indices(keep))
        before = real(wanted)
        layer.crop(-count)
        expected = [[{p: t for p, t in head.items() if p < 10 - count} for head in row] for row in before]
        assert same(real(layer), expected)
        assert layer.seen == 10 - count
        layer.update(noise(2, 2, 2, 4, seed=8), noise(2, 2, 2, 4, seed=9))
        assert all({10 - count, 11 - count} <= head.keys() for row in real(layer) for head in row)


def test_taking_back_nothing_changes_nothing() -> None:
    layer = filled()
    before = layer.keys
    layer.crop(0)
    assert layer.keys is before and layer.seen == 10
    TrackedLayer().crop(-3)


def test_what_left_a_window_cannot_be_taken_back() -> None:
    layer = filled(10, window=4)
    with pytest.raises(InputError, match="left the window"):
        layer.crop(-1)
    early = filled(3, window=4)
    early.crop(-1)
    assert early.seen == 2 and early.keys.shape[2] == 2


def test_a_window_never_forgets_what_a_later_query_sees() -> None:
    """Nor holds more than the library's own, after an eviction of some."""
    layer = filled(8, window=6)
    assert layer.positions()[0].tolist() == [3, 4, 5, 6, 7]
    layer.evict(torch.tensor([0, 3, 4]))
    for step in range(8, 20):
        layer.update(noise(2, 2, 1, 4), noise(2, 2, 1, 4))
        held = layer.positions()[0].tolist()
        assert set(held) >= set(range(max(6, step - 4), step + 1))
        assert len(held) <= 5
    assert held == [15, 16, 17, 18, 19]


def test_rows_are_chosen_with_their_positions() -> None:
    layer = filled()
    layer.evict(as_indices(draw(2, 2, 10, seed=4)))
    layer.shift = torch.tensor([1, 2])
    before = real(layer)
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert same(real(layer), [before[1], before[0], before[0], before[1]])
    assert layer.shift.tolist() == [2, 1, 1, 2]
    layer.batch_select_indices(torch.tensor([2]))
    assert same(real(layer), [before[0]])


def test_rows_are_chosen_where_a_window_holds_nothing() -> None:
    layer = filled(5, window=2)
    layer.incoming = (3, torch.full((2, 1), -1))  # none of three tokens stays
    layer.update(noise(2, 2, 1, 4), noise(2, 2, 1, 4))
    assert (layer.keys.shape[2], layer.get_seq_length()) == (0, 8)
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([3, 1, 0]))
    keys = noise(3, 2, 1, 4)
    layer.update(keys, keys)
    assert torch.equal(layer.keys, keys) and layer.positions().tolist() == [[8]] * 3


def test_reset_begins_anew() -> None:
    layer = filled(10, window=4)
    layer.evict(torch.tensor([1, 2]))
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.pos is None and layer.sliding_window == 4
    layer.attended = True
    layer.update(noise(1, 2, 3, 4), noise(1, 2, 3, 4))
    assert layer.keys.shape == (1, 2, 3, 4) and layer.get_seq_length() == 3


@pytest.mark.parametrize("window", [None, 6])
def test_a_cache_is_taken_over_as_it_stands(window: int | None) -> None:
    cache = DynamicCache()
    layer = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    cache.layers = [layer]
    k, v = noise(2, 2, 9, 4), noise(2, 2, 9, 4, seed=7)
    cache.update(k, v, 0)
    held = layer.keys
    tracked = track(cache).layers[0]
    assert type(tracked) is TrackedLayer and tracked.keys is held
    assert tracked.get_seq_length() == 9
    assert tracked.positions()[0].tolist() == list(range(9 - held.shape[2], 9))
    assert track(cache).layers[0] is tracked


def test_a_thinned_cache_is_copied_and_pickled() -> None:
    model, inputs = shared("llama"), FAMILIES["llama"].inputs()
    keep = {1: entries(inputs, "ragged")}
    with sc.attach(model, Evict(keep=keep)), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        copies = (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache)
        logits = [model(input_ids=words(2, 1), past_key_values=each).logits for each in copies]
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[2])


def test_a_thinned_layer_takes_nothing_where_nobody_knows_of_it() -> None:
    layer = filled()
    layer.evict(torch.tensor([1, 2, 9]))
    layer.attended = False
    for call in (lambda: layer.update(noise(2, 2, 1, 4), noise(2, 2, 1, 4)), lambda: layer.get_mask_sizes(1)):
        with pytest.raises(InputError, match="missing from this cache"):
            call()
    assert layer.keys.shape[2] == 3 and layer.seen == 10


# ---- two caches in one ---------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("mine", "theirs"), [(8, 8), (8, 6), (6, 8), (3, 9)])
@pytest.mark.parametrize("thin", ["none", "mine", "theirs", "heads"])
def test_joined_and_stripped_a_cache_is_as_it_was(
    window: int | None, mine: int, theirs: int, thin: str
) -> None:
    a, b = filled(mine, window), filled(theirs, window, seed=20)
    for layer, who in ((a, "mine"), (b, "theirs")):
        if thin in (who, "heads"):
            keep = (
                draw(2, 2, layer.keys.shape[2], seed=5)
                if thin == "heads"
                else draw(2, layer.keys.shape[2], seed=5)
            )
            keep[..., -1] = True
            layer.evict(as_indices(keep))
    alone, other = real(a), real(b)
    moved = join([a], [b], 1)
    assert moved == max(0, theirs - mine) and a.seen == max(mine, theirs)
    gap = a.seen - theirs
    shifted = [[{p + moved: t for p, t in head.items()} for head in row] for row in alone]
    shifted += [[{p + gap: t for p, t in head.items()} for head in row] for row in other]
    assert same(real(a), shifted)
    k, v = noise(4, 2, 1, 4, seed=30), noise(4, 2, 1, 4, seed=31)
    a.update(k, v)
    strip([a], 2, moved)
    a.attended = True
    plain = filled(mine, window)
    if thin in ("mine", "heads"):
        keep = (
            draw(2, 2, plain.keys.shape[2], seed=5)
            if thin == "heads"
            else draw(2, plain.keys.shape[2], seed=5)
        )
        keep[..., -1] = True
        plain.evict(as_indices(keep))
    plain.update(k[:2], v[:2])
    assert same(real(a), real(plain)) and a.seen == plain.seen
    assert a.keys.untyped_storage().nbytes() == a.keys.numel() * 4  # no row of the other is kept alive


# ---- masks ---------------------------------------------------------------------------------------


def by_rule(start: int, keep: Tensor, pos: Tensor, full: Tensor | None, groups: int) -> Tensor:
    """Which keys each row sees, one by one: (batch, heads, rows, keys)."""
    pos = pos[:, None] if pos.ndim == 2 else pos.repeat_interleave(groups, 1)
    batch, heads, keys = pos.shape
    seen = torch.zeros(batch, heads, keep.shape[1], keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for r, place in enumerate(keep[b].tolist()):
                for k, p in enumerate(pos[b, h].tolist()):
                    if place < 0:
                        continue
                    sees = p <= place + start if full is None else bool(full[b, 0, place, max(p, 0)])
                    seen[b, h, r, k] = p >= 0 and sees
    return seen


@pytest.mark.parametrize("given", ["none", "bool", "float"])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("thin_rows", [False, True])
def test_the_mask_is_the_models_for_what_is_left(given: str, heads: bool, thin_rows: bool) -> None:
    start, queries = 4, 5
    total = start + queries
    keep = torch.tensor([[0, 2, 4], [-1, 1, 4]]) if thin_rows else torch.arange(queries).expand(2, -1)
    pos = torch.tensor([[-1, 0, 2, 4, 6, 8], [0, 1, 3, 5, 7, 8]])
    if heads:
        pos = torch.stack([pos, pos.flip(0)], 1)
    full = None
    mask: Any = None
    if given != "none":
        full = draw(2, 1, queries, total, seed=0, share=0.7) & torch.ones(queries, total).tril(start).bool()
        mask = (
            full
            if given == "bool"
            else torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float32).min)
        )
    got = fit_mask(
        mask, queries=keep.shape[1], groups=2, keep=keep if thin_rows else None, pos=pos, start=start,
        ragged=True,
        causal=True, dtype=torch.float32,
    )  # fmt: skip
    wanted = by_rule(start, keep, pos, full, 2)
    rows = (keep >= 0)[:, None, :, None].expand(-1, got.shape[1], -1, -1)
    attends = got if got.dtype == torch.bool else got > torch.finfo(torch.float32).min / 2
    wanted = wanted.expand(-1, got.shape[1], -1, -1)
    assert torch.equal(attends & rows, wanted & rows)
    assert bool((attends | rows).any(-1).all())  # a filler row sees something, and is never NaN


def test_no_mask_is_made_where_none_is_needed() -> None:
    pos = torch.arange(6).expand(2, -1)
    assert fit_mask(None, **{**F, "pos": pos}) is None
    assert fit_mask(None, **{**F, "pos": pos, "queries": 6}) is None
    assert fit_mask(None, **{**F, "pos": pos, "queries": 3, "causal": False}) is None
    assert fit_mask(None, **{**F, "pos": pos, "queries": 3}) is not None
    untouched = torch.ones(2, 1, 3, 6, dtype=torch.bool)
    assert fit_mask(untouched, **{**F, "pos": None}) is untouched


def test_a_padding_mask_of_two_axes_loses_its_columns() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    pos = torch.tensor([[1, 3], [0, 2]])
    got = fit_mask(mask, **{**F, "pos": pos})
    assert got.tolist() == [[1, 1], [1, 1]]


def test_a_tower_without_causality_gets_no_causal_mask() -> None:
    keep = torch.tensor([[0, 2, 3], [-1, 1, 2]])
    got = fit_mask(None, **{**F, "queries": 3, "keep": keep, "pos": None, "causal": False})
    assert got[0, 0].all() and got[1, 0, 1:, 1:].all() and not got[1, 0, 1:, 0].any()
