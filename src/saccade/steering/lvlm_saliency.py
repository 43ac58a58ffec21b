"""Say no word that hangs in the air, and keep in touch with the words just said.

    S     = |A * d(-log p(c)) / dA|         the newest row, mean over heads, divided by its length
    s(c)  = mean of S on the words of the answer, over three layers; 1 for the first word
    draw c from the `top` likeliest without replacement, up to `rounds` times, until
            s(c) >= alpha * mean of s over the last `history` words that were said
    else the candidate with the largest s
    A[newest, the `window` words before it] <- times (1 + beta)

What is given to `generate()` is the law of the word that this says: its own drawing, beams or greed choose by it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.cache import forked
from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError, OptionError
from saccade.core.layout import Layout
from saccade.core.method import Method, Sites, option
from saccade.core.passes import HiddenCall, Pass
from saccade.steering._parts.rules import scaled
from saccade.steering._parts.watch import Watch

TINY = 1e-300


@dataclass(eq=False)
class LVLMSaliency(Method):
    card = Card(
        slug="lvlm_saliency",
        name="LVLMs-Saliency (SGRS, LocoRE)",
        kind="method",
        family="steering",
        form="method",
        target="vlm",
        paper="Hallucination Begins Where Saliency Drops (Zhang et al., 2026)",
        summary="Reject words with little gradient from the answer so far, and attend more to the words just said",
        neutral={"alpha": 0.0, "beta": 0.0, "top": 0},
        code="zhangbaijin/LVLMs-Saliency",
        choices=(
            "The row of a candidate's saliency is that which predicts it, as in the paper's equation; the released "
            "code reads the candidate's own row, whose gradient is zero.",
            "The law of the word is worked out and given to generate(), which draws from it; drawing inside would "
            "leave beams and greed nothing to choose.",
            "LocoRE is the paper's, and not in the released code; its rows sum to more than one, as in the paper, "
            "unless renormalise is set.",
            "The answer is that of the running turn. LLaVA's layers 6, 7 and 8 of 32 scale with the model's depth.",
        ),
        tags=("hallucination", "saliency", "gradient", "rejection sampling", "local coherence"),
    )

    alpha: float = option(
        0.6, "share of the recent words' saliency that a word must have; 0 takes any", low=0
    )
    beta: float = option(0.15, "by how much the words just said are seen more; 0 changes nothing", low=0)
    top: int = option(5, "candidates, the likeliest; 0 for all words, which then none is rejected of", low=0)
    rounds: int = option(3, "draws before the most salient candidate is taken", low=1)
    history: int = option(5, "words that were said before, whose saliency counts", low=1)
    window: int = option(5, "words before the newest that are seen more", low=1)
    renormalise: bool = option(False, "give the rows of LocoRE the sum that they had")
    layers: str = option("text.19%.self|text.22%.self|text.25%.self", "where saliency is measured")
    sites: Sites = option("text.*.self", "where LocoRE acts")
    rows: str | int = option("last", "query rows that are changed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha > 0 and not self.top:
            raise OptionError(
                f"LVLMSaliency(alpha={self.alpha}, top=0) would measure every word there is.",
                "give top= a number",
            )

    def sites_of(self, event: str) -> tuple[str, ...]:
        return ("text.embed",) if event == "hidden" else super().sites_of(event)

    # ---- LocoRE ------------------------------------------------------------------------------------------

    def acts(self, call: AttentionCall) -> bool:
        return self.beta != 0 and call.phase == "decode"

    def weights(self, call: AttentionCall, w: Tensor) -> Tensor:
        return coherent(call, w, recent(call.klayout, self.window), self.beta, self.renormalise)

    # ---- SGRS --------------------------------------------------------------------------------------------

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        if self.alpha > 0 and call.phase == "decode":
            call.run.state["before"] = forked(call.run.cache)
        return h

    def prediction(self, base: Tensor, branches: list[Tensor], p: Pass) -> Tensor:
        if not self.top:
            return base
        likely = base.topk(self.top)
        chances = likely.values.double().softmax(-1)  # (rows, candidates)
        if self.alpha > 0:
            salient = self._saliency(p, likely.indices)
            enough = salient >= self.alpha * self._usual(p, likely.indices, salient)[:, None]
            rows = zip(chances, enough, salient, strict=True)
            chances = torch.stack([law(*row, self.rounds) for row in rows])
        said = chances.log().to(base.dtype)
        return torch.full_like(base, -torch.inf).scatter(1, likely.indices, said)

    def _usual(self, p: Pass, candidates: Tensor, salient: Tensor) -> Tensor:
        """Mean saliency of the words that were said last: (rows,), 0 at first."""
        state = p.sequence.state_of(self)
        if p.phase != "decode":
            state.clear()
        said = state.get("said", salient[:, :0])  # (rows, words)
        if "tried" in state:
            chosen = state["tried"] == p.sequence.ids_from(p.sequence.length - 1)
            newest = torch.where(chosen, state["salient"], math.nan).nanmean(1, keepdim=True)
            said = torch.cat([said, newest], 1)
        state.update(tried=candidates, salient=salient, said=said)
        return said[:, -self.history :].nanmean(1).nan_to_num(0)

    def _saliency(self, p: Pass, candidates: Tensor) -> Tensor:
        """Of every candidate: (rows, candidates)."""
        if p.phase != "decode":
            return torch.ones(candidates.shape, dtype=torch.float64, device=candidates.device)
        if p.run.branches:
            raise InputError(
                "LVLMSaliency reads the newest word again, and other prompts stand in the cache beside it.",
                "attach it without methods that follow branches",
            )
        layout = p.sequence.layout()
        watch = Watch(sites=self.layers)
        before, sites = recent(layout, self.window), self.sites_of("weights")
        locore = Coherent(before=before, beta=self.beta, renormalise=self.renormalise, sites=sites)
        again = {**p.inputs, "past_key_values": p.run.state["before"]}
        out = p.run.forward(again, [locore, watch], grad=True)
        answer = layout.where("generated") & (layout.turn == layout.turn.amax(1, keepdim=True))
        found = []
        for candidate in candidates.T:
            with torch.enable_grad():
                chance = out.logits[:, -1].log_softmax(-1).gather(1, candidate[:, None]).sum()
            slopes = torch.autograd.grad(chance, watch.seen, retain_graph=True)
            layers = [saliency(w, g, answer) for w, g in zip(watch.seen, slopes, strict=True)]
            found.append(torch.stack(layers).mean(0))
        return torch.stack(found, 1).double()


@dataclass(eq=False)
class Coherent(Method):
    """LocoRE in a pass that does not know what was said."""

    before: Tensor | None = None  # (rows, tokens)
    beta: float = 0.0
    renormalise: bool = False

    def weights(self, call: AttentionCall, w: Tensor) -> Tensor:
        assert self.before is not None
        return coherent(call, w, self.before, self.beta, self.renormalise)


def coherent(call: AttentionCall, w: Tensor, before: Tensor, beta: float, renormalise: bool) -> Tensor:
    """Weights with those on the words `before` (rows, tokens) made larger."""
    factor = 1 + beta * call.at_columns(before).to(w.dtype)
    return scaled(w, factor) if renormalise else w * factor


def recent(layout: Layout, window: int) -> Tensor:
    """The words of answers among the last few before the newest token: (rows, tokens), bool."""
    tokens = layout.shape[1]
    place = torch.arange(tokens, device=layout.kind.device)
    return layout.where("generated") & (place >= tokens - 1 - window) & (place < tokens - 1)


def saliency(w: Tensor, slope: Tensor, answer: Tensor) -> Tensor:
    """Of the last of the rows (batch, heads, rows, keys), on the answer (batch, tokens): (batch,)"""
    s = (w.detach() * slope).abs()[:, :, -1].mean(1)
    s = s / s.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
    answer = answer[:, -s.shape[1] :]  # a window shows the last only
    return (s * answer).sum(1) / answer.sum(1)


def law(chances: Tensor, enough: Tensor, salient: Tensor, rounds: int) -> Tensor:
    """How likely every candidate is to be said, drawn without replacement until one is salient enough."""
    p, ok = chances.tolist(), enough.tolist()
    poor = [i for i, fine in enumerate(ok) if not fine]
    said = [0.0] * len(p)
    for drawn in range(rounds):
        for rejected in itertools.permutations(poor, drawn):
            path, left = 1.0, 1.0
            for i in rejected:
                path, left = path * p[i] / left, max(left - p[i], TINY)
            for i, fine in enumerate(ok):
                said[i] += path * p[i] / left if fine else 0.0
    said[int(salient.argmax())] += max(0.0, 1 - sum(said))
    return chances.new_tensor(said)
