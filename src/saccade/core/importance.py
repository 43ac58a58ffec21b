"""What a vision tower itself finds important, for methods of every family."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.core.features import Item
from saccade.core.passes import Run
from saccade.core.site import Site


def class_token(call: AttentionCall) -> Tensor | None:
    """Where the class token of every tile stands, (tiles, 1); None in towers without one."""
    ahead = call.columns("special")[:, 0, 0]
    return ahead.int().argmax(1, keepdim=True) if bool(ahead.any(1).all()) else None


def tower_attention(call: AttentionCall) -> Tensor:
    """(batch, tokens): attention of the class token, mean over heads; in towers without one, what a token
    receives, so that windows of every size count alike."""
    row = class_token(call)
    return received(call) if row is None else call.weights(row).mean(1)[:, 0]


def received(call: AttentionCall) -> Tensor:
    """(batch, tokens): attention that a token receives from all patches, mean over heads, summed."""
    ahead = int(call.columns("special").sum(-1).max())  # class and register tokens
    total = call.q.new_zeros(call.q.shape[0], call.k.shape[2], dtype=torch.float32)
    for rows in call.chunks(slice(ahead, None)):
        total += call.weights(rows, keep=False).mean(1).sum(1)
    return total


def note(call: AttentionCall, values: Tensor, what: str = "") -> None:
    """Keep what a site of the tower says of its tokens, (tiles, tokens), until their features come."""
    _notes(call.run, what).setdefault(call.site, []).append(values)


def noted(
    item: Item, layer: int | None = None, over: Callable[[Tensor, int], Tensor] = torch.sum, what: str = ""
) -> tuple[Tensor, Tensor]:
    """What was noted of each feature, at a layer of the tower or `over` all of them; and its tile: (tokens,), NaN
    and -1 for separators."""
    seen = {site: calls for site, calls in _notes(item.run, what).items() if layer in (None, site.index)}
    if not seen:
        raise InputError(
            f"No attention was seen in the tower that made these {item.kind} features.",
            "let sites= name the tower's attention, as in sites={observe: video.*.self}",
        )
    site, calls = list(seen.items())[-1]
    layers = torch.stack([torch.cat([call.flatten() for call in each]) for each in seen.values()])
    parts = over(layers, 0).split([call.numel() for call in calls])
    return item.from_tower(site, [part.view_as(call) for part, call in zip(parts, calls, strict=True)])


def _notes(run: Run, what: str) -> dict[Site, list[Tensor]]:
    return run.state.setdefault("notes", {}).setdefault(what, {})
