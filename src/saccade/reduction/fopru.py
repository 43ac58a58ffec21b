"""Send only those patches, or rows of patches, on that the others look at.

    s_j   <- sum over patches i of the mean over heads of A_ij, in the layer whose features are used
    K     = ceil(keep * N)
    rank: keep the K patches with the largest s;   row: the floor(K / W) rows of W patches with the largest sums

Nothing is merged, and no text is used. Tiles and views are cut alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.features import Item
from saccade.core.importance import note, noted, received
from saccade.core.method import Method, Sites, option
from saccade.core.tokens import Tokens
from saccade.reduction._parts.choice import of_each, top


@dataclass(eq=False)
class FoPru(Method):
    card = Card(
        slug="fopru",
        name="FoPru",
        kind="method",
        family="reduction",
        form="method",
        target="vlm",
        paper="FoPru: Focal Pruning for Efficient Large Vision-Language Models (Jiang et al., 2024)",
        summary="Keep the patches, or whole rows of them, that the vision tower's other patches attend to",
        needs=("image",),
        neutral={"keep": 1.0},
        sure="abstract",
        choices=(
            "Significance is the mean over heads and patches, without the class token's row and column; the "
            "mean over all patches of a picture is their sum but for a constant.",
            "Features that several patches were merged into take the mean of their scores.",
            "Every tile and view has a budget of its own, for what is received sums to one in each; "
            "separators stay.",
            "At least one patch, or one row, of a tile stays.",
        ),
        tags=("token pruning", "received attention", "rows", "training-free", "visual tokens"),
    )

    keep: float = option(
        0.25, "share of the visual tokens that stays, of every tile; 1 changes nothing", low=0, high=1
    )
    strategy: str = option("rank", "single patches or whole rows", choices=("rank", "row"))
    sites: Sites = option(
        {"observe": "vision.*.self"}, "where the tower attends; the layer of the features counts"
    )

    def observe(self, call: AttentionCall) -> None:
        if call.site.index == call.run.feature_layer:
            note(call, received(call))

    def features(self, item: Item) -> Tokens | None:
        if self.keep == 1:
            return None
        scores, tile = noted(item)
        row = item.grid()[:, 1] if self.strategy == "row" else None

        def pick(mine: Tensor) -> Tensor:
            budget = max(1, math.ceil(self.keep * len(mine)))
            return top(scores[mine], budget) if row is None else top_rows(scores[mine], row[mine], budget)

        return Tokens(of_each(tile, pick), positions="renumber")


def top_rows(scores: Tensor, row: Tensor, budget: int) -> Tensor:
    """Of a tile the whole rows with the highest sums, as many as the budget holds: (tokens,), bool."""
    rows = int(row.max()) + 1
    sums = scores.new_zeros(rows).index_add(0, row, scores)
    return top(sums, max(1, budget * rows // len(scores)))[row]
