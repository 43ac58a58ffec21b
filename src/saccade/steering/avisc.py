"""Subtract what the tokens alone would say that draw too much attention to themselves.

    a_l      attention of the prompt's last word on the picture in layer l, mean over heads
    layers   the fewest whose sums of a_l make up gamma of the sum over all
    blind    tokens with a >= mean + lam * deviation,                   a = mean of a_l over these layers
    logits   (1 + alpha) * f(picture) - alpha * f(blind),   where p(picture) >= beta * max p(picture)

The second prompt is the same, the features of all other tokens being zero; it is followed beside the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.core.branch import Branch
from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.features import Item
from saccade.core.method import Method, Sites, option
from saccade.core.passes import Pass, Run
from saccade.core.tokens import Tokens
from saccade.steering._parts.contrast import contrast, plausible
from saccade.steering._parts.glance import by_kind, last_glance, of_item
from saccade.steering._parts.prompts import of_samples, seeing


@dataclass(eq=False)
class AVISC(Method):
    card = Card(
        slug="avisc",
        name="AvisC",
        kind="method",
        family="steering",
        form="method",
        target="vlm",
        paper="Don't Miss the Forest for the Trees: Attentional Vision Calibration for Large Vision Language "
        "Models (Woo et al., 2024)",
        summary="Contrast the prompt with one that sees only the tokens that draw too much attention",
        needs=("image",),
        neutral={"alpha": 0.0, "beta": 0.0},
        code="sangminwoo/AvisC",
        choices=(
            "Layers and blind tokens are chosen for every sample; the released code takes one sample at a time.",
            "lam is 1; the released scripts give 0.99.",
            "Where the second prompt gives no number there is none; the released code takes the first one's.",
        ),
        tags=("hallucination", "contrastive decoding", "blind tokens", "attention sink", "calibration"),
    )

    alpha: float = option(1.0, "how much of the blind tokens is subtracted; 0 changes nothing", low=0)
    beta: float = option(0.1, "least probability of a word, as a share of the likeliest", low=0, high=1)
    gamma: float = option(
        0.5, "share of the attention on the picture that the layers make up", low=1e-6, high=1
    )
    lam: float = option(1.0, "deviations above the mean from which a token is blind")
    sites: Sites = option("text.*.self", "layers to choose among")
    phases: tuple[str, ...] = option(("prefill", "extend"), "passes in which attention is read")

    def observe(self, call: AttentionCall) -> None:
        if call.pass_.complete:
            call.run.state.setdefault("glances", {})[call.site] = last_glance(call)

    def branches(self, run: Run) -> Iterable[Branch]:
        inputs = seeing(run)
        layout, first = of_samples(run)
        glances = torch.stack([*run.state["glances"].values()])[:, first]
        blind = blind_tokens(glances, layout.where("visual"), self.gamma, self.lam)
        return [Branch(inputs, methods=(Only(by_kind(layout, blind)),))]

    def prediction(self, base: Tensor, branches: list[Tensor], p: Pass) -> Tensor:
        return plausible(contrast(base, branches[0], self.alpha), base, self.beta)


@dataclass(eq=False)
class Only(Method):
    """Zeros in place of all features but some."""

    chosen: Mapping[str, Tensor] = field(default_factory=dict)

    def features(self, item: Item) -> Tokens:
        mine = of_item(item, self.chosen)
        return Tokens(torch.ones_like(mine), values=item.x * mine[:, None])


def blind_tokens(glances: Tensor, visual: Tensor, gamma: float, lam: float) -> Tensor:
    """Among attention (layers, samples, tokens), of which only `visual` (samples, tokens) counts: (samples, tokens)."""
    a = glances * visual
    share, order = (a.sum(-1) / a.sum((0, -1))).sort(0, descending=True)  # (layers, samples)
    needed = share.cumsum(0) - share < gamma
    a = (a.gather(0, order[..., None].expand_as(a)) * needed[..., None]).sum(0) / needed.sum(0)[:, None]
    count = visual.sum(-1, keepdim=True)
    mean = a.sum(-1, keepdim=True) / count
    deviation = ((a - mean).square() * visual).sum(-1, keepdim=True).div(count - 1).sqrt()
    return visual & (a >= mean + lam * deviation)
