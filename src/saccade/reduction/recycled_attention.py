"""Read again, for some steps, what was attended to in the last step that read everything.

    a full step reads the whole cache;  R = the K entries with the largest weight of its query, largest first,
                                        of a key head the maximum over the heads that share it
    another step reads R <- (the newest entry, then R) cut to K: the least attended to leaves
    every S-th step is full, or, where `similarity` is at most 1, asks: full if cos(q, q of the last full step) is
    below it, mean over heads

The prompt's last word is the first full step. The cache itself loses nothing. Each layer goes by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.call import AttentionCall, take_rows
from saccade.core.card import Card
from saccade.core.method import Method, Sites, option
from saccade.reduction._parts.cache import chosen, positions


@dataclass(eq=False)
class RecycledAttention(Method):
    card = Card(
        slug="recycled_attention",
        name="Recycled Attention",
        kind="method",
        family="reduction",
        form="method",
        target="llm (decoder-only)",
        paper="Recycled Attention: Efficient inference for long-context language models (Xu et al., 2024)",
        summary="Between steps that read the whole cache, read what the last of them attended to most",
        needs=("first_token",),
        neutral={"every": 1, "similarity": 2.0},
        sure="abstract",
        choices=(
            "Entries since the last full step have no weight of it; they stay before all that have one, and the "
            "oldest of them leave last.",
            "Queries are compared as attention gets them, rotated, head by head.",
            "Samples of a batch, and layers, take their full steps each by themselves where the query decides.",
            "The continued pre-training of the paper is not part of it.",
        ),
        headline="2x better than local-context baselines on RULER at comparable speedup",
        tags=("kv cache", "long context", "decoding", "top-k attention", "training-free"),
    )

    keep: int = option(2048, "entries that a step between full ones reads, the newest included", low=1)
    every: int = option(10, "steps from one that is full, or asks, to the next", low=1)
    similarity: float = option(
        2.0, "cosine with the last full step's query below which a step that asks is full; above 1 always"
    )
    group: str = option("max", "over the heads that share a key head", choices=("max", "mean"))
    sites: Sites = option("text.*.self", "layers that recycle")

    def replace(self, call: AttentionCall) -> Tensor | None:
        known = call.state.get(call.site.name)
        if call.phase != "decode" or known is None:
            return None
        newest = call.qpos.expand(call.q.shape[0], -1)[:, None].expand(-1, call.k.shape[1], -1)
        known["kept"] = torch.cat([newest, known["kept"]], -1)[..., : self.keep]
        known["age"] = known["age"] + 1
        full = known["age"] % self.every == 0
        if self.similarity <= 1:
            full &= F.cosine_similarity(call.q[:, :, 0], known["query"], dim=-1).mean(1) < self.similarity
        known["age"] = known["age"].masked_fill(full, 0)
        if bool(full.all()):
            return None
        out = chosen(call, known["kept"]).native()
        return torch.where(full[:, None, None, None], call.next(), out) if bool(full.any()) else out

    def observe(self, call: AttentionCall) -> None:
        known = call.state.get(call.site.name)
        if call.phase != "decode" or known is None:
            if call.pass_.complete:
                query = take_rows(call.q, call.resolve("last"))[:, :, 0]
                age = torch.zeros(query.shape[0], dtype=torch.long, device=query.device)
                call.state[call.site.name] = {"kept": self._most(call), "query": query, "age": age}
            return
        full = known["age"] == 0
        if bool(full.any()):
            known["query"] = torch.where(full[:, None, None], call.q[:, :, 0], known["query"])
            new, old = self._most(call), known["kept"]
            width = max(new.shape[-1], old.shape[-1])
            new, old = (F.pad(t, (0, width - t.shape[-1]), value=-1) for t in (new, old))
            known["kept"] = torch.where(full[:, None, None], new, old)

    def _most(self, call: AttentionCall) -> Tensor:
        """Positions of what the last query attends to most, (batch, key heads, keep or all), -1 for padding."""
        w = call.weights("last")[:, :, 0].unflatten(1, (-1, call.groups))
        w = w.amax(2) if self.group == "max" else w.mean(2)
        there = call.columns("all")[:, :, 0]
        there = there[:, :: call.groups if there.shape[1] > 1 else 1].expand_as(w)
        order = w.masked_fill(~there, -1).sort(dim=-1, descending=True, stable=True).indices[..., : self.keep]
        return torch.where(there.gather(-1, order), positions(call).gather(-1, order), -1)
