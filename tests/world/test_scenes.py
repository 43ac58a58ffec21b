"""Scenes: for ever the same, and what is said of them is what is drawn."""

import hashlib
import importlib
import subprocess
import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from saccade.core.errors import InputError
from saccade.world.kinds import CO_OCCURRENCE, COLOURS, CONSONANTS, KINDS, PARTNER, SIZE, VOWELS
from saccade.world.scenes import SPLITS, Scene, Thing, letter_boxes, scene, scenes
from saccade.world.sprites import GLYPHS, SIZES, Sprite, sprite
from world.drawn import drawn, near

CHECKSUM = "1468b34358eda7fdd55a781672df6c3b11f1ae311f37d59d324377ff181d2422"


def silhouette(thing: Thing) -> Sprite:
    """The sprite that was drawn, found by the size of the box."""
    x0, y0, x1, y1 = thing.box
    for width in SIZES[thing.kind]:
        left, top, right, bottom = sprite(thing.kind, width).box
        if (right - left, bottom - top) == (x1 - x0, y1 - y0):
            return sprite(thing.kind, width)
    raise AssertionError(thing)


def full_mask(thing: Thing) -> np.ndarray:
    own = silhouette(thing)
    left, top, right, bottom = own.box
    x0, y0, x1, y1 = thing.box
    whole = np.zeros((SIZE, SIZE), bool)
    whole[y0:y1, x0:x1] = own.mask[top:bottom, left:right]
    return whole


def test_a_seed_is_a_picture_for_ever():
    digest = hashlib.sha256()
    for split in SPLITS:
        for seed in (*range(50), 2**32 - 1):
            one = scene(seed, split)
            digest.update(one.image.tobytes() + one.ids.tobytes() + repr((one.place, one.things)).encode())
    assert digest.hexdigest() == CHECKSUM


def test_a_scene_does_not_depend_on_what_was_drawn_before():
    alone = scene(5, "test")
    again = list(scenes(3, "test", start=3))[2]
    assert (alone.seed, alone.things) == (again.seed, again.things)
    assert (alone.image == again.image).all() and (alone.ids == again.ids).all()


def test_splits_share_no_picture():
    seen = {split: {one.image.tobytes() for one in drawn(split, 150)} for split in SPLITS}
    assert all(len(pictures) == 150 for pictures in seen.values())
    assert len(set.union(*seen.values())) == 150 * len(SPLITS)


def test_shapes_and_types():
    for one in drawn()[:50]:
        assert (one.image.shape, one.image.dtype) == ((SIZE, SIZE, 3), np.uint8)
        assert (one.ids.shape, one.ids.dtype) == ((SIZE, SIZE), np.int8)
        assert one.picture().size == (SIZE, SIZE) and (np.asarray(one.picture()) == one.image).all()
        assert set(np.unique(one.ids)) - {-1} == set(range(len(one.things)))
        assert [thing.depth for thing in one.things] == list(range(len(one.things)))


def test_boxes_masks_and_visible_shares_agree():
    for one in drawn():
        for i, thing in enumerate(one.things):
            whole, seen = full_mask(thing), one.mask(i)
            rows, columns = np.flatnonzero(whole.any(1)), np.flatnonzero(whole.any(0))
            assert thing.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert thing.centre == ((columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2)
            assert not (seen & ~whole).any()
            assert thing.visible == pytest.approx(seen.sum() / whole.sum())
            assert (one.ids[whole & ~seen] > i).all()  # only what is nearer hides it


def test_things_overlap_sometimes_and_never_by_much():
    hidden = [[thing for thing in one.things if thing.visible < 1] for one in drawn()]
    assert all(len(things) <= 1 for things in hidden)
    assert min(thing.visible for things in hidden for thing in things) >= 0.6
    assert not any(thing.kind == "sign" for things in hidden for thing in things)
    assert 0.1 < np.mean([len(things) for things in hidden]) < 0.2


def test_things_stand_on_the_raster():
    for thing in (thing for one in drawn() for thing in one.things):
        left, top, *_ = silhouette(thing).box
        assert (thing.box[0] - left) % 4 == (thing.box[1] - top) % 4 == 0


@pytest.fixture
def on(monkeypatch):
    """The scene of a seed before a grey, without noise, each thing in exactly its colour."""
    module = importlib.import_module("saccade.world.scenes")
    monkeypatch.setattr(module, "NOISE", 0)
    monkeypatch.setattr(module, "JITTER", 0)
    monkeypatch.setattr(module, "FAINT", 0)

    def on(grey: float, seed: int) -> Scene:
        ground = np.full((SIZE, SIZE, 3), grey, np.float32)
        monkeypatch.setattr(module, "background", lambda place, rng: ground)
        return scene(seed)

    return on


def apart(things: tuple[Thing, ...]) -> bool:
    def far(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        return any(a[i] > b[i + 2] + 2 or b[i] > a[i + 2] + 2 for i in range(2))

    return all(far(one.box, other.box) for one, other in combinations(things, 2))


def test_the_masks_are_what_is_painted(on):
    """A pixel is a thing's where less than half of what is behind shines through."""
    for seed in range(100):
        dark, light = on(0, seed), on(250, seed)
        through = (light.image.astype(float) - dark.image).max(-1) / 250
        if apart(dark.things):  # else two soft edges may meet
            assert ((through < 0.5) == (dark.ids >= 0)).all()


def test_the_nearest_is_painted_last_in_its_colour(on):
    overlaps = 0
    for seed in range(150):
        one = on(0, seed)
        for i, thing in enumerate(one.things):
            if thing.visible < 1:  # soft edges of what is nearer run into it
                overlaps += 1
                continue
            own = silhouette(thing)
            left, top, right, bottom = own.box
            x0, y0, x1, y1 = thing.box
            alpha, tint, added = (part[top:bottom, left:right] for part in own[:3])
            opaque = (alpha[..., 0] == 1) & one.mask(i)[y0:y1, x0:x1]
            for a, b, c, d in letter_boxes(thing):
                opaque[b - y0 : d - y0, a - x0 : c - x0] = False
            expected = np.array(COLOURS[thing.colour]) * tint + added
            assert opaque.sum() > 10
            assert np.abs(one.image[y0:y1, x0:x1] - expected)[opaque].max() < 0.51
    assert overlaps > 10


def test_a_thing_has_the_colour_that_is_said():
    """More of its pixels are near its own colour than near any other."""
    palette = np.array(list(COLOURS.values()), float)
    right = []
    for one in drawn()[:300]:
        for i, thing in enumerate(one.things):
            if thing.faint:
                continue
            pixels = one.image[one.mask(i)].astype(float)
            distance = np.linalg.norm(pixels[:, None] - palette, axis=-1)
            close = (distance < 60) & (distance == distance.min(1, keepdims=True))
            right.append(list(COLOURS)[close.sum(0).argmax()] == thing.colour)
    assert np.mean(right) > 0.99


def test_colours_are_well_apart():
    palette = np.array(list(COLOURS.values()), float)
    distance = np.linalg.norm(palette[:, None] - palette, axis=-1) + np.eye(len(palette)) * 999
    assert distance.min() > 85 and palette.max(1).min() > 150


def test_signs_can_be_read_from_the_picture():
    """The letter whose form separates dark from light best is the one that is said."""
    right, colours = [], set()
    for one in drawn():
        signs = [thing for thing in one.things if thing.kind == "sign"]
        texts = [thing.text for thing in signs]
        assert len(set(texts)) == len(texts)
        assert all(thing.text is None for thing in one.things if thing.kind != "sign")
        for thing in signs:
            first, middle, last = thing.text
            assert first in CONSONANTS and middle in VOWELS and last in CONSONANTS and first != last
            for letter, (x0, y0, x1, y1) in zip(thing.text, letter_boxes(thing), strict=True):
                assert thing.box[0] < x0 and x1 < thing.box[2] and thing.box[1] < y0 and y1 < thing.box[3]
                if thing.faint:
                    continue
                light = one.image[y0:y1, x0:x1].mean(-1)
                contrast = {g: light[~form].mean() - light[form].mean() for g, form in GLYPHS.items()}
                right.append(max(contrast, key=contrast.get) == letter)
                colours.add(thing.colour)
    assert len(right) > 300 and np.mean(right) > 0.995
    assert colours == set(COLOURS)


def test_every_sign_of_a_scene_has_its_own_word(monkeypatch):
    module = importlib.import_module("saccade.world.scenes")
    monkeypatch.setattr(module, "CONSONANTS", "CHL")
    monkeypatch.setattr(module, "VOWELS", "A")  # six words, so that chance would repeat one soon
    texts = [[thing.text for thing in scene(seed).things if thing.text] for seed in range(600)]
    assert all(len(set(words)) == len(words) for words in texts)
    assert sum(len(words) > 1 for words in texts) > 20


def test_letters_differ_by_several_pixels():
    forms = list(GLYPHS.values())
    assert min((a != b).sum() for i, a in enumerate(forms) for b in forms[:i]) >= 6


@pytest.mark.parametrize("split", ["train", "broken"])
def test_co_occurrence_is_what_is_planted(split):
    there, both, stray = Counter(), Counter(), Counter()
    for one in drawn(split):
        counts = one.counts()
        for anchor, partner in PARTNER.items():
            there[anchor] += counts[anchor] > 0
            both[anchor] += counts[anchor] > 0 and counts[partner] > 0
            stray[anchor] += counts[anchor] == 0 and counts[partner] > 0
    count = len(drawn(split))
    for anchor in PARTNER:
        planted = CO_OCCURRENCE[anchor] if split == "train" else 0.4
        assert near(both[anchor] / there[anchor], planted, there[anchor]), anchor
    alone = sum(stray.values()) / (count * len(PARTNER) - there.total())
    assert near(alone, 0.05 if split == "train" else 0.2, count * len(PARTNER) - there.total())


def test_the_prior_is_graded():
    assert min(CO_OCCURRENCE.values()) == 0.4 and max(CO_OCCURRENCE.values()) == 0.95
    assert len(set(CO_OCCURRENCE.values())) == len(PARTNER) == len(KINDS) // 2


def test_counts_and_unique():
    for one in drawn()[:100]:
        kinds = [thing.kind for thing in one.things]
        assert one.counts() == {kind: kinds.count(kind) for kind in kinds}
        assert one.unique() == [t for t in one.things if kinds.count(t.kind) == 1 and not t.faint]
    numbers = Counter(number for one in drawn() for number in one.counts().values())
    assert set(numbers) == {1, 2, 3, 4, 5} and min(numbers.values()) > 50


@pytest.mark.parametrize("split", ["train", "broken"])
def test_some_partners_can_hardly_be_seen(split):
    beside, faint = 0, 0
    for one in drawn(split):
        counts = one.counts()
        for anchor, partner in PARTNER.items():
            single = counts[anchor] > 0 and counts[partner] == 1
            beside += single
            faint += single and partner in one.faint()
        assert one.faint() <= {partner for anchor, partner in PARTNER.items() if counts[anchor]}
    assert near(faint / beside, 0.3, beside)


def test_a_veil_leaves_little_of_a_thing(on, monkeypatch):
    """On an even ground without noise, where it can be measured."""
    monkeypatch.setattr(importlib.import_module("saccade.world.scenes"), "FAINT", 1)
    seen = 0
    for seed in range(150):
        one = on(120, seed)
        for i, thing in enumerate(one.things if apart(one.things) else ()):
            off = np.abs(one.image[one.mask(i)].astype(float) - 120).max()
            assert off <= 0.08 * 135 + 1 if thing.faint else off > 60
            seen += thing.faint
    assert seen > 20


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "3", True, None])
def test_a_seed_that_is_none(seed):
    with pytest.raises(InputError, match=r"seed .* is out of range") as caught:
        scene(seed)
    assert "from 0 to 4294967295" in caught.value.remedy


@pytest.mark.parametrize(("count", "start"), [(0, 0), (-3, 0), (2.0, 0), (2, 2**32 - 1), (1, -1)])
def test_a_count_that_is_none(count, start):
    with pytest.raises(InputError, match=r"(count|first seed) .* is out of range"):
        scenes(count, start=start)


def test_an_unknown_split():
    for ask in (lambda: scene(0, "validation"), lambda: scenes(3, "validation")):
        with pytest.raises(InputError, match="'validation'") as caught:
            ask()
        assert "train, calibration, test, broken" in caught.value.remedy


def test_drawing_needs_no_torch():
    code = "import sys, saccade.world, saccade.world.sheet as s; s.sheet(1); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
