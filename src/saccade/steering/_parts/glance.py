"""Where the last word of a prompt looks, and the features of pictures that are chosen by it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.features import Item
from saccade.core.layout import Layout


def last_glance(call: AttentionCall) -> Tensor:
    """Attention of the last row, mean over heads, by place in the conversation: (rows, tokens), 0 for those
    that left."""
    w = call.weights("last")[:, :, 0]  # (rows, heads, keys)
    place = call.kpos
    if place.ndim == 2:
        place = place[:, None]
    elif place.ndim == 3:
        place = place.repeat_interleave(call.groups, 1)
    spread = w.new_zeros(*w.shape[:2], call.pass_.sequence.length)
    spread.scatter_add_(2, place.clamp_min(0).expand_as(w), w * (place >= 0))
    return spread.mean(1)


def by_kind(layout: Layout, values: Tensor) -> dict[str, Tensor]:
    """Of values of a prompt's tokens (samples, tokens) those of its features, all items in order."""
    return {kind: values[layout.where(kind)] for kind in ("image", "video")}


def of_item(item: Item, values: Mapping[str, Tensor]) -> Tensor:
    """Those of one item's features: (tokens,)."""
    return values[item.kind][item.first : item.first + len(item.x)].to(item.x.device)
