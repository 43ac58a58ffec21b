"""Where in a model what a prompt says is carried: clean states put back into a corrupted run.

recovery = (score(patched) - score(corrupted)) / (score(clean) - score(corrupted))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.core.method import Method
from saccade.core.passes import HiddenCall
from saccade.core.session import Session
from saccade.core.site import Site
from saccade.probes._parts.sweep import Score, sweep

ROUNDING = 1e-6  # of the clean score: clean and corrupted differ by more, or not at all


class Patch(NamedTuple):
    """What is put back in one run. At an attention site it is what its heads give, before it is mixed."""

    site: Site
    where: Tensor  # (tokens,), bool
    heads: tuple[int, ...] | None = None  # of an attention site; None for all


class Traced(NamedTuple):
    """Scores: of two runs (...), and of the corrupted one with each patch (patches, ...)."""

    clean: Tensor
    corrupted: Tensor
    patched: Tensor

    @property
    def recovery(self) -> Tensor:
        """0 for what restores nothing, 1 for what restores everything: (patches, ...)."""
        gap = self.clean - self.corrupted
        if bool((gap.abs() <= ROUNDING * self.clean.abs()).any()):
            raise InputError(
                "The corrupted prompt scores as the clean one does: there is nothing to recover.",
                "corrupt what the answer depends on",
            )
        return (self.patched - self.corrupted) / gap


def trace(
    session: Session,
    clean: Mapping[str, Any],
    corrupted: Mapping[str, Any],
    patches: Sequence[Patch],
    score: Score,
    rows: int,
) -> Traced:
    """A pass for each of two prompts of one length, and one for every `rows` patches."""
    check_lengths(clean, corrupted)
    sites = by_event({patch.site for patch in patches})
    keep = Keep(sites=sites)
    before = score(session.forward(clean, [keep], last_only=True).logits[:, -1])[0]
    after = score(session.forward(corrupted, last_only=True).logits[:, -1])[0]

    def restore(some: Sequence[Patch]) -> Restore:
        return Restore(sites=sites, states=keep.states, patches=some)

    return Traced(before, after, sweep(session, corrupted, patches, restore, score, rows))


def check_lengths(clean: Mapping[str, Any], corrupted: Mapping[str, Any]) -> None:
    lengths = [inputs["input_ids"].shape[1] for inputs in (clean, corrupted)]
    if lengths[0] != lengths[1]:
        raise InputError(
            f"The clean prompt has {lengths[0]} tokens, the corrupted one {lengths[1]}.",
            "corrupt it by words, or pictures, of as many tokens",
        )


def by_event(sites: set[Site]) -> dict[str, tuple[str, ...]]:
    """Heads are patched inside of attention, states behind a module."""
    inside = tuple(site.name for site in sites if site.seam != "module")
    return {"output": inside, "hidden": tuple(site.name for site in sites if site.seam == "module")}


@dataclass(eq=False)
class Keep(Method):
    """The states of one run, by site."""

    states: dict[str, Tensor] = field(default_factory=dict)

    def output(self, call: AttentionCall, o: Tensor) -> Tensor:
        self.states[call.site.name] = o.clone()
        return o

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        self.states[call.site.name] = h.clone()
        return h


@dataclass(eq=False)
class Restore(Method):
    """Every row of the batch with a patch of its own."""

    states: Mapping[str, Tensor] = field(default_factory=dict)
    patches: Sequence[Patch] = ()

    def output(self, call: AttentionCall, o: Tensor) -> Tensor:
        heads = torch.zeros(o.shape[:2], dtype=torch.bool)
        for row, patch in zip(heads, self.patches, strict=True):
            row[slice(None) if patch.heads is None else list(patch.heads)] = True
        where = self._where(call.site)[:, None, :, None] & heads[:, :, None, None]
        return torch.where(where.to(o.device), self.states[call.site.name], o)

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        where = self._where(call.site)[:, :, None]
        return torch.where(where.to(h.device), self.states[call.site.name], h)

    def _where(self, site: Site) -> Tensor:
        """(rows, tokens)"""
        return torch.stack([patch.where.cpu() & (patch.site.name == site.name) for patch in self.patches])
