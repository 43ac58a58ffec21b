"""Take attention from the sinks inside a text, and give it back to all that is read beside them.

    s_k   <- sum_i A[i, k] / (queries that can see k)            A  what a head attends to, so far
    sinks    s_k > alpha / T,   but for the first of them        T  tokens so far
    A[:, sinks] <- beta * A[:, sinks]
    A[:, others] <- A[:, others] * (1 + (1 - beta) * sum(A[:, sinks]) / sum(A[:, others]))

In chosen heads; every row still sums to one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.call import AttentionCall, Span, take_rows
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, Sites, option
from saccade.core.session import Session
from saccade.steering._parts.profiling import heads_of, one_by_one, score
from saccade.steering._parts.rules import redistribute


@dataclass(eq=False)
class ACT(Method):
    card = Card(
        slug="act",
        name="ACT",
        kind="method",
        family="steering",
        form="method",
        target="llm",
        paper="Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without "
        "Training through Attention Calibration (Yu et al., 2024)",
        summary="Take attention from the sinks inside a text and give it back to the other tokens",
        neutral={"beta": 1.0},
        code="GATECH-EIC/ACT",
        choices=(
            "The paper's alpha / T by default; the released scripts' absolute 0.1 with threshold=0.1.",
            "While writing, the means go on with every new row; the released code looks at that row alone.",
            "Without calibration every head is changed; the paper keeps those whose change costs no accuracy.",
        ),
        headline="average accuracy up by as much as 7.30% on Llama-30B",
        tags=("attention sink", "calibration", "head profiling", "redistribution", "classification"),
    )

    beta: float = option(0.4, "share of its attention that a sink keeps; 1 changes nothing", low=0, high=1)
    alpha: float = option(
        5.0, "mean attention over that of T equal tokens, from which a token is a sink", low=0
    )
    threshold: float | None = option(None, "mean attention from which a token is a sink, in place of alpha")
    sites: Sites = option("text.2:-1.self", "layers")
    calibrated: bool = option(False, "take the heads from a calibration of this model")

    def acts(self, call: AttentionCall) -> bool:
        return self.beta != 1

    def weights(self, call: AttentionCall, w: Tensor) -> Tensor:
        call.pass_.check_complete("finds sinks by the whole prompt")
        sinks = self._sinks(call, w)[:, :, None]  # (batch, heads, 1, keys)
        moved = redistribute(w, sinks, ~sinks, self.beta)
        if not self.calibrated:
            return moved
        heads = call.run.calibration()["heads"][call.site.layer].to(w.device)
        return torch.where(heads[: w.shape[1], None, None], moved, w)

    def calibrate(self, session: Session, samples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Samples are inputs of a forward with `answer`, ids (batch,) of the right next token. A head is kept
        where changing it alone costs no accuracy."""
        batches = [dict(sample) for sample in samples]
        if not all("answer" in batch for batch in batches):
            raise InputError(
                "ACT keeps heads by accuracy, and a sample has no answer.", "give every one its own"
            )
        bare, _ = score(session, batches, [])
        counts = heads_of(session, batches[0], self)
        heads = torch.zeros(max(counts) + 1, max(counts.values()), dtype=torch.bool)
        for layer, head, one in one_by_one(self, counts):
            heads[layer, head] = score(session, batches, [one])[0] >= bare
        return {"heads": heads}

    def _sinks(self, call: AttentionCall, w: Tensor) -> Tensor:
        """(batch, heads, keys)"""
        at = self._positions(call, w)
        sums, queries = self._so_far(call, w, at)
        mean = (sums / queries.clamp_min(1)).gather(2, at.clamp_min(0))
        tokens = call.klayout.where("all").sum(1)
        limit = (
            self.alpha / tokens
            if self.threshold is None
            else torch.full_like(tokens, self.threshold, dtype=w.dtype)
        )
        sinks = (mean > limit[:, None, None]) & (at >= 0)
        return sinks & (sinks.cumsum(-1) > 1)

    def _so_far(self, call: AttentionCall, w: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """What every token of the conversation got in this layer, and how many queries saw it, (batch, heads,
        tokens) each."""
        name, length = f"attention of {call.site.layer}", call.pass_.sequence.length
        known = call.state.get(name, (w.new_zeros(*w.shape[:2], 0), w.new_zeros(*w.shape[:2], 0)))
        if (gap := length - known[0].shape[2]) > 0:
            new = torch.zeros(2, *at.shape, dtype=w.dtype, device=w.device)
            whole = w.shape[2] == call.q.shape[2]  # else the rows come in pieces
            for rows in [call.resolve("all")] if whole else call.chunks():
                part = w if whole else call.weights(rows, self.heads_at(call.site), native=True, keep=False)
                real = take_rows(call.queries("all")[:, None, :, None], rows)
                new += torch.stack(
                    [part.where(real, 0).sum(2), (_visible(call, rows) & real).sum(2).expand(at.shape)]
                )
            new = new.masked_fill(at < 0, 0)
            grown = (
                F.pad(old, (0, gap)).scatter_add(2, at.clamp_min(0), n)
                for old, n in zip(known, new, strict=True)
            )
            call.state[name] = known = tuple(grown)
        return known

    def _positions(self, call: AttentionCall, w: Tensor) -> Tensor:
        """Of every key among the tokens of the conversation, -1 for none: (batch, heads, keys)."""
        pos, heads = call.kpos, self.heads_at(call.site)
        if pos.ndim == 3:  # heads hold different keys
            pos = pos.repeat_interleave(call.groups, 1)
            pos = pos if heads is None else pos[:, list(heads)]
        pos = pos.where(pos < call.pass_.sequence.length, -1)  # a static cache has room for more than came
        return (pos if pos.ndim == 3 else pos[..., None, :]).expand(*w.shape[:2], -1)


def _visible(call: AttentionCall, rows: Span) -> Tensor:
    """Which keys the rows see: (batch or 1, 1, rows or 1, keys)"""
    allowed = call.allowed(rows)
    if allowed is None:
        return torch.ones(1, 1, 1, call.k.shape[2], dtype=torch.bool, device=call.k.device)
    seen = allowed if allowed.dtype == torch.bool else allowed > torch.finfo(allowed.dtype).min / 2
    return seen[:, :1]
