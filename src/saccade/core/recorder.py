"""The method that records: it only observes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from saccade.core.errors import InputError, OptionError
from saccade.core.layout import GENERATED, PAD, Layout
from saccade.core.method import Method, option
from saccade.core.record import Part, Recording
from saccade.core.reduce import entropy, segments
from saccade.core.sinks import sinks_of
from saccade.core.site import Site

if TYPE_CHECKING:
    from saccade.core.call import AttentionCall, Span
    from saccade.core.passes import Pass, Run

_TOP = re.compile(r"topk\(([1-9]\d*)\)")


@dataclass(eq=False, kw_only=True)
class Record(Method):
    """Keeps attention weights, and only what is asked for. The model's output stays as it is, to the bit.

    Rows, columns and heads are chosen first, then the reduction is made: `mean_heads`; `segments`, the sums
    over the first token, pictures, question, answer and the rest; `entropy` of the chosen columns in nats;
    `topk(k)`, the largest and where they are. `session.results["Record"]` is then a `Recording`.
    """

    sites: Any = option("text.*.self", "where: a pattern of sites")
    rows: Any = option(
        "generated",
        "query rows: generated (those that say the answer: the prompt's last and all later ones), last (of "
        "every pass), all, a segment such as question, or a slice of positions",
    )
    columns: str = option(
        "all", "keys: all, a kind or segment such as image, visual, question, or sinks, by layer"
    )
    reduce: str | None = option(None, "what is kept: mean_heads, segments, entropy, topk(k); None for all")
    dtype: str = option("float16", "in which numbers", choices=("float16", "bfloat16", "float32"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduce not in (None, "mean_heads", "segments", "entropy") and not _TOP.fullmatch(self.reduce):
            raise OptionError(
                f"Record(reduce={self.reduce!r}) is not known.",
                "use mean_heads, segments, entropy or topk(k)",
            )
        if isinstance(self.rows, int):
            self.rows = slice(self.rows, self.rows + 1 or None)
        if isinstance(self.rows, slice) and self.rows.step not in (None, 1):
            raise OptionError("Record(rows=) takes slices of neighbours only.", "leave out the step")
        if self.reduce == "segments" and self.columns != "all":
            raise OptionError("Sums over segments are made of all columns.", "leave out columns=")

    def begin(self, run: Run) -> None:
        run.state["log"] = _Log()

    def observe(self, call: AttentionCall) -> None:
        log: _Log = call.run.state["log"]
        space = log.enter(call)
        span = self._span(call, log)
        if span is None or (isinstance(span, slice) and span.start >= span.stop):
            return
        chosen = log.columns(call, self.columns, self._heads(call))
        if chosen is None:
            return
        chunks = list(call.chunks(span)) if isinstance(span, slice) else [span]
        parts = [
            self._reduced(call, call.weights(c, chosen.heads, keep=len(chunks) == 1), chosen) for c in chunks
        ]
        where = [at for _, at in parts if at is not None]
        log.add(
            Part(
                site=call.site.name,
                space=space.number,
                first=0 if space.main else log.samples(call),
                moment=len(log.moments) - 1 if space.main else -1,
                rows=log.rows(call, span),
                columns=None if self.reduce in ("segments", "entropy") else chosen.positions,
                weights=torch.cat([w for w, _ in parts], 2),
                where=torch.cat(where, 2) if where else None,
            ),
            call.site,
        )

    def end(self, run: Run) -> Recording:
        log: _Log = run.state["log"]
        options = {
            "rows": str(self.rows),
            "columns": self.columns,
            "heads": self.heads,
            "reduce": self.reduce,
        }
        return log.recording(run, options)

    def _span(self, call: AttentionCall, log: _Log) -> Span | None:
        if isinstance(self.rows, slice):
            queries = call.q.shape[2]
            end = call.pass_.logical_end(call.site, queries)
            first, last, _ = self.rows.indices(end)
            if call.keep is None:
                return slice(max(0, first - end + queries), max(0, last - end + queries))
            qpos = call.qpos
            inside = (
                ((qpos >= first) & (qpos < last)).view(-1, qpos.shape[-1]).any(0).nonzero()[:, 0].tolist()
            )
            return slice(inside[0], inside[-1] + 1) if inside else None
        if self.rows not in ("last", "generated"):
            return call.resolve(self.rows)
        if self.rows == "generated" and not log.space.main:
            return None
        if self.rows == "generated" and call.phase == "decode":
            return slice(0, call.q.shape[2])
        return call.resolve("last") if call.pass_.complete else None

    def _heads(self, call: AttentionCall) -> list[int] | None:
        count = call.q.shape[1]
        heads = self.heads_at(call.site)
        wrong = [head for head in heads or () if not -count <= head < count]
        if wrong:
            raise InputError(
                f"{call.site.name} has no head {wrong[0]}, only {count}.", f"use heads from 0 to {count - 1}"
            )
        return None if heads is None else [head % count for head in heads]

    def _reduced(self, call: AttentionCall, w: Tensor, chosen: _Columns) -> tuple[Tensor, Tensor | None]:
        where = None
        if self.reduce == "segments":
            masks = segments(call.columns)[:, :, 0]  # (batch, heads or 1, keys, segments)
            w = w @ (masks if masks.shape[1] == 1 or chosen.heads is None else masks[:, chosen.heads]).to(
                w.dtype
            )
        else:
            w = chosen.of(w)
        if self.reduce == "mean_heads":
            if chosen.positions.ndim == 3:
                raise InputError(
                    f"The heads of {call.site.name} hold different keys: they have no mean over places.",
                    "record without mean_heads",
                )
            w = w.mean(1, keepdim=True)
        elif self.reduce == "entropy":
            w = entropy(w)
        elif self.reduce is not None and (top := _TOP.fullmatch(self.reduce)):
            w, index = w.topk(min(int(top[1]), w.shape[-1]), -1)
            where = chosen.positions if chosen.positions.ndim == 3 else chosen.positions[:, None]
            where = where[:, :, None].expand(*w.shape[:3], -1).gather(3, index)
        return w.to(getattr(torch, self.dtype), copy=True).contiguous(), where


@dataclass
class _Columns:
    """The chosen keys of a call, of every sample as many as of the richest."""

    index: slice | Tensor  # (batch, heads or 1, columns)
    positions: (
        Tensor  # (batch, columns), or (batch, heads, columns) where heads hold different keys; -1 for none
    )
    heads: list[int] | None

    def of(self, w: Tensor) -> Tensor:
        if isinstance(self.index, slice):
            return w[..., self.index]
        real = (self.positions if self.positions.ndim == 3 else self.positions[:, None]) >= 0
        index = self.index[:, :, None].expand(-1, w.shape[1], w.shape[2], -1)
        return w.gather(3, index) * real[:, :, None]


class _Space(NamedTuple):
    number: int  # of the keys' layout; 0 is the main sequence
    main: bool  # the queries are tokens of the main sequence


class _Moment(NamedTuple):
    """One pass of the main sequence: which rows of the batch were there."""

    sample: Tensor  # (rows,)
    prefix: Tensor | None  # (rows, tokens since the first pass)


class _Log:
    """What is gathered in one run."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.moments: list[_Moment] = []
        self.sites: dict[str, Site] = {}
        self.layouts: dict[Any, Layout] = {}  # of spaces beside the main sequence
        self.seen: dict[str, int] = {}
        self.space = _Space(0, True)
        self.last: Pass | None = None  # of the main sequence
        self.base = 0  # length of the main sequence after its first pass
        self.prompt = 0  # and before the first generated token
        self._pass: Pass | None = None
        self._cache: dict[Any, _Columns | None] = {}
        self._rows: dict[Any, Tensor] = {}
        self._known: list[Tensor] = []

    def enter(self, call: AttentionCall) -> _Space:
        """Note the pass, and say in which space the call's keys are."""
        pass_ = call.pass_
        if pass_ is not self._pass:
            self._pass, self._cache, self._rows, self._known = pass_, {}, {}, []
        sequential = call.site.tower == call.run.runtime.host.main_tower and pass_.sequence.length > 0
        if sequential and pass_ is not self.last:
            self._note(pass_)
        index = 0
        if not sequential or call.site.kind != "self":
            layout = call.klayout
            key = (call.site.tower, call.site.kind == "self", layout.shape)
            index = 1 + list(self.layouts).index(key) if key in self.layouts else len(self.layouts) + 1
            self.layouts.setdefault(key, layout)
        self.space = _Space(index, sequential)
        return self.space

    def _note(self, pass_: Pass) -> None:
        self.last, sequence = pass_, pass_.sequence
        assert sequence.sample is not None
        if not self.moments:
            self.base = sequence.length
        if pass_.phase != "decode":
            self.prompt = sequence.length
        many = sequence.rows > 1
        if many and sequence.rows != pass_.run.samples and not sequence.layout().named:
            raise InputError(
                "Beams cannot be recorded where no ids are given.", "pass input_ids in place of inputs_embeds"
            )
        prefix = sequence.ids_from(self.base) if many else None
        self.moments.append(_Moment(sequence.sample, prefix))

    def add(self, part: Part, site: Site) -> None:
        self.parts.append(part)
        self.sites.setdefault(site.name, site)

    def samples(self, call: AttentionCall) -> int:
        """How many samples of a tower came to the site before."""
        before = self.seen.get(call.site.name, 0)
        self.seen[call.site.name] = before + call.q.shape[0]
        return before

    def shared(self, positions: Tensor) -> Tensor:
        """Equal positions of one pass are kept once."""
        for known in self._known:
            if known.shape == positions.shape and torch.equal(known, positions):
                return known
        self._known.append(positions)
        return positions

    def rows(self, call: AttentionCall, span: Span) -> Tensor:
        """Logical positions of the rows: (batch, rows)."""
        place = (span.start, span.stop) if isinstance(span, slice) else id(span)
        key = (call.site.tower, call.q.shape, place)
        if call.keep is not None or key not in self._rows:
            qpos = call.qpos.expand(call.q.shape[0], -1)
            found = self.shared(qpos[:, span] if isinstance(span, slice) else qpos.gather(1, span))
            if call.keep is not None:  # every layer may have other queries
                return found
            self._rows[key] = found
        return self._rows[key]

    def columns(self, call: AttentionCall, name: str, heads: list[int] | None) -> _Columns | None:
        key = (call.site.tower, call.site.kind, call.k.shape, str(heads))
        if call.pos is not None or name == "sinks":  # every layer has its own
            return self._columns(call, name, heads)
        if key not in self._cache:
            self._cache[key] = self._columns(call, name, heads)
        return self._cache[key]

    def _columns(self, call: AttentionCall, name: str, heads: list[int] | None) -> _Columns | None:
        keys = call.k.shape[2]
        kpos = call.kpos.expand(call.k.shape[0], -1) if call.kpos.ndim == 1 else call.kpos
        if kpos.ndim == 3:
            kpos = kpos.repeat_interleave(call.groups, 1)
            kpos = kpos if heads is None else kpos[:, heads]
        if name == "all":
            return _Columns(slice(0, keys), self.shared(kpos), heads)
        found = sinks_of(call, self.space.main) if name == "sinks" else call.columns(name)
        mask = found[:, :, 0]  # (batch, heads or 1, keys)
        mask = mask if mask.shape[1] == 1 or heads is None else mask[:, heads]
        counts = mask.sum(-1)
        most = int(counts.max())
        if most == 0:
            return None
        index = mask.long().sort(dim=-1, descending=True, stable=True).indices[..., :most]
        real = torch.arange(most, device=mask.device) < counts[..., None]
        places = (kpos if kpos.ndim == 3 else kpos[:, None]).gather(2, index).masked_fill(~real, -1)
        positions = self.shared(places if kpos.ndim == 3 else places[:, 0])
        first, last = int(index[0, 0, 0]), int(index[0, 0, -1])
        if last - first + 1 == most and bool((index == index[:1, :1]).all()) and bool(real.all()):
            return _Columns(slice(first, last + 1), positions, heads)
        return _Columns(index, positions, heads)

    # ---- in the end ----------------------------------------------------------------------------------

    def recording(self, run: Run, options: dict[str, Any]) -> Recording:
        main, ids, answer, parts = self._main(run)
        if main is None:
            main = Layout.of_kind("text", 0, 0, torch.device("cpu"), named=False)
        return Recording(parts, [*self.sites.values()], [main, *self.layouts.values()], ids, answer, options)

    def _main(self, run: Run) -> tuple[Layout | None, Tensor | None, int, list[Part]]:
        """Layout, ids and begin of the answer in the rows that the caller got, and what was seen in them."""
        if self.last is None:
            return None, None, 0, self.parts
        sequence = self.last.sequence
        layout, ids, answer = sequence.layout(), sequence.ids_from(0), sequence.length
        assert sequence.sample is not None
        sample = sequence.sample
        if run.generating and isinstance(run.answer, Tensor):
            ids, answer = run.answer.to(layout.kind.device), self.prompt
            if not layout.named:  # only the answer came back
                ids = torch.nn.functional.pad(ids, (answer, 0), value=-1)
            sample = torch.arange(len(ids), device=ids.device) // max(1, len(ids) // run.samples)
            at = (sequence.sample[None] == sample[:, None]).int().argmax(1)
            special = torch.tensor(sorted(sequence.vocabulary.special), device=ids.device)
            layout = _answered(layout.at(at).until(answer), torch.isin(ids[:, answer:], special))
        picks = [_pick(moment, sample, ids, self.base) for moment in self.moments]
        return layout, ids, answer, [_picked(p, picks[p.moment]) if p.moment >= 0 else p for p in self.parts]


def _answered(prompt: Layout, special: Tensor) -> Layout:
    """With the tokens of an answer. What stands behind its end is padding."""
    turn = prompt.turn[:, -1:].expand_as(special)
    over = special.flip(1).cummin(1).values.flip(1)
    over = over & torch.nn.functional.pad(over[:, :-1], (1, 0))
    kind, item = torch.where(over, PAD, GENERATED), torch.full_like(turn, -1)
    return prompt.followed_by(Layout(kind, item, turn, prompt.sample, named=prompt.named))


def _pick(moment: _Moment, sample: Tensor, ids: Tensor | None, base: int) -> Tensor | None:
    """For every row in the end the row of that pass that had read the same, or -1; None: as they are."""
    if moment.prefix is None or ids is None:
        return None
    tokens = moment.prefix.shape[1]
    if base + tokens > ids.shape[1]:
        return torch.full_like(sample, -1)
    same = sample[:, None] == moment.sample[None]
    same &= (ids[:, None, base : base + tokens] == moment.prefix[None]).all(-1)
    rows = torch.arange(len(sample), device=sample.device)
    if same.shape[0] == same.shape[1] and bool(same.diagonal().all()):
        return None
    return torch.where(same.any(1), same.int().argmax(1), -1) if len(rows) else None


def _picked(part: Part, pick: Tensor | None) -> Part:
    if pick is None:
        return part
    index, missing = pick.clamp_min(0), pick < 0
    return replace(
        part,
        rows=part.rows[index].masked_fill(missing[:, None], -1),
        columns=None if part.columns is None else part.columns[index],
        weights=part.weights[index],
        where=None if part.where is None else part.where[index],
    )
