"""See the queries and keys of every head together, so that near means attended.

    q' = c q,   k' = k / c + mean(q') - mean(k / c)          q'.k' = q.k + what is the same for all keys of a query
    c: of the most negative correlation of |q' - k'| with q.k, which counts every pair by its attention
    PCA of all q' and k' of a head

Attention is what it was, queries and keys lie around one centre, and small distances go with large dot products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.layout import KINDS
from saccade.core.method import Method, Sites, option
from saccade.core.passes import Run
from saccade.core.picture import Picture
from saccade.core.words import pieces

if TYPE_CHECKING:
    from PIL.Image import Image

SCALES = sorted((2 ** (step / 4) for step in range(-20, 21)), key=lambda c: max(c, 1 / c))
PAIRS = 2**14  # of a query and a key that a scale is chosen by, evenly taken


@dataclass(eq=False)
class AttentionViz(Method):
    """`session.results["attentionviz"]` has by tower the `Vectors` of a run; `joined` takes those of many runs
    together, and `vectors.page()` is a page to look around in."""

    card = Card(
        slug="attentionviz",
        name="AttentionViz",
        kind="method",
        family="probes",
        form="probe",
        target="any-transformer",
        paper="AttentionViz: A Global View of Transformer Attention (Yeh et al., 2023)",
        summary="Queries and keys of all heads as clouds of points in which near means attended",
        code="catherinesyeh/attention-viz",
        choices=(
            "Points are placed by PCA; t-SNE and UMAP are left out, which would need further packages.",
            "Queries and keys are scaled before keys are moved, so that their centres coincide afterwards.",
            "A pair counts by its attention weight, and c is sought among 41 powers of 2, from 1/32 to 32, that leave "
            "the correlation as strong as 1 does: of few heads it is positive whatever c is.",
            "Dot products are those of keys moved to the centre of the queries, with c = 1.",
            "The page shows two dimensions; `embedded` gives as many as are asked for.",
        ),
        tags=("query", "key", "embedding", "visualisation", "pca", "page", "interpretability"),
    )

    sites: Sites = option("*.self", "layers whose heads are shown")
    phases: tuple[str, ...] = option(("prefill",), "passes whose queries and keys are taken")

    def observe(self, call: AttentionCall) -> None:
        chosen = self.heads_at(call.site)
        heads = tuple(range(call.q.shape[1])) if chosen is None else tuple(chosen)
        if not heads:
            return
        if call.site.kind != "self" or call.q.shape[2] != call.k.shape[2] or call.kpos.ndim == 3:
            raise InputError(
                f"Queries and keys of {call.site.name} are not of the same tokens.",
                "narrow with sites= to self-attention, and evict nothing by head",
            )
        ids = call.run.prompt_ids() if call.site.tower == call.run.runtime.host.main_tower else None
        weights, k = call.weights(heads=heads, keep=False), call.k.repeat_interleave(call.groups, 1)
        real, layout, places = call.columns("all")[:, 0, 0], call.klayout, call.kpos.expand(len(call.q), -1)
        calls = call.run.state.setdefault(call.site.tower, {}).setdefault(call.site.name, [])
        for row, own in enumerate(real):
            at, sample, item = places[row, own], int(layout.sample[row]), int(layout.item[row].max())
            elsewhere = layout.item[row, at] != item
            known = ids is not None and ids.shape[1] == layout.shape[1]
            seen = Input(
                weights=weights[row][:, own][..., own].float().cpu()[None],
                kinds=tuple(KINDS[kind] for kind in layout.kind[row, at].tolist()),
                boxes=layout.boxes[row, at].masked_fill(elsewhere[:, None], torch.nan).float().cpu(),
                sample=sample,
                item=item,
                ids=tuple(ids[sample, at].tolist()) if ids is not None and known else (),
            )
            q, keys = (t[row, list(heads)][:, own].float().cpu() for t in (call.q, k))
            calls.append(Seen(q, keys, heads, seen))

    def end(self, run: Run) -> dict[str, Vectors] | None:
        return {tower: gathered(sites) for tower, sites in run.state.items()} or None


@dataclass(frozen=True, eq=False)
class Input:
    """A sentence or a picture, as one tower saw it."""

    weights: Tensor  # (sites, heads, tokens, tokens)
    kinds: tuple[str, ...]
    boxes: Tensor  # (tokens, 4) on its picture, NaN for none
    sample: int
    item: int  # the picture of the sample, the last of several, -1 for none
    ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()  # what every token wrote
    picture: Picture | None = None

    def __len__(self) -> int:
        return len(self.kinds)


class Comparable(NamedTuple):
    q: Tensor  # (sites, heads, tokens, dim)
    k: Tensor
    scale: Tensor  # (sites, heads), c
    before: Tensor  # (sites, heads), correlation of distance and dot product with c = 1
    after: Tensor  # with c


@dataclass(frozen=True, eq=False, repr=False)
class Vectors:
    """Queries and keys of one tower as attention multiplied them, of all inputs one after the other."""

    sites: tuple[str, ...]
    heads: tuple[tuple[int, ...], ...]  # by site
    q: Tensor  # (sites, heads, tokens, dim)
    k: Tensor
    inputs: list[Input] = field(default_factory=list)

    def __repr__(self) -> str:
        found = self.comparable
        lines = [
            f"{self.q.shape[2]} tokens of {len(self.inputs)} inputs; by head c, and the correlation with it"
        ]
        for site, scales, after in zip(self.sites, found.scale.tolist(), found.after.tolist(), strict=True):
            each = "  ".join(f"{c:.2g} {r:+.2f}" for c, r in zip(scales, after, strict=True))
            lines.append(f"{site}  {each}")
        return "\n".join(lines)

    def with_words(self, processor: Any) -> Vectors:
        """With the words of the ids, from a tokenizer, or from a processor that has one."""
        tokenizer = getattr(processor, "tokenizer", processor)
        if not any(one.ids for one in self.inputs):
            raise InputError("The ids of these inputs are not known.", "call the model with input_ids")
        inputs = []
        for one in self.inputs:
            ids = [i if kind == "text" else None for i, kind in zip(one.ids, one.kinds, strict=True)]
            inputs.append(replace(one, texts=tuple(text or "" for text in pieces(tokenizer, ids))))
        return replace(self, inputs=inputs)

    def with_pictures(self, *samples: Sequence[Image]) -> Vectors:
        """With the pictures of every sample of the batch; made smaller where they are large."""
        inputs = [
            replace(one, picture=Picture.of(samples[one.sample][one.item])) if one.item >= 0 else one
            for one in self.inputs
        ]
        return replace(self, inputs=inputs)

    @cached_property
    def comparable(self) -> Comparable:
        """Queries and keys among which distances can be seen."""
        i, j, at = self._pairs()
        found = []
        for site in range(len(self.sites)):
            weights = torch.cat([one.weights[site].flatten(1) for one in self.inputs], 1)[:, at]
            for q, k, w in zip(self.q[site].double(), self.k[site].double(), weights.double(), strict=True):
                c, before, after = scaled(q, k, i, j, w)
                found.append((*moved(q, k, c), torch.tensor([c, before, after])))
        shape = self.q.shape[:2]
        q, k, numbers = (torch.stack(part).unflatten(0, shape) for part in zip(*found, strict=True))
        return Comparable(q, k, *numbers.unbind(-1))

    def embedded(self, dimensions: int = 2) -> tuple[Tensor, Tensor]:
        """Places of queries and keys by head: (sites, heads, tokens, dimensions) each."""
        q, k = self.comparable.q, self.comparable.k
        places = pca(torch.cat([q, k], 2), dimensions)
        return places[:, :, : q.shape[2]], places[:, :, q.shape[2] :]

    def page(self, title: str = "Queries and keys") -> str:
        """HTML that needs nothing else: all heads, the points of one, and what a point attends to."""
        from saccade.report import vectors

        return vectors.page(self, title)

    def _pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of one input (pairs,), and where their weights are among all."""
        i, j, start = [], [], 0
        for one in self.inputs:
            at = torch.arange(start, start := start + len(one))
            i.append(at.repeat_interleave(len(one)))
            j.append(at.repeat(len(one)))
        every = torch.arange(0, sum(map(len, i)), 1 + sum(map(len, i)) // PAIRS)
        return torch.cat(i)[every], torch.cat(j)[every], every


class Seen(NamedTuple):
    """One input at one site."""

    q: Tensor  # (heads, tokens, dim)
    k: Tensor
    heads: tuple[int, ...]
    input: Input


def gathered(sites: dict[str, list[Seen]]) -> Vectors:
    """Of one tower's calls by site, one for every input."""
    if len({tuple(one.q.shape for one in calls) for calls in sites.values()}) > 1:
        raise InputError(
            f"{' and '.join(sites)} see other tokens than each other, or have other heads.",
            "narrow with sites= to layers that are alike",
        )
    q = torch.stack([torch.cat([one.q for one in calls], 1) for calls in sites.values()])
    k = torch.stack([torch.cat([one.k for one in calls], 1) for calls in sites.values()])
    inputs = [
        replace(calls[0].input, weights=torch.cat([one.input.weights for one in calls]))
        for calls in zip(*sites.values(), strict=True)
    ]
    return Vectors(tuple(sites), tuple(calls[0].heads for calls in sites.values()), q, k, inputs)


def joined(found: Sequence[Vectors]) -> Vectors:
    """Of many runs of one model."""
    if len({(one.sites, one.q.shape[1], one.q.shape[3]) for one in found}) != 1:
        raise InputError("These are not of the same heads.", "join runs of one model with the same sites")
    q, k = (torch.cat(parts, 2) for parts in ([one.q for one in found], [one.k for one in found]))
    return replace(found[0], q=q, k=k, inputs=[one for each in found for one in each.inputs])


def moved(q: Tensor, k: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """q' and k' of a head (tokens, dim)."""
    return c * q, k / c + (c * q.mean(0) - k.mean(0) / c)


def scaled(q: Tensor, k: Tensor, i: Tensor, j: Tensor, w: Tensor) -> tuple[float, float, float]:
    """c of a head (tokens, dim), by pairs with their attention; and the correlation with 1, and with c."""
    dots = (q[i] * (k - k.mean(0) + q.mean(0))[j]).sum(-1)
    q, k = q - q.mean(0), k - k.mean(0)
    parts = q.square().sum(-1)[i], k.square().sum(-1)[j], (q[i] * k[j]).sum(-1)
    found = {}
    for c in SCALES:
        squares = c**2 * parts[0] + parts[1] / c**2 - 2 * parts[2]
        found[c] = correlation(squares.clamp_min(0).sqrt(), dots, w)
    strong = (c for c in SCALES if abs(found[c]) >= abs(found[1.0]))
    best = min(strong, key=found.__getitem__)  # the first of equals, which is the nearest to 1
    return best, found[1.0], found[best]


def correlation(a: Tensor, b: Tensor, w: Tensor) -> float:
    """Pearson's, of numbers that count by weights; 0 where one does not vary."""
    w = w / w.sum()
    a, b = a - w @ a, b - w @ b
    size = ((w @ a.square()) * (w @ b.square())).sqrt()
    return float((w @ (a * b)) / size) if size > 0 else 0.0


def pca(x: Tensor, dimensions: int) -> Tensor:
    """Points (..., points, dim) along the axes of the largest variance, each with its largest entry positive."""
    x = x.double() - x.double().mean(-2, keepdim=True)
    axes = torch.linalg.eigh(x.mT @ x).eigenvectors.flip(-1)[..., :dimensions]
    largest = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
    return x @ (axes * largest.sign())
