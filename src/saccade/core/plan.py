"""What happens at one site, decided at attach: what a method overrides is what it costs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saccade.core.cache import TrackedLayer
from saccade.core.call import AttentionCall, Span, put_rows, take_rows
from saccade.core.errors import AttachError, InputError
from saccade.core.method import CALL_EVENTS, SITE_EVENTS, Method
from saccade.core.site import Site, match
from saccade.models.towers import BY_PLACE

if TYPE_CHECKING:
    from saccade.core.passes import Pass

# What a seam lets a method do.
REACH = {
    "interface": frozenset((*CALL_EVENTS, "evict", "hidden")),
    "sdpa": frozenset(("context", "skip", *CALL_EVENTS, "hidden")),
    "softmax": frozenset(("scores", "weights", "observe")),
    "module": frozenset(("hidden",)),
}


def reach(site: Site) -> frozenset[str]:
    if site.kind == "layer":
        return REACH[site.seam] | {"tokens"}
    crossed = site.tower == "text" and getattr(site.module, "layer_idx", None) is not None  # and cached
    return REACH[site.seam] if site.kind == "self" or crossed else REACH[site.seam] - {"evict"}


def by_place(layer: Site) -> str:
    """What a layer is given for every token and every other one."""
    return min(BY_PLACE & set(inspect.signature(layer.module.forward).parameters), default="")


def by_distance(module: nn.Module) -> bool:
    """Whether it makes a term for every distance, and can be told how many keys there were."""
    compute = getattr(module, "compute_bias", None)
    return compute is not None and "past_seen_tokens" in inspect.signature(compute).parameters


def rigid(layer: Site, sites: Sequence[Site]) -> str:
    """Why no token can leave before a layer; empty where one can."""
    names = set(inspect.signature(layer.module.forward).parameters)
    if given := by_place(layer):
        return f"its layers are given {given!r} for all of them"
    seams = {s.seam for s in sites if s.seam != "module" and s.path.startswith(f"{layer.path}.")}
    if "attention_mask" in names and seams - {"interface"}:
        return "its attention is not called through transformers' interface, where the mask could follow"
    stacks = {s.path.rpartition(".")[0] for s in sites if s.kind == "layer" and s.tower == layer.tower}
    if len(stacks) > 1:
        return f"its layers stand in more than one stack ({', '.join(sorted(stacks))})"
    return ""


@dataclass
class Plan:
    """The methods of one site by event, in the order of attachment."""

    context: tuple[Method, ...] = ()
    skip: tuple[Method, ...] = ()
    tokens: tuple[Method, ...] = ()
    inputs: tuple[Method, ...] = ()
    bias: tuple[Method, ...] = ()
    scores: tuple[Method, ...] = ()
    weights: tuple[Method, ...] = ()
    replace: tuple[Method, ...] = ()
    output: tuple[Method, ...] = ()
    observe: tuple[Method, ...] = ()
    evict: tuple[Method, ...] = ()
    hidden: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        self.edits = tuple({id(m): m for m in self.scores + self.weights}.values())  # equal is not the same
        called = [m for f in CALL_EVENTS for m in getattr(self, f)]
        self.batches = tuple(dict.fromkeys(m.batch for m in called))  # all that methods of a call name


def make_plans(methods: Sequence[Method], sites: Sequence[Site]) -> dict[Site, Plan]:
    """Which method acts where. What cannot be done is an error that names the site and what it lacks."""
    wanted: dict[Site, dict[str, list[Method]]] = {}
    for method in methods:
        name = type(method).__name__
        for event in [e for e in type(method).events() if e in SITE_EVENTS]:
            for site in _places(method, event, sites):
                if event not in reach(site):
                    able = [s.name for s in sites if event in reach(s)]
                    raise AttachError(
                        f"{name} needs {event!r} at {site.name} ({site.path}, {type(site.module).__name__}), "
                        f"where the {site.seam} seam gives only {', '.join(sorted(reach(site)))}.",
                        f"narrow it with sites=, to some of {', '.join(able[:6])}"
                        if able
                        else "use another method",
                    )
                if event == "tokens" and (why := rigid(site, sites)):
                    raise AttachError(
                        f"{name} takes tokens out at {site.name} ({type(site.module).__name__}), but {why}.",
                        "narrow it with sites= to another tower, or choose among its features behind it",
                    )
                layer = next(
                    (s for s in sites if s.kind == "layer" and site.path.startswith(f"{s.path}.")), None
                )
                counts = event == "evict" and site.kind == "self" and not by_distance(site.module)
                if counts and layer is not None and (given := by_place(layer)):
                    raise AttachError(
                        f"{name} thins out the cache at {site.name} ({type(layer.module).__name__}), but its layers "
                        f"are given {given!r}, which counts the entries.",
                        "use a model with rotary or learned positions",
                    )
                wanted.setdefault(site, {}).setdefault(event, []).append(method)
    return {
        site: Plan(**{event: tuple(found) for event, found in events.items()})
        for site, events in wanted.items()
    }


def _places(method: Method, event: str, sites: Sequence[Site]) -> list[Site]:
    """Where the method wants the event: of calls only where it has heads."""
    found = match(method.sites_of(event), sites) if method.sites_of(event) else []
    if not found or event not in CALL_EVENTS or not isinstance(method.heads, Mapping):
        return found
    chosen = [site for site in match(method.heads, sites) if site in found]
    if not chosen:
        raise AttachError(
            f"{type(method).__name__}: the sites of heads= ({', '.join(method.heads)}) are none of those of sites=.",
            "let sites= name them too",
        )
    return chosen


def merge(plans: Sequence[dict[Site, Plan]]) -> dict[Site, Plan]:
    """The plans of several sessions as one, in the order of attachment, refused where they cannot stand together."""
    merged: dict[Site, Plan] = {}
    for plan in plans:
        for site, mine in plan.items():
            old = merged.get(site, Plan())
            merged[site] = Plan(
                **{f.name: getattr(old, f.name) + getattr(mine, f.name) for f in fields(Plan)}
            )
    for site, together in merged.items():
        check(site, together)
    return merged


def reducing(plans: dict[Site, Plan]) -> dict[Site, Plan]:
    """What of the plans takes tokens and entries away, and looks for what to take."""
    parts = {site: Plan(tokens=p.tokens, evict=p.evict, observe=p.observe) for site, p in plans.items()}
    return {site: p for site, p in parts.items() if p.tokens or p.evict or p.observe}


def check(site: Site, plan: Plan) -> None:
    """Refuse methods that cannot stand together at one site."""
    if len(plan.evict) > 1:
        raise AttachError(
            f"{' and '.join(type(m).__name__ for m in plan.evict)} would both thin out the cache at {site.name}.",
            "narrow one of them with sites=",
        )
    if plan.replace and plan.edits:
        raise AttachError(
            f"{type(plan.replace[0]).__name__} replaces attention at {site.name}, and "
            f"{type(plan.edits[0]).__name__} edits its scores or weights there: there would be none.",
            "narrow one of them with sites=",
        )


def execute(call: AttentionCall, plan: Plan) -> Tensor:
    """(batch, heads, queries, dim). Where nothing is edited it is the native operator's own result."""
    if plan.batches not in ((), ("all",)):
        return _by_rows(call, plan)
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
    edits = acting(call, plan)
    out = _edited(call, plan, edits) if edits else call.next()
    for method in plan.output:
        if phase in method.phases:
            run.method = method
            out = method.output(call, out)
    call.out = out
    observe(call, plan)
    return out


def _by_rows(call: AttentionCall, plan: Plan) -> Tensor:
    """Every group of rows with the methods that want it; what nobody wants is the whole batch's native result."""
    rows = call.pass_.rows
    if not rows:
        method = next(m for e in CALL_EVENTS for m in getattr(plan, e) if m.batch != "all")
        raise InputError(
            f"{type(method).__name__}(batch={method.batch!r}): the rows of this batch have no names.",
            "attach to a pipeline of diffusers, or leave batch at 'all'",
        )
    onlookers = tuple(m for m in plan.observe if m.batch == "all")  # see the whole batch, as edited
    out = call.next()
    for name, index in rows.items():
        chosen = {e: tuple(m for m in getattr(plan, e) if m.batch in ("all", name)) for e in CALL_EVENTS}
        chosen["observe"] = tuple(m for m in chosen["observe"] if m not in onlookers)
        mine = Plan(**chosen)
        if mine.batches:
            mine.batches = ()
            index = index.to(out.device)
            part = call.part(index, call.pass_.only(name), 0)
            part.keeps_weights = bool(onlookers) or call.keeps_weights
            out = out.index_copy(0, index, execute(part, mine))
            call.join(index, part)
    call.out = out
    observe(call, Plan(observe=onlookers))
    return out


def evict(call: AttentionCall, plan: Plan, held: TrackedLayer | None) -> None:
    """Let the site's method thin out its layer of the cache."""
    keep = _entries(call, plan, held)
    if keep is not None and held is not None:
        held.evict(keep)


def _entries(call: AttentionCall, plan: Plan | None, held: TrackedLayer | None) -> Tensor | None:
    if plan is None or held is None or not held.keys.shape[2]:
        return None
    for method in plan.evict:
        if call.pass_.phase in method.phases:
            call.pass_.run.method = method
            return method.evict(call, held)
    return None


def execute_groups(
    call: AttentionCall, groups: list[tuple[slice, Pass, int]], held: TrackedLayer | None
) -> Tensor:
    """A prompt and its branches in one batch, each with the methods that act on it."""
    if not any(pass_.plans.get(call.site) for _, pass_, _ in groups):
        out = call.next()
        call.returned_weights = _present(call, groups, call.returned_weights)
        return out
    outs, kept = [], []
    weights: Tensor | None = None
    for at, (rows, pass_, offset) in enumerate(groups):
        part = call.part(rows, pass_, offset)
        part.keeps_weights = call.keeps_weights
        plan = pass_.plans.get(call.site, Plan())
        outs.append(execute(part, plan))
        kept.append(_entries(part, plan, None if held is None else held.part(rows)))
        if at == 0 and call.keeps_weights:
            weights = part.weights().to(call.q.dtype) if plan.edits else part.returned_weights
    call.returned_weights = _present(call, groups, weights)
    if held is not None and any(k is not None for k in kept):
        held.evict(_together(kept, groups, held))
    return torch.cat(outs)


def _present(
    call: AttentionCall, groups: list[tuple[slice, Pass, int]], weights: Tensor | None
) -> Tensor | None:
    """Of weights, the prompt's rows, without columns that only branches fill."""
    if weights is None:
        return None
    pos = call.part(*groups[0]).pos
    weights = weights[groups[0][0]]
    if pos is None:
        return weights
    empty = int((pos < 0).flatten(0, -2).long().cumprod(-1).sum(-1).min())
    return weights[..., empty:]


def _together(kept: list[Tensor | None], groups: list[tuple[slice, Pass, int]], held: TrackedLayer) -> Tensor:
    """Slots of all rows (batch, key heads, slots), shorter lists filled up on the left."""
    heads, slots = held.keys.shape[1], held.keys.shape[2]
    full = []
    for keep, (rows, _, _) in zip(kept, groups, strict=True):
        count = len(range(*rows.indices(held.keys.shape[0])))
        keep = torch.arange(slots, device=held.keys.device) if keep is None else keep
        while keep.ndim < 3:
            keep = keep[None] if keep.ndim == 1 else keep[:, None]
        full.append(keep.expand(count, heads, -1))
    most = max(k.shape[-1] for k in full)
    return torch.cat([torch.nn.functional.pad(k, (most - k.shape[-1], 0), value=-1) for k in full])


def observe(call: AttentionCall, plan: Plan) -> None:
    run, phase = call.pass_.run, call.pass_.phase
    if not plan.observe or run.runtime.recomputing:
        return
    if torch.is_grad_enabled():
        with torch.no_grad():
            return observe(call, plan)
    for method in plan.observe:
        if phase in method.phases:
            run.method = method
            method.observe(call)


def acting(call: AttentionCall, plan: Plan) -> list[Method]:
    """The methods that edit scores or weights in this call."""
    found = []
    for method in plan.edits:
        call.pass_.run.method = method
        read = method.rows != "last" or call.pass_.complete  # else its last row has not come
        if read and call.pass_.phase in method.phases and method.acts(call):
            found.append(method)
    return found


def _edited(call: AttentionCall, plan: Plan, edits: list[Method]) -> Tensor:
    """Native for all rows and heads, explicit for those that somebody edits."""
    everything = slice(0, call.q.shape[2])
    spans = {id(m): call.resolve(m.rows) for m in edits}
    union = _union(list(spans.values()), everything)
    heads = _heads([m.heads_at(call.site) for m in edits], call.q.shape[1])
    if isinstance(union, slice) and union.start == union.stop:
        return call.next()
    parts = []
    ragged = any(isinstance(span, Tensor) for span in spans.values())
    for chunk in (union,) if ragged or isinstance(union, Tensor) else call.chunks(union):
        w = edited_weights(call, plan, edits, spans, chunk, call.scores(chunk))
        if plan.output or plan.observe or plan.evict or call.keeps_weights:
            call.edit(chunk, w)
        w = torch.nn.functional.dropout(w, call.dropout) if call.dropout else w
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
    active = {id(m) for m in edits}
    for method in plan.scores:
        if id(method) in active:
            s = _apply_event(call, method, method.scores, s, spans[id(method)], chunk)
    w = call.softmax(s)
    for method in plan.weights:
        if id(method) in active:
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
    heads = method.heads_at(call.site)
    if heads is None:
        new = event(call, part)
    else:
        new = part.clone()
        new[:, list(heads)] = event(call, part[:, list(heads)])
    call.span = slice(0, call.q.shape[2])
    return new if inside == slice(0, t.shape[2]) else put_rows(t, inside, new)


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


def _heads(edits: list[tuple[int, ...] | None], count: int) -> list[int] | None:
    """The heads that somebody edits; None for all."""
    chosen = {head for heads in edits for head in heads or ()}
    wrong = [head for head in chosen if not -count <= head < count]
    if wrong:
        raise InputError(f"There is no head {wrong[0]} among {count}.", f"use heads from 0 to {count - 1}")
    return None if None in edits else sorted({head % count for head in chosen})
