"""Which heads speak to which: path patching, and how much of one task's circuit another uses.

    sender    its output at one place is that of the other prompt; all other heads there are as in the clean run
    receiver  what it then reads is put into a clean run, and nothing else
    effect = (LD(patched) - LD(clean)) / (LD(other) - LD(clean))
    reuse  = |A & B| / |B|

LD is the logit of the right word less that of the wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.errors import InputError
from saccade.core.heads import Heads, Selection
from saccade.core.method import Method
from saccade.core.passes import HiddenCall
from saccade.core.question import Answer, Question
from saccade.core.session import Session
from saccade.core.site import Site, match
from saccade.core.system import option
from saccade.probes._parts.asked import placed, read, token_of
from saccade.probes._parts.sweep import Score, repeated
from saccade.probes._parts.table import Table, layers
from saccade.probes._parts.tracing import Keep, Traced, check_lengths

READS = ("q", "k", "v")
Head = tuple[Site, int]


@dataclass(eq=False)
class CircuitReuse(Driver):
    """`answer.found["paths"]` is a `Paths`, whose `circuit` is a selection of heads; `reuse` and `overlap` compare
    those of two tasks."""

    card = Card(
        slug="circuit_component_reuse",
        name="Circuit component reuse",
        kind="driver",
        family="probes",
        form="probe",
        target="llm",
        paper="Circuit Component Reuse Across Tasks in Transformer Language Models (Merullo et al., 2023)",
        summary="Path patching from heads to heads or to the answer, and how circuits of two tasks overlap",
        code="jmerullo/circuit_reuse",
        sure="abstract",
        choices=(
            "Every sender is a row of a batch; the release takes them one by one.",
            "Senders are the heads of the layers below the receivers.",
            "Receivers that share keys and values with other heads change these too.",
            "The repair of attention is a reconstruction: it is not in the release.",
        ),
        headline="about 78% overlap of in-circuit heads; four-head repair raises Colored Objects accuracy "
        "49.6% -> 93.7%",
        tags=("path patching", "circuit", "interpretability", "indirect object identification", "heads"),
    )

    other: str = option("", "a question that differs as little as possible, of as many tokens")
    correct: str = option("yes", "the right answer, one token")
    incorrect: str = option("no", "the answer to the other question, one token")
    receivers: tuple[tuple[int, int], ...] = option((), "layer and head of each; none for the final residual")
    reads: str = option("q", "what of the receivers is patched", choices=READS)
    at: str = option("last", "where senders are patched: last, or a word of the question")
    freeze_mlps: bool = option(False, "keep the mlps there as in the clean run")
    rows: int = option(32, "senders in one batch", low=1)

    def run(self, session: Session, question: Question) -> Answer:
        if not self.other:
            raise InputError("CircuitReuse compares two questions, and is given one.", "give other=")
        clean = question.inputs(session.model)
        other = replace(question, text=self.other).inputs(session.model)
        layout, counts = read(session, question, clean)
        right, wrong = (token_of(question, word) for word in (self.correct, self.incorrect))
        sites, receivers = match("text.*.self", session.sites), self._receivers(session, counts)
        top = min((site.layer for site, _ in receivers), default=sites[-1].layer + 1)
        senders = [(site, head) for site in sites if site.layer < top for head in range(counts[site.name])]
        traced = paths(
            session,
            clean,
            other,
            senders,
            receivers,
            lambda logits: (logits[:, right] - logits[:, wrong]).double().cpu(),
            place=int(placed(question, self.at, clean, layout).nonzero()),
            reads=self.reads,
            freeze_mlps=self.freeze_mlps,
            rows=self.rows,
        )
        effect = Traced(traced.corrupted, traced.clean, traced.patched).recovery
        answer = question.ask(session)
        answer.found["paths"] = Paths(
            of_heads(senders, -100 * effect), float(traced.clean), float(traced.corrupted)
        )
        return answer

    def _receivers(self, session: Session, counts: Mapping[str, int]) -> list[Head]:
        found = []
        for layer, head in self.receivers:
            name = f"text.{layer}.self"
            if name not in counts or not layer > 0 or not 0 <= head < counts[name]:
                raise InputError(
                    f"There is no head {layer}.{head} that others could speak to.",
                    f"layers are 1 to {len(counts) - 1}, heads 0 to {max(counts.values()) - 1}",
                )
            found.append((match(name, session.sites)[0], head))
        return found


@dataclass(frozen=True, repr=False)
class Paths:
    """-100 times the effect of every sender, and the logit differences of both prompts."""

    change: Table  # (layer, head)
    clean: float
    other: float

    def circuit(self, share: float = 0.02) -> Selection:
        """The heads of the largest effect."""
        sites = tuple(f"text.{layer}.self" for layer in self.change.axes["layer"])
        return Heads("paths", sites, -self.change.values[None]).top(share)

    def __repr__(self) -> str:
        told = f"logit difference: clean {self.clean:.3g}, other {self.other:.3g}; change in percent"
        return f"{told}\n{self.change!r}"


def reuse(a: Selection, b: Selection) -> float:
    """The share of b's heads that a has too."""
    mine, theirs = _heads(a), _heads(b)
    return len(mine & theirs) / len(theirs)


def overlap(a: Selection, b: Selection) -> float:
    """Intersection over union."""
    mine, theirs = _heads(a), _heads(b)
    return len(mine & theirs) / len(mine | theirs)


def _heads(selection: Selection) -> set[tuple[str, int]]:
    return {(site, head) for site, heads in selection.items() for head in heads}


# ---- path patching -----------------------------------------------------------------------------------------


def paths(
    session: Session,
    clean: Mapping[str, Any],
    other: Mapping[str, Any],
    senders: Sequence[Head],
    receivers: Sequence[Head],
    score: Score,
    *,
    place: int,
    reads: str = "q",
    freeze_mlps: bool = False,
    rows: int = 32,
) -> Traced:
    """Scores of the clean prompt, of the other, and of the clean one with what each sender tells the receivers."""
    check_lengths(clean, other)
    sites = {"output": "text.*.self", **({"hidden": "text.*.mlp"} if freeze_mlps else {})}
    mine, theirs = Keep(sites=sites), Keep(sites=sites)
    before = score(session.forward(clean, [mine], last_only=True).logits[:, -1])[0]
    after = score(session.forward(other, [theirs], last_only=True).logits[:, -1])[0]
    found = []
    for start in range(0, len(senders), rows):
        some = senders[start : start + rows]
        inputs = repeated(clean, len(some))
        speak = Speak(sites=sites, senders=some, place=place, clean=mine.states, other=theirs.states)
        if not receivers:
            out = session.forward(inputs, [speak], last_only=True)
        else:
            hear = Hear(sites=tuple(site.name for site, _ in receivers))
            session.forward(inputs, [speak, hear], last_only=True)
            swap = Swap(sites=hear.sites, heard=hear.heard, receivers=receivers, part=READS.index(reads))
            out = session.forward(inputs, [swap], last_only=True)
        found.append(score(out.logits[:, -1]))
    return Traced(before, after, torch.cat(found))


@dataclass(eq=False)
class Speak(Method):
    """At one place every head as in the clean run, but one in each row, which is as in the other."""

    senders: Sequence[Head] = ()
    place: int = -1
    clean: Mapping[str, Tensor] = field(default_factory=dict)
    other: Mapping[str, Tensor] = field(default_factory=dict)

    def output(self, call: AttentionCall, o: Tensor) -> Tensor:
        o = o.clone()
        name = call.site.name
        o[:, :, self.place] = self.clean[name][:, :, self.place]
        for row, (site, head) in enumerate(self.senders):
            if site.name == name:
                o[row, head, self.place] = self.other[name][0, head, self.place]
        return o

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        h = h.clone()
        h[:, self.place] = self.clean[call.site.name][:, self.place]
        return h


@dataclass(eq=False)
class Hear(Method):
    """Queries, keys and values of the receivers' layers."""

    heard: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def inputs(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.heard[call.site.name] = q, k, v
        return q, k, v


@dataclass(eq=False)
class Swap(Method):
    """Gives the receivers what they heard."""

    heard: Mapping[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    receivers: Sequence[Head] = ()
    part: int = 0  # of queries, keys and values

    def inputs(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = [q, k, v]
        changed = given[self.part].clone()
        for site, head in self.receivers:
            if site.name == call.site.name:
                at = head if self.part == 0 else head // call.groups
                changed[:, at] = self.heard[site.name][self.part][:, at]
        given[self.part] = changed
        return given[0], given[1], given[2]


def of_heads(heads: Sequence[Head], values: Tensor) -> Table:
    """(layer, head)"""
    depth, most = max(site.layer for site, _ in heads) + 1, max(head for _, head in heads) + 1
    table = torch.full((depth, most), torch.nan, dtype=values.dtype)
    for (site, head), value in zip(heads, values, strict=True):
        table[site.layer, head] = value
    return Table(table, {"layer": layers(depth), "head": layers(most)})


# ---- repair ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Repair(Method):
    """The last row of some heads (`heads=`) looks at given places of the prompt alone, at each as much."""

    rows: str | int = "last"
    places: tuple[int, ...] = ()

    def weights(self, call: AttentionCall, w: Tensor) -> Tensor:
        there = torch.zeros(call.k.shape[2], dtype=w.dtype, device=w.device)
        there[list(self.places)] = 1 / len(self.places)
        return there.expand_as(w)
