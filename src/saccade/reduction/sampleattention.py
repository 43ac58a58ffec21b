"""Read a prompt by the keys near by and the fewest columns that answer a sample of its queries.

    c_j     = sum over sampled queries i of softmax_j(q_i . k_j / sqrt(dim))
    columns   of each head: the fewest, largest first, with  sum c_j >= alpha sum of all c
    query i   attends to the columns up to i, and to the last `window` share of the prompt before it

No key leaves the cache; what is written on the prompt attends to all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.method import Method, Sites, option
from saccade.ops.blocks import attend
from saccade.ops.sampleattention import pattern
from saccade.reduction._parts.prefill import by_prompt


@dataclass(eq=False)
class SampleAttention(Method):
    card = Card(
        slug="sampleattention",
        name="SampleAttention",
        kind="method",
        family="reduction",
        form="method",
        target="llm",
        paper="SampleAttention: Near-Lossless Acceleration of Long Context LLM Inference with Adaptive Structured "
        "Sparse Attention (Zhu et al., 2024)",
        summary="Read a prompt by a window and the columns that a sample of queries attends to",
        needs=("first_token",),
        neutral={"alpha": 1.0},
        sure="abstract",
        choices=(
            "Sampled queries are counted from the prompt's end, so that the last is one of them.",
            "The window's share of a column counts as the column's: a column inside of every window may be chosen.",
            "A later part of a conversation is read densely, and so is what is written.",
        ),
        headline="up to 2.42x lower time to first token than FlashAttention with nearly no loss of accuracy",
        tags=("sparse attention", "prefill", "long context", "vertical stripes", "training-free"),
    )

    alpha: float = option(
        0.95, "share of the sample's attention that columns must have; 1 attends to all", low=0, high=1
    )
    sample: float = option(0.05, "share of the queries that choose", low=1e-6, high=1)
    window: float = option(0.08, "share of the prompt that every query sees behind it", low=0, high=1)
    run: int = option(1, "neighbours that are sampled together", low=1)
    block: int = option(1, "neighbouring keys that are chosen together", low=1)
    sites: Sites = option("text.*.self", "layers")
    phases: tuple[str, ...] = option(("prefill",), "passes in which it acts; others attend as ever")

    def replace(self, call: AttentionCall) -> Tensor:
        def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            chosen = pattern(
                q,
                k,
                sample=self.sample,
                alpha=self.alpha,
                window=max(1, math.ceil(self.window * q.shape[2])),
                run=self.run,
                block=self.block,
                scale=call.scale,
            )
            return attend(q, k, v, chosen, scale=call.scale)

        return by_prompt(call, sparse)
