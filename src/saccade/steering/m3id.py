"""Amplify what the picture adds, the more the longer the answer has become.

    l_c, l_u   next word with the prompt, and with the prompt without its picture
    s_t        exp(lam * (t + t0)) - 1  for the answer's word t = 1, 2, ...; 0 where max p_c >= alpha
    logits     (1 + s_t) * l_c - s_t * l_u

The prompt without its picture is followed beside the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from saccade.core.branch import Branch
from saccade.core.card import Card
from saccade.core.method import Method, option
from saccade.core.passes import Pass, Run
from saccade.steering._parts.contrast import contrast, plausible
from saccade.steering._parts.prompts import without_pictures


@dataclass(eq=False)
class M3ID(Method):
    card = Card(
        slug="m3id",
        name="M3ID",
        kind="method",
        family="steering",
        form="method",
        target="vlm",
        paper="Multi-Modal Hallucination Control by Visual Information Grounding (Favero et al., 2024)",
        summary="Amplify what the picture adds, the more the longer the answer has become",
        needs=("image",),
        neutral={"lam": 0.0},
        choices=(
            "lam and alpha are those of an independent reimplementation (sangminwoo/AvisC), for there is no "
            "official code; it counts the answer's words from 1 and so do we.",
            "That reimplementation amplifies also where the model is sure, and cuts what is implausible: "
            "m3id(alpha=1.1, beta=0.1).",
            "Logits are mixed; log-probabilities differ by a number that a softmax takes out.",
            "The variant that is trained by preferences is no decoder and is left out.",
        ),
        headline="LLaVA 13B: 25% fewer hallucinated objects in captions; POPE accuracy +21%",
        tags=("hallucination", "contrastive decoding", "language prior", "visual grounding", "forgetting"),
    )

    lam: float = option(0.02, "growth of the strength by word; 0 changes nothing", low=0)
    t0: float = option(0.0, "words that count as said before; about 10 for yes-or-no questions", low=0)
    alpha: float = option(0.3, "probability of the likeliest word from which the model is sure", low=0)
    beta: float = option(0.0, "least probability of a word, as a share of the likeliest", low=0, high=1)

    def branches(self, run: Run) -> Iterable[Branch]:
        return [Branch(without_pictures(run))]

    def prediction(self, base: Tensor, branches: list[Tensor], p: Pass) -> Tensor:
        said = p.sequence.length - p.run.inputs["input_ids"].shape[1]
        unsure = base.softmax(-1).amax(-1, keepdim=True) < self.alpha
        return plausible(contrast(base, branches[0], unsure * self.strength(said + 1)), base, self.beta)

    def strength(self, t: int) -> float:
        """At the answer's word t."""
        return math.exp(self.lam * (t + self.t0)) - 1
