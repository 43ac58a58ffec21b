"""Patches that leave inside of the vision tower, and the features that are then left."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.core.features import Item
from saccade.core.importance import note, noted

LEFT = "left"


def note_left(call: AttentionCall) -> None:
    """Remember which of the tower's tokens have come to this layer."""
    ones = call.q.new_ones(call.q.shape[0], call.q.shape[2], dtype=torch.float32)
    note(call, at_full(call, ones), LEFT)


def at_full(call: AttentionCall, values: Tensor) -> Tensor:
    """Values of the tokens that are left (tiles, left) for all that came to the tower, 0 for the others."""
    if call.keep is None:
        return values
    full = values.new_zeros(values.shape[0], call.pass_.full(call.site))
    return full.scatter_add(1, call.keep.clamp_min(0), values * (call.keep >= 0))


def survivors(item: Item) -> Tensor:
    """The features whose patch was left, and separators: (tokens,), bool."""
    left, tile = noted(item, what=LEFT)
    if bool(((left > 0) & (left < 1)).any()):
        raise InputError(
            f"{type(item.run.method).__name__} lets patches leave one by one, and this projector makes a feature of "
            "several.",
            "let none leave the tower, or use a model that makes a feature of each patch, such as LLaVA",
        )
    return (left == 1) | (tile < 0)
