"""How much tokens matter, by attention over some of them alone."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.call import AttentionCall, take_rows


def attended(query: Tensor, keys: Tensor, among: Tensor) -> Tensor:
    """Mean over heads of the softmax of query . key over the tokens `among`: (batch, tokens)."""
    s = (keys @ query.mT)[..., 0]
    s = s if s.dtype == torch.float64 else s.float()
    return s.masked_fill(~among[:, None], -torch.inf).softmax(-1).mean(1)


def by_last_word(call: AttentionCall, among: Tensor) -> Tensor:
    """Attention of the last word over those tokens of the pass alone: (batch, tokens)."""
    k = call.k[:, :, -among.shape[1] :].repeat_interleave(call.groups, 1)
    return attended(take_rows(call.q, call.resolve("last")) * call.scale, k, among)
