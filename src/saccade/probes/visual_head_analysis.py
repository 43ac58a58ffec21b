"""Find the heads that look at the picture, and at little of it.

    weight_h        = sum over image tokens of a_h       a_h: attention in the row that says the answer
    concentration_h = 1 - H(a_h / weight_h) / log n
    S_h             = weight_h * concentration_h

n counts the image tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.heads import Heads
from saccade.core.method import option
from saccade.core.record import Recording
from saccade.core.recorder import Record
from saccade.core.reduce import entropy
from saccade.probes._parts.scored import Scored, shown


@dataclass(eq=False)
class VisualHeadAnalysis(Scored):
    """`session.results["visual_head_analysis"]` has three tables of heads, `weight`, `concentration` and
    `score`, with an event for every sample, in order: `table.where(right)` are those of right answers."""

    card = Card(
        slug="visual_head_analysis",
        name="Visual heads",
        kind="method",
        family="probes",
        form="probe",
        target="vlm",
        paper="Unveiling Visual Perception in Language Models: An Attention Head Analysis Approach (Bi et al., 2025)",
        summary="Which heads look at the picture, how much, and at how little of it",
        needs=("image",),
        code="jing-bi/visual-head",
        sure="abstract",
        choices=(
            "The score is the product of weight and concentration, and entropy is measured in units of log n: "
            "the paper writes neither out.",
            "With a box the weight is that on its tokens; concentration is always that on the whole picture.",
        ),
        headline="none (4 model families, 4 scales)",
        tags=(
            "visual heads",
            "attention weight",
            "entropy",
            "concentration",
            "head scores",
            "interpretability",
        ),
    )

    word: int = option(0, "which written word is the answer, counted from 0", low=0)
    box: tuple[float, ...] | None = option(
        None, "a region whose weight is measured: x0, y0, x1, y1; none: all"
    )

    def recorder(self) -> Record:
        return Record(sites=self.sites, columns="image", dtype="float32")

    def judge(self, seen: Recording, sample: int) -> list[Tensor]:
        found = seen.map(sample=sample)
        row = (torch.tensor(found.labels["row"]) == seen.answer_start + self.word - 1).nonzero()[:, 0]
        if not len(row):
            raise InputError(
                f"Word {self.word} was not written.", "generate more words, or take an earlier one"
            )
        w = found.tensor[:, :, row[0]]  # (sites, heads, image tokens)
        chosen = shown(seen, sample, self.box)[torch.tensor(found.labels["column"])]
        return [torch.stack([w[..., chosen].sum(-1), concentration(w)])]

    def table(self, seen: Recording, events: list[Tensor]) -> dict[str, Heads]:
        weight, sharp = torch.stack(events).unbind(1)
        scored = {"weight": weight, "concentration": sharp, "score": weight * sharp}
        names = tuple(site.name for site in seen.sites)
        return {kind: Heads(f"visual_head_analysis {kind}", names, of) for kind, of in scored.items()}


def concentration(w: Tensor) -> Tensor:
    """0 where all columns of (..., columns) have alike, 1 where one has everything."""
    return 1 - entropy(w)[..., 0] / math.log(max(2, w.shape[-1]))


def correlations(a: Heads, b: Heads) -> tuple[float, float]:
    """Of the heads' scores in two tables, Pearson's and Spearman's."""
    pair = torch.stack([a.scores.flatten(), b.scores.flatten()]).double()
    ranks = pair.argsort(1).argsort(1).double()
    return float(pair.corrcoef()[0, 1]), float(ranks.corrcoef()[0, 1])
