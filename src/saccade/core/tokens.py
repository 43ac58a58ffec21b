"""Tokens that leave a tower between its layers, what stands in their place at the end, and tokens that join."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from saccade.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from saccade.core.call import AttentionCall
    from saccade.core.layout import Layout
    from saccade.core.passes import Pass, Run
    from saccade.core.site import Site


@dataclass
class Tokens:
    """Which tokens stay, all unless `keep` is given, and which join.

    `keep` is bool (batch, tokens) or (tokens,), or indices, in ascending order, -1 for fillers. `values`
    (batch, kept, width) replaces the states of those that stay, for merged tokens. An aggregate of many takes
    the place of one of them. Positions stay as they are, or close up (`renumber`). What is to `append`,
    (tokens, width) or (batch, tokens, width), has no position; it stands behind the others until the tower's end.
    """

    keep: Tensor | None = None
    values: Tensor | None = None
    append: Tensor | None = None
    positions: Literal["keep", "renumber"] = "keep"
    only_this_layer: bool = False

    def index(self, batch: int, tokens: int, *, empty: bool = False) -> Tensor:
        """(batch, kept), -1 on the left of rows that keep fewer; a row keeps none only where that is allowed."""
        if self.keep is None:
            return torch.arange(tokens).expand(batch, -1)
        keep = self.keep[None].expand(batch, -1) if self.keep.ndim == 1 else self.keep
        if keep.ndim != 2 or keep.shape[0] != batch:
            raise InputError(
                f"A choice for {keep.shape[0]} samples was made among {batch}.", "choose for each of them"
            )
        if keep.dtype == torch.bool:
            if keep.shape[1] != tokens:
                raise InputError(
                    f"A mask of {keep.shape[1]} says which of {tokens} tokens stay.", "give one of each"
                )
            counts = keep.sum(1)
            most = int(counts.max())
            index = keep.long().sort(dim=1, stable=True).indices[:, tokens - most :]
            index, none = torch.where(keep.gather(1, index), index, -1), not bool((counts > 0).all())
            index = index if most else index.new_full((batch, 1), -1)
        else:
            index = keep.long()
            if bool((index >= tokens).any()):
                raise InputError(
                    f"Token {int(keep.max())} cannot stay: there are {tokens}.", "keep indices below it"
                )
            if bool(((index.diff(dim=1) <= 0) & (index[:, :-1] >= 0)).any()):
                raise InputError(
                    "Tokens that stay are not in ascending order.", "sort the indices, or give a mask"
                )
            none = index.shape[1] == 0 or bool((index[:, -1] < 0).any())
        if none and not empty:
            raise InputError("A sample would keep no token at all.", "keep at least one")
        return index


class Removal:
    """The tokens of a tower that are left in a pass, and those that were appended to them."""

    def __init__(self, keep: Tensor, full: int) -> None:
        self.keep, self.full = keep, full  # (batch, left) places in the chunk, -1 for fillers; its length
        self.appended: Tensor | None = None  # (batch, appended, width), their states before the next layer
        self.ids: Tensor | None = None  # renumbered positions, (batch, left) or (sections, batch, left)
        self.shift: Tensor | None = None  # (batch,) by how much what follows moves up
        self.whole = False  # the layer below gave states at full length

    def further(self, keep: Tensor) -> Removal:
        new = Removal(torch.where(keep < 0, -1, self.keep.gather(1, keep.clamp_min(0))), self.full)
        new.ids = None if self.ids is None else gather_tokens(self.ids, keep, -1)
        new.shift, new.appended = self.shift, self.appended
        return new

    def holding(self, appended: Tensor) -> Self:
        new = copy.copy(self)
        new.__dict__.pop("places", None)
        new.appended = appended
        return new

    @property
    def behind(self) -> slice:
        """Where the appended tokens stand in a layer."""
        left = self.keep.shape[1]
        return slice(left, left if self.appended is None else left + self.appended.shape[1])

    @cached_property
    def places(self) -> Tensor:
        """`keep` with -1 for each appended token, as a layer has them."""
        added = self.behind.stop - self.behind.start
        return torch.nn.functional.pad(self.keep, (0, added), value=-1) if added else self.keep

    def spread(self, mask: Tensor) -> Tensor:
        """A mask over what is left (batch, left), appended tokens behind it or not, as one over all tokens, False
        where one left."""
        whole = mask.new_zeros(mask.shape[0], self.full)
        rows, columns = (self.keep >= 0).nonzero(as_tuple=True)
        whole[rows, self.keep[rows, columns]] = mask[rows, columns]
        return whole

    def scatter(self, h: Tensor) -> Tensor:
        """States at full length, a removed position taking the previous surviving row."""
        batch, left = self.keep.shape
        if not left:
            return h.new_zeros(batch, self.full, h.shape[-1])
        source = torch.zeros(batch, self.full, dtype=torch.long, device=h.device)
        rows, columns = (self.keep >= 0).nonzero(as_tuple=True)
        source[rows, self.keep[rows, columns]] = columns
        first = (self.keep < 0).sum(1, keepdim=True).clamp_max(left - 1)
        source = source.cummax(1).values.maximum(first)
        return h.gather(1, source[..., None].expand(-1, -1, h.shape[-1]))


class TokensCall:
    """A layer about to run, for the `tokens` event: `h` (batch, tokens, width) goes in, and behind it what
    was appended.

    `peek()` is the attention call that it will make, made ahead; its projections are computed twice.
    `peek(rotated=False)` is what it would be if all tokens stood at position 0.
    """

    def __init__(self, site: Site, pass_: Pass, h: Tensor, peek: Callable[..., AttentionCall]) -> None:
        self.site, self.pass_, self.h, self.peek = site, pass_, h, peek
        self.run: Run = pass_.run
        self.phase = pass_.phase

    @property
    def layer(self) -> int:
        return self.site.layer

    @property
    def state(self) -> dict[str, Any]:
        return self.pass_.sequence.state_of(self.run.method)

    @property
    def removal(self) -> Removal | None:
        return self.pass_.removals.get(self.site.tower)

    def tokens(self, name: str) -> Tensor:
        """Which of the tokens that are still there are of a kind or segment: (batch, tokens), bool."""
        return self.left(self._all(name))

    def items(self, name: str = "visual") -> list[Tensor]:
        """The tokens that are still there of every picture and clip of a kind, each (batch, tokens), bool; one of
        which none is left is empty."""
        found = []
        item = self._layout.item
        for kind in ("image", "video") if name == "visual" else (name,):
            parts = (self._all(f"{kind}:{index}") for index in range(int(item.max()) + 1))
            found += [self.left(part) for part in parts if bool(part.any())]
        return found

    def of_features(self, kind: str, said: Sequence[Tensor]) -> Tensor:
        """What was said (bool) of the features of all items of a kind, in the prompt's order, for the tokens that are
        still there: (batch, tokens), False for others."""
        slots = self._all(kind)
        beams = slots.shape[0] // self.run.samples
        mask, flat = torch.zeros_like(slots[::beams]), torch.cat([*said])
        if len(flat) != int(slots[::beams].sum()):
            raise InputError(
                f"{len(flat)} features of {kind}s were judged, and this pass has {int(slots[::beams].sum())}.",
                "let pictures through the vision tower once for each prompt",
            )
        mask[slots[::beams]] = flat.to(mask.device)
        return self.left(mask.repeat_interleave(beams, 0))

    def left(self, mask: Tensor) -> Tensor:
        """A mask over the tokens of the pass (batch, tokens) for those that are still there."""
        if self.removal is None:
            return mask
        keep = self.removal.keep
        return mask.gather(1, keep.clamp_min(0)) & (keep >= 0)

    def spread(self, mask: Tensor) -> Tensor:
        """A mask over the tokens that are still there as one over the tokens of the pass, False where one left."""
        return mask if self.removal is None else self.removal.spread(mask)

    @property
    def _full(self) -> int:
        return self.h.shape[1] if self.removal is None else self.removal.full

    @property
    def _layout(self) -> Layout:
        return self.pass_.layout_of(self.site, self.h.shape[0], self._full, self.h.device)

    def _all(self, name: str) -> Tensor:
        return self._layout.where(name)[:, -self._full :]


def gather_tokens(t: Tensor, keep: Tensor, axis: int) -> Tensor:
    """Tokens `keep` (batch, left) along an axis; the batch is the axis before it."""
    axis = axis % t.ndim
    shape = list(t.shape)
    shape[axis - 1] = keep.shape[0]
    t = t.expand(shape)
    view = [1] * t.ndim
    view[axis - 1], view[axis] = keep.shape
    shape[axis] = keep.shape[1]
    return t.gather(axis, keep.clamp_min(0).view(view).expand(shape))


def dense_rank(
    ids: Tensor, real: Tensor, before: Tensor | None = None, there: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Positions (batch, tokens) or (sections, batch, tokens) without gaps, and by how much (batch,) the end has
    moved. `real` (batch, tokens) are the tokens that count. They begin where those did from which they were
    chosen: the positions `before` of the tokens that were `there`."""
    before, there = (ids, real) if before is None or there is None else (before, there)
    sections, whole = (t if t.ndim == 3 else t[None] for t in (ids, before))
    closed, gap = sections.clone(), ids.new_zeros(real.shape[0])
    for row in range(real.shape[0]):
        used, chosen = torch.unique(sections[:, row][:, real[row]]), whole[:, row][:, there[row]]
        if not chosen.numel():
            continue
        start = chosen.min()
        closed[:, row] = (
            torch.searchsorted(used, sections[:, row].contiguous()).clamp(0, max(0, len(used) - 1)) + start
        )
        gap[row] = chosen.max() - (start + len(used) - 1)
    return (closed if ids.ndim == 3 else closed[0]), gap
