"""Take from heads what they attend to, and see what is lost.

    w <- (1 - strength) * w + strength * target

    zero      0: the head says nothing
    context   alike on all keys that the row sees
    all       alike on all keys, later ones too
    rest      w without the first token, renormalised: the sink keeps the share 1 - strength

Heads and rows are chosen as for every method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.method import Method, Sites, option


@dataclass(eq=False)
class MuteHeads(Method):
    """For the heads of a probe: `heads=table.top(20)`, and `heads=table.random(20)` for comparison."""

    card = Card(
        slug="mute_heads",
        name="Muted heads",
        kind="method",
        family="probes",
        form="method",
        target="any-transformer",
        paper="",
        summary="Silence or flatten chosen heads, to see what depends on them",
        neutral={"strength": 0.0},
        choices=(
            "Of what the probes' papers do: zero is MAPS', context that of retrieval heads, all that of visual "
            "heads, rest that of OCR heads, whose beta is 1 - strength.",
        ),
        tags=("ablation", "head masking", "causal", "knockout", "attention sink", "head scores"),
    )

    to: str = option("zero", "what the weights become", choices=("zero", "context", "all", "rest"))
    strength: float = option(1.0, "how far; 0 changes nothing", low=0, high=1)
    sites: Sites = option("*.self", "layers")

    def weights(self, call: AttentionCall, w: Tensor) -> Tensor:
        return torch.lerp(w, self._target(call, w), self.strength)

    def _target(self, call: AttentionCall, w: Tensor) -> Tensor:
        if self.to == "zero":
            return torch.zeros_like(w)
        if self.to == "all":
            return evenly(call.columns("all").expand(w.shape), w)
        seen = call.scores(call.span, self.heads_at(call.site)) > torch.finfo(w.dtype).min / 2
        if self.to == "context":
            return evenly(seen, w)
        others = seen & ~call.columns("first")
        rest = w * others
        total = rest.sum(-1, keepdim=True)
        return torch.where(total > 0, rest / total, evenly(others, w))


def evenly(keys: Tensor, w: Tensor) -> Tensor:
    """Weights that these keys (batch, heads, rows, keys) share; `w` where there are none."""
    count = keys.sum(-1, keepdim=True)
    return torch.where(count > 0, keys / count.clamp_min(1), w).to(w.dtype)
