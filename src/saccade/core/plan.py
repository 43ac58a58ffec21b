"""What happens at one site, decided at attach: what a method overrides is what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from saccade.core.call import AttentionCall, Span, put_rows, take_rows
from saccade.core.errors import AttachError, InputError
from saccade.core.method import CALL_EVENTS, Method
from saccade.core.site import Site, match

# What a seam lets a method do.
REACH = {
    "interface": frozenset(CALL_EVENTS),
    "sdpa": frozenset(CALL_EVENTS),
    "softmax": frozenset(("scores", "weights", "observe")),
    "module": frozenset(("hidden",)),
}


@dataclass
class Plan:
    """The methods of one site by event, in the order of attachment."""

    inputs: tuple[Method, ...] = ()
    bias: tuple[Method, ...] = ()
    scores: tuple[Method, ...] = ()
    weights: tuple[Method, ...] = ()
    replace: tuple[Method, ...] = ()
    output: tuple[Method, ...] = ()
    observe: tuple[Method, ...] = ()
    hidden: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        self.edits = tuple(dict.fromkeys(self.scores + self.weights))


def make_plans(methods: Sequence[Method], sites: Sequence[Site]) -> dict[Site, Plan]:
    """Which method acts where. What cannot be done is an error that names the site and what it lacks."""
    wanted: dict[Site, dict[str, list[Method]]] = {}
    for method in methods:
        name = type(method).__name__
        for event in type(method).events():
            for site in match(method.sites_of(event), sites) if method.sites_of(event) else ():
                if event not in REACH[site.seam]:
                    able = [s.name for s in sites if event in REACH[s.seam]]
                    raise AttachError(
                        f"{name} needs {event!r} at {site.name} ({site.path}, {type(site.module).__name__}), "
                        f"where the {site.seam} seam gives only {', '.join(sorted(REACH[site.seam]))}.",
                        f"narrow it with sites=, to some of {', '.join(able[:6])}" if able else "use another method",
                    )
                wanted.setdefault(site, {}).setdefault(event, []).append(method)
    return {site: Plan(**{event: tuple(found) for event, found in events.items()}) for site, events in wanted.items()}


def merge(plans: Sequence[dict[Site, Plan]]) -> dict[Site, Plan]:
    """The plans of several sessions as one, in the order of attachment, refused where they cannot stand together."""
    merged: dict[Site, Plan] = {}
    for plan in plans:
        for site, mine in plan.items():
            old = merged.get(site, Plan())
            merged[site] = Plan(**{f.name: getattr(old, f.name) + getattr(mine, f.name) for f in fields(Plan)})
    for site, plan in merged.items():
        if plan.replace and plan.edits:
            raise AttachError(
                f"{type(plan.replace[0]).__name__} replaces attention at {site.name}, and "
                f"{type(plan.edits[0]).__name__} edits its scores or weights there: there would be none.",
                "narrow one of them with sites=",
            )
    return merged


def execute(call: AttentionCall, plan: Plan) -> Tensor:
    """(batch, heads, queries, dim). Where nothing is edited it is the native operator's own result."""
    run, phase = call.pass_.run, call.pass_.phase
    for method in plan.inputs:
        if phase in method.phases:
            run.method = method
            call.change_inputs(*method.inputs(call, call.q, call.k, call.v))
    for method in plan.bias:
        if phase in method.phases:
            run.method = method
            term = method.bias(call)
            if term is not None:
                call.add_bias(term)
    for method in plan.replace:
        if phase in method.phases:
            call.put_over(method)
    edits = [m for m in plan.edits if phase in m.phases]
    out = _edited(call, plan, edits) if edits else call.next()
    for method in plan.output:
        if phase in method.phases:
            run.method = method
            out = method.output(call, out)
    call.out = out
    observe(call, plan)
    return out


def observe(call: AttentionCall, plan: Plan) -> None:
    if plan.observe:
        with torch.no_grad():
            for method in plan.observe:
                if call.pass_.phase in method.phases:
                    call.pass_.run.method = method
                    method.observe(call)


def _edited(call: AttentionCall, plan: Plan, edits: list[Method]) -> Tensor:
    """Native for all rows and heads, explicit for those that somebody edits."""
    everything = slice(0, call.q.shape[2])
    spans = {id(m): call.resolve(m.rows) for m in edits}
    union = _union(list(spans.values()), everything)
    heads = _heads(edits, call.q.shape[1])
    if isinstance(union, slice) and union.start == union.stop:
        return call.next()
    parts = []
    ragged = any(isinstance(span, Tensor) for span in spans.values())
    for chunk in (union,) if ragged or isinstance(union, Tensor) else call.chunks(union):
        w = edited_weights(call, plan, edits, spans, chunk, call.scores(chunk))
        if plan.output or plan.observe:
            call.edit(chunk, w)
        parts.append(call.apply(w) if heads is None else call.apply(w)[:, heads])
    explicit = torch.cat(parts, 2)
    if heads is None and union == everything:
        return explicit
    out = call.next()
    if heads is None:
        return put_rows(out, union, explicit.to(out.dtype))
    out = out.clone()
    out[:, heads] = put_rows(out[:, heads], union, explicit.to(out.dtype))
    return out


def edited_weights(
    call: AttentionCall, plan: Plan, edits: list[Method], spans: dict[int, Span], chunk: Span, s: Tensor
) -> Tensor:
    """Scores of the chunk's rows through every `scores`, the softmax, and every `weights`."""
    for method in plan.scores:
        if method in edits:
            s = _apply_event(call, method, method.scores, s, spans[id(method)], chunk)
    w = call.softmax(s)
    for method in plan.weights:
        if method in edits:
            w = _apply_event(call, method, method.weights, w, spans[id(method)], chunk)
    return w


def _apply_event(
    call: AttentionCall, method: Method, event: Callable[..., Tensor], t: Tensor, span: Span, chunk: Span
) -> Tensor:
    """Give the event its rows and heads of `t`, and put its answer in their place."""
    inside = _inside(span, chunk)
    if isinstance(inside, slice) and inside.start >= inside.stop:
        return t
    call.pass_.run.method = method
    call.span = span if isinstance(span, Tensor) else _shift(inside, chunk)
    part = take_rows(t, inside)
    if method.heads is None:
        new = event(call, part)
    else:
        new = part.clone()
        new[:, list(method.heads)] = event(call, part[:, list(method.heads)])
    call.span = slice(0, call.q.shape[2])
    return new if part is t or new.shape == t.shape else put_rows(t, inside, new)


def _inside(span: Span, chunk: Span) -> Span:
    """Rows `span` of the call, counted from the chunk's first."""
    if isinstance(span, slice) and isinstance(chunk, slice):
        return slice(max(span.start, chunk.start) - chunk.start, min(span.stop, chunk.stop) - chunk.start)
    if isinstance(span, Tensor) and isinstance(chunk, slice):
        return span - chunk.start
    return slice(0, chunk.shape[1]) if isinstance(chunk, Tensor) else span


def _shift(inside: Span, chunk: Span) -> Span:
    if isinstance(inside, slice) and isinstance(chunk, slice):
        return slice(inside.start + chunk.start, inside.stop + chunk.start)
    return chunk


def _union(spans: list[Span], everything: slice) -> Span:
    slices = [s for s in spans if isinstance(s, slice)]
    if len(slices) == len(spans):
        filled = [s for s in slices if s.start < s.stop]
        return slice(min(s.start for s in filled), max(s.stop for s in filled)) if filled else slice(0, 0)
    first = spans[0]
    return first if all(s is first for s in spans) else everything


def _heads(edits: list[Method], count: int) -> list[int] | None:
    """The heads that somebody edits; None for all."""
    chosen: set[int] = set()
    for method in edits:
        if method.heads is None:
            return None
        chosen.update(method.heads)
    wrong = [head for head in chosen if not -count <= head < count]
    if wrong:
        raise InputError(f"There is no head {wrong[0]} among {count}.", f"use heads from 0 to {count - 1}")
    return sorted(head % count for head in chosen)
