"""Drop visual tokens over a prompt's whole life: merge like patches, drop by two thresholds, clear the cache.

    tower     behind layer 0 the patches of a 3 x 3 window become their mean where the mean of their cosines, pair by
              pair, is at least `similarity`;   key set: the top ceil(key * n) of the n that are left, by the class
              token's attention in the tower's last layer
    prompt    behind stages in the text tower, of the tokens j outside of the key set, g_j = sum_i a_ij over words i
              drop j where  g_j < global_thr * sum g   and   max_i a_ij < individual_thr
    cache     at the end of the last stage, in the layers from the first stage's on, what has left leaves

a is the mean over heads; positions close up whenever tokens leave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.features import Item
from saccade.core.importance import note, noted, tower_attention
from saccade.core.method import Method, Sites, option
from saccade.core.tokens import Tokens, TokensCall
from saccade.reduction._parts.cache import slots
from saccade.reduction._parts.choice import of_each, top
from saccade.reduction._parts.tower import at_full, note_left, survivors

WINDOW = 3
KEY = "key"


@dataclass(eq=False)
class MustDrop(Method):
    card = Card(
        slug="mustdrop",
        name="MustDrop",
        kind="method",
        family="reduction",
        form="method",
        target="vlm",
        paper="Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model "
        "(Liu et al., 2024)",
        summary="Merge like patches, drop by two thresholds in four layers, and clear the cache of them",
        needs=("image",),
        neutral={"similarity": 1.1, "global_thr": 0.0, "individual_thr": 0.0},
        code="liuting20/MustDrop",
        choices=(
            "A merged token stands where its window began; the released code puts merged ones first.",
            "Every tile merges what is alike in it; the released code merges as many in all of a batch.",
            "Windows that do not fit into a tile's side stay as they are.",
            "The stages behind layers 2, 6, 10 and 14 of 32 scale with the model's depth; thresholds do not.",
            "Written words stand behind the prompt as each layer numbered it; the released code counts the "
            "entries that each layer has left.",
            "The key set is one of features, of every tile or view; separators belong to it. In towers without a "
            "class token the attention that a patch receives stands in.",
            "Towers that pack pictures in one row cannot merge: there similarity must be above 1.",
        ),
        headline="about 88.5% fewer FLOPs on LLaVA at 92.2% compression with comparable accuracy",
        tags=("token pruning", "token merging", "kv cache", "progressive", "thresholds", "training-free"),
    )

    similarity: float = option(
        0.8, "mean cosine from which a window merges; above 1 none does", low=-1, high=2
    )
    key: float = option(0.08, "share of the patches that no threshold drops", low=0, high=1)
    global_thr: float = option(
        0.001, "share of all words' attention, below which a token may leave", low=0, high=1
    )
    individual_thr: float = option(0.001, "weight that no word gives it, then too", low=0, high=2)
    sites: Sites = option(
        {
            "observe": "vision.*.self|text.6%.self|text.19%.self|text.31%.self|text.44%.self",
            "tokens": "vision.1.layer|text.*.layer",
        },
        "where attention judges, the stages among them, and where tokens leave",
    )
    phases: tuple[str, ...] = option(("prefill", "extend"), "passes in which tokens leave")

    def observe(self, call: AttentionCall) -> None:
        if call.site.tower == "text":
            if bool(call.queries("visual").any()):
                call.pass_.check_complete()
                call.run.state["behind"] = call
            return
        if call.site.layer == call.run.feature_layer:
            note_left(call)
        if call.site.layer == call.site.depth - 1:
            note(call, at_full(call, tower_attention(call)), KEY)

    def tokens(self, call: TokensCall) -> Tokens | None:
        if call.site.tower != "text":
            return self._merged(call) if self.similarity <= 1 else None
        stages = [site.layer for site in call.run.places(self, "observe") if site.tower == "text"]
        if call.layer - 1 not in stages or "behind" not in call.run.state:
            return None
        dropped = self._dropped(call, call.run.state.pop("behind"))
        if call.layer - 1 == stages[-1]:
            forget(call, ~dropped, range(stages[0], call.layer))
        return Tokens(~dropped, positions="renumber") if bool(dropped.any()) else None

    def features(self, item: Item) -> Tokens | None:
        scores, tile = noted(item, what=KEY)
        stays = survivors(item) if self.similarity <= 1 else torch.ones_like(tile, dtype=torch.bool)
        key = of_each(tile.where(stays, -1), lambda mine: top(scores[mine], math.ceil(self.key * len(mine))))
        item.run.state.setdefault(item.kind, []).append(key)
        return None if bool(stays.all()) else Tokens(stays, positions="renumber")

    def _merged(self, call: TokensCall) -> Tokens:
        patches = call.tokens("image")
        ahead = int((~patches).sum(1).max()) if call.h.ndim == 3 else 0
        side = math.isqrt(call.h.shape[1] - ahead)
        if call.h.ndim != 3 or side * side != call.h.shape[1] - ahead:
            raise InputError(
                f"MustDrop merges windows of a square of patches, and {call.site.tower} holds none.",
                "merge none (similarity=1.1)",
            )
        window = windows(side).to(call.h.device) + ahead  # (windows, 9)
        members = call.h[:, window]  # (tiles, windows, 9, width)
        merge = likeness(members) >= self.similarity
        keep = torch.ones(call.h.shape[:2], dtype=torch.bool, device=call.h.device)
        keep[:, window[:, 1:]] = ~merge[..., None]
        h = call.h.clone()
        h[:, window[:, 0]] = torch.where(merge[..., None], members.mean(2), members[:, :, 0])
        index = Tokens(keep).index(*keep.shape)
        return Tokens(index, values=h.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, h.shape[-1])))

    def _dropped(self, call: TokensCall, behind: AttentionCall) -> Tensor:
        """Which of the tokens that are there: (batch, tokens)."""
        total, most = from_words(behind, call.h.shape[1])
        key = torch.zeros_like(total, dtype=torch.bool)
        for kind in ("image", "video"):
            if kind in call.run.state:
                key |= call.of_features(kind, call.run.state[kind])
        dropped = torch.zeros_like(key)
        for picture in call.items("visual"):
            all_ = (total * picture).sum(1, keepdim=True)
            dropped |= picture & (total < self.global_thr * all_) & (most < self.individual_thr)
        return dropped & ~key


def windows(side: int) -> Tensor:
    """Places of the whole windows in a square of that side: (windows, 9)."""
    count = side // WINDOW
    square = torch.arange(side * side).view(side, side)[: count * WINDOW, : count * WINDOW]
    return square.reshape(count, WINDOW, count, WINDOW).transpose(1, 2).reshape(-1, WINDOW * WINDOW)


def likeness(members: Tensor) -> Tensor:
    """Mean cosine of all pairs of different members: (..., members, width) to (...)."""
    unit = F.normalize(members, dim=-1)
    count = members.shape[-2]
    return ((unit @ unit.mT).sum((-1, -2)) - unit.square().sum((-1, -2))) / (count * (count - 1))


def from_words(call: AttentionCall, tokens: int) -> tuple[Tensor, Tensor]:
    """Of every token of the pass, the sum and the largest of the words' weights, means over heads: (batch, tokens)."""
    words = (call.queries("all") & ~call.queries("visual"))[..., None]
    total = torch.zeros(call.q.shape[0], tokens, dtype=torch.float32, device=call.q.device)
    most = torch.zeros_like(total)
    for rows in call.chunks():
        w = call.weights(rows, keep=False).mean(1)[..., -tokens:] * words[:, rows]
        total, most = total + w.sum(1), torch.maximum(most, w.amax(1))
    return total, most


def forget(call: TokensCall, keep: Tensor, layers: range) -> None:
    """Of the caches of these layers what is no longer among the tokens that are there and stay."""
    start, full = call.pass_.start, keep.shape[1] if call.removal is None else call.removal.full
    places = (
        torch.arange(full, device=keep.device).expand_as(keep) if call.removal is None else call.removal.keep
    )
    alive = torch.zeros(keep.shape[0], full, dtype=torch.int, device=keep.device)
    alive = alive.scatter_add(1, places.clamp_min(0), (keep & (places >= 0)).int()) > 0
    alive = F.pad(alive, (start, 0), value=True)
    for layer in layers:
        held = call.pass_.held(layer)
        if held is not None:
            pos = held.positions()
            there = alive[:, None].expand(-1, pos.shape[1], -1) if pos.ndim == 3 else alive
            held.evict(slots(there.gather(-1, pos.clamp_min(0)) & (pos >= 0)))
