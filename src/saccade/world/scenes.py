"""Scenes, drawn from a seed: what stands where, in what colour, and what hides what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from saccade.core.errors import InputError
from saccade.world.kinds import (
    ANCHORS,
    CO_OCCURRENCE,
    COLOURS,
    CONSONANTS,
    PARTNER,
    PLACES,
    SIZE,
    VOWELS,
)
from saccade.world.places import background
from saccade.world.sprites import GLYPHS, INK, LETTER, OWN, PITCH, SIZES, Sprite, lettering, sprite

SPLITS = ("train", "calibration", "test", "broken")
"""Disjoint. In the last, co-occurrence is broken: all partners are equally likely beside their anchors."""

SEEDS = 2**32
RASTER = 4  # pixels: where things may begin
MOST = 9  # things, unless there are more kinds
LEAST_VISIBLE = 0.6  # of a thing

STRAY = 0.05  # P(partner is there | anchor is not)
BROKEN = 0.4  # P(partner is there | anchor is there) where co-occurrence is broken
BROKEN_STRAY = 0.2

USUAL = 0.8  # of the anchors belong to the place
AGAIN = (0.22, 0.06)  # that an anchor, or a partner, is there once more, and again
CROWD = 0.2  # of the scenes: one kind three to five times
ONE_COLOUR = 0.18  # of the scenes: all things but one have one colour
NEAR = 0.5  # of the partners stand near their anchor
OVERLAP = 0.21  # of the scenes try to put one thing before another
HIDDEN = (0.06, 1 - LEAST_VISIBLE)  # of the farther one
TRIES = 60
JITTER = 10  # of a thing's colour
NOISE = 32  # of the sensor, at most
FAINT = 0.3  # of the single partners beside their anchor
VEIL = 0.08  # that is left of a faint thing's colours
MARGIN = 8  # pixels around a thing, in a closeup


@dataclass(frozen=True)
class Thing:
    """Something in a scene. `box` is that of its whole silhouette, also where another hides a part. What is faint
    can hardly be told from the background: whoever says that it is there knows it from its anchor."""

    kind: str
    colour: str
    box: tuple[int, int, int, int]
    depth: int  # 0 is the farthest; its index in the scene too
    visible: float  # share of its pixels
    text: str | None = None
    faint: bool = False

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and all that is true of it."""

    seed: int
    split: str
    place: str
    image: np.ndarray  # (SIZE, SIZE, 3), uint8
    things: tuple[Thing, ...]
    ids: np.ndarray  # (SIZE, SIZE), int8: the index of the thing that is seen, -1 for the background

    def counts(self) -> Counter[str]:
        return Counter(thing.kind for thing in self.things)

    def mask(self, index: int) -> np.ndarray:
        """Where a thing is seen."""
        return self.ids == index

    def picture(self) -> Image.Image:
        return Image.fromarray(self.image)

    def unique(self) -> list[Thing]:
        """The things that are the only one of their kind, and plain to see."""
        counts = self.counts()
        return [thing for thing in self.plain() if counts[thing.kind] == 1]

    def plain(self) -> list[Thing]:
        """The things that can be told from the background."""
        return [thing for thing in self.things if not thing.faint]

    def faint(self) -> set[str]:
        """The kinds of which something is faint."""
        return {thing.kind for thing in self.things if thing.faint}


def scene(seed: int, split: str = "train") -> Scene:
    """The scene of that seed: for ever the same."""
    _check(split, "seed", seed, 0, SEEDS - 1)
    rng = np.random.default_rng([SPLITS.index(split), seed])
    place = list(PLACES)[rng.integers(len(PLACES))]
    image = background(place, rng)
    things, ids = _draw(image, _arranged(_wanted(place, split, rng), rng), rng)
    return Scene(seed, split, place, _sensed(image, rng), things, ids)


def scenes(count: int, split: str = "train", start: int = 0) -> Iterator[Scene]:
    """The scenes of the seeds from `start` on."""
    _check(split, "count", count, 1, SEEDS)
    _check(split, "first seed", start, 0, SEEDS - count)
    return (scene(seed, split) for seed in range(start, start + count))


def closeup(scene: Scene, thing: Thing) -> Image.Image:
    """A square around a thing, within the picture."""
    x0, y0, x1, y1 = thing.box
    side = min(SIZE, max(x1 - x0, y1 - y0) + 2 * MARGIN)
    left, top = (round(min(max(0, middle - side / 2), SIZE - side)) for middle in thing.centre)
    return scene.picture().crop((left, top, left + side, top + side))


def letter_boxes(sign: Thing) -> list[tuple[int, int, int, int]]:
    """Where every letter of a sign is."""
    x0, y0, x1, _ = sign.box
    x, y = lettering(x1 - x0)
    starts = [x0 + x + PITCH * i for i in range(len(sign.text or ""))]
    return [(start, y0 + y, start + LETTER[0], y0 + y + LETTER[1]) for start in starts]


def _check(split: str, name: str, value: int, low: int, high: int) -> None:
    if split not in SPLITS:
        raise InputError(f"There is no split {split!r}.", f"use {', '.join(SPLITS)}")
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise InputError(
            f"The {name} {value!r} is out of range.", f"give a whole number from {low} to {high}"
        )


@dataclass(eq=False)
class _Wish:
    """A thing that is to be drawn, with its place once it has one."""

    kind: str
    colour: str
    width: int
    faint: bool = False
    depth: int = 0
    x: int = 0
    y: int = 0

    @property
    def sprite(self) -> Sprite:
        return sprite(self.kind, self.width)

    @property
    def box(self) -> tuple[int, int, int, int]:
        x0, y0, x1, y1 = self.sprite.box
        return self.x + x0, self.y + y0, self.x + x1, self.y + y1


def _wanted(place: str, split: str, rng: np.random.Generator) -> list[_Wish]:
    """What is to be drawn: one of each kind first, then what is there more than once."""
    anchors: list[str] = []
    for _ in range(rng.choice(4, p=(0.03, 0.29, 0.43, 0.25))):
        among = PLACES[place] if rng.random() < USUAL else ANCHORS
        anchor = among[rng.integers(len(among))]
        if anchor not in anchors:
            anchors.append(anchor)
    broken = split == "broken"
    kinds = list(anchors)
    for anchor, partner in PARTNER.items():
        if anchor in anchors:
            likely = BROKEN if broken else CO_OCCURRENCE[anchor]
        else:
            likely = BROKEN_STRAY if broken else STRAY
        if rng.random() < likely:
            kinds.append(partner)
    return _themed(kinds, rng)


def _themed(kinds: list[str], rng: np.random.Generator) -> list[_Wish]:
    """How many of each kind, how large, and in what colours."""
    again = [kind for kind in kinds for likely in AGAIN if rng.random() < likely]
    colours = [str(name) for name in rng.permutation(list(COLOURS))]
    several = [kind for kind in kinds if kind != "sign"]
    theme, crowd, odd = rng.random(), "", ""
    if several and theme < CROWD:
        crowd = several[rng.integers(len(several))]
        again = [crowd] * int(rng.integers(2, 5))
    elif several and len(kinds) > 1 and theme < CROWD + ONE_COLOUR:
        often = several[rng.integers(len(several))]
        others = [kind for kind in kinds if kind != often]
        odd = others[rng.integers(len(others))]
        again = [often] * int(rng.integers(1, 3))
    wishes, every = [], kinds + again[: max(0, MOST - len(kinds))]
    beside = {PARTNER[kind] for kind in kinds if kind in PARTNER}
    for kind in every:
        colour = colours[int(kind == odd)] if odd else colours[rng.integers(len(colours))]
        width = SIZES[kind][0 if kind == crowd else rng.integers(2)]
        faint = kind in beside and every.count(kind) == 1 and rng.random() < FAINT
        wishes.append(_Wish(kind, colour, width, faint))
    return wishes


def _arranged(wishes: list[_Wish], rng: np.random.Generator) -> list[_Wish]:
    """Those that found room, from the farthest to the nearest."""
    for wish, depth in zip(wishes, rng.permutation(len(wishes))):
        wish.depth = int(depth)
    piled = int(rng.integers(1, len(wishes))) if len(wishes) > 1 and rng.random() < OVERLAP else None
    placed: list[_Wish] = []
    for number, wish in enumerate(wishes):
        beside = None
        if number == piled:
            beside = placed[rng.integers(len(placed))]
        elif rng.random() < NEAR:
            beside = next((other for other in placed if PARTNER.get(other.kind) == wish.kind), None)
        for attempt in range(TRIES):
            if attempt == TRIES // 2:
                beside = None
            _put(wish, beside, rng)
            touched = [other for other in placed if _touch(wish.box, other.box)]
            if number == piled and beside:
                fits = touched == [beside] and _layered(wish, beside)
            else:
                fits = not touched
            if fits:
                placed.append(wish)
                break
    return sorted(placed, key=lambda wish: wish.depth)


def _put(wish: _Wish, beside: _Wish | None, rng: np.random.Generator) -> None:
    """Anywhere on the raster, or around another thing."""
    height, width = wish.sprite.mask.shape
    right, bottom = (SIZE - width) // RASTER, (SIZE - height) // RASTER
    left = top = 0
    if beside:
        x0, y0, x1, y1 = beside.box
        left, right = max(0, (x0 - width) // RASTER), min(right, x1 // RASTER + 1)
        top, bottom = max(0, (y0 - height) // RASTER), min(bottom, y1 // RASTER + 1)
    wish.x = RASTER * int(rng.integers(left, right + 1))
    wish.y = RASTER * int(rng.integers(top, bottom + 1))


def _touch(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def _layered(a: _Wish, b: _Wish) -> bool:
    """Whether the nearer hides some of the farther, and not too much; never a word."""
    far, near = sorted((a, b), key=lambda wish: wish.depth)
    if far.kind == "sign":
        return False
    ground = np.zeros((SIZE, SIZE), bool)
    _window(ground, far)[far.sprite.mask] = True
    hidden = (_window(ground, near) & near.sprite.mask).sum() / far.sprite.mask.sum()
    return bool(HIDDEN[0] <= hidden <= HIDDEN[1])


def _window(plane: np.ndarray, wish: _Wish) -> np.ndarray:
    height, width = wish.sprite.mask.shape
    return plane[wish.y : wish.y + height, wish.x : wish.x + width]


def _draw(
    image: np.ndarray, wishes: list[_Wish], rng: np.random.Generator
) -> tuple[tuple[Thing, ...], np.ndarray]:
    ids = np.full((SIZE, SIZE), -1, np.int8)
    texts: list[str | None] = []
    for i, wish in enumerate(wishes):
        alpha, tint, own, mask, _ = wish.sprite
        colour = np.array(COLOURS[wish.colour], np.float32) + rng.integers(-JITTER, JITTER + 1, 3)
        window = _window(image, wish)
        before = window.copy()
        window[:] = window * (1 - alpha) + colour * tint + own
        texts.append(_write(window, wish.width, texts, rng) if wish.kind == "sign" else None)
        if wish.faint:
            window[:] = before + VEIL * (window - before)
        _window(ids, wish)[mask] = i
    seen = np.bincount(ids.ravel() + 1, minlength=len(wishes) + 1)[1:]
    return tuple(
        Thing(
            wish.kind, wish.colour, wish.box, i, float(seen[i] / wish.sprite.mask.sum()), texts[i], wish.faint
        )
        for i, wish in enumerate(wishes)
    ), ids


def _write(board: np.ndarray, width: int, taken: list[str | None], rng: np.random.Generator) -> str:
    """A word that no other sign has, in the signs' own letters."""
    while True:
        first, last = rng.choice(len(CONSONANTS), 2, replace=False)
        word = CONSONANTS[first] + VOWELS[rng.integers(len(VOWELS))] + CONSONANTS[last]
        if word not in taken:
            break
    x, y = lettering(width)
    for letter in word:
        board[y : y + LETTER[1], x : x + LETTER[0]][GLYPHS[letter]] = OWN[INK]
        x += PITCH
    return word


def _sensed(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """With the noise of a sensor, from whole numbers, so that it is the same on every machine."""
    grain = np.frombuffer(rng.bytes(2 * image.size), np.uint8).reshape(2, *image.shape).sum(0, dtype=np.int16)
    strength = float(rng.random()) * NOISE / 255
    noisy = image + (grain - 255).astype(np.float32) * np.float32(strength)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
