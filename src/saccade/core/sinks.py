"""Tokens that draw attention whatever is asked.

A key is a sink where the last rows of the question, half of them or 16, give it ten times the even share of the
keys that all of them see, or 30% of their attention: a mean over heads and rows. The question's own words are none,
for they are what is asked, save where the sequence begins with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.core.errors import InputError

if TYPE_CHECKING:
    from saccade.core.call import AttentionCall

TIMES, SHARE, READERS = 10, 0.3, 16


def readers(question: Tensor) -> Tensor:
    """The rows that tell, of the question's (samples, rows): bool."""
    left = question.flip(1).cumsum(1).flip(1)
    return question & (left <= ((question.sum(1, keepdim=True) + 1) // 2).clamp_max(READERS))


def sinks(weights: Tensor, able: Tensor) -> Tensor:
    """Which keys are sinks (keys,), of those that can be, by what these rows give them (heads, rows, keys)."""
    if weights.shape[1] == 0:
        return torch.zeros(weights.shape[-1], dtype=torch.bool, device=weights.device)
    seen = (weights.amax(0) > 0).all(0)
    return able & seen & (weights.mean((0, 1)) >= (TIMES / seen.sum().clamp_min(1)).clamp_max(SHARE))


def sinks_of(call: AttentionCall, main: bool) -> Tensor:
    """Keys of a call that are sinks (batch, 1, 1, keys): in the main sequence those of the prompt that was
    read last, in a tower beside it those of all rows."""
    if call.site.kind != "self" or call.kpos.ndim == 3:
        raise InputError(
            f"{call.site.name} has no sinks: its keys are another sequence's, or its heads hold different ones.",
            "record other columns there",
        )
    if not main:
        every = torch.ones(call.k.shape[2], dtype=torch.bool, device=call.k.device)
        return torch.stack([sinks(w, every) for w in call.weights()])[:, None, None]
    name = f"sinks of {call.site.name}"
    if call.phase != "decode":
        rows = readers(call.queries("question"))
        at = rows.any(0).nonzero()[:, 0]
        first, last = (int(at[0]), int(at[-1]) + 1) if len(at) else (0, 0)
        weights, rows = call.weights(slice(first, last), keep=False), rows[:, first:last]
        able = (~call.columns("question") | call.columns("first"))[:, 0, 0]
        found = torch.stack([sinks(w[:, r], a) for w, r, a in zip(weights, rows, able, strict=True)])
        length = call.pass_.sequence.length
        mask = found.new_zeros(len(found), max(length, found.shape[1]) + 1)  # the last for empty slots
        mask.scatter_(1, call.kpos.expand(len(found), -1) % mask.shape[1], found)
        call.state[name] = mask[:, :length]
    if name not in call.state:
        raise InputError("The prompt was read before its sinks could be found.", "attach before the prompt")
    return call.at_columns(call.state[name])
