"""Send only those patches on that the class token looks at in several layers of the vision tower.

    s_j   <- sum over the layers from the start layer to that of the features
                 of the mean over heads of the class token's attention on patch j
    keep the K = round(keep * N) patches with the largest s, in their order

Nothing is merged, and no text is used. Tiles and views are cut alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.features import Item
from saccade.core.importance import note, noted, tower_attention
from saccade.core.method import Method, Sites, option
from saccade.core.tokens import Tokens
from saccade.reduction._parts.choice import top_of_each

OVER: dict[str, Callable[..., Tensor]] = {"sum": torch.sum, "min": torch.amin, "max": torch.amax}


@dataclass(eq=False)
class VTCCLS(Method):
    card = Card(
        slug="vtc_cls",
        name="VTC-CLS",
        kind="method",
        family="reduction",
        form="method",
        target="vlm",
        paper="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs (Wang et al., 2024)",
        summary="Keep the patches that the class token attends to, over several layers of the tower",
        needs=("image",),
        neutral={"keep": 1.0},
        code="THU-MIG/VTC-CLS",
        choices=(
            "The paper tunes the start layer for each task; here it is the tower's fourth from the end unless "
            "sites= says another.",
            "In towers without a class token the attention that a patch receives, summed, stands in.",
            "Features that several patches were merged into take the mean of their scores.",
            "Every tile and view keeps its share, and separators stay; the released code serves one view.",
        ),
        tags=("token pruning", "class token", "CLS attention", "training-free", "visual tokens"),
    )

    keep: float = option(
        0.25, "share of the visual tokens that stays, of every tile; 1 changes nothing", low=0, high=1
    )
    over: str = option("sum", "how the layers' scores become one", choices=("sum", "min", "max"))
    sites: Sites = option(
        {"observe": "vision.-4:.self"},
        "the start layer and those above; up to that of the features they count",
    )

    def observe(self, call: AttentionCall) -> None:
        if call.site.layer <= call.run.feature_layer:
            note(call, tower_attention(call))

    def features(self, item: Item) -> Tokens | None:
        if self.keep == 1:
            return None
        scores, tile = noted(item, over=OVER[self.over])
        return Tokens(top_of_each(scores, tile, self.keep), positions="renumber")
