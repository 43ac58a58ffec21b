"""Look harder at the patches that hold detail, and at those that sum the picture up.

    local    a quarter of the patches, by the class token's attention in the vision tower's first layer
    summary  patches above Q3 + 1.5 * (Q3 - Q1) of its attention in the last layer but one
    z_j <- z_j + alpha * |z_j|      local, unless it is summary
    z_j <- z_j + beta * |z_j|       summary

z are the scores of the newest query before the softmax, in every head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.features import Item
from saccade.core.importance import note, noted, tower_attention
from saccade.core.layout import KINDS
from saccade.core.method import Method, Sites, option


@dataclass(eq=False)
class PAINT(Method):
    card = Card(
        slug="paint",
        name="PAINT",
        kind="method",
        family="steering",
        form="method",
        target="vlm",
        paper="Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language "
        "Model (Arif et al., 2025)",
        summary="Raise the scores of patches that hold detail and of those that sum the picture up",
        needs=("image",),
        neutral={"alpha": 0.0, "beta": 0.0},
        code="hasanar1f/llava-hallunication-fix",
        choices=(
            "The paper's spatial tokens rank row sums of the attention, which are all one: left out, as in the "
            "released code.",
            "Heads share alpha and beta, as in the released code; only their scores differ.",
            "Patches are ranked within their picture, tiles and all.",
            "In towers without a class token the attention that a patch receives, summed, stands in.",
        ),
        headline="hallucination rate reduced by up to 62.3% on MSCOCO",
        tags=("hallucination", "class token", "summary tokens", "local tokens", "attention scores"),
    )

    alpha: float = option(0.7, "by how much local tokens are raised; 0 changes nothing", low=0)
    beta: float = option(0.4, "by how much summary tokens are raised; 0 changes nothing", low=0)
    local: float = option(0.25, "share of the patches that is local", low=0, high=1)
    outlier: float = option(1.5, "interquartile ranges above Q3 from which a patch is summary", low=0)
    sites: Sites = option(
        {"observe": "vision.0.self|vision.-2.self", "scores": "text.2:.self"},
        "layers: of the tower the one that ranks local patches, then that of the summary; of the text",
    )
    rows: str | int = option("last", "query rows that are changed")

    def observe(self, call: AttentionCall) -> None:
        note(call, tower_attention(call))

    def features(self, item: Item) -> None:
        layers = [site.layer for site in item.run.places(self, "observe")]
        first, late = (noted(item, layer)[0] for layer in (min(layers, default=0), max(layers, default=0)))
        marks = torch.stack(choose(first, late, self.local, self.outlier), -1)
        item.run.state.setdefault("marks", {}).setdefault((item.kind, item.sample), []).append(marks)

    def acts(self, call: AttentionCall) -> bool:
        return (self.alpha, self.beta) != (0, 0) and self._marks(call).numel() > 0

    def scores(self, call: AttentionCall, s: Tensor) -> Tensor:
        local, summary = (call.at_columns(marks).to(s.dtype) for marks in self._marks(call).unbind(-1))
        return raised(s, self.alpha * local + self.beta * summary)

    def _marks(self, call: AttentionCall) -> Tensor:
        """Which tokens of the conversation are local, and which summary, up to the last that a picture gave:
        (batch, tokens, 2)."""
        kind, first, features = call.klayout.kind, call.run.start or 0, call.run.state.get("marks", {})
        known = call.state.get("marks", kind.new_zeros(kind.shape[0], 0, 2, dtype=torch.bool))
        if call.phase != "decode" and features and known.shape[1] < kind.shape[1]:
            before, known = known, kind.new_zeros(*kind.shape, 2, dtype=torch.bool)
            known[:, : before.shape[1]] = before
            for (name, sample), parts in features.items():
                for row in (call.klayout.sample == sample).nonzero()[:, 0].tolist():
                    places = first + (kind[row, first:] == KINDS.index(name)).nonzero()[:, 0]
                    known[row, places] = torch.cat(parts)[: len(places)].to(known.device)
            call.state["marks"] = known
        return known


def choose(first: Tensor, late: Tensor, share: float, outlier: float) -> tuple[Tensor, Tensor]:
    """Local and summary patches by attention in an early and in a late layer, (patches,) each, NaN for
    separators, which are neither."""
    patches = first.isfinite()
    local = torch.zeros_like(patches)
    local[first.nan_to_num(-torch.inf).topk(int(share * int(patches.sum()))).indices] = True
    low, high = late[patches].quantile(torch.tensor([0.25, 0.75], dtype=late.dtype, device=late.device))
    summary = late > high + outlier * (high - low)  # False for NaN
    return local & ~summary, summary


def raised(z: Tensor, gain: Tensor) -> Tensor:
    """Scores raised by a share of their own size; what is masked stays masked."""
    return torch.where(z > torch.finfo(z.dtype).min / 2, z + gain * z.abs(), z)
