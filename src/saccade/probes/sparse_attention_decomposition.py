"""Take a head's score apart into what it says along a few directions, and ask the heads before it who wrote there.

    Omega = (W_Q; b_Q) (W_K; b_K)^T = sum_k s_k u_k v_k^T           norm folded in, a 1 appended to every token
    q_i . k_j = sum_k s_k (x_i . u_k) (x_j . v_k)                   x: normalised residuals
    signal    = the largest terms, as few as exceed the whole
    from head o    sum_k sign(x_i . u_k) sqrt(s_k) (o . v_k) / scale      to the source j over the signal's terms;
                                                                    to the destination i with u_k and x_j . v_k

Rotary models turn queries and keys by their places, and are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, Sites, option
from saccade.core.passes import HiddenCall, Run


@dataclass(eq=False)
class SparseAttentionDecomposition(Method):
    """`session.results["sparse_attention_decomposition"]` is a `Circuit` for every sample. For short prompts: the
    scores of all heads are kept."""

    card = Card(
        slug="sparse_attention_decomposition",
        name="Sparse Attention Decomposition",
        kind="method",
        family="probes",
        form="probe",
        target="llm",
        paper="Sparse Attention Decomposition Applied to Circuit Tracing (Franco and Crovella, 2024)",
        summary="Which few directions a head attends by, and which heads before it wrote them",
        code="gaabrielfranco/sparse-attention-decomposition",
        choices=(
            "The release appends a 1 to every head's output too; it is left out.",
            "Tracing begins at all heads that fire at the prompt's last token.",
            "Heads whose queries and keys are rotated are refused: their matrix changes with the distance.",
        ),
        tags=("circuit", "singular vectors", "interpretability", "attribution", "tracing", "heads"),
    )

    weight: float = option(0.5, "from which a head fires on a token", low=0, high=1)
    share: float = option(
        0.7, "of all contributions, that the heads which are followed make up", low=0, high=1
    )
    sites: Sites = option(
        {"observe": "text.*.self", "hidden": "text.*.input"}, "heads, and what their layers are given"
    )
    phases: tuple[str, ...] = option(("prefill",), "passes that are taken apart")

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        call.run.state.setdefault("given", {})[call.site.layer] = h.detach()
        return h

    def observe(self, call: AttentionCall) -> None:
        assert call.out is not None
        layer = Layer(
            site=call.site.name,
            scores=call.q.double() @ call.k.double().repeat_interleave(call.groups, 1).mT,
            weights=call.weights(),
            out=call.out.double(),
            allowed=1e-3 + 16 * torch.finfo(call.q.dtype).eps,
        )
        call.run.state.setdefault("layers", {})[call.site.layer] = layer
        call.run.state["real"] = call.klayout.where("all")

    def end(self, run: Run) -> list[Circuit] | None:
        if "circuits" not in run.state and "layers" in run.state:
            heads = {number: taken_apart(run, number, layer) for number, layer in run.state["layers"].items()}
            run.state["circuits"] = [
                Tracing(heads, sample, real, self.weight, self.share).circuit()
                for sample, real in enumerate(run.state["real"])
            ]
        return run.state.get("circuits")


class Layer(NamedTuple):
    """One layer's attention on all samples, unscaled scores first."""

    site: str
    scores: Tensor  # (batch, heads, tokens, tokens)
    weights: Tensor
    out: Tensor  # (batch, heads, tokens, dim)
    allowed: float  # of the largest score, by which it may be missed


class Decomposition(NamedTuple):
    """Omega of one head."""

    u: Tensor  # (width + 1, dim)
    s: Tensor  # (dim,)
    v: Tensor  # (width + 1, dim)

    def terms(self, destination: Tensor, source: Tensor) -> Tensor:
        """Of the score of two tokens (width + 1,): (dim,)."""
        return self.s * (destination @ self.u) * (source @ self.v)


@dataclass(frozen=True)
class Taken:
    """A layer taken apart."""

    layer: Layer
    heads: list[Decomposition]
    x: Tensor  # (batch, tokens, width + 1), normalised, with a 1
    scale: Tensor  # (batch, tokens), by which the norm divides
    writes: Tensor  # (batch, heads, tokens, width), centred
    keys: Tensor  # (heads, width, dim), the norm folded in
    queries: Tensor


class Firing(NamedTuple):
    """A head that looks at one token, and by which singular vectors."""

    layer: int
    head: int
    destination: int
    source: int
    weight: float
    logit: float  # before the division by sqrt(dim)
    signal: tuple[int, ...]


@dataclass(frozen=True)
class Edge:
    """What one head has written for another to read, at the source or destination of a firing."""

    writer: tuple[int, int]  # layer and head
    reader: Firing
    side: str
    contribution: float
    part: Tensor  # (width,), of what was written, along the signal
    change: Tensor  # (dim,), of the reader's key or query, that this part makes

    @property
    def token(self) -> int:
        return self.reader.source if self.side == "source" else self.reader.destination


@dataclass(frozen=True, repr=False)
class Circuit:
    """Every firing of a sample, and the edges that lead to those at its last token. Tokens count from its first."""

    firings: list[Firing]
    edges: list[Edge]

    def __repr__(self) -> str:
        lines = [f"{len(self.firings)} firings, {len(self.edges)} edges"]
        for edge in self.edges:
            (layer, head), reader = edge.writer, edge.reader
            lines.append(
                f"  {layer}.{head} -> {reader.layer}.{reader.head} ({reader.destination} to {reader.source}, weight "
                f"{reader.weight:.2f}, {len(reader.signal)} terms) by its {edge.side}: {edge.contribution:.3g}"
            )
        return "\n".join(lines)


def decompose(q: Tensor, q_bias: Tensor, k: Tensor, k_bias: Tensor) -> Decomposition:
    """Of the matrices (width, dim) and biases (dim,) of one head."""
    left, right = (torch.cat([w, b[None]]) for w, b in ((q, q_bias), (k, k_bias)))
    (qa, ra), (qb, rb) = torch.linalg.qr(left), torch.linalg.qr(right)
    u, s, vh = torch.linalg.svd(ra @ rb.T)
    return Decomposition(qa @ u, s, qb @ vh.T)


def signal(terms: Tensor) -> Tensor:
    """The fewest terms, the largest first, whose sum exceeds that of all; all where none does."""
    order = terms.argsort(descending=True)
    beyond = (terms[order].cumsum(0) > terms.sum()).nonzero()
    return order[: int(beyond[0]) + 1] if len(beyond) else order


def taken_apart(run: Run, number: int, layer: Layer) -> Taken:
    norm, matrices = run.norm(layer.site), run.matrices(layer.site)
    if not isinstance(norm, nn.LayerNorm):
        raise InputError(
            f"{layer.site} stands behind a {type(norm).__name__}, whose centre and scale are not known.",
            "use a model with nn.LayerNorm, such as GPT-2",
        )
    h = run.state["given"][number].double()
    scale = (h.var(-1, correction=0) + norm.eps).sqrt()
    gamma, beta = norm.weight.detach().double(), norm.bias.detach().double()
    folded = []
    for w, bias in ((matrices.q, matrices.q_bias), (matrices.k, matrices.k_bias)):
        weight = w.double()  # (heads, width, dim)
        folded.append((gamma[:, None] * weight, (beta @ weight)[:, None] + bias))
    groups = len(matrices.q) // len(matrices.k)
    (q, q_bias), (k, k_bias) = folded[0], (t.repeat_interleave(groups, 0) for t in folded[1])
    heads = [decompose(q[i], q_bias[i, 0], k[i], k_bias[i, 0]) for i in range(len(q))]
    x = (h - h.mean(-1, keepdim=True)) / scale[..., None]
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    made = torch.stack([((x @ u) * s) @ (x @ v).mT for u, s, v in heads], 1)
    factor = (layer.scores * made).sum() / made.square().sum()  # by which some scale their queries at once
    if (factor * made - layer.scores).abs().max() > layer.allowed * layer.scores.abs().max():
        raise InputError(
            f"The scores of {layer.site} are not made of its matrices alone: queries or keys are changed.",
            "use a model whose positions are added to its embeddings, such as GPT-2",
        )
    o = layer.out @ matrices.o.double()
    return Taken(layer._replace(scores=made), heads, x, scale, o - o.mean(-1, keepdim=True), k, q)


@dataclass
class Tracing:
    """Back from one sample's last token."""

    layers: dict[int, Taken]
    sample: int
    real: Tensor  # (tokens,)
    weight: float
    share: float
    edges: list[Edge] = field(default_factory=list)

    def circuit(self) -> Circuit:
        columns = self.real.nonzero()[:, 0].tolist()
        self.first, last = columns[0], columns[-1]
        by_place: dict[tuple[int, int, int], list[Firing]] = {}
        for firing in self.firings():
            by_place.setdefault((firing.layer, firing.head, firing.destination), []).append(firing)
        everything = [firing for firings in by_place.values() for firing in firings]
        waiting = [firing for firing in everything if firing.destination == last - self.first]
        followed = set(waiting)
        while waiting:
            for edge in self.into(waiting.pop()):
                self.edges.append(edge)
                fresh = [f for f in by_place.get((*edge.writer, edge.token), ()) if f not in followed]
                followed.update(fresh)
                waiting += fresh
        return Circuit(everything, self.edges)

    def firings(self) -> Iterator[Firing]:
        for number, taken in self.layers.items():
            weights, scores = taken.layer.weights[self.sample], taken.layer.scores[self.sample]
            fires = (weights >= self.weight) & (scores > 0)
            for head, i, j in fires.nonzero().tolist():
                if self.real[i] and j > self.first:
                    x = taken.x[self.sample]
                    terms = taken.heads[head].terms(x[i], x[j])
                    yield Firing(
                        number,
                        head,
                        i - self.first,
                        j - self.first,
                        float(weights[head, i, j]),
                        float(scores[head, i, j]),
                        tuple(signal(terms).tolist()),
                    )

    def into(self, firing: Firing) -> Iterator[Edge]:
        """The heads whose contributions, the largest first, reach the share of all."""
        for side in ("source", "destination"):
            found = [
                (number, *each)
                for number in self.layers
                if number < firing.layer
                for each in self._from(number, firing, side)
            ]
            found.sort(key=lambda one: -one[2])
            goal, reached = self.share * sum(one[2] for one in found), 0.0
            for number, head, contribution, part, change in found:
                if reached >= goal:
                    break
                reached += contribution
                yield Edge((number, head), firing, side, contribution, part, change)

    def _from(self, number: int, firing: Firing, side: str) -> Iterator[tuple[int, float, Tensor, Tensor]]:
        """Of every head of an earlier layer: its contribution, the part of its output along the signal, and the
        change of the reader's key or query by that."""
        reader = self.layers[firing.layer]
        at = self.first + (firing.source if side == "source" else firing.destination)
        ways, folded = directions(reader, firing, side, self.sample, self.first)
        for head, o in enumerate(self.layers[number].writes[self.sample, :, at]):
            part = along(o, ways)
            yield (
                head,
                contributed(o, ways, reader.scale[self.sample, at]),
                part,
                part / reader.scale[self.sample, at] @ folded,
            )


def directions(reader: Taken, firing: Firing, side: str, sample: int, first: int) -> tuple[Tensor, Tensor]:
    """Of a firing's signal at one side: weighted and signed (width, terms); and the matrix that reads there."""
    u, s, v = reader.heads[firing.head]
    chosen = list(firing.signal)
    x = reader.x[sample]
    if side == "source":
        sign, ways, folded = torch.sign(x[first + firing.destination] @ u), v, reader.keys
    else:
        sign, ways, folded = torch.sign(x[first + firing.source] @ v), u, reader.queries
    return (ways * sign * s.sqrt())[:-1, chosen], folded[firing.head]


def contributed(o: Tensor, ways: Tensor, scale: Tensor) -> float:
    """Of a centred output (width,) along weighted directions (width, terms)."""
    return float((o @ ways).sum() / scale)


def along(o: Tensor, ways: Tensor) -> Tensor:
    """The part of an output (width,) in the space of the directions."""
    basis, _ = torch.linalg.qr(ways)
    return basis @ (basis.T @ o)


@dataclass(eq=False)
class Intervention(Method):
    """Adds to one prompt `times` what an edge carries: to what its writer writes, or to what its reader reads."""

    edge: Any = None
    times: float = -1.0
    only_reader: bool = True

    def sites_of(self, event: str) -> tuple[str, ...]:
        reads, writes = self.edge.reader.layer, self.edge.writer[0]
        return {"inputs": (f"text.{reads}.self",), "hidden": (f"text.{writes}.self",)}.get(event, ())

    def inputs(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.only_reader:
            changed = (k if self.edge.side == "source" else q).clone()
            changed[:, self.edge.reader.head, self.edge.token] += (self.times * self.edge.change).to(changed)
            return (q, changed, v) if self.edge.side == "source" else (changed, k, v)
        return q, k, v

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        if self.only_reader:
            return h
        h = h.clone()
        h[:, self.edge.token] += (self.times * self.edge.part).to(h)
        return h
