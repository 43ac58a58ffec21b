"""How alike what a language model makes of pictures and of words is, layer by layer, in states and in weights.

    alignment = cos(mean_i p_i, mean_j t_j)                  p, t: states of visual and of text tokens behind a layer
    drift     = mean_i cos(h_i, h_i one layer before)
    overlap   = |A & B| / |A | B|                            A, B: the weights W_oi of the largest |W_oi| |x_i|, where
                                                             |x_i| is a norm over visual, over text tokens

The alignment of an example is the mean over the layers. With skipped=mlp, visual tokens pass by every n-th mlp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.linears import linears, listening, sizes, thinned
from saccade.core.method import Method, Sites, option
from saccade.core.passes import HiddenCall, Run
from saccade.core.session import Session
from saccade.core.site import match
from saccade.probes._parts.asked import Reading
from saccade.probes._parts.table import Table, layers

KINDS = ("visual", "text")
PAIRS = (("visual", "text"), ("visual", "visual"), ("text", "text"))
REDUCED = ("max", "min", "mean", "median", "mean of row maxima", "pooled")

State = tuple[Tensor, Tensor]  # of some tokens: positions (tokens,) and states (tokens, width)
Masks = dict[tuple[int, str], Tensor]  # by layer and name of a linear layer: (width in, width out), bool


@dataclass(eq=False)
class IMA(Method):
    """`session.results["ima"]` is an `Alignment`. `subnetworks` finds the weights that matter to each kind of token,
    `overlap` compares them, and under `using` the model has no others."""

    card = Card(
        slug="ima",
        name="IMA",
        kind="method",
        family="probes",
        form="probe",
        target="vlm",
        paper="Implicit Multimodal Alignment: On the Generalization of Frozen LLMs to Multimodal Inputs "
        "(Shukor and Cord, 2024)",
        summary="How alike a language model's states and subnetworks are for pictures and for words",
        needs=("image",),
        code="mshukor/ima-lmms",
        choices=(
            "Text tokens are those of the prompt, without special ones; nothing generated counts.",
            "Within a kind, a token is not compared with itself; the release counts these pairs too.",
            "Next words are read from every layer through the final norm.",
            "A skipped module adds nothing; in the release's skipped mlp the normed state is added.",
            "Skipped modules still run, and what they give visual tokens is dropped: that shows the effect, and "
            "saves no time.",
            "Every n-th layer is n, 2n, ..., counted from 1.",
        ),
        headline="none",
        tags=("alignment", "modality gap", "cosine", "Wanda", "pruning", "subnetwork", "skip", "layers"),
    )

    skipped: str = option(
        "none",
        "what visual tokens pass by: mlp, attention (self), both (layer)",
        choices=("none", "mlp", "self", "layer"),
    )
    every: int = option(4, "in every n-th layer; in none where there are fewer", low=1)
    entropy: bool = option(
        False, "measure how open the next word is at every state, which costs as much as the model"
    )
    sites: Sites = option(
        "text.embed|text.*.layer|text.*.self|text.*.mlp", "layers that are seen, or skipped"
    )
    phases: tuple[str, ...] = option(("prefill", "extend"), "passes in which it is measured and skipped")

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        kind, layer = call.site.kind, call.site.layer
        if kind in ("self", "mlp"):
            off = self.skipped in (kind, "layer") and (layer + 1) % self.every == 0
            return h.masked_fill(call.rows("visual", h), 0) if off else h
        for name in KINDS:
            mask = call.rows(name, h)[..., 0]
            seen = call.run.state.setdefault("seen", {})
            rows = seen.setdefault((name, 0 if kind == "embed" else layer + 1), [[] for _ in h])
            for pieces, own, states, at in zip(rows, mask, h.detach(), call.spread(mask), strict=True):
                pieces.append((call.start + at.nonzero()[:, 0].cpu(), states[own].float().cpu()))
        return h

    def end(self, run: Run) -> Alignment | None:
        kept: dict[tuple[str, int], list[list[State]]] = run.state.get("seen", {})
        if not kept:
            return None
        seen = {key: [_joined(pieces) for pieces in rows] for key, rows in kept.items()}
        order = sorted({layer for _, layer in seen})
        samples = range(len(seen["text", order[0]]))

        def token(kind: str, row: int, at: int) -> State:
            return seen[kind, order[at]][row]

        def by_layer(measure: Callable[[int, int], Tensor], first: int = 0) -> Tensor:
            """(samples, layers, ...)"""
            return torch.stack(
                [torch.stack([measure(row, at) for at in range(first, len(order))]) for row in samples]
            )

        names = tuple(str(layer - 1) if layer else "embed" for layer in order)

        def by_kind(measure: Callable[[str, int, int], Tensor], first: int = 0) -> Table:
            values = [by_layer(partial(measure, kind), first).mean(0) for kind in KINDS]
            return Table(torch.stack(values), {"kind": KINDS, "layer": names[first:]})

        def similarity(a: str, b: str, row: int, at: int) -> Tensor:
            return similarities(token(a, row, at)[1], token(b, row, at)[1], a == b)

        found = torch.stack([by_layer(partial(similarity, *pair)) for pair in PAIRS])
        axes = {"pair": tuple(" ".join(pair) for pair in PAIRS), "reduced": REDUCED, "layer": names}
        return Alignment(
            implicit=found[0, ..., REDUCED.index("pooled")],
            similarity=Table(found.mean(1).movedim(-1, 1), axes),
            norms=by_kind(lambda kind, row, at: token(kind, row, at)[1].norm(dim=-1).mean()),
            drift=by_kind(lambda kind, row, at: drift(token(kind, row, at - 1), token(kind, row, at)), 1),
            entropy=by_kind(lambda kind, row, at: openness(run, token(kind, row, at)[1]))
            if self.entropy
            else None,
        )


@dataclass(frozen=True, repr=False)
class Alignment:
    """Means over the samples of a run, and the implicit alignment of each; layers are told by what they give."""

    implicit: Tensor  # (samples, layers)
    similarity: Table  # (pair, reduced, layer)
    norms: Table  # (kind, layer)
    drift: Table  # (kind, layer), from the layer before
    entropy: Table | None  # (kind, layer)

    @property
    def score(self) -> float:
        return float(self.implicit.mean())

    def __repr__(self) -> str:
        return f"implicit alignment {self.score:.3g}; mean similarity\n{self.similarity.at(reduced='mean')!r}"


def similarities(a: Tensor, b: Tensor, same: bool = False) -> Tensor:
    """Cosines of all pairs of states (tokens, width), reduced in every way; without the diagonal where both are the
    same tokens. NaN where there is no pair."""
    cosine = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    if same:
        cosine = cosine[~torch.eye(len(a), dtype=torch.bool)].view(len(a), max(0, len(a) - 1))
    if not cosine.numel():
        return torch.full((len(REDUCED),), torch.nan)
    pooled = torch.cosine_similarity(a.mean(0), b.mean(0), 0)
    median = torch.tensor(float(np.median(cosine.numpy())))
    return torch.stack([cosine.max(), cosine.min(), cosine.mean(), median, cosine.amax(1).mean(), pooled])


def drift(before: State, after: State) -> Tensor:
    """Mean cosine of tokens with themselves, as far as they are still there."""
    old = before[1][torch.isin(before[0], after[0])]
    return torch.cosine_similarity(old, after[1][torch.isin(after[0], before[0])], -1).mean()


@torch.no_grad()
def openness(run: Run, h: Tensor) -> Tensor:
    """Mean entropy of the next word, of states (tokens, width)."""
    model: Any = run.runtime.model
    found = [
        torch.special.entr(run.unembed(part.to(model.device, model.dtype)).float().softmax(-1)).sum(-1).cpu()
        for part in h.split(256)
    ]
    return torch.cat(found).mean()


def _joined(pieces: list[State]) -> State:
    at, states = zip(*pieces, strict=True)
    return torch.cat(at), torch.cat(states)


# ---- weights -------------------------------------------------------------------------------------------------


@torch.no_grad()
def subnetworks(
    session: Session, samples: Iterable[Mapping[str, Any]], share: float = 0.5
) -> dict[str, Masks]:
    """For each kind of token, the share of every output's weights that matter most to it. Samples are inputs of a
    forward."""
    found = _linears(session)
    power: dict[str, dict[Any, Tensor | float]] = {kind: dict.fromkeys(found, 0.0) for kind in KINDS}
    for inputs in samples:
        reading = Reading()
        session.forward(inputs, [reading], last_only=True)
        assert reading.layout is not None
        where = {kind: reading.layout.where(kind) for kind in KINDS}

        def add(key: tuple[int, str], x: Tensor, where: dict[str, Tensor] = where) -> None:
            for kind, mask in where.items():
                if x.shape[:2] != mask.shape:
                    raise InputError(
                        f"{key[1]} of layer {key[0]} does not see every token: it is an expert.",
                        "take a model whose layers treat all tokens alike",
                    )
                power[kind][key] = power[kind][key] + x[mask].float().square().sum(0)

        with listening(found, add):
            session.forward(inputs, last_only=True)
    return {
        kind: {
            key: largest(sizes(found[key]) * torch.as_tensor(p).sqrt()[:, None], share).cpu()
            for key, p in of.items()
        }
        for kind, of in power.items()
    }


def largest(scores: Tensor, share: float) -> Tensor:
    """That share of every column of (width in, width out), bool."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(0, scores.topk(round(share * len(scores)), dim=0).indices, True)


def overlap(a: Masks, b: Masks) -> Table:
    """Of what two subnetworks keep, by matrix and layer; NaN where a layer has no such matrix."""
    depth, names = 1 + max(layer for layer, _ in a), tuple(dict.fromkeys(name for _, name in a))
    values = torch.full((len(names), depth), torch.nan, dtype=torch.float64)
    for (layer, name), mask in a.items():
        other = b[layer, name]
        values[names.index(name), layer] = (mask & other).sum() / (mask | other).sum()
    return Table(values, {"matrix": names, "layer": layers(depth)})


def using(session: Session, masks: Masks) -> AbstractContextManager[None]:
    """Inside of it, the model has the weights of this subnetwork alone."""
    return thinned(_linears(session), masks)


def _linears(session: Session) -> dict[tuple[int, str], nn.Module]:
    """Those of the text's layers."""
    sites = match("text.*.layer", session.sites)
    return {(site.layer, name): part for site in sites for name, part in linears(site.module).items()}
