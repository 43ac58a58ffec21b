"""Read the whole picture in the first layers, and ever less of it in those above.

    at the end of stage s = 1, 2, ..:  keep int(keep^s * N) of the N tokens of each picture, in their order,
                                       those with the largest   mean over heads of a_hj
    a_hj = attention of the last word of the instruction on token j, in the first layer of the next stage

What is dropped is gone for good, and positions are counted anew. Where labels are given, in training, a_hj
is the mean over the words that answers follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.card import Card
from saccade.core.method import Method, Sites, option
from saccade.core.tokens import Tokens, TokensCall
from saccade.reduction._parts.choice import highest


@dataclass(eq=False)
class PyramidDrop(Method):
    card = Card(
        slug="pyramiddrop",
        name="PyramidDrop",
        kind="method",
        family="reduction",
        form="method",
        target="vlm",
        paper="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy "
        "Reduction (Xing et al., 2024)",
        summary="Drop visual tokens stage by stage, by the attention of the last word",
        needs=("image",),
        neutral={"keep": 1.0},
        code="Cooperx521/PyramidDrop",
        choices=(
            "Every picture is thinned out by itself; the released code serves one picture in a prompt.",
            "Positions are counted anew after each drop, as in the released code.",
            "Where labels are given the words before the answers rank, in training and in evaluation; a "
            "sample without an answer keeps everything.",
            "The paper's drops behind layers 8, 16 and 24 of 32 scale with the model's depth.",
        ),
        headline="LLaVA-NeXT: 40% less training time, 55% fewer inference FLOPs at comparable performance",
        tags=("token pruning", "visual redundancy", "progressive", "training acceleration"),
    )

    keep: float = option(
        0.5, "share of a picture's tokens that each stage leaves; 1 drops none", low=0, high=1
    )
    sites: Sites = option(
        "text.25%.layer|text.50%.layer|text.75%.layer", "the first layer of each later stage"
    )
    phases: tuple[str, ...] = option(("prefill", "extend"), "passes in which tokens are dropped")

    def tokens(self, call: TokensCall) -> Tokens | None:
        stages = call.run.places(self, "tokens")
        stage = 1 + stages.index(call.site)
        pictures = call.items("visual")
        if not pictures:
            return None
        if stage == 1:
            call.run.state["sizes"] = [picture.sum(1, keepdim=True) for picture in pictures]
        score, known = self._ranking(call)
        keep = ~call.tokens("visual")
        for picture, size in zip(pictures, call.run.state["sizes"], strict=True):
            budget = (size.double() * self.keep**stage).long()
            keep |= highest(score, picture, budget) | (picture & ~known)
        return Tokens(keep, positions="renumber")

    def _ranking(self, call: TokensCall) -> tuple[Tensor, Tensor]:
        """Of the tokens that are there (batch, tokens), and which samples have words that rank (batch, 1)."""
        ahead, tokens = call.peek(), call.h.shape[1]
        labels = call.pass_.inputs.get("labels")
        if labels is None:
            call.pass_.check_complete()
            score = ahead.weights("last").mean(1)[:, 0, -tokens:]
            return score, torch.ones_like(score[:, :1], dtype=torch.bool)
        answer = torch.nn.functional.pad(labels != -100, (0, 1))
        asks = call.left(~answer[:, :-1] & answer[:, 1:])  # words that an answer follows: (batch, tokens)
        counts = asks.sum(1, keepdim=True)
        rows = asks.int().sort(dim=1, descending=True, stable=True).indices[:, : max(1, int(counts.max()))]
        w = ahead.weights(rows).mean(1)[..., -tokens:] * asks.gather(1, rows)[..., None]
        return w.sum(1) / counts.clamp_min(1), counts > 0
