"""One attention call, lazily readable: what is not asked for is not computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.core.errors import InputError

if TYPE_CHECKING:
    from saccade.core.layout import Layout
    from saccade.core.method import Method
    from saccade.core.passes import Pass, Run
    from saccade.core.site import Site

Rows = str | int | slice | Tensor
Span = slice | Tensor  # a slice of plain ints, or (batch, rows) indices

SCORES_LIMIT = 2**30  # elements of scores that one request may hold at once
CHUNK = 2**26  # elements of scores that an edit of all rows holds at once


class AttentionCall:
    """Queries (batch, heads, queries, dim); keys and values (batch, key heads, keys, dim), not repeated.

    `mask` is what the native operator gets: None, bool (True attends) or additive, (batch, heads or 1,
    queries, keys), or (batch, keys) where a kernel wants padding only. `causal` and `window` say what
    the operator adds to it by itself.
    """

    def __init__(
        self,
        site: Site,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        *,
        scale: float | None,
        causal: bool,
        operator: Callable[[AttentionCall], Tensor],
        pass_: Pass,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        position_bias: Tensor | None = None,
        window: int | None = None,
        segments: Tensor | None = None,
        x: Tensor | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.site = site
        self.q, self.k, self.v, self.mask = q, k, v, mask
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.causal, self.window = causal, window
        self.softcap, self.sinks, self.position_bias = softcap, sinks, position_bias
        self.segments = segments  # cumulative lengths of packed sequences
        self.x = x
        self.options = options  # what the seam hands on to the native operator
        self.pass_ = pass_
        self.out: Tensor | None = None  # (batch, heads, queries, dim), once computed
        self.span: Span = slice(0, q.shape[2])  # the rows that the running event sees
        self._native = self._below = operator
        self._bias: Tensor | None = None
        self._untouched: tuple[Tensor, Tensor, Tensor] | None = None
        self._weights: dict[Any, tuple[Span, Tensor]] = {}
        self._edited: list[tuple[Span, Tensor]] = []
        self._unbiased: tuple[Any, bool, int | None, Tensor | None] | None = None

    @property
    def run(self) -> Run:
        return self.pass_.run

    @property
    def phase(self) -> str:
        return self.pass_.phase

    @property
    def state(self) -> dict[str, Any]:
        """The running method's own dictionary, which lives as long as the conversation. Tensors with a
        leading batch axis follow beams."""
        return self.pass_.sequence.state_of(self.run.method)

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def qlayout(self) -> Layout:
        return self.pass_.layouts(self)[0]

    @property
    def klayout(self) -> Layout:
        return self.pass_.layouts(self)[1]

    @property
    def qpos(self) -> Tensor:
        """Logical position of every query: (queries,)."""
        last = self.pass_.logical_end(self.site, self.q.shape[2])
        return torch.arange(last - self.q.shape[2], last, device=self.q.device)

    @property
    def kpos(self) -> Tensor:
        """Logical position of every key: (keys,)."""
        last = self.pass_.logical_end(self.site, self.k.shape[2]) if self.site.kind == "self" else self.k.shape[2]
        return torch.arange(last - self.k.shape[2], last, device=self.k.device)

    def columns(self, name: str) -> Tensor:
        """Keys of a kind or segment: (batch, 1, 1, keys), bool."""
        return self.klayout.where(name)[:, None, None, -self.k.shape[2] :]

    def rows(self, name: str) -> Tensor:
        """Queries of a kind or segment among the rows that the event sees: (batch, 1, rows, 1), bool."""
        mask = self.qlayout.where(name)[:, -self.q.shape[2] :]
        return take_rows(mask[:, None, :, None], self.span)

    # ---- reading -------------------------------------------------------------------------------------

    def scores(self, rows: Rows = "all", heads: Any = None) -> Tensor:
        """Scores before the softmax, masked with the lowest float: (batch, heads, rows, keys)."""
        return self._scores(self.resolve(rows), heads, native=False)

    def weights(self, rows: Rows = "all", heads: Any = None, *, native: bool = False) -> Tensor:
        """Weights as edited so far, or as the model alone has them: (batch, heads, rows, keys), float32 or better."""
        span = self.resolve(rows)
        for edited, w in self._edited if not native else ():
            if _same(edited, span):
                return w if heads is None else w[:, heads]
        key = (_key(span), None if heads is None else tuple(torch.as_tensor(heads).tolist()), native)
        if key not in self._weights:
            w = self.softmax(self._scores(span, heads, native=native), heads)
            for edited, new in self._edited if not native else ():
                w = self._overlay(w, span, new if heads is None else new[:, heads], edited)
            self._weights[key] = (span, w)  # the span is kept, for the key may be its id
        return self._weights[key][1]

    def chunks(self, rows: Rows = "all", limit: int | None = None) -> Iterator[slice]:
        """The rows in pieces whose scores stay below `limit` elements."""
        span = self.resolve(rows)
        if not isinstance(span, slice):
            raise InputError("Rows that differ between samples cannot be cut into pieces.", "ask for a slice of rows")
        per_row = self.q.shape[0] * self.q.shape[1] * self.k.shape[2]
        step = max(1, (limit or CHUNK) // per_row)
        for start in range(span.start, span.stop, step):
            yield slice(start, min(start + step, span.stop))

    def apply(self, w: Tensor) -> Tensor:
        """Weights (batch, heads, rows, keys) times values: (batch, heads, rows, dim)."""
        batch, heads, rows, keys = w.shape
        grouped = w.to(self.v.dtype).reshape(batch, heads // self.groups, self.groups * rows, keys)
        return (grouped @ self.v).reshape(batch, heads, rows, -1)

    def native(self, **changed: Any) -> Tensor:
        """The model's own operator on this call, `q`, `k`, `v` or `mask` exchanged: (batch, heads, queries, dim)."""
        old = {name: getattr(self, name) for name in changed}
        try:
            for name, value in changed.items():
                setattr(self, name, value)
            return self._native(self)
        finally:
            for name, value in old.items():
                setattr(self, name, value)

    def next(self) -> Tensor:
        """For `replace`: the operator below, with all that was edited before it."""
        return self._below(self)

    def put_over(self, method: Method) -> None:
        """Let the method's `replace` stand over the operators so far."""
        below = self._below

        def operator(call: AttentionCall) -> Tensor:
            call._below, call.run.method = below, method
            out = method.replace(call)
            return below(call) if out is None else out

        self._below = operator

    # ---- the arithmetic ------------------------------------------------------------------------------

    def softmax(self, scores: Tensor, heads: Any = None) -> Tensor:
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks if heads is None else self.sinks[torch.as_tensor(heads, device=self.sinks.device)]
        extra = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, extra], -1).softmax(-1)[..., :-1]

    def allowed(self, span: Span) -> Tensor | None:
        """Which keys the rows see, as bool or as a term of the scores, (batch or 1, heads or 1, rows, keys);
        None when all."""
        queries, keys = self.q.shape[2], self.k.shape[2]
        mask: Tensor | None = self.mask
        if mask is not None and mask.ndim == 4:
            return take_rows(mask, span) if mask.shape[2] == queries else mask
        qpos, kpos = self.qpos[:, None], self.kpos[None, :]
        rules = []
        if mask is not None:
            rules.append(mask.bool()[:, None, None, :])
        if self.segments is not None:
            part = torch.bucketize(torch.arange(keys, device=self.k.device), self.segments[1:], right=True)
            rules.append(part[:, None] == part[None, :])
        if self.causal and queries > 1:
            rules.append(kpos <= qpos)
        if self.window is not None:
            rules.append(kpos > qpos - self.window)
        if not rules:
            return None
        merged = rules[0]
        for rule in rules[1:]:
            merged = merged & rule
        merged = merged.view((1,) * (4 - merged.ndim) + merged.shape)
        return take_rows(merged, span) if merged.shape[2] == queries else merged

    def add_bias(self, term: Tensor) -> None:
        """Add to the scores and stay on the native operator: the term becomes part of its mask."""
        batch, heads, queries, keys = self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2]
        term = term.to(self.q.dtype)
        self._bias = term if self._bias is None else self._bias + term
        self._weights.clear()
        if self._unbiased is None:
            self._unbiased = (self.mask, self.causal, self.window, self.segments)
        self.mask, self.causal, self.window, self.segments = self._unbiased
        allowed = self.allowed(slice(0, queries))
        if allowed is None:
            mask = self._bias
        elif allowed.dtype == torch.bool:
            mask = self._bias.masked_fill(~allowed, torch.finfo(self.q.dtype).min)
        else:
            mask = (self._bias + allowed).clamp_min(torch.finfo(self.q.dtype).min)
        self.mask = mask.expand(mask.shape[0], mask.shape[1], queries, keys)
        self.causal, self.window, self.segments = False, None, None

    def change_inputs(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        if self._untouched is None:
            self._untouched = (self.q, self.k, self.v)
        self.q, self.k, self.v = q, k, v
        self._weights.clear()

    def edit(self, span: Span, w: Tensor) -> None:
        self._edited.append((span, w))
        self._weights.clear()

    def resolve(self, rows: Rows) -> Span:
        """Rows as a slice of plain ints, or as indices (batch, rows) where the samples differ."""
        queries = self.q.shape[2]
        if isinstance(rows, str):
            return self.pass_.span(rows, self)
        if isinstance(rows, int):
            row = rows % queries
            return slice(row, row + 1)
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(queries)
            return slice(start, max(start, stop))
        index = rows.to(self.q.device)
        return index if index.ndim == 2 else index[None].expand(self.q.shape[0], -1)

    def _scores(self, span: Span, heads: Any, *, native: bool) -> Tensor:
        q, k = (self._untouched or (self.q, self.k))[:2] if native else (self.q, self.k)
        q = take_rows(q, span)
        groups = self.groups
        if heads is not None:
            index = torch.as_tensor(heads, device=q.device)
            q, k, groups = q[:, index], k[:, index // groups], 1
        batch, count, rows, dim = q.shape
        size = batch * count * rows * k.shape[2]
        if size > SCORES_LIMIT:
            raise InputError(
                f"Scores of {rows} rows at {self.site.name} would hold {size * 4 / 2**30:.1f} GiB.",
                "ask for fewer rows or heads, or walk over call.chunks(rows)",
            )
        s = (q.reshape(batch, count // groups, groups * rows, dim) @ k.transpose(-1, -2)).reshape(
            batch, count, rows, -1
        ) * self.scale
        if self.softcap is not None:
            s = torch.tanh(s / self.softcap) * self.softcap
        s = s if s.dtype == torch.float64 else s.float()
        if self.position_bias is not None:
            s = s + _narrow(self.position_bias, heads, span, self.q.shape[2])
        before = (self.mask, self.causal, self.window, self.segments)
        if native and self._unbiased is not None:
            self.mask, self.causal, self.window, self.segments = self._unbiased
        allowed = self.allowed(span)
        self.mask, self.causal, self.window, self.segments = before
        if allowed is None:
            return s
        if heads is not None and allowed.shape[1] > 1:
            allowed = allowed[:, heads]
        lowest = torch.finfo(s.dtype).min
        if allowed.dtype == torch.bool:
            return s.masked_fill(~allowed, lowest)
        return (s + allowed).masked_fill(allowed <= torch.finfo(allowed.dtype).min / 2, lowest)

    def _overlay(self, w: Tensor, span: Span, new: Tensor, edited: Span) -> Tensor:
        """Rows of `w` that were edited, taken from `new`."""
        index, at = (_indices(s, self.q) for s in (span, edited))  # (batch, rows)
        same = index[:, :, None] == at[:, None, :]
        source = same.to(torch.uint8).argmax(-1)[:, None, :, None].expand(-1, w.shape[1], -1, w.shape[3])
        return torch.where(same.any(-1)[:, None, :, None], new.gather(2, source), w)


def take_rows(t: Tensor, span: Span) -> Tensor:
    """Rows (axis 2) of a tensor with four axes; axes of length one stay."""
    if t.shape[2] == 1:
        return t
    if isinstance(span, slice):
        return t[:, :, span]
    t = t.expand(span.shape[0], -1, -1, -1)
    return t.gather(2, span[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))


def put_rows(t: Tensor, span: Span, new: Tensor) -> Tensor:
    """`t` with those rows exchanged; not in place, for `t` may be the native operator's own memory."""
    if isinstance(span, slice):
        return torch.cat([t[:, :, : span.start], new, t[:, :, span.stop :]], 2)
    return t.scatter(2, span[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]), new)


def _narrow(bias: Tensor, heads: Any, span: Span, queries: int) -> Tensor:
    bias = bias if heads is None or bias.shape[1] == 1 else bias[:, heads]
    return take_rows(bias, span) if bias.shape[2] == queries else bias


def _indices(span: Span, q: Tensor) -> Tensor:
    if isinstance(span, slice):
        return torch.arange(span.start, span.stop, device=q.device)[None].expand(q.shape[0], -1)
    return span


def _same(a: Span, b: Span) -> bool:
    if isinstance(a, slice) or isinstance(b, slice):
        return isinstance(a, slice) and isinstance(b, slice) and (a.start, a.stop) == (b.start, b.stop)
    return a is b or torch.equal(a, b)


def _key(span: Span) -> Any:
    return (span.start, span.stop) if isinstance(span, slice) else id(span)
