"""What every token of a sequence is, and which part of which picture it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from saccade.core.errors import InputError, nearest

KINDS = ("text", "image", "video", "audio", "special", "generated", "pad")
VISUAL = (KINDS.index("image"), KINDS.index("video"))
PAD = KINDS.index("pad")
GENERATED = KINDS.index("generated")
SEGMENTS = ("all", "first", "last", "visual", "prompt", "before_image", "question", "after_image")


@dataclass(frozen=True)
class Layout:
    """One space of tokens. Cross and joint attention have two, a vision tower another.

    Columns are logical positions: they survive removal, padding, beams and later turns.
    """

    kind: Tensor  # (batch, tokens), index into KINDS
    item: Tensor  # (batch, tokens), picture, clip or sound within the sample, -1 for none
    turn: Tensor  # (batch, tokens), turn of the conversation
    sample: Tensor  # (batch,), row of the caller's batch: beams of one sample share it
    box: Tensor | None = None  # (batch, tokens, 4) x0 y0 x1 y1 in the original picture, NaN for none
    named: bool = True  # False where no ids were given, so that kinds are unknown
    ended: bool = True  # False where more of the prompt will come
    words: Callable[[str], list[list[int]]] | None = (
        None  # columns of a word or phrase, by row; None: no words known
    )

    @property
    def shape(self) -> torch.Size:
        return self.kind.shape

    def where(self, name: str) -> Tensor:
        """Tokens of a kind, an item (`image:0`), a word (`word:cat`), or a named segment, or of one of several
        (`image|question`): (batch, tokens), bool.

        `first` is the first real token, `last` the last, `question` what the user said after the last picture of the
        last turn, `before_image` what stands before the first picture, `after_image` everything behind the
        last one, answers included.
        """
        if "|" in name:
            return torch.stack([self.where(part) for part in name.split("|")]).any(0)
        if not self.named and name not in ("all", "first", "last", "pad", "generated"):
            raise InputError(
                f"The layout cannot tell which tokens are {name!r}: the model was called with inputs_embeds.",
                "pass input_ids (and pixel_values) and let the model embed them",
            )
        kind, _, item = name.partition(":")
        if kind == "word":
            return self._word(item)
        if kind in KINDS:
            mask = self.kind == KINDS.index(kind)
            return mask & (self.item == int(item)) if item else mask
        if name not in SEGMENTS:
            known = (*KINDS, *SEGMENTS)
            raise InputError(
                f"No tokens are called {name!r}.", nearest(name, known) or f"use one of {', '.join(known)}"
            )
        return getattr(self, f"_{name}")

    def _word(self, text: str) -> Tensor:
        if self.words is None:
            raise InputError(
                f"Nobody knows which of these tokens is the word {text!r}.",
                "give the pipeline a prompt; in a language model record it and ask the recording",
            )
        mask = torch.zeros_like(self.kind, dtype=torch.bool)
        for row, columns in enumerate(self.words(text)):
            mask[row, columns] = True
        return mask

    @cached_property
    def _all(self) -> Tensor:
        return self.kind != PAD

    @cached_property
    def _first(self) -> Tensor:
        return self._all & (self._all.cumsum(1) == 1)

    @cached_property
    def _last(self) -> Tensor:
        last = self._all & (self._all.flip(1).cumsum(1).flip(1) == 1)
        return last if self.ended else torch.zeros_like(last)

    @cached_property
    def _visual(self) -> Tensor:
        return (self.kind == VISUAL[0]) | (self.kind == VISUAL[1])

    @cached_property
    def _prompt(self) -> Tensor:
        return self._all & (self.kind != GENERATED)

    @cached_property
    def _before_image(self) -> Tensor:
        return self._prompt & (self._visual.cumsum(1) == 0) & self._visual.any(1, keepdim=True)

    @cached_property
    def _question(self) -> Tensor:
        last_turn = self.turn == self.turn.amax(1, keepdim=True)
        after = self._visual.flip(1).cumsum(1).flip(1) == 0
        return self._prompt & last_turn & after

    @cached_property
    def _after_image(self) -> Tensor:
        visual = self._visual
        return self._all & ~visual & (visual.flip(1).cumsum(1).flip(1) == 0) & visual.any(1, keepdim=True)

    def at(self, index: Tensor) -> Layout:
        """The same rows in another order (beams), or a choice of them."""
        kind, item, turn, sample = (_rows(t, index) for t in (self.kind, self.item, self.turn, self.sample))
        box = None if self.box is None else _rows(self.box, index)
        return Layout(kind, item, turn, sample, box, self.named)

    def followed_by(self, other: Layout) -> Layout:
        return Layout(
            kind=torch.cat([self.kind, other.kind], 1),
            item=torch.cat([self.item, other.item], 1),
            turn=torch.cat([self.turn, other.turn], 1),
            sample=self.sample,
            box=None if self.box is None and other.box is None else torch.cat([self.boxes, other.boxes], 1),
            named=self.named and other.named,
        )

    def until(self, tokens: int) -> Layout:
        box = None if self.box is None else self.box[:, :tokens]
        return Layout(
            self.kind[:, :tokens], self.item[:, :tokens], self.turn[:, :tokens], self.sample, box, self.named
        )

    @property
    def boxes(self) -> Tensor:
        """(batch, tokens, 4), NaN where nothing is known."""
        if self.box is not None:
            return self.box
        return torch.full((*self.kind.shape, 4), float("nan"), device=self.kind.device)

    @staticmethod
    def of_kind(kind: str, batch: int, tokens: int, device: torch.device, named: bool = True) -> Layout:
        """A space in which every token is alike."""
        shape = (batch, tokens)
        item = (
            torch.zeros(shape, dtype=torch.long, device=device)
            if kind in ("image", "video", "audio")
            else None
        )
        return Layout(
            kind=torch.full(shape, KINDS.index(kind), dtype=torch.long, device=device),
            item=torch.full(shape, -1, dtype=torch.long, device=device) if item is None else item,
            turn=torch.zeros(shape, dtype=torch.long, device=device),
            sample=torch.arange(batch, device=device),
            named=named,
        )


def _rows(t: Tensor, index: Tensor) -> Tensor:
    return t.index_select(0, index.to(t.device))


def items_of(placeholder: Tensor, counts: list[list[int]], seen: Tensor) -> Tensor:
    """The item of every placeholder token: (batch, tokens), -1 elsewhere.

    `counts[row]` lists how many tokens each item of that row has; `seen` (batch,) placeholders of the
    row came in earlier chunks. Where the counts do not cover the placeholders (features were given
    from outside), every run of neighbours is an item.
    """
    item = torch.full_like(placeholder, -1, dtype=torch.long)
    for row, lengths in enumerate(counts):
        mask = placeholder[row]
        rank = mask.cumsum(0) - 1 + seen[row]
        total = int(seen[row]) + int(mask.sum())
        if total <= sum(lengths):
            ends = torch.tensor(lengths, device=mask.device).cumsum(0)
            item[row] = torch.where(mask, torch.searchsorted(ends, rank, right=True), -1)
        else:
            starts = mask & ~torch.nn.functional.pad(mask[:-1], (1, 0))
            item[row] = torch.where(mask, starts.cumsum(0) - 1, -1)
    return item
