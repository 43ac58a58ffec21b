"""Read a core of the picture in most steps, a wider part of it in some, and forget the rest of it.

    s_j   attention of the newest word on entry j, mean over heads, of every layer by itself
    prompt    of the N visual entries the S * N with the largest s stay: the secondary set;  of these C * N are core
    a step reads the core, the text and itself;  every K-th step reads all that is held, and C * N of the secondary
    set are made core by its s
    text      s adds up over the steps that read an entry;  every 8th step behind the 20th leaves T of the text so
              far: the newest 30% of these, and those of the others with the largest sum

Before that, an early layer may drop visual tokens for all above it: all but the P * N with the largest s there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.cache import TrackedLayer
from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import OptionError
from saccade.core.method import Method, Sites, option
from saccade.core.tokens import Tokens, TokensCall
from saccade.reduction._parts.cache import chosen, positions, slots
from saccade.reduction._parts.choice import highest


@dataclass(eq=False)
class AVL(Method):
    card = Card(
        slug="a_vl",
        name="A-VL",
        kind="method",
        family="reduction",
        form="method",
        target="vlm",
        paper="A-VL: Adaptive Attention for Large Vision-Language Models (Zhang et al., 2024)",
        summary="Read a core of the picture's cache in most steps, a wider part in some, and forget the rest",
        needs=("image",),
        neutral={"core": 1.0, "secondary": 1.0, "text": 1.0, "filtered": 1.0},
        choices=(
            "Shares of the picture are of the visual tokens that came to the layer, those of all pictures of a "
            "sample together.",
            "Text entries are scored by the prompt's last word and by each word that is written.",
            "Text leaves at every 8th step, the first time behind the spared ones; how much stays by default is "
            "a guess.",
            "The filter is off by default, and judges by the layer before the first that loses tokens, as the "
            "code's 3 of 32 layers scaled to the model's depth.",
            "A later prompt's last word sorts anew what is left of the pictures, to the same numbers.",
        ),
        tags=("kv cache", "eviction", "decoding", "heavy hitters", "visual tokens", "training-free"),
    )

    core: float = option(0.35, "share of the visual entries that each step reads", low=0, high=1)
    secondary: float = option(0.5, "share that is held, the core included", low=0, high=1)
    every: int = option(3, "steps from one that reads all that is held to the next", low=1)
    text: float = option(0.7, "share of the text's entries that stays; 1 keeps all", low=0, high=1)
    heavy: float = option(0.7, "of these, the share that is chosen by attention", low=0, high=1)
    prune_every: int = option(8, "steps from one that drops text to the next", low=1)
    spared: int = option(20, "first steps, in which no text leaves", low=0)
    filtered: float = option(
        1.0, "share of the visual tokens that an early layer passes on; 1 is all", low=0, high=1
    )
    sites: Sites = option(
        {
            "replace": "text.*.self",
            "evict": "text.*.self",
            "observe": "text.6%.self",
            "tokens": "text.*.layer",
        },
        "layers whose cache is sorted; where the filter judges, and the layers above it",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.core > self.secondary:
            raise OptionError(
                f"core={self.core} is not a part of secondary={self.secondary}.", "let the core be smaller"
            )

    # ---- the filter ----------------------------------------------------------------------------------------

    def observe(self, call: AttentionCall) -> None:
        if self.filtered < 1 and call.phase != "decode" and bool(call.queries("visual").any()):
            call.pass_.check_complete()
            call.run.state["judged"] = newest_word(call)[:, -call.q.shape[2] :]

    def tokens(self, call: TokensCall) -> Tokens | None:
        judging = call.run.places(self, "observe")[-1].layer
        if call.layer - 1 != judging or "judged" not in call.run.state:
            return None
        visual = call.tokens("visual")
        stays = highest(call.run.state.pop("judged"), visual, share_of(visual, self.filtered))
        return Tokens(~visual | stays)

    # ---- the cache -------------------------------------------------------------------------------------------

    def replace(self, call: AttentionCall) -> Tensor | None:
        known = call.state.get(call.site.name)
        if call.phase != "decode" or known is None or (known["step"] + 1) % self.every == 0:
            return None
        visual, core = call.columns("visual")[:, 0, 0], call.at_columns(known["core"])[:, 0, 0]
        entries = slots(call.columns("all")[:, 0, 0] & (~visual | core))
        pos = positions(call)[:, 0]
        kept = torch.where(entries < 0, -1, pos.gather(1, entries.clamp_min(0)))
        part = chosen(call, kept[:, None].expand(-1, call.k.shape[1], -1))
        call.run.state["read"] = part, kept
        return part.native()

    def evict(self, call: AttentionCall, cache: TrackedLayer) -> Tensor | None:
        known = call.state.setdefault(call.site.name, {"step": 0})
        pos, visual = positions(call)[:, 0], call.columns("visual")[:, 0, 0]
        text = call.columns("all")[:, 0, 0] & ~visual
        came = visual if "pictures" not in known else call.queries("visual")
        known["pictures"] = known.get("pictures", 0) + came.sum(1, keepdim=True)
        if not call.pass_.complete:
            return None
        keep = torch.ones_like(visual)
        if call.phase != "decode" or "core" not in known:
            s, known["step"] = newest_word(call), 0
            keep = ~visual | highest(s, visual, share(known["pictures"], self.secondary))
        else:
            known["step"] += 1
            part, read = call.run.state.pop("read", (call, pos))
            s = _at(newest_word(part), read, call.pass_.sequence.length).gather(1, pos.clamp_min(0))
        if call.phase != "decode" or known["step"] % self.every == 0:
            core = highest(s, visual, share(known["pictures"], self.core))
            known["core"] = _at(core.int(), pos, call.pass_.sequence.length) > 0
        total = _at(s * text, pos, call.pass_.sequence.length)
        before = known.get("sums", total[:, :0])
        known["sums"] = total + F.pad(before, (0, total.shape[1] - before.shape[1]))
        if self.text < 1 and known["step"] > self.spared and known["step"] % self.prune_every == 0:
            keep &= ~text | self._heavy_or_recent(call, known["sums"].gather(1, pos.clamp_min(0)), text)
        keep = keep[:, call.k.shape[2] - cache.keys.shape[2] :]  # windows slide
        return None if bool(keep.all()) else slots(keep)

    def _heavy_or_recent(self, call: AttentionCall, sums: Tensor, text: Tensor) -> Tensor:
        layout = call.klayout
        budget = share_of(layout.where("all") & ~layout.where("visual"), self.text)
        recent = share(budget, 1 - self.heavy).clamp_min(1)
        newest = text & (text.flip(1).cumsum(1).flip(1) <= recent)
        return newest | highest(sums, text & ~newest, budget - recent)


def newest_word(call: AttentionCall) -> Tensor:
    """(batch, keys)."""
    return call.weights("last")[:, :, 0].mean(1)


def share(counts: Tensor, of: float) -> Tensor:
    return (counts.double() * of).round().long()


def share_of(mask: Tensor, of: float) -> Tensor:
    """Of the tokens of a mask (batch, tokens), how many: (batch, 1)."""
    return share(mask.sum(1, keepdim=True), of)


def _at(values: Tensor, pos: Tensor, length: int) -> Tensor:
    """Values (batch, entries) at their positions (batch, length), 0 elsewhere."""
    return values.new_zeros(len(values), length).scatter_add(1, pos.clamp_min(0), values * (pos >= 0))
