"""One attention call, lazily readable: what is not asked for is not computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.core.errors import InputError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

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
    queries, keys), (batch, keys) where a kernel wants padding only, or flex attention's `BlockMask`. `causal` and
    `window` say what the operator adds to it by itself.
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
        pos: Tensor | None = None,
        keep: Tensor | None = None,
        context: Any = None,
        source: int = 0,
    ) -> None:
        self.site = site
        self.q, self.k, self.v, self.mask = q, k, v, mask
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.causal, self.window = causal, window
        self.softcap, self.sinks, self.position_bias = softcap, sinks, position_bias
        self.segments = segments  # cumulative lengths of packed sequences
        self.x = x
        self.options = options  # what the seam hands on to the native operator
        self.pos = (
            pos  # (batch, keys) or (batch, key heads, keys) logical positions, None while none is missing
        )
        self.keep = keep  # (batch, queries) places in the pass' tokens, None while none is missing
        self.context = context  # what the module was given beside the stream
        self.source = (
            source  # which of the module's calls it is: a module may attend to text, then to a picture
        )
        self.pass_ = pass_
        self.out: Tensor | None = None  # (batch, heads, queries, dim), once computed
        self.span: Span = slice(0, q.shape[2])  # the rows that the running event sees
        self.returned_weights: Tensor | None = None  # what the native operator gives beside its output
        self.keeps_weights = False  # somebody reads the edited weights later
        self._parts: list[tuple[Tensor, AttentionCall]] = []  # rows of the batch that methods saw alone
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
    def dropout(self) -> float:
        """What the native operator drops of the weights, in training."""
        options = self.options or {}
        return options.get("dropout", options.get("dropout_p", 0.0))

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before any edit."""
        return self._untouched or (self.q, self.k, self.v)

    @property
    def is_plain(self) -> bool:
        """Nothing but the causal rule and the scale stands between scores and weights, and no key is missing."""
        marks = (self.mask, self.pos, self.keep, self.window, self.segments, self.sinks, self.position_bias)
        return all(mark is None for mark in marks) and self.softcap is None

    @property
    def qlayout(self) -> Layout:
        return self.pass_.layouts(self)[0]

    @property
    def klayout(self) -> Layout:
        return self.pass_.layouts(self)[1]

    @property
    def qpos(self) -> Tensor:
        """Logical position of every query: (queries,), or (batch, queries) where some are missing, -1 for fillers."""
        if self.keep is not None:
            return torch.where(self.keep < 0, -1, self.keep + self.pass_.logical_start(self.site))
        last = self.pass_.logical_end(self.site, self.q.shape[2])
        return torch.arange(last - self.q.shape[2], last, device=self.q.device)

    @property
    def appended(self) -> slice:
        """Which of the queries, and of the keys, are tokens that methods appended."""
        return self.pass_.appended(self.site)

    @property
    def kpos(self) -> Tensor:
        """Logical position of every key: (keys,), or `pos` where some are missing."""
        if self.pos is not None:
            return self.pos
        last = (
            self.pass_.logical_end(self.site, self.k.shape[2])
            if self.site.kind == "self"
            else self.k.shape[2]
        )
        return torch.arange(last - self.k.shape[2], last, device=self.k.device)

    def columns(self, name: str) -> Tensor:
        """Keys of a kind or segment: (batch, 1, 1, keys), bool."""
        return self._at_keys(self.klayout.where(name))

    def at_columns(self, mask: Tensor) -> Tensor:
        """A mask or values of the conversation's first tokens (batch, tokens) for the keys of this call, False or 0
        for later ones: (batch, 1, 1, keys)."""
        last = self.pass_.logical_end(self.site, self.k.shape[2])
        last = last if self.pos is None else self.pass_.sequence.length
        return self._at_keys(nn.functional.pad(mask, (0, max(0, last - mask.shape[1])))[:, :last])

    def _at_keys(self, mask: Tensor) -> Tensor:
        if self.pos is None:
            keys = self.k.shape[2]  # a static cache has room for more than came
            return nn.functional.pad(mask[:, -keys:], (0, max(0, keys - mask.shape[1])))[:, None, None]
        pos = self.pos[:, None] if self.pos.ndim == 2 else self.pos.repeat_interleave(self.groups, 1)
        at = mask[:, None].expand(-1, pos.shape[1], -1).gather(2, pos.clamp_min(0)).where(pos >= 0, False)
        return at[:, :, None, :]

    def rows(self, name: str) -> Tensor:
        """Queries of a kind or segment among the rows that the event sees: (batch, 1, rows, 1), bool."""
        return take_rows(self.queries(name)[:, None, :, None], self.span)

    def queries(self, name: str) -> Tensor:
        """Queries of a kind or segment: (batch, queries), bool."""
        mask = self.qlayout.where(name)
        if self.keep is None:
            return mask[:, -self.q.shape[2] :]
        mask = mask[:, -self.pass_.full(self.site) :]
        return mask.gather(1, self.keep.clamp_min(0)) & (self.keep >= 0)

    def part(self, rows: slice | Tensor, pass_: Pass, offset: int) -> AttentionCall:
        """Some rows of the batch as a call of their own, whose columns begin at `offset`."""
        pos = None if self.pos is None else self.pos[rows]
        if pos is not None and offset:
            pos = torch.where(pos < offset, -1, pos - offset)

        def take(t: Any) -> Any:
            return t[rows] if isinstance(t, Tensor) and t.shape[0] == self.q.shape[0] else t

        return AttentionCall(
            self.site, self.q[rows], self.k[rows], self.v[rows], take(self.mask), scale=self.scale,
            causal=self.causal, operator=self._native, pass_=pass_, softcap=self.softcap, sinks=self.sinks,
            position_bias=take(self.position_bias), window=self.window, x=take(self.x), options=self.options,
            pos=pos, keep=take(self.keep), context=take(self.context), source=self.source,
        )  # fmt: skip

    def join(self, index: Tensor, part: AttentionCall) -> None:
        """Take over what was edited in these rows of the batch alone."""
        self._parts.append((index, part))
        if part._untouched is not None:
            mine, theirs = (self.q, self.k, self.v), (part.q, part.k, part.v)
            self.change_inputs(*(t.index_copy(0, index, new) for t, new in zip(mine, theirs, strict=True)))

    def by_sample(self, t: Tensor) -> Tensor:
        """Values of the caller's samples (samples, ...) for the rows of this call, beams and all: (batch, ...)."""
        return t.index_select(0, self.qlayout.sample.to(t.device))

    # ---- reading -------------------------------------------------------------------------------------

    def scores(self, rows: Rows = "all", heads: Any = None) -> Tensor:
        """Scores before the softmax, masked with the lowest float: (batch, heads, rows, keys)."""
        return self._scores(self.resolve(rows), heads, native=False)

    def weights(
        self, rows: Rows = "all", heads: Any = None, *, native: bool = False, keep: bool = True
    ) -> Tensor:
        """Weights as edited so far, or as the model alone has them: (batch, heads, rows, keys), float32 or better.

        The call keeps them for the next who asks; who walks over chunks says `keep=False`.
        """
        span = self.resolve(rows)
        if self._parts and not native:
            w = self.weights(span, heads, native=True)
            for index, part in self._parts:
                w = w.index_copy(0, index, part.weights(span, heads))
            return w
        for edited, w in self._edited if not native else ():
            if _same(edited, span):
                return w if heads is None else w[:, heads]
        key = (_key(span), None if heads is None else tuple(torch.as_tensor(heads).tolist()), native)
        if key in self._weights:
            return self._weights[key][1]
        w = self.softmax(self._scores(span, heads, native=native), heads)
        for edited, new in self._edited if not native else ():
            w = self._overlay(w, span, new if heads is None else new[:, heads], edited)
        if keep:
            self._weights[key] = (span, w)  # the span is kept, for the key may be its id
        return w

    def chunks(self, rows: Rows = "all", limit: int | None = None) -> Iterator[slice]:
        """The rows in pieces whose scores stay below `limit` elements."""
        span = self.resolve(rows)
        if not isinstance(span, slice):
            raise InputError(
                "Rows that differ between samples cannot be cut into pieces.", "ask for a slice of rows"
            )
        per_row = self.q.shape[0] * self.q.shape[1] * self.k.shape[2]
        step = max(1, (limit or CHUNK) // per_row)
        for start in range(span.start, span.stop, step):
            yield slice(start, min(start + step, span.stop))

    def apply(self, w: Tensor) -> Tensor:
        """Weights (batch, heads, rows, keys) times values: (batch, heads, rows, dim)."""
        batch, heads, rows, keys = w.shape
        grouped = w.to(self.v.dtype).reshape(batch, heads // self.groups, self.groups * rows, keys)
        return (grouped @ self.v).reshape(batch, heads, rows, self.v.shape[-1])

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

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that this site's own matrices and norms make of other context states (batch, tokens,
        width): (batch, heads, tokens, dim) each, not rotated."""
        return self.run.runtime.host.project(self, states)

    def rotate(self, x: Tensor, by: Tensor | int) -> Tensor:
        """Queries or keys (..., dim) of this site as they would be that many positions (...) later."""
        return self.run.runtime.rotation(self.site)(x, by)

    def next(self) -> Tensor:
        """For `replace`: the operator below, with all that was edited before it."""
        return self._below(self)

    def put_over(self, method: Method) -> None:
        """Let the method's `replace` stand over the operators so far."""
        below = self._below

        def operator(call: AttentionCall) -> Tensor:
            above, caller = call._below, call.run.method
            call._below, call.run.method = below, method
            try:
                out = method.replace(call)
                return below(call) if out is None else out
            finally:
                call._below, call.run.method = above, caller

        self._below = operator

    # ---- the arithmetic ------------------------------------------------------------------------------

    def softmax(self, scores: Tensor, heads: Any = None) -> Tensor:
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks if heads is None else self.sinks[torch.as_tensor(heads, device=self.sinks.device)]
        extra = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, extra], -1).softmax(-1)[..., :-1]

    def allowed(self, span: Span, *, native: bool = False) -> Tensor | None:
        """Which keys the rows see, as bool or as a term of the scores, (batch or 1, heads or 1, rows, keys);
        None when all."""
        queries, keys = self.q.shape[2], self.k.shape[2]
        given = (self.mask, self.causal, self.window, self.segments)
        mask, causal, window, segments = (self._unbiased if native else None) or given
        if mask is not None and not isinstance(mask, Tensor):
            mask = dense(mask, queries, keys)
        if mask is not None and mask.ndim == 4:
            return take_rows(mask, span) if mask.shape[2] == queries else mask
        if queries == 1 or (isinstance(span, slice) and span.start >= queries - 1):
            causal = False  # the last row sees all
        if mask is None and segments is None and window is None and not causal:
            return None
        # Where tokens are missing and there is no mask, what is left stands in order.
        kpos = torch.arange(keys, device=self.k.device)
        rows = torch.arange(queries, device=self.k.device)[
            span
        ]  # (rows,), or (batch, rows) where samples differ
        qpos = rows[..., None] + (keys - queries)
        rules = []  # each (rows, keys), (batch, rows, keys) or (batch, 1, keys)
        if mask is not None:
            rules.append(mask.bool()[:, None, :])
        if segments is not None:
            part = torch.bucketize(kpos, segments[1:], right=True)
            rules.append(part[rows][..., None] == part)
        if causal:
            rules.append(kpos <= qpos)
        if window is not None:
            rules.append(kpos > qpos - window)
        merged = functools.reduce(torch.logical_and, rules)
        return merged[None, None] if merged.ndim == 2 else merged[:, None]

    def add_bias(self, term: Tensor) -> None:
        """Add to the scores and stay on the native operator: the term becomes part of its mask."""
        queries, keys = self.q.shape[2], self.k.shape[2]
        term = term.to(self.q.dtype)
        term = term.reshape((1,) * (4 - term.ndim) + term.shape)
        self._bias = term if self._bias is None else self._bias + term
        self._weights.clear()
        if self._unbiased is None:
            self._unbiased = (self.mask, self.causal, self.window, self.segments)
        allowed = self.allowed(slice(0, queries), native=True)
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
        if isinstance(rows, int):  # a row that this call does not have is no row
            rows = slice(rows, rows + 1 or None) if -queries <= rows < queries else slice(0, 0)
        if isinstance(rows, slice):
            start, stop, step = rows.indices(queries)
            if step == 1:
                return slice(start, max(start, stop))
            rows = torch.arange(start, stop, step)
        index = rows.to(self.q.device)
        index = torch.where(index < 0, index + queries, index)
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
        q = q.reshape(batch * count // groups, groups * rows, dim)
        s = torch.baddbmm(q.new_empty(()), q, k.flatten(0, 1).mT, beta=0, alpha=self.scale)
        s = s.view(batch, count, rows, k.shape[2])
        if self.softcap is not None:
            s = torch.tanh(s / self.softcap) * self.softcap
        s = s if s.dtype == torch.float64 else s.float()
        if self.position_bias is not None:
            s = s + _narrow(self.position_bias, heads, span, self.q.shape[2])
        allowed = self.allowed(span, native=native)
        if allowed is None:
            return s
        if heads is not None and allowed.shape[1] > 1:
            allowed = allowed[:, heads]
        lowest = torch.finfo(s.dtype).min
        if allowed.dtype == torch.bool:
            return s.masked_fill_(~allowed, lowest)
        return (s + allowed).masked_fill(allowed <= torch.finfo(allowed.dtype).min / 2, lowest)

    def _overlay(self, w: Tensor, span: Span, new: Tensor, edited: Span) -> Tensor:
        """Rows of `w` that were edited, taken from `new`."""
        index, at = (_indices(s, self.q) for s in (span, edited))  # (batch, rows)
        same = index[:, :, None] == at[:, None, :]
        source = same.to(torch.uint8).argmax(-1)[:, None, :, None].expand(-1, w.shape[1], -1, w.shape[3])
        return torch.where(same.any(-1)[:, None, :, None], new.gather(2, source), w)


def take_rows(t: Tensor, span: Span) -> Tensor:
    """Rows (axis 2) of a tensor with four axes; axes of length one stay."""
    if isinstance(span, slice):
        return t[:, :, span] if t.shape[2] != 1 or span.start == span.stop else t
    if t.shape[2] == 1:
        return t.expand(-1, -1, span.shape[1], -1)
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


def dense(mask: BlockMask, queries: int, keys: int) -> Tensor:
    """What a mask of blocks stands for: (batch or 1, heads or 1, queries, keys), bool."""
    from torch.nn.attention.flex_attention import create_mask

    batch, heads = mask.shape[:2]
    return create_mask(mask.mask_mod, batch, heads, queries, keys, device=mask.kv_num_blocks.device)
