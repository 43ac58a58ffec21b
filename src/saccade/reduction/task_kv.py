"""Let the heads that mean something else keep their whole cache, and the one that means what all do.

    C = mean causal weights of the last queries;   u_h = sum over the top t tokens j of  C_hj v_hj
    full heads of layer r:  the one nearest to the mean of u, and of the others the farthest, together
          f(r) = n beta - (n beta - m) r / (R - 1)     of n key heads, in layers r = 0 .. R - 1
    any other head keeps its first s entries, its last w, and of those between the k with the largest pool_7(C),
          k = (B - N f) / (n - f) - s - w,     B = keep * n * N

Once the prompt of N tokens has been read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.cache import TrackedLayer
from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, Sites, option
from saccade.reduction._parts.cache import slots
from saccade.reduction._parts.choice import highest

KERNEL = 7


@dataclass(eq=False)
class TaskKV(Method):
    card = Card(
        slug="task_kv",
        name="Task-KV",
        kind="method",
        family="reduction",
        form="method",
        target="llm (decoder-only)",
        paper="Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads "
        "(He et al., 2025)",
        summary="Full cache for heads far from the others in meaning, a thin one for those that agree",
        needs=("first_token",),
        neutral={"beta": 1.0, "least": 1000000},
        choices=(
            "The head nearest to the mean is one of the f(r); the paper leaves open whether it is.",
            "Heads that share keys are one: their C is the mean, and n counts key heads.",
            "Of two heads, which are always equally far from their mean, the first is the nearest.",
            "f(r) is rounded, at least 1 and at most n.",
            "The layer's budget is a share of all its entries, so that it grows with the prompt as full heads do.",
            "Entries between are pooled among themselves: the weight of sinks does not spill over.",
            "At the end of a later turn's prompt what is held is thinned out again, by the same rule.",
        ),
        headline="close to the full cache on summarization and synthetic tasks at a fraction of the budget",
        tags=("kv cache", "eviction", "head budgets", "heterogeneous heads", "training-free"),
    )

    keep: float = option(0.6, "share of a layer's entries that stay", low=0, high=1)
    beta: float = option(0.25, "share of the first layer's heads that keep everything", low=0, high=1)
    least: int = option(4, "m: heads of the last layer that do", low=1)
    sinks: int = option(16, "first entries that stay in any head", low=0)
    recent: int = option(256, "last entries that stay in any head", low=1)
    top: int = option(256, "t: tokens that say what a head means", low=1)
    window: int = option(32, "last queries whose weights count", low=1)
    sites: Sites = option("text.*.self", "layers whose cache is thinned out")
    phases: tuple[str, ...] = option(("prefill", "extend"), "passes after which entries leave")

    def evict(self, call: AttentionCall, cache: TrackedLayer) -> Tensor | None:
        call.pass_.check_complete()
        heads = call.k.shape[1]
        there = call.columns("all")[:, :, 0]  # (batch, 1 or heads, keys)
        there = there[:, :: call.groups if there.shape[1] > 1 else 1].expand(-1, heads, -1)
        layers = [site.layer for site in call.run.places(self, "evict")]
        count = full_heads(layers.index(call.site.layer), len(layers), heads, self.beta, self.least)
        c = self._weights(call)
        full = chosen(meaning(c, call.v, there, self.top), count)
        ends = (there.cumsum(-1) <= self.sinks) | (there.flip(-1).cumsum(-1).flip(-1) <= self.recent)
        between = there & ~ends
        pooled = F.avg_pool1d(c * between, KERNEL, 1, KERNEL // 2)
        more = highest(pooled, between, self._between(there, count)[:, None, None])
        keep = there & (full[..., None] | ends | more)
        if torch.equal(keep, there):
            return None
        return slots(keep[..., call.k.shape[2] - cache.keys.shape[2] :])  # windows slide

    def _weights(self, call: AttentionCall) -> Tensor:
        """C by key head: (batch, key heads, keys)."""
        rows = slice(-min(self.window, call.q.shape[2]), None)
        real = call.queries("all")[:, None, rows, None]
        c = (call.weights(rows) * real).sum(2) / real.sum(2)
        return c.unflatten(1, (-1, call.groups)).mean(2)

    def _between(self, there: Tensor, full: int) -> Tensor:
        """How many entries other heads keep between the ends: (batch,)."""
        heads = there.shape[1]
        length = there.sum(-1).amax(1).double()
        if full == heads:
            return length.long()
        ends = self.sinks + self.recent
        k = torch.round((self.keep * heads * length - length * full) / (heads - full)).long() - ends
        short = (k < 0) & (length > ends)
        if bool(short.any()):
            longest = int(length[short].max())
            raise InputError(
                f"keep={self.keep} of {heads * longest} entries does not hold {full} of {heads} heads whole and "
                f"{ends} entries of each other one.",
                "keep more, or fewer heads (beta), sinks and recent entries",
            )
        return k


def full_heads(layer: int, layers: int, heads: int, beta: float, least: int) -> int:
    """f(r), rounded."""
    first = heads * beta
    f = first - (first - least) * layer / max(1, layers - 1)
    return max(1, min(heads, round(f)))


def meaning(c: Tensor, v: Tensor, there: Tensor, top: int) -> Tensor:
    """Vectors of heads (batch, heads, dim) from weights (batch, heads, keys) and values."""
    best = highest(c, there, torch.tensor(top, device=c.device))
    return ((c * best)[:, :, None] @ v.to(c.dtype))[:, :, 0]


def chosen(vectors: Tensor, count: int) -> Tensor:
    """The head nearest to the mean (batch, heads, dim) and the farthest others: (batch, heads), bool."""
    pairs = vectors[:, :, None] - vectors[:, None]  # two heads are then equally far, to the bit
    far = pairs.mean(2).norm(dim=-1)
    everywhere = torch.ones_like(far, dtype=torch.bool)
    nearest = highest(-far, everywhere, torch.tensor(1, device=far.device))
    return highest(far.masked_fill(nearest, torch.inf), everywhere, torch.tensor(count, device=far.device))
