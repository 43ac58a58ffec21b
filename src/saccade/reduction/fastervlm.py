"""Send only those patches on that the vision tower's class token looks at.

    s_j   <- mean over heads of the class token's attention on patch j, in the layer whose features are used
    keep the K = round(keep * N) patches with the largest s, in their order

Nothing is merged, and no text is used: one selection serves many questions. Tiles and views are cut alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.features import Item
from saccade.core.importance import note, noted, tower_attention
from saccade.core.method import Method, Sites, option
from saccade.core.tokens import Tokens
from saccade.reduction._parts.choice import top_of_each


@dataclass(eq=False)
class FasterVLM(Method):
    card = Card(
        slug="fastervlm",
        name="FasterVLM",
        kind="method",
        family="reduction",
        form="method",
        target="vlm",
        paper="[CLS] Attention is All You Need for Training-Free Visual Token Pruning (Zhang et al., 2024)",
        summary="Keep the patches that the vision tower's class token attends to",
        needs=("image",),
        neutral={"keep": 1.0},
        code="Theia-4869/FasterVLM",
        choices=(
            "In towers without a class token the attention that a patch receives, summed, stands in.",
            "Features that several patches were merged into take the mean of their scores.",
            "Separators between rows of tiles stay, and positions close up, as in the released code.",
            "A tile keeps its share of what unpadding leaves; the released code unpads afterwards.",
        ),
        headline="95% of visual tokens pruned with 90% of LLaVA-1.5-7B performance kept",
        tags=("token pruning", "class token", "CLS attention", "training-free", "visual tokens"),
    )

    keep: float = option(
        0.25, "share of the visual tokens that stays, of every tile; 1 changes nothing", low=0, high=1
    )
    sites: Sites = option(
        {"observe": "vision.*.self"}, "where the tower attends; the layer of the features counts"
    )

    def observe(self, call: AttentionCall) -> None:
        if call.site.index == call.run.feature_layer:
            note(call, tower_attention(call))

    def features(self, item: Item) -> Tokens | None:
        if self.keep == 1:
            return None
        scores, tile = noted(item)
        return Tokens(top_of_each(scores, tile, self.keep), positions="renumber")
