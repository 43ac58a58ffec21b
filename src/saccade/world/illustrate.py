"""A scene of what a caption says: the way back from words to a picture."""

from __future__ import annotations

import re

import numpy as np

from saccade.world.kinds import COLOURS, KINDS, NUMBERS, PLACES
from saccade.world.places import background
from saccade.world.scenes import MOST, Scene, _arranged, _draw, _sensed, _Wish
from saccade.world.sprites import SIZES


def illustrate(text: str, seed: int = 0) -> Scene:
    """The things that a caption names, plain to see, in the place and the colours that it names; the seed decides the
    rest. Words that the world does not have show nothing."""
    rng = np.random.default_rng(seed)
    words = re.findall("[a-z]+", text.lower())
    place = next((word for word in words if word in PLACES), [*PLACES][rng.integers(len(PLACES))])
    wishes: list[_Wish] = []
    for before, kind in zip(["", *words], words):
        if kind in KINDS:
            for _ in range(NUMBERS.index(before) if before in NUMBERS else 1):
                colour = before if before in COLOURS else [*COLOURS][rng.integers(len(COLOURS))]
                wishes.append(_Wish(kind, colour, SIZES[kind][rng.integers(2)]))
    image = background(place, rng)
    things, ids = _draw(image, _arranged(wishes[:MOST], rng), rng)
    return Scene(seed, "illustrated", place, _sensed(image, rng), things, ids)
