"""Keep the tokens that are read most or look at the picture most, and take away what the last word alone says.

    s_i      attention that token i receives, mean over heads and rows
    a_i      attention of token i on the picture, mean over heads
    delta_i  s_i^2 + lam * P_i,                             P = softmax over the tokens of a
    keep     the share of the prompt's tokens with the largest delta, its last word among them
    sinks    words with s_i >= sink * mean s, whose scores are lowered by `penalty` from there on
    logits   f(prompt) - weight * head(embedding of the last word)

Only tokens of the picture leave.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, Sites, option
from saccade.core.passes import HiddenCall, Pass
from saccade.core.tokens import Tokens, TokensCall


@dataclass(eq=False)
class VASparse(Method):
    card = Card(
        slug="vasparse",
        name="VASparse",
        kind="method",
        family="steering",
        form="method",
        target="vlm",
        paper="VASparse: Towards Efficient Visual Hallucination Mitigation via Visual-Aware Token "
        "Sparsification (Zhuang et al., 2025)",
        summary="Keep tokens that are read or look at the picture, and subtract what the last word alone says",
        needs=("image",),
        neutral={"keep": 1.0, "penalty": 0.0, "weight": 0.0},
        code="mengchuang123/VASparse-github",
        sure="abstract",
        choices=(
            "Tokens are chosen once, at the first named layer, and leave there; the released code masks half of "
            "them at random and merges others by the token pruner that it builds on.",
            "Only the picture's tokens leave, as in the released code: without the question's words the "
            "embedded model answers another question.",
            "lam is the paper's 0.1; the released code's 1 stands in a branch that is switched off.",
            "The penalty on words that are sinks is the paper's, reconstructed; the released code has none.",
            "The contrast acts on every word; the released code asks a detector which words have no ground.",
            "The last word's embedding goes to the head without the final norm, as in the released code.",
            "Entries of the answer are not averaged, as the released code does for memory.",
        ),
        headline="state of the art on four hallucination benchmarks with competitive decoding speed",
        tags=(
            "hallucination",
            "token sparsification",
            "token pruning",
            "contrastive decoding",
            "attention sink",
        ),
    )

    keep: float = option(
        0.5, "share of the prompt's tokens that stay, rounded up; 1 drops none", low=0, high=1
    )
    lam: float = option(0.1, "weight of looking at the picture", low=0)
    sink: float = option(3.0, "times the mean attention from which a word is a sink", low=0)
    penalty: float = option(0.5, "what is taken from the scores of sinks; 0 is none", low=0)
    weight: float = option(0.1, "how much of what the last word alone says is subtracted; 0 is none", low=0)
    sites: Sites = option(
        {"tokens": "text.6%.layer", "bias": "text.6%:.self", "hidden": "text.embed"},
        "where tokens leave, where sinks are penalised, and what the last word is; the paper's 2 of 32",
    )

    def tokens(self, call: TokensCall) -> Tokens | None:
        if call.phase == "decode":
            return None
        if not call.pass_.complete:
            raise InputError(
                "VASparse chooses by what all of a prompt reads, and it comes in pieces.",
                "generate without prefill_chunk_size",
            )
        real, visual = call.tokens("all"), call.tokens("visual")
        strength, looking = measured(call.peek(), real)
        mean = strength.sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
        sinks = call.spread(real & ~visual & (strength >= self.sink * mean))
        before = call.state.get("sinks", sinks[:, :0])
        gap = call.pass_.start - before.shape[1]  # answers of earlier turns, which are no sinks
        call.state["sinks"] = torch.cat([F.pad(before, (0, gap)), sinks], 1)
        return Tokens(~visual | kept(delta(strength, looking, visual, self.lam), visual, self.keep))

    def bias(self, call: AttentionCall) -> Tensor | None:
        return -self.penalty * call.at_columns(call.state["sinks"])

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        call.run.state["last"] = h[:, -1]
        return h

    def prediction(self, base: Tensor, branches: list[Tensor], p: Pass) -> Tensor:
        return base - self.weight * p.run.unembed(p.run.state["last"], norm=False)


def measured(call: AttentionCall, real: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens that are there, how strongly they are read, and how they look at the picture: (batch, tokens)."""
    received, looking = [], []
    visual = call.columns("visual")[:, 0]
    for rows in call.chunks():
        w = call.weights(rows, keep=False).mean(1)  # (batch, rows, keys)
        received.append((w[..., -real.shape[1] :] * real[:, rows, None]).sum(1))
        looking.append((w * visual).sum(-1))
    return torch.stack(received).sum(0) / real.sum(-1, keepdim=True), torch.cat(looking, -1)


def delta(strength: Tensor, looking: Tensor, visual: Tensor, lam: float) -> Tensor:
    return strength.square() + lam * looking.masked_fill(~visual, -torch.inf).softmax(-1)


def kept(score: Tensor, visual: Tensor, share: float) -> Tensor:
    """The share of the visual tokens (batch, tokens) with the largest scores."""
    order = score.masked_fill(~visual, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    return visual & (order.argsort(-1) < (share * visual.sum(-1, keepdim=True)).ceil())
