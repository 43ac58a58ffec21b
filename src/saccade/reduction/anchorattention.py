"""Read a prompt by its beginning, the own stretch, and the columns that come near the largest score there.

    m_i       = max over the first block and i's own group, up to i, of  q_i . k_j / sqrt(dim)
    column j  is seen by a group of blocks when  mean(m) - mean(q) . k_j / sqrt(dim) <= theta
              for one of its blocks of queries
    query i   attends to the first block, its group up to i, and the columns of its group between them

No key leaves the cache; what is written on the prompt attends to all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.method import Method, Sites, option
from saccade.ops.anchorattention import pattern
from saccade.ops.blocks import attend
from saccade.reduction._parts.prefill import by_prompt


@dataclass(eq=False)
class AnchorAttention(Method):
    card = Card(
        slug="anchorattention",
        name="AnchorAttention",
        kind="method",
        family="reduction",
        form="method",
        target="llm",
        paper="AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity (2025)",
        summary="Read a prompt by the columns whose scores come near the largest at its beginning and near by",
        needs=("first_token",),
        neutral={"theta": 1e30},
        choices=(
            "Beginning, columns and own group share no key and leave none out; the released code counts some of the "
            "beginning twice and never sees the block in front of a group.",
            "The anchor's scores are made once for the choice and again for the output, in one softmax over all.",
            "A later part of a conversation is read densely, and so is what is written.",
        ),
        headline="1.44x faster than the best before at 128k, with higher recall",
        tags=("sparse attention", "prefill", "long context", "vertical stripes", "training-free"),
    )

    theta: float = option(12.0, "how far below the anchor a column's score may lie, in natural-log units")
    block: int = option(128, "keys of the beginning, and queries that are averaged", low=1)
    group: int = option(16, "blocks of queries that share columns", low=1)
    sites: Sites = option("text.*.self", "layers")
    phases: tuple[str, ...] = option(("prefill",), "passes in which it acts; others attend as ever")

    def replace(self, call: AttentionCall) -> Tensor:
        def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            chosen = pattern(q, k, block=self.block, group=self.group, theta=self.theta, scale=call.scale)
            return attend(q, k, v, chosen, scale=call.scale)

        return by_prompt(call, sparse)
