"""Send the patches that matter and means of the others, and let words ignore what no word before them looked at.

    VMTC    keep the k patches with the most of the class token's attention;   the others become m means, by k-means
    CMAI    in every layer of the text tower, A the mean over heads, of words i and j and visual tokens t
            F_it  <- sum_j A_ij A_jt
            s_it  <- -inf   for the floor(rho * n) of the n visual tokens that i sees with the smallest F_it

The softmax that follows shares out what is left. A is what it would be with nothing inhibited in that layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.features import Item
from saccade.core.importance import note, noted, tower_attention
from saccade.core.method import Method, Sites, option
from saccade.core.tokens import Tokens
from saccade.reduction._parts.choice import top
from saccade.reduction._parts.clusters import aggregates, clusters, nearest


@dataclass(eq=False)
class VMTCCMAI(Method):
    card = Card(
        slug="vmtc_cmai",
        name="VMTC+CMAI",
        kind="method",
        family="reduction",
        form="method",
        target="vlm",
        trains="full",
        paper="Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy "
        "(Yang et al., 2024)",
        summary="Keep what the class token looks at, average the rest, and inhibit what words do not look at",
        needs=("image",),
        neutral={"keep": 1.0, "rho": 0.0},
        sure="abstract",
        choices=(
            "The paper tunes with it; here it serves a trained model as it is.",
            "Clusters are k-means of what the projector reads, from a fixed seed; a mean takes the place of the "
            "member nearest to it, so k, m, rho and the layers are a reconstruction.",
            "A picture has one budget for all its tiles, and separators stay. In towers without a class token the "
            "attention that a patch receives stands in.",
            "F is not normalised by row, which changes no order. It reaches back over the whole conversation.",
            "Where the projector makes a feature of several patches stage='after' is needed.",
        ),
        tags=("token merging", "clustering", "attention inhibition", "instruction following", "cross-modal"),
    )

    keep: float = option(0.2, "share of a picture's tokens that stay as they are; 1 keeps all", low=0, high=1)
    merge: float = option(0.05, "share of them, in number, that the means of the others make", low=0, high=1)
    rho: float = option(
        0.5, "share of the visual tokens that a word is kept from; 0 inhibits none", low=0, high=1
    )
    stage: str = option("before", "on which side of the projector tokens merge", choices=("before", "after"))
    seed: int = option(0, "of the first means")
    sites: Sites = option(
        {"observe": "vision.*.self", "scores": "text.*.self"}, "where the tower attends, and where words do"
    )

    def observe(self, call: AttentionCall) -> None:
        if call.site.index == call.run.feature_layer:
            note(call, tower_attention(call))

    def features(self, item: Item) -> Tokens | None:
        if self.keep == 1:
            return None
        scores, tile = noted(item)
        patches = (tile >= 0).nonzero()[:, 0]
        k = max(1, round(self.keep * len(patches)))
        primary = top(scores[patches], k)
        keep, rest = tile < 0, patches[~primary]
        keep[patches[primary]] = True
        m, values = min(round(self.merge * len(patches)), len(rest)), item.x.clone()
        if m:
            x = item.x[rest] if item.x.dtype == torch.float64 else item.x[rest].float()
            cluster = clusters(x, m, 20, 1, self.seed)
            means = aggregates(x, cluster, m)
            places = rest[nearest(x, cluster, means)]
            keep[places], values[places] = True, means.to(values.dtype)
        return Tokens(keep, values[keep], positions="renumber")

    def acts(self, call: AttentionCall) -> bool:
        return self.rho > 0

    def scores(self, call: AttentionCall, s: Tensor) -> Tensor:
        w = call.softmax(s.detach()).mean(1)  # (batch, rows, keys)
        visual = call.columns("visual")[:, 0, 0]
        asks = (call.rows("all") & ~call.rows("visual"))[:, 0, :, 0]  # (batch, rows)
        seen = (s > torch.finfo(s.dtype).min / 2).any(1) & visual[:, None] & asks[..., None]
        columns = visual.any(0).nonzero()[:, 0]
        f, seen = self._focus(call, w, asks, visual, columns), seen[..., columns]
        count = (seen.sum(-1, keepdim=True).double() * self.rho).long()
        rank = f.masked_fill(~seen, torch.inf).sort(dim=-1, stable=True).indices.argsort(-1)
        inhibited = torch.zeros_like(w, dtype=torch.bool)
        inhibited[..., columns] = seen & (rank < count)
        return s.masked_fill(inhibited[:, None], torch.finfo(s.dtype).min)

    def _focus(self, call: AttentionCall, w: Tensor, asks: Tensor, visual: Tensor, columns: Tensor) -> Tensor:
        """F of the rows, and of the visual columns: (batch, rows, columns)."""
        rows = call.span
        first = call.k.shape[2] - call.q.shape[2] + (rows.start if isinstance(rows, slice) else 0)
        old = call.state.get(call.site.name, {"keys": 0, "words": [], "looks": w[:, :0, :0]})
        if old["keys"] != first or not isinstance(rows, slice):
            raise InputError(
                f"VMTCCMAI remembers how words looked at {old['keys']} tokens, and {call.site.name} has {first}.",
                "attach before the conversation begins, evict nothing from the cache, and leave rows at 'all'",
            )
        some = asks.any(0).nonzero()[:, 0]  # rows that are a word in any sample
        looks = (w * asks[..., None] * visual[:, None])[:, some][..., columns]  # A_jt
        before = pad(old["looks"], (0, len(columns) - old["looks"].shape[2]))
        words = [*old["words"], *(some + first).tolist()]
        looks = torch.cat([before, looks], 1)
        call.state[call.site.name] = {"keys": first + w.shape[1], "words": words, "looks": looks}
        text = (call.columns("all")[:, 0, 0] & ~visual)[:, None, words]
        return (w[..., words] * text) @ looks
