"""Correct a sparse reading of a prompt by what it misses at every so-many-th query.

    d_j  = dense_j - sparse_j                      at queries j = 0, gamma, 2 gamma, ...
    o_i  = sparse_i + d_(gamma floor(i / gamma))
    o_i  = dense_i                                 for the last  N mod gamma + max(tail, gamma)  queries

Sparse is a window with sinks, or the method attached before. No key leaves the cache; what is written on the
prompt attends to all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.method import Method, Sites, option
from saccade.ops.blocks import attend
from saccade.ops.delta_attention import corrected, streaming
from saccade.reduction._parts.prefill import by_prompt


@dataclass(eq=False)
class DeltaAttention(Method):
    card = Card(
        slug="delta_attention",
        name="Delta Attention",
        kind="method",
        family="reduction",
        form="method",
        target="llm",
        paper="Delta Attention: Fast and Accurate Sparse Attention Inference by Delta Correction "
        "(Willette et al., 2025)",
        summary="Put a sparse attention right by dense answers to a few of a prompt's queries",
        needs=("first_token",),
        neutral={"gamma": 1},
        code="jeffwillette/delta-attention",
        choices=(
            "Its own sparse attention is a window with sinks; with over='below' it corrects the method attached "
            "before it, of which the released code knows one, and dense layers are left out with sites=.",
            "The tail's least length is an option; the released code has 128.",
            "A later part of a conversation is read densely, and so is what is written.",
        ),
        headline="36 points more on average on RULER at 131K than the window with sinks alone, 88% of dense "
        "accuracy, at about 98.5% sparsity",
        tags=("sparse attention", "prefill", "long context", "sliding window", "correction", "training-free"),
    )

    gamma: int = option(64, "of so many queries one is answered densely; 1 answers all so", low=1)
    window: int = option(2048, "keys that every query sees behind it, its own included", low=1)
    sinks: int = option(1024, "first keys that every query sees", low=0)
    tail: int = option(128, "last queries that are answered densely, at the least", low=0)
    mode: str = option(
        "delta",
        "delta shifts the queries between; recompute does not; sparse corrects nothing",
        choices=("delta", "recompute", "sparse"),
    )
    over: str = option(
        "window",
        "what is corrected: window, or below, the attention of the methods attached before",
        choices=("window", "below"),
    )
    sites: Sites = option("text.*.self", "layers")
    phases: tuple[str, ...] = option(("prefill",), "passes in which it acts; others attend as ever")

    def replace(self, call: AttentionCall) -> Tensor:
        def put_right(q: Tensor, k: Tensor, v: Tensor, *below: Tensor) -> Tensor:
            if below:
                (sparse,) = below
            else:
                seen = streaming(q.shape[2], self.window, self.sinks, q.device)
                sparse = attend(q, k, v, seen, scale=call.scale)
            if self.mode == "sparse":
                return sparse
            shift = self.mode == "delta"
            return corrected(q, k, v, sparse, gamma=self.gamma, tail=self.tail, shift=shift, scale=call.scale)

        return by_prompt(call, put_right, *([call.next()] if self.over == "below" else []))
