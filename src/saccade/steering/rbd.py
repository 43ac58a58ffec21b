"""Speak for what the picture's main tokens say, against what is said of a picture lost in noise.

    v        of every picture a share of its tokens, those that the prompt's last word attends to most
    logits   f(picture) + alpha * (f(v) - f(noise)),        where p(picture) >= beta * max p(picture)

Two prompts are followed beside the caller's: one sees v alone, one sees the picture after so many steps of
diffusion.
"""

from __future__ import annotations

import math
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
from saccade.steering._parts.contrast import plausible
from saccade.steering._parts.glance import by_kind, last_glance, of_item
from saccade.steering._parts.prompts import of_samples, repainted, seeing

STEPS = 1000


@dataclass(eq=False)
class RBD(Method):
    card = Card(
        slug="rbd",
        name="RBD",
        kind="method",
        family="steering",
        form="method",
        target="vlm",
        paper="Mitigating Hallucination in Visual-Language Models via Re-Balancing Contrastive Decoding "
        "(Liang et al., 2024)",
        summary="Add what the picture's main tokens say and subtract what is said of a noisy picture",
        needs=("image",),
        neutral={"alpha": 0.0, "beta": 0.0},
        sure="abstract",
        choices=(
            "How the branches are combined, the layer, the share and the strength are reconstructed from the "
            "abstract and from related decoders.",
            "Tokens that are not chosen are taken out, positions kept: nobody attends to them, and the "
            "attention on what stays still sums to one.",
            "Tokens are ranked within each picture, so that none of several goes unseen.",
            "Noise is that of visual contrastive decoding, the same for every picture, from the seed.",
        ),
        tags=("hallucination", "contrastive decoding", "visual branch", "textual branch", "noise"),
    )

    alpha: float = option(1.0, "strength of the two branches; 0 changes nothing", low=0)
    beta: float = option(0.1, "least probability of a word, as a share of the likeliest", low=0, high=1)
    share: float = option(0.5, "of the visual tokens that the visual branch sees", low=1e-6, high=1)
    noise: int = option(500, "steps of diffusion, of 1000; 0 is none", low=0, high=STEPS)
    seed: int = option(0, "of the noise")
    sites: Sites = option("text.50%.self", "the layer whose attention ranks the visual tokens")
    phases: tuple[str, ...] = option(("prefill", "extend"), "passes in which attention is read")

    def observe(self, call: AttentionCall) -> None:
        call.run.state["glance"] = last_glance(call)

    def branches(self, run: Run) -> Iterable[Branch]:
        inputs = seeing(run)
        layout, first = of_samples(run)
        glance = by_kind(layout, run.state["glance"][first])
        noisy = repainted(inputs, lambda pixels: diffused(pixels, self.noise, self.seed))
        return [Branch(inputs, methods=(Main(glance, self.share),)), Branch(noisy)]

    def prediction(self, base: Tensor, branches: list[Tensor], p: Pass) -> Tensor:
        visual, textual = branches
        return plausible(base + self.alpha * (visual - textual), base, self.beta)


@dataclass(eq=False)
class Main(Method):
    """The share of every picture's features, rounded up, that most attention falls on."""

    glance: Mapping[str, Tensor] = field(default_factory=dict)
    share: float = 1.0

    def features(self, item: Item) -> Tokens:
        values = of_item(item, self.glance)
        return Tokens(values.topk(math.ceil(self.share * len(values))).indices.sort().values)


def diffused(pixels: Tensor, steps: int, seed: int) -> Tensor:
    """sqrt(a) * pixels + sqrt(1 - a) * noise, where a is what the steps leave."""
    betas = torch.linspace(-6, 6, STEPS).sigmoid() * (5e-3 - 1e-5) + 1e-5
    left = (1 - betas[:steps]).prod()
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return left.sqrt().to(pixels) * pixels + (1 - left).sqrt().to(pixels) * noise.to(pixels)
