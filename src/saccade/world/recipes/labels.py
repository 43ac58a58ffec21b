"""Pictures, and what their patches show."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.world.architectures import MEAN, STD
from saccade.world.kinds import COLOURS, GRID, KINDS, LETTERS, PATCH, PLACES
from saccade.world.scenes import Scene, letter_boxes
from saccade.world.train import Batch

TOKENS = GRID * GRID
NONE = -100  # no label


def shown(scenes: list[Scene]) -> Batch:
    labels = [patches(one) for one in scenes]
    return {
        "whole": torch.from_numpy(np.stack([whole(one) for one in scenes])),
        **{name: torch.from_numpy(np.stack([own[name] for own in labels])) for name in labels[0]},
    }


def patches(seen: Scene) -> dict[str, np.ndarray]:
    """What every patch shows most of: (tokens,) kind, colour, letter, and which letter of its word."""
    ids = seen.ids.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(TOKENS, -1)
    kind, colour = np.full(TOKENS, len(KINDS)), np.full(TOKENS, NONE)
    most = np.full(TOKENS, 0.08 * PATCH * PATCH)
    for number, thing in enumerate(seen.things):
        area = (ids == number).sum(1)
        here = area > most
        told = KINDS.index(thing.kind), list(COLOURS).index(thing.colour)
        kind[here], colour[here] = (NONE, NONE) if thing.faint else told
        most = np.maximum(most, area)
    letter, order, most = np.full(TOKENS, NONE), np.full(TOKENS, NONE), np.full(TOKENS, 0.0)
    corner = PATCH * np.arange(GRID)
    for thing in seen.unique():
        for number, (x0, y0, x1, y1) in enumerate(letter_boxes(thing)):
            wide = np.clip(np.minimum(corner + PATCH, x1) - np.maximum(corner, x0), 0, None)
            high = np.clip(np.minimum(corner + PATCH, y1) - np.maximum(corner, y0), 0, None)
            area = np.outer(high, wide).reshape(-1)
            here = area > np.maximum(most, 8)
            letter[here], order[here] = LETTERS.index((thing.text or "")[number]), number
            most = np.maximum(most, area)
    return {"patch kind": kind, "patch colour": colour, "patch letter": letter, "patch order": order}


def whole(seen: Scene) -> np.ndarray:
    """Which kinds are there, and which place it is."""
    there = [float(kind in seen.counts()) for kind in KINDS]
    return np.array(there + [float(place == seen.place) for place in PLACES], np.float32)


def pixels(images: list[np.ndarray]) -> Tensor:
    """(pictures, 3, height, width)"""
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Zero where there is nothing to tell."""
    told = (labels != NONE).sum().clamp_min(1)
    return F.cross_entropy(logits, labels, ignore_index=NONE, reduction="sum") / told
