"""What is known of the tokens of one cache, and what methods remember along with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.core.errors import InputError
from saccade.core.layout import GENERATED, KINDS, PAD, Layout, items_of

if TYPE_CHECKING:
    from saccade.core.method import Method
    from saccade.core.passes import Run


@dataclass(frozen=True)
class Vocabulary:
    """Which ids are no words: placeholders by kind, and special tokens."""

    placeholders: Mapping[str, int]
    special: frozenset[int]


@dataclass(frozen=True)
class Chunk:
    """Tokens that came in one pass."""

    start: int
    stop: int
    generated: bool
    turn: int


class Sequence:
    """The conversation in one cache: it dies with the cache, and its rows follow beams.

    Ids are recorded as they pass; the layout is made from them when somebody asks.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.length = 0
        self.turn = 0
        self.sample: Tensor | None = None  # (rows,)
        self._ids: list[Tensor] = []  # (rows, tokens) each
        self._named = True
        self.run: Run | None = None  # the forward that stands alone and began it
        self.unverified = ""  # as its run's
        self.unfed: Tensor | None = None  # generated last and not yet cached: the next turn begins with it
        self._chunks: list[Chunk] = []
        self._padding: Tensor | None = None  # (rows, columns so far), True for padding
        self._counts: dict[str, list[list[int]]] = {}  # by kind and row: tokens of every item
        self._boxes: dict[str, list[Tensor]] = {}  # by kind and row: (tokens of that kind, 4)
        self._layout: Layout | None = None
        self._states: dict[int, tuple[Method, dict[str, Any]]] = {}

    @property
    def rows(self) -> int:
        return 0 if self.sample is None else self.sample.shape[0]

    def state_of(self, method: Method) -> dict[str, Any]:
        if self.unverified:
            raise InputError(
                f"{type(method).__name__} remembers what it has read, and generate({self.unverified}=...) feeds tokens "
                "that may be taken back.",
                "generate without it",
            )
        return self._states.setdefault(id(method), (method, {}))[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Sequence:
        """For a copied cache: rows and states of its own, the same methods."""
        new = copy.copy(self)
        new._ids, new._chunks = list(self._ids), list(self._chunks)
        new._counts, new._boxes = dict(self._counts), dict(self._boxes)
        new._states = {
            key: (method, copy.deepcopy(state, memo)) for key, (method, state) in self._states.items()
        }
        return new

    # ---- growing -------------------------------------------------------------------------------------

    def extend(
        self,
        ids: Tensor | None,
        shape: tuple[int, int],
        device: torch.device,
        *,
        generated: bool,
        samples: int,
    ) -> None:
        """Tokens of a pass. Without ids (inputs_embeds) they are known by number only."""
        rows, tokens = shape
        answered, self.unfed = self.unfed, None
        if not generated and ids is not None and answered is not None:
            count = answered.shape[1]
            if 0 < count <= tokens and torch.equal(ids[:, :count], answered.to(ids)):
                self.extend(answered.to(ids), (rows, count), device, generated=True, samples=samples)
                if count < tokens:
                    self.extend(
                        ids[:, count:], (rows, tokens - count), device, generated=False, samples=samples
                    )
                return
        if self._chunks and self._chunks[-1].generated and not generated:
            self.turn += 1
        if self.sample is None:
            self.sample = torch.arange(rows, device=device) // max(1, rows // max(1, samples))
        self._named &= ids is not None
        self._ids.append(ids.detach() if ids is not None else torch.full(shape, -1, device=device))
        self._chunks.append(Chunk(self.length, self.length + tokens, generated, self.turn))
        self.length += tokens

    def unknown(self, ids: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
        """Tokens that were cached before a session came."""
        self.extend(ids, shape, device, generated=False, samples=shape[0])

    def ids_from(self, start: int) -> Tensor | None:
        return torch.cat(self._ids, 1)[:, start:] if self._named else None

    def pad(self, mask: Tensor | None) -> None:
        """The newest attention mask (rows, columns): zeros are padding."""
        if mask is not None:
            self._padding = mask == 0

    def add_items(self, kind: str, counts: list[list[int]], boxes: list[Tensor] | None) -> None:
        """Features that came with this turn, by row."""
        old = self._counts.setdefault(kind, [[] for _ in counts])
        self._counts[kind] = [a + b for a, b in zip(old, counts, strict=True)]
        if boxes is not None or kind in self._boxes:
            before = self._boxes.get(kind) or _unknown(old)
            boxes = boxes or _unknown(counts)
            self._boxes[kind] = [torch.cat([a, b.to(a.device)]) for a, b in zip(before, boxes, strict=True)]
        self._layout = None

    # ---- what the library does to its cache ----------------------------------------------------------

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was."""
        rows, rows_before = index.tolist(), self.rows
        self._ids = (
            [t.index_select(0, index.to(t.device)) for t in [torch.cat(self._ids, 1)]] if self._ids else []
        )
        if self.sample is not None:
            self.sample = self.sample.index_select(0, index.to(self.sample.device))
        if self._padding is not None:
            self._padding = self._padding.index_select(0, index.to(self._padding.device))
        self._counts = {kind: [counts[i] for i in rows] for kind, counts in self._counts.items()}
        self._boxes = {kind: [boxes[i] for i in rows] for kind, boxes in self._boxes.items()}
        if self._layout is not None:
            self._layout = self._layout.at(index)
        for _, state in self._states.values():
            for name, value in state.items():
                state[name] = _follow(value, index, rows_before, name)

    def crop(self, length: int) -> None:
        """Forget what lies beyond `length` tokens."""
        if length >= self.length:
            return
        beyond = self.length - length
        while len(self._ids) > 1 and self._ids[-1].shape[1] <= beyond:
            beyond -= self._ids.pop().shape[1]
        if beyond:
            self._ids[-1] = self._ids[-1][:, :-beyond]
        while self._chunks and self._chunks[-1].start >= length:
            self._chunks.pop()
        if self._chunks and self._chunks[-1].stop > length:
            self._chunks[-1] = replace(self._chunks[-1], stop=length)
        self.turn = self._chunks[-1].turn if self._chunks else 0
        for kind, counts in self._counts.items():
            ids = torch.cat(self._ids, 1)
            left = (ids == self.vocabulary.placeholders[kind]).sum(1).tolist()
            self._counts[kind] = [
                _first(lengths, tokens) for lengths, tokens in zip(counts, left, strict=True)
            ]
            if kind in self._boxes:
                self._boxes[kind] = [
                    boxes[:tokens] for boxes, tokens in zip(self._boxes[kind], left, strict=True)
                ]
        self._padding = None if self._padding is None else self._padding[:, :length]
        self._layout = None if self._layout is None else self._layout.until(length)
        self.length = length

    # ---- the layout ----------------------------------------------------------------------------------

    def layout(self) -> Layout:
        done = 0 if self._layout is None else self._layout.shape[1]
        if done < self.length:
            new = self._layout_of(done)
            self._layout = new if self._layout is None else self._layout.followed_by(new)
        assert self._layout is not None
        return self._layout

    def _layout_of(self, start: int) -> Layout:
        if len(self._ids) > 1:
            self._ids = [torch.cat(self._ids, 1)]
        everything = self._ids[0]
        ids = everything[:, start:]
        kind = torch.zeros_like(ids)
        item = torch.full_like(ids, -1)
        if self.vocabulary.special:
            special = torch.tensor(sorted(self.vocabulary.special), device=ids.device)
            kind = torch.where(torch.isin(ids, special), KINDS.index("special"), kind)
        box = None
        for name, placeholder in self.vocabulary.placeholders.items():
            mask = ids == placeholder
            if not mask.any():
                continue
            kind = torch.where(mask, KINDS.index(name), kind)
            seen = (everything[:, :start] == placeholder).sum(1)
            counts = self._counts.get(name) or [[] for _ in range(ids.shape[0])]
            item = torch.where(mask, items_of(mask, counts, seen), item)
            if name in self._boxes:
                box = torch.full((*ids.shape, 4), float("nan"), device=ids.device) if box is None else box
                for row, boxes in enumerate(self._boxes[name]):
                    at = mask[row].nonzero()[:, 0]
                    box[row, at] = boxes[int(seen[row]) : int(seen[row]) + len(at)].to(box)
        turn = torch.zeros_like(ids)
        for chunk in self._chunks:
            if chunk.stop > start:
                columns = slice(max(0, chunk.start - start), chunk.stop - start)
                turn[:, columns] = chunk.turn
                if chunk.generated:
                    kind[:, columns] = GENERATED
        if self._padding is not None:
            padding = self._padding[:, start : self.length]
            kind[:, : padding.shape[1]] = torch.where(padding, PAD, kind[:, : padding.shape[1]])
        assert self.sample is not None
        return Layout(kind, item, turn, self.sample, box, self._named)


def _first(lengths: list[int], tokens: int) -> list[int]:
    """The items that the first tokens of their kind begin."""
    return [length for i, length in enumerate(lengths) if sum(lengths[:i]) < tokens]


def _follow(value: Any, index: Tensor, rows: int, name: str) -> Any:
    """What a method remembers of `rows` rows, for the rows in `index`; tensors may lie in lists and dictionaries."""
    if isinstance(value, Tensor) and value.ndim:
        if value.shape[0] != rows:
            raise InputError(
                f"call.state[{name!r}] holds a tensor of shape {tuple(value.shape)}, "
                f"and the cache reorders {rows} rows.",
                "give it a leading batch axis, or keep what is the same for all rows in run.state",
            )
        return value.index_select(0, index.to(value.device))
    if isinstance(value, dict):
        return {key: _follow(v, index, rows, name) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_follow(v, index, rows, name) for v in value])
    return value


def _unknown(counts: list[list[int]]) -> list[Tensor]:
    """Boxes of items that were not located, by row."""
    return [torch.full((sum(lengths), 4), float("nan")) for lengths in counts]
