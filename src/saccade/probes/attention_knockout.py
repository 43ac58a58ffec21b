"""Keep some tokens from seeing others.

    s_ij <- -inf    for rows i of the target and columns j of the source

What else the rows see makes up for it: their weights still sum to 1. Stays on the fused kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.method import Method, Sites, option
from saccade.probes._parts.knockout import severed


@dataclass(eq=False)
class AttentionKnockout(Method):
    card = Card(
        slug="attention_knockout",
        name="Attention knockout",
        kind="method",
        family="probes",
        form="method",
        target="vlm",
        paper="Dissecting Recall of Factual Associations in Auto-Regressive Language Models (Geva et al., 2023)",
        summary="Keep some tokens from seeing others, such as words from the picture, in some layers",
        neutral={"source": ""},
        choices=(
            "A row that would see nothing at all is refused; the lowest score would make it see everything.",
        ),
        tags=("attention knockout", "information flow", "blocking", "ablation", "interpretability"),
    )

    source: str = option(
        "image", "tokens that are not seen: a kind or segment, or several (image|question); empty is none"
    )
    target: str = option("last|generated", "tokens that do not see them")
    sites: Sites = option("text.*.self", "layers")

    def bias(self, call: AttentionCall) -> Tensor | None:
        return severed(call, call.rows(self.target), call.columns(self.source)) if self.source else None
