"""Which blocks of keys every query attends to: one object for the plain form and for the fast one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

ROWS_TIMES_KEYS = 2**26  # elements of a mask that the gather form holds at once


@dataclass(frozen=True)
class BlockPattern:
    """`chosen` (batch, heads, tiles, blocks): blocks of `size` keys for tiles of `tile` queries, the last ones
    perhaps shorter.

    The last query stands at the last key. `causal` leaves out the keys behind a query in a chosen block, and
    beside those blocks every query then attends to the last `window` keys, its own included.
    """

    chosen: Tensor
    size: int
    keys: int
    causal: bool = True
    tile: int = 1
    window: int = 0

    @property
    def queries(self) -> int:
        return min(self.chosen.shape[2] * self.tile, self.keys)

    @property
    def start(self) -> int:
        """Position of the first query."""
        return self.keys - self.queries

    @property
    def by_query(self) -> Tensor:
        """(batch, heads, queries, blocks)"""
        return self.chosen.repeat_interleave(self.tile, 2)[:, :, : self.queries]

    def mask(self) -> Tensor:
        """(batch, heads, queries, keys), True attends."""
        mask = self.by_query.repeat_interleave(self.size, -1)[..., : self.keys]
        if not self.causal:
            return mask
        at = torch.arange(self.keys, device=mask.device)
        return self._ruled(mask, at[self.start :, None], at)

    def _ruled(self, chosen: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (chosen | (column > row - self.window)) & (column <= row)

    def block_mask(self, tile: int = 128) -> BlockMask:
        """The same for `flex_attention`, found from the blocks: no (queries, keys) mask is made. `tile` is
        how many queries the kernel takes at once."""
        chosen, queries, blocks = self.by_query, self.queries, self.chosen.shape[3]
        size, start, causal = self.size, self.start, self.causal
        missing = -queries % tile
        padded = F.pad(chosen, (0, 0, 0, missing))
        some = padded.unflatten(2, (-1, tile)).any(3)  # (batch, heads, tiles, blocks)
        whole = F.pad(chosen, (0, 0, 0, missing), value=True).unflatten(2, (-1, tile)).all(3)
        ends = torch.arange(1, blocks + 1, device=whole.device) * size
        whole &= ends <= self.keys
        if causal:
            first = torch.arange(start, self.keys, tile, device=whole.device)[:, None]
            last = (first + tile - 1).clamp_max(self.keys - 1)
            if self.window:
                some = some | (ends - 1 > first - self.window)
                whole = whole | (ends - size > last - self.window)
            some, whole = some & (ends - size <= last), whole & (ends - 1 <= first)

        def attends(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            inside = padded[b, h, q, kv // size]
            return self._ruled(inside, q + start, kv) if causal else inside

        return BlockMask.from_kv_blocks(
            *_listed(some & ~whole),
            *_listed(whole),
            BLOCK_SIZE=(tile, size),
            mask_mod=attends,
            seq_lengths=(queries, self.keys),
        )


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, *, scale: float | None = None) -> Tensor:
    """The gather form: a few queries at a time, with the keys of their window and of chosen blocks and no others.

    Every query must see a key. Of a pattern that is one for all heads, keys are gathered once for those that share
    them.
    """
    heads = k.shape[1] if pattern.chosen.shape[1] == 1 else q.shape[1]
    owner = torch.arange(heads, device=q.device) * k.shape[1] // heads
    sample = torch.arange(q.shape[0], device=q.device)[:, None, None]
    at = torch.arange(pattern.keys, device=q.device)
    rows = min(pattern.tile, max(1, ROWS_TIMES_KEYS // (q.shape[0] * q.shape[1] * pattern.keys)))
    outs = []
    for tile in range(pattern.chosen.shape[2]):
        chosen = pattern.chosen[:, :, tile].repeat_interleave(pattern.size, -1)[..., : pattern.keys]
        chosen = chosen.expand(q.shape[0], heads, -1)
        order = _listed(chosen)[1]
        for first in range(tile * pattern.tile, min((tile + 1) * pattern.tile, pattern.queries), rows):
            last = min(first + rows, (tile + 1) * pattern.tile, pattern.queries)
            row = at[pattern.start + first : pattern.start + last, None]
            seen = pattern.start + last if pattern.causal else pattern.keys  # keys that the rows may see
            near = max(0, pattern.start + first + 1 - pattern.window) if pattern.window else seen
            count = chosen[..., :near].sum(-1, keepdim=True)
            index = order[..., : int(count.max())]
            keys, values = (
                torch.cat([t[sample, owner[:, None], index], t[:, owner, near:seen]], 2) for t in (k, v)
            )
            far, own = (at[: index.shape[-1]] < count)[:, :, None], chosen[:, :, None, near:seen]
            if pattern.causal:
                far, own = far & (index[:, :, None] <= row), pattern._ruled(own, row, at[near:seen])
            mask = torch.cat([part.expand(-1, -1, last - first, -1) for part in (far, own)], 3)
            mask = mask.repeat_interleave(q.shape[1] // heads, 1)
            outs.append(
                F.scaled_dot_product_attention(
                    q[:, :, first:last], keys, values, attn_mask=mask, scale=scale, enable_gqa=True
                )
            )
    return torch.cat(outs, 2)


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(batch, heads, queries, keys), in float32 or better."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    return (grouped @ k.to(wide).mT).view(*q.shape[:3], -1) * scale


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each tile has, and which, those first."""
    order = blocks.int().sort(dim=-1, descending=True, stable=True).indices
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)
