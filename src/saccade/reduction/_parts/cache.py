"""Entries of a cache that stay, or that are read."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.errors import InputError


def slots(keep: Tensor) -> Tensor:
    """Indices of what stays (..., kept), in order, -1 on the left of those that keep fewer."""
    most = int(keep.sum(-1).max())
    index = keep.long().sort(dim=-1, stable=True).indices[..., -most:]
    return torch.where(keep.gather(-1, index), index, -1)


def positions(call: AttentionCall) -> Tensor:
    """Of every key: (batch, key heads, keys), -1 for none."""
    pos = call.kpos
    return (pos[:, None] if pos.ndim == 2 else pos).expand(call.k.shape[:3])


def chosen(call: AttentionCall, kept: Tensor) -> AttentionCall:
    """The call with these entries alone: positions (batch, key heads, entries) in any order, -1 for none."""
    if call.position_bias is not None:
        raise InputError(
            f"{call.site.name} adds a bias of its own to every pair, which cannot follow chosen entries.",
            "use a model whose positions are rotations or embeddings",
        )
    pos = positions(call)
    slot = torch.searchsorted(pos.contiguous().cummax(-1).values, kept.contiguous())
    slot = slot.clamp_max(pos.shape[-1] - 1)
    there = (pos.gather(-1, slot) == kept) & (kept >= 0)
    part = call.part(slice(None), call.pass_, 0)
    part.k, part.v = (t.gather(2, slot[..., None].expand(-1, -1, -1, t.shape[-1])) for t in (call.k, call.v))
    slot, there = (t.repeat_interleave(call.groups, 1)[:, :, None] for t in (slot, there))
    lowest = torch.finfo(call.q.dtype).min
    mask = torch.zeros_like(there, dtype=call.q.dtype).masked_fill(~there, lowest)
    mask = mask.expand(*call.q.shape[:3], -1)
    allowed = call.allowed(call.resolve("all"))
    if allowed is not None:
        if allowed.dtype == torch.bool:
            allowed = torch.zeros_like(allowed, dtype=call.q.dtype).masked_fill(~allowed, lowest)
        allowed = allowed.expand(*call.q.shape[:3], -1).gather(3, slot.expand_as(mask))
        mask = (mask + allowed).clamp_min(lowest)
    part.mask, part.causal, part.window, part.segments, part.pos = mask, False, None, None, None
    return part
