"""Subtract what the picture's outlier tokens alone would say.

    outliers   the k patches that the vision tower's class token attends to most, mean over heads
    logits     (1 + alpha) * f(picture) - alpha * f(outliers),   where p(picture) >= beta * max p(picture)

The second prompt is the same, its picture being the k outliers only; it is followed beside the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.branch import Branch
from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.features import Item
from saccade.core.importance import note, noted, tower_attention
from saccade.core.method import Method, option
from saccade.core.passes import Pass, Run
from saccade.core.tokens import Tokens
from saccade.steering._parts.contrast import contrast, plausible
from saccade.steering._parts.prompts import with_pictures


@dataclass(eq=False)
class DAMRO(Method):
    card = Card(
        slug="damro",
        name="DAMRO",
        kind="method",
        family="steering",
        form="method",
        target="vlm",
        paper="DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination "
        "(Gong et al., 2024)",
        summary="Contrast the prompt with one that sees only the picture's outlier tokens",
        needs=("image",),
        neutral={"alpha": 0.0, "beta": 0.0},
        code="coder-gx/DAMRO",
        choices=(
            "Attention is that of the heads, averaged; the released LLaVA code softmaxes unsplit heads.",
            "Outliers keep their order, and positions close up; the released code sorts them by attention.",
            "k is the paper's 10 of 576 patches as a share, so that it fits towers of any size.",
            "In towers without a class token the attention that a patch receives, summed, stands in.",
        ),
        tags=("hallucination", "contrastive decoding", "outlier tokens", "class token", "register tokens"),
    )

    alpha: float = option(1.0, "how much of the outliers is subtracted; 0 changes nothing", low=0)
    beta: float = option(0.1, "least probability of a token, as a share of the likeliest", low=0, high=1)
    k: float = option(10 / 576, "outliers: a share of the patches, or from 1 on their number", low=0)

    def branches(self, run: Run) -> Iterable[Branch]:
        inputs = with_pictures(run)
        if inputs is None:  # nothing but words
            return []
        return [Branch(inputs, methods=(Outliers(self.k, sites={"observe": "vision.*.self"}),))]

    def prediction(self, base: Tensor, branches: list[Tensor], p: Pass) -> Tensor:
        if not branches:
            return base
        return plausible(contrast(base, branches[0], self.alpha), base, self.beta)


@dataclass(eq=False)
class Outliers(Method):
    """Of every picture the k patches with the most attention, and nothing else."""

    k: float = 1.0

    def observe(self, call: AttentionCall) -> None:
        if call.site.index == call.run.feature_layer:
            note(call, tower_attention(call))

    def features(self, item: Item) -> Tokens:
        scores, _ = noted(item)
        patches = int(scores.isfinite().sum())
        scores = scores.nan_to_num(-torch.inf)  # separators come last
        count = max(1, round(self.k * patches)) if self.k < 1 else min(int(self.k), len(scores))
        return Tokens(scores.topk(count).indices.sort().values, positions="renumber")
