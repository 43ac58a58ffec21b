"""Find the heads that look at a place, whatever stands there.

    S_h = mean over rows i of  w_h[i, first]        a sink
                          or   w_h[i, i - offset]   a head of the previous token, of the one before, ...

Scores lie between 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.heads import Heads
from saccade.core.method import Method, Sites, option
from saccade.core.passes import Run


@dataclass(eq=False)
class PositionHeads(Method):
    """`session.results["position_heads"]` is a table of heads with an event for every sample of a prompt."""

    card = Card(
        slug="position_heads",
        name="Sink and offset heads",
        kind="method",
        family="probes",
        form="probe",
        target="llm",
        paper="",
        summary="Which heads look at the first token, or a fixed number of tokens back",
        needs=("first_token",),
        tags=("attention sink", "previous token head", "local heads", "offset", "head scores"),
    )

    offset: int = option(0, "tokens back; 0 for the first token of all", low=0)
    sites: Sites = option("text.*.self", "layers whose heads are scored")
    phases: tuple[str, ...] = option(("prefill",), "passes that are read")

    def observe(self, call: AttentionCall) -> None:
        total: Any = 0
        count: Any = 0
        for rows in call.chunks():
            there = self._places(call, rows)
            total = total + (call.weights(rows, keep=False) * there).sum((2, 3))  # (batch, heads)
            count = count + there.any(-1).sum(2)
        call.run.state.setdefault(call.site.name, []).append((total / count.clamp_min(1)).cpu())

    def _places(self, call: AttentionCall, rows: slice) -> Tensor:
        """Where each row should look: (batch, 1, rows, keys)."""
        if not self.offset:
            later = call.queries("all") & ~call.queries("first")
            return call.columns("first") & later[:, None, rows, None]
        batch = call.q.shape[0]
        back = call.qpos.expand(batch, -1)[:, rows, None] - self.offset
        return call.columns("all") & (call.kpos.expand(batch, -1)[:, None] == back)[:, None]

    def end(self, run: Run) -> Heads | None:
        if not run.state:
            return None
        layers = [torch.cat(calls) for calls in run.state.values()]  # (samples, heads)
        return Heads(self.card.slug, tuple(run.state), torch.stack(layers, 1))
