"""Keeping some tokens from seeing others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.core.method import Method


@dataclass(frozen=True)
class Cut:
    """A knockout between positions of one prompt, in some of the layers."""

    source: Tensor  # (tokens,), bool
    target: Tensor
    layers: range


@dataclass(eq=False)
class Cuts(Method):
    """Every row of the batch with a knockout of its own."""

    cuts: Sequence[Cut] = ()

    def bias(self, call: AttentionCall) -> Tensor | None:
        here = [call.site.layer in cut.layers for cut in self.cuts]
        if not any(here):
            return None
        target = torch.stack([cut.target & acts for cut, acts in zip(self.cuts, here, strict=True)])
        source = torch.stack([cut.source for cut in self.cuts])
        target, source = target.to(call.q.device), source.to(call.q.device)
        return severed(call, target[:, None, :, None], source[:, None, None, :])


def severed(call: AttentionCall, target: Tensor, source: Tensor) -> Tensor:
    """The term of the scores by which queries (batch, 1, queries, 1) do not see keys (batch, 1, 1, keys)."""
    cut = target & source
    seen = call.allowed(slice(0, call.q.shape[2]))
    if seen is None:
        seen = torch.ones_like(cut)
    elif seen.dtype != torch.bool:
        seen = seen > torch.finfo(seen.dtype).min / 2
    if bool((seen.any(-1) & ~(seen & ~cut).any(-1)).any()):
        raise InputError(
            f"At {call.site.name} some of the tokens would see nothing at all.",
            "leave them something to see: themselves, or the first token",
        )
    return torch.zeros(cut.shape, dtype=call.q.dtype, device=call.q.device).masked_fill(
        cut, torch.finfo(call.q.dtype).min
    )
