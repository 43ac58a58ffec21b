"""Let visual tokens leave by attention without positions, and early only beside a sample of the whole picture.

    a_j     <- mean over heads of softmax_j(q . k_j / sqrt(dim)) over the picture's tokens; q of the prompt's last
               word and k_j, none of them rotated, in the layer below
    stage 1 keep the int(keep * N) largest, and every `stride`-th row and column
    stage 2 keep the int(keep^2 * n) largest of the n that are left

Positions stay. Words neither leave nor count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.features import Item
from saccade.core.method import Method, Sites, option
from saccade.core.site import layers
from saccade.core.tokens import Tokens, TokensCall, gather_tokens
from saccade.reduction._parts.choice import highest
from saccade.reduction._parts.importance import by_last_word


@dataclass(eq=False)
class Feather(Method):
    card = Card(
        slug="feather",
        name="FEATHER",
        kind="method",
        family="reduction",
        form="method",
        target="vlm",
        paper="Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration "
        "(Endo et al., 2024)",
        summary="Drop visual tokens in two stages, by attention without positions and on a grid",
        needs=("image",),
        neutral={"keep": 1.0},
        code="markendo/FEATHER",
        choices=(
            "The paper's drops before layers 8 and 16 of 32 scale with the model's depth.",
            "Every picture is ranked and thinned out by itself; the released code serves one in a prompt.",
            "Rows and columns are those of every tile and view; separators between rows leave as other tokens do.",
        ),
        headline="more than 5x better on localization benchmarks than the original acceleration at comparable "
        "savings",
        tags=(
            "token pruning",
            "rotary",
            "position bias",
            "uniform sampling",
            "localization",
            "training-free",
        ),
    )

    keep: float = option(
        0.3, "share of the visual tokens that attention keeps; 1 changes nothing", low=0, high=1
    )
    stride: int = option(3, "of the rows and columns of which the first stage keeps every one", low=1)
    stages: tuple[str, str] = option(("25%", "50%"), "layers before which tokens leave")
    sites: Sites = option(
        {"tokens": "text.*.layer"}, "layers of which the stages are some, and those below them"
    )
    phases: tuple[str, ...] = option(("prefill", "extend"), "passes in which tokens leave")

    def features(self, item: Item) -> None:
        if self.keep == 1:
            return
        place = item.grid()[:, 1:]
        sample = (place >= 0).all(1) & (place % self.stride == 0).all(1)
        item.run.state.setdefault(item.kind, []).append(sample)

    def tokens(self, call: TokensCall) -> Tokens | None:
        pictures = call.items("visual")
        if self.keep == 1 or not pictures:
            return None
        first, second = (layers(stage, call.site.depth)[0] for stage in self.stages)
        if not 0 < first < second:
            raise InputError(
                f"Feather's stages {self.stages} are layers {first} and {second} of {call.site.depth}.",
                "name two layers, one after the other, above the lowest",
            )
        keep = torch.ones_like(pictures[0])
        if call.layer in (first, second):
            keep = self._chosen(call, pictures, call.layer == first)
        if call.layer + 1 in (first, second):  # it may be where the first stage ends
            call.pass_.check_complete()
            ahead, index = call.peek(rotated=False), Tokens(keep).index(*keep.shape)
            score = (by_last_word(ahead, picture & keep) for picture in pictures)
            call.run.state["score"] = [gather_tokens(each, index, -1) for each in score]
        return Tokens(keep) if call.layer in (first, second) else None

    def _chosen(self, call: TokensCall, pictures: list[Tensor], first: bool) -> Tensor:
        keep = ~call.tokens("visual")
        for kind in ("image", "video") if first else ():
            if kind in call.run.state:
                keep |= call.of_features(kind, call.run.state[kind])
        for picture, score in zip(pictures, call.run.state["score"], strict=True):
            count = (picture.sum(1, keepdim=True).double() * self.keep ** (1 if first else 2)).long()
            keep |= highest(score, picture, count)
        return keep
