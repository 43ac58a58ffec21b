"""Attention to a whole prompt by another operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.errors import InputError


def by_prompt(call: AttentionCall, operator: Callable[..., Tensor], *beside: Tensor) -> Tensor:
    """What `operator(q, k, v, *beside)` gives for causal prompts without padding: all at once where nothing is
    padded, otherwise one by one, and 0 for padding."""
    real = check_prompt(call)
    given = (call.q, call.k, call.v, *beside)
    if bool(real.all()):
        return operator(*given)
    out = call.v.new_zeros(*call.q.shape[:3], call.v.shape[3])
    for b, words in enumerate(real):
        index = words.nonzero()[:, 0]
        out[b, :, index] = operator(*(t[b : b + 1, :, index] for t in given))[0]
    return out


def check_prompt(call: AttentionCall) -> Tensor:
    """Refuse what is no causal attention of a whole prompt. Which of its tokens are real: (batch, tokens)."""
    name = type(call.run.method).__name__
    call.pass_.check_complete("reads a prompt at once")
    if call.q.shape[2] != call.k.shape[2] or (call.pos is not None and call.pos.ndim == 3):
        raise InputError(
            f"{name} reads whole prompts, and at {call.site.name} the keys are not those of the queries.",
            "use a dynamic cache that is empty at first, and leave phases= as it is",
        )
    beside = {
        "a soft cap": call.softcap,
        "sinks": call.sinks,
        "a term for positions": call.position_bias,
        "a window": call.window,
        "several sequences in one row": call.segments,
    }
    found = [what for what, given in beside.items() if given is not None]
    real = call.queries("all")
    if not found and not _is_causal(call, real):
        found = ["another mask than the causal one"]
    if found:
        raise InputError(
            f"{name} takes the place of plain causal attention, and {call.site.name} has {found[0]}.",
            "name other layers with sites=, or attach it to a model without that",
        )
    return real


def _is_causal(call: AttentionCall, real: Tensor) -> bool:
    """Whether real queries see all real keys up to themselves, and no others."""
    if call.mask is None:
        return (call.causal or call.q.shape[2] == 1) and bool(real.all())
    at = torch.arange(call.k.shape[2], device=call.k.device)
    for span in call.chunks():
        allowed = call.allowed(span)
        if allowed is None:
            return False
        sees = allowed if allowed.dtype == torch.bool else allowed == 0
        expected = real[:, None, None, :] & (at <= at[span, None])
        if not bool(((sees == expected) | ~real[:, None, span, None]).all()):
            return False
    return True
