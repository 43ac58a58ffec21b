"""What a model of pictures and words has made alike: a scene's caption among others, and what a closeup shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from saccade.core.errors import InputError
from saccade.core.samples import to_model
from saccade.evals.interval import wilson
from saccade.evals.task import Scores
from saccade.world.captions import caption, photo_of
from saccade.world.kinds import COLOURS, KINDS
from saccade.world.scenes import closeup, scenes

GROUP = 64
SPLITS = ("test", "broken")


def measure(
    model: Any, processor: Any, count: int, seed: int = 0, batch: int = 64
) -> dict[str, dict[str, Scores]]:
    """Scores by split and task, on so many scenes of each split."""
    if count < GROUP:
        raise InputError(f"{count} scenes make no group of {GROUP}.", f"take {GROUP} at least")
    return {
        split: {
            "retrieval": retrieval(model, processor, count, split),
            "zero-shot": zero_shot(model, processor, count, split, seed, batch),
        }
        for split in SPLITS
    }


def retrieval(model: Any, processor: Any, count: int, split: str) -> Scores:
    """Among 64 scenes, the caption of each and the scene of each caption."""
    found: dict[str, list[bool]] = {"caption": [], "scene": []}
    drawn = list(scenes(count, split))
    for start in range(0, count - GROUP + 1, GROUP):
        group = drawn[start : start + GROUP]
        said = [caption(one) for one in group]
        alike = likeness(model, processor, [one.picture() for one in group], said)
        for name, axis in (("caption", 1), ("scene", 0)):
            best = alike.argmax(axis)
            found[name] += [said[one] == told for one, told in zip(best, said, strict=True)]
    return {f"{name} of {GROUP}": wilson(sum(hits), len(hits)) for name, hits in found.items()}


def zero_shot(model: Any, processor: Any, count: int, split: str, seed: int, batch: int) -> Scores:
    """Of a thing in every scene, its kind among all, and its colour where the kind is told."""
    rng = np.random.default_rng(seed)
    shown = ((one, one.plain()) for one in scenes(count, split))
    near = [(one, things[rng.integers(len(things))]) for one, things in shown if things]
    texts = [photo_of(kind) for kind in KINDS] + [photo_of(kind, hue) for kind in KINDS for hue in COLOURS]
    kinds = colours = 0
    for start in range(0, len(near), batch):
        some = near[start : start + batch]
        alike = likeness(model, processor, [closeup(*one) for one in some], texts)
        for (_, thing), own in zip(some, alike, strict=True):
            kind, hue = KINDS.index(thing.kind), list(COLOURS).index(thing.colour)
            kinds += own[: len(KINDS)].argmax() == kind
            colours += own[len(KINDS) :].reshape(len(KINDS), -1)[kind].argmax() == hue
    return {"kind": wilson(kinds, len(near)), "colour": wilson(colours, len(near))}


@torch.no_grad()
def likeness(model: Any, processor: Any, images: Sequence[Image], texts: Sequence[str]) -> np.ndarray:
    """(pictures, texts)"""
    inputs = processor(text=list(texts), images=list(images), padding=True, return_tensors="pt")
    out = model(**{name: to_model(model, value) for name, value in inputs.items()})
    logits: np.ndarray = out.logits_per_image.float().cpu().numpy()
    return logits
