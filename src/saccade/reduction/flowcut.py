"""Let patches that little information flows through leave inside of the vision tower, layer by layer.

    rel_j <- mean over heads of the class token's attention on patch j
    sem_j <- mean over heads of softmax_j(v_cls . v_j)
    s_j   <- (rel_j / sum rel + sem_j / sum sem) * |mean over heads of v_j|_1
    C     <- s behind the first layer,   0.5 * C + 0.5 * s behind the others
    behind a layer that an even number r of layers parts from that before the features', of N patches
        n = (N - K) / sqrt(r) * (1 - (H(rel) / log N)^2)   leave, rounded;   at r = 0 all but K

K is a share of a tile's patches, those with the largest C stay, and there are never fewer. With slack > 1 the
tower leaves so many times more, and the text tower the K of each picture with the largest s behind its layer 1,
the last word of the prompt being the class token, and both softmaxes being over the picture and by sqrt(dim).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import AttentionCall, take_rows
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.features import Item
from saccade.core.importance import class_token
from saccade.core.method import Method, Sites, option
from saccade.core.tokens import Tokens, TokensCall, gather_tokens
from saccade.reduction._parts.choice import highest
from saccade.reduction._parts.importance import attended, by_last_word
from saccade.reduction._parts.tower import note_left, survivors


@dataclass(eq=False)
class FlowCut(Method):
    card = Card(
        slug="flowcut",
        name="FlowCut",
        kind="method",
        family="reduction",
        form="method",
        target="vlm (vision encoder and decoder)",
        paper="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models "
        "(Tong et al., 2025)",
        summary="Drop patches inside of the vision tower, as many as the class token's attention is concentrated",
        needs=("image",),
        neutral={"keep": 1.0},
        code="TungChintao/FlowCut",
        choices=(
            "In towers without a class token the mean query stands in, and s = rel * |v|, as in the released "
            "code for Qwen2-VL.",
            "Towers that pack all pictures in one row, such as Qwen's, lose no token; there the slack must leave "
            "all (keep * slack >= 1), and the text tower drops.",
            "Every tile loses as many as its own entropy says; the released code takes the most of a batch.",
            "Separators stay, positions close up, and every picture of a prompt has a budget of its own.",
        ),
        headline="+1.6% over SoTA on LLaVA-1.5-7B at 88.9% reduction, +4.3% on LLaVA-NeXT-7B at 94.4%, 3.2x "
        "prefill speedup",
        tags=("token pruning", "information flow", "class token", "entropy", "progressive", "training-free"),
    )

    keep: float = option(0.25, "share of the visual tokens that stays; 1 changes nothing", low=0, high=1)
    slack: float = option(
        1.0, "how many times as many leave the vision tower; 2.5 in LLaVA-NeXT, 4 in Qwen2-VL", low=1
    )
    sites: Sites = option(
        {
            "observe": "vision.*.self|text.1.self",
            "tokens": "vision.*.layer|text.2.layer",
        },
        "where patches are judged, and before which layers they leave",
    )
    phases: tuple[str, ...] = option(("prefill", "extend"), "passes in which tokens leave")

    def observe(self, call: AttentionCall) -> None:
        call.run.state["behind"] = call
        if call.site.tower != "text" and call.site.layer == call.run.feature_layer:
            note_left(call)

    def tokens(self, call: TokensCall) -> Tokens | None:
        if call.site.tower == "text":
            return self._of_text(call, call.run.state["behind"]) if self.slack > 1 else None
        remaining = call.run.feature_layer - call.site.layer  # r
        if call.site.layer == 0 or remaining < 0 or self._in_tower == 1:
            return None
        flow = self._flow(call, call.run.state["behind"])
        if remaining % 2:
            return None
        counts = flow.patches.sum(1, keepdim=True)
        stay = (counts - leaving(flow, counts, flow.target, remaining)).maximum(flow.target)
        keep = highest(flow.total, flow.patches, stay) | flow.ahead
        flow.total = gather_tokens(flow.total, Tokens(keep).index(*keep.shape), -1)
        return Tokens(keep)

    def _flow(self, call: TokensCall, behind: AttentionCall) -> Flow:
        """What the layers so far say."""
        if call.h.shape[:-1] != (behind.q.shape[0], behind.q.shape[2]):
            raise InputError(
                f"{call.site.tower} holds the patches of all pictures in one row, from which none can leave.",
                "give a slack with which all leave the tower: keep * slack >= 1",
            )
        patches, ahead = (behind.columns(name)[:, 0, 0] for name in ("image", "special"))
        rel, s = flow_through(behind, patches)
        if call.site.layer == 1:
            target = budget(self._in_tower, patches.sum(1, keepdim=True))
            call.run.state["flow"] = Flow(rel, s, patches, ahead, target)
        else:
            old = call.run.state["flow"]
            call.run.state["flow"] = Flow(rel, 0.5 * old.total + 0.5 * s, patches, ahead, old.target)
        return call.run.state["flow"]

    def features(self, item: Item) -> Tokens | None:
        if self._in_tower == 1:
            return None
        return Tokens(survivors(item), positions="renumber")

    @property
    def _in_tower(self) -> float:
        """The share of the patches that leaves the tower."""
        return min(1.0, self.keep * self.slack)

    def _of_text(self, call: TokensCall, behind: AttentionCall) -> Tokens | None:
        pictures = call.items("visual")
        if not pictures:
            return None
        call.pass_.check_complete()
        keep = ~call.tokens("visual")
        for picture in pictures:
            count = budget(self.keep / self._in_tower, picture.sum(1, keepdim=True))
            keep |= highest(text_score(behind, picture), picture, count)
        return Tokens(keep, positions="renumber")


@dataclass
class Flow:
    """Of the tokens that are there: (tiles, tokens)."""

    rel: Tensor  # sums to one over the patches
    total: Tensor  # C
    patches: Tensor
    ahead: Tensor  # class and register tokens
    target: Tensor  # K: (tiles, 1)


def flow_through(call: AttentionCall, patches: Tensor) -> tuple[Tensor, Tensor]:
    """rel and s of a layer: (tiles, tokens)."""
    row = class_token(call)
    if row is None:
        q = (call.q * patches[:, None, :, None]).sum(2, keepdim=True) / patches.sum(1)[:, None, None, None]
        rel = attended(q * call.scale, call.k, patches)
        return rel, rel * size(call.v)
    rel = share_of(call.weights(row).mean(1)[:, 0], patches)
    sem = share_of(attended(take_rows(call.v, row), call.v, call.columns("all")[:, 0, 0]), patches)
    return rel, (rel + sem) * size(call.v)


def leaving(flow: Flow, counts: Tensor, target: Tensor, remaining: int) -> Tensor:
    """How many of the patches, (tiles, 1)."""
    if remaining == 0:
        return counts
    entropy = torch.special.entr(flow.rel).sum(1, keepdim=True) / counts.clamp_min(2).log()
    return ((counts - target) / remaining**0.5 * (1 - entropy**2)).round().long()


def text_score(call: AttentionCall, picture: Tensor) -> Tensor:
    """Of every token of the pass that is in the picture, by the last word: (batch, tokens)."""
    v = call.v[:, :, -picture.shape[1] :]
    sem = attended(take_rows(v, call.resolve("last")) * v.shape[-1] ** -0.5, v, picture)
    return (by_last_word(call, picture) + sem) * size(v)


def share_of(values: Tensor, among: Tensor) -> Tensor:
    """Values (batch, tokens) that sum to one over the tokens `among`, zero elsewhere."""
    values = values * among
    return values / values.sum(1, keepdim=True)


def size(v: Tensor) -> Tensor:
    """(batch, tokens)."""
    return v.mean(1).abs().sum(-1)


def budget(share: float, counts: Tensor) -> Tensor:
    """(batch, 1), at least one."""
    return (counts.double() * share).round().long().clamp_min(1)
