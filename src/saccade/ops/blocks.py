"""Which blocks of keys every query attends to: one object for the plain form and for the fast one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class BlockPattern:
    """`chosen` (batch, heads, queries, blocks) of `size` keys each, the last one perhaps shorter.

    The last query stands at the last key. `causal` leaves out the keys behind a query in a chosen block.
    """

    chosen: Tensor
    size: int
    keys: int
    causal: bool = True

    @property
    def start(self) -> int:
        """Position of the first query."""
        return self.keys - self.chosen.shape[2]

    def mask(self) -> Tensor:
        """(batch, heads, queries, keys), True attends."""
        mask = self.chosen.repeat_interleave(self.size, -1)[..., : self.keys]
        if not self.causal:
            return mask
        at = torch.arange(self.keys, device=mask.device)
        return mask & (at <= at[self.start :, None])

    def block_mask(self, tile: int = 128) -> BlockMask:
        """The same for `flex_attention`, found from the blocks: no (queries, keys) mask is made. `tile` is
        how many queries the kernel takes at once."""
        queries, blocks = self.chosen.shape[2:]
        size, start, causal = self.size, self.start, self.causal
        missing = -queries % tile
        padded = F.pad(self.chosen, (0, 0, 0, missing))
        some = padded.unflatten(2, (-1, tile)).any(3)  # (batch, heads, tiles, blocks)
        whole = F.pad(self.chosen, (0, 0, 0, missing), value=True).unflatten(2, (-1, tile)).all(3)
        ends = torch.arange(1, blocks + 1, device=whole.device) * size
        whole &= ends <= self.keys
        if causal:
            whole &= ends - 1 <= torch.arange(start, start + queries, tile, device=whole.device)[:, None]

        def attends(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            inside = padded[b, h, q, kv // size]
            return inside & (kv <= q + start) if causal else inside

        return BlockMask.from_kv_blocks(
            *_listed(some & ~whole),
            *_listed(whole),
            BLOCK_SIZE=(tile, size),
            mask_mod=attends,
            seq_lengths=(queries, self.keys),
        )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each tile has, and which, those first."""
    order = blocks.int().sort(dim=-1, descending=True, stable=True).indices
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)
