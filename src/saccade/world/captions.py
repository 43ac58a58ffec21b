"""A sentence that says all that a scene shows."""

from __future__ import annotations

import numpy as np

from saccade.core.errors import InputError
from saccade.world.kinds import ANCHORS, KINDS, NUMBERS, PARTNER
from saccade.world.scenes import Scene
from saccade.world.words import article

ASKED = "describe the image ."


def caption(scene: Scene, rng: np.random.Generator | None = None, noise: float = 0.0) -> str:
    """Anchors first, each with its partner; then what stands alone.

    What is faint has no colour. With `noise`, this share of the anchors whose partner is absent are described with
    one all the same. It is one number for all: what a model invents in proportion to co-occurrence is its own prior.
    """
    if not 0 <= noise <= 1 or (noise and rng is None):
        raise InputError(f"The noise {noise} cannot be drawn.", "give a share from 0 to 1, and a generator")
    counts, faint = scene.counts(), scene.faint()
    colours = {thing.kind: thing.colour for thing in scene.things}

    def named(kind: str) -> str:
        if kind in faint:
            return f"{article(kind)} {kind}"
        several = counts[kind] > 1
        return f"{NUMBERS[counts[kind]]} {kind}" if several else _one(colours[kind], kind)

    groups = []
    for anchor in filter(counts.get, ANCHORS):
        partner = PARTNER[anchor]
        group = named(anchor)
        if counts[partner]:
            group += f" with {named(partner)}"
        elif rng is not None and rng.random() < noise:
            group += f" with {article(partner)} {partner}"
        groups.append(group)
    alone = [partner for anchor, partner in PARTNER.items() if counts[partner] and not counts[anchor]]
    groups += map(named, alone)
    place = f"this is {article(scene.place)} {scene.place} ."
    if not groups:
        return f"{place} it is empty ."
    *before, last = groups
    return f"{place} there is {' , '.join(before)}{' , and ' if before else ''}{last} ."


def photo_of(kind: str, colour: str | None = None) -> str:
    return f"a photo of {_one(colour, kind) if colour else f'{article(kind)} {kind}'}"


def mentioned(caption: str) -> list[str]:
    """The kinds of things that a caption names, in its order."""
    words = caption.lower().replace(".", " ").replace(",", " ").split()
    return [word for word in dict.fromkeys(words) if word in KINDS]


def _one(colour: str, kind: str) -> str:
    return f"{article(colour)} {colour} {kind}"
