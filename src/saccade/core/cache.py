"""A cache that knows the position of everything it still holds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from saccade.core.errors import InputError


class TrackedLayer(DynamicLayer):
    """Reports the logical length, so that positions, masks and `generate()` work as if nothing were missing.

    `pos` (batch, slots) or (batch, key heads, slots) is the logical position of every entry, -1 where the
    slot is empty; None while entries and positions are the same.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.is_sliding = window is not None
        self.sliding_window = window
        self.seen = 0
        self.lost = 0  # positions below have left the window
        self.attended = False  # a pass is running that knows of `pos`
        self.pos: Tensor | None = None
        self.ragged = False  # some slots are empty
        self.incoming: tuple[int, Tensor] | None = (
            None  # logical tokens of the next update, and which are left
        )
        self.call_pos: Tensor | None = None  # `pos` as the running call sees it
        self.shift: Tensor | None = None  # (batch,) by how much positions were closed up
        self.beside: TrackedLayer | None = None  # what the same layer holds of the encoder

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        batch, tokens = key_states.shape[0], key_states.shape[-2]
        self.check()
        logical, left = self.incoming or (tokens, None)
        self.incoming = None
        if left is not None or self.pos is not None:
            fresh = torch.arange(tokens, device=key_states.device).expand(batch, -1) if left is None else left
            fresh = torch.where(fresh < 0, -1, fresh + self.seen)
            self.ragged = self.ragged or (left is not None and bool((left < 0).any()))
            old = self.positions(batch, key_states.device)
            if old.ndim == 3:
                fresh = fresh[:, None].expand(-1, old.shape[1], -1)
            self.pos = torch.cat([old, fresh], -1)
        keys, values = super().update(key_states, value_states)
        self.seen += logical
        self.call_pos = self.pos
        if self.sliding_window is not None and self.keys.shape[-2] >= self.sliding_window:
            self._leave_window(batch)
        return keys, values

    def positions(self, batch: int | None = None, device: torch.device | None = None) -> Tensor:
        """`pos`, also where it is trivial."""
        if self.pos is not None:
            return self.pos
        held = self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0
        batch = self.keys.shape[0] if batch is None else batch
        return torch.arange(self.seen - held, self.seen, device=device or self.keys.device).expand(batch, -1)

    def _leave_window(self, batch: int) -> None:
        """Drop the leading slots that no later query of any row sees."""
        if self.pos is None:
            self.pos = self.call_pos = torch.arange(
                self.seen - self.keys.shape[-2], self.seen, device=self.keys.device
            ).expand(batch, -1)
        assert self.sliding_window is not None
        gone = (self.pos <= self.seen - self.sliding_window).long().cumprod(-1).sum(-1)
        dead = int(gone.min())
        self.lost = self.seen - self.sliding_window + 1 if dead else self.lost
        self.keys, self.values, self.pos = (
            self.keys[..., dead:, :],
            self.values[..., dead:, :],
            self.pos[..., dead:],
        )

    def evict(self, keep: Tensor) -> None:
        """Keep these slots: (slots,), (batch, slots) or (batch, key heads, slots), -1 for an empty one."""
        batch, heads, slots_before, _ = self.keys.shape
        keep = keep.to(self.keys.device)
        keep = keep[None].expand(batch, -1) if keep.ndim == 1 else keep
        if (
            keep.dtype == torch.bool
            or keep.shape[:-1] not in ((batch,), (batch, heads))
            or not keep.shape[-1]
        ):
            raise InputError(
                f"{keep.dtype} {tuple(keep.shape)} says nothing of a cache of {batch} rows and {heads} key heads.",
                "give slots that stay: (slots,), (batch, slots) or (batch, key heads, slots), at least one",
            )
        keep = keep.long().sort(-1).values
        if int(keep[..., -1].max()) >= slots_before:
            raise InputError(
                f"Slot {int(keep.max())} cannot stay: there are {slots_before}.", "keep slots below it"
            )
        pos = self.positions()
        if keep.ndim == 3 and pos.ndim == 2:
            pos = pos[:, None].expand(-1, heads, -1)
        elif keep.ndim == 2 and pos.ndim == 3:
            keep = keep[:, None].expand(-1, heads, -1)
        slots = keep.clamp_min(0)
        self.ragged = self.ragged or bool((keep < 0).any())
        self.pos = torch.where(keep < 0, -1, pos.gather(-1, slots))
        by_head = (slots if slots.ndim == 3 else slots[:, None].expand(-1, heads, -1))[..., None]
        self.keys = self.keys.gather(2, by_head.expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(2, by_head.expand(-1, -1, -1, self.values.shape[-1]))

    def check(self) -> None:
        """Refuse to go on where nobody would know which entries are missing."""
        if self.pos is not None and not self.attended and not self._whole():
            raise InputError(
                "Tokens are missing from this cache, and no method is attached that takes any out.",
                "go on inside of the session that thinned it, or one like it; or begin without past_key_values",
            )
        if self.beside is not None:
            self.beside.check()

    def _whole(self) -> bool:
        """Nothing but what a window forgets is missing."""
        if self.pos is None:
            return True
        held = self.pos.shape[-1]
        plain = torch.arange(self.seen - held, self.seen, device=self.pos.device)
        return (
            self.pos.ndim == 2
            and held >= min(self.seen, self.sliding_window or self.seen + 1) - 1
            and bool((self.pos == plain).all())
        )

    def part(self, rows: slice) -> TrackedLayer:
        """Some rows of the batch, to look at."""
        view = TrackedLayer(self.sliding_window)
        view.keys, view.values, view.seen, view.ragged = (
            self.keys[rows],
            self.values[rows],
            self.seen,
            self.ragged,
        )
        view.dtype, view.device, view.is_initialized = self.dtype, self.device, True
        view.pos = None if self.pos is None else self.pos[rows]
        view.call_pos = None if self.call_pos is None else self.call_pos[rows]
        return view

    # ---- what the library asks ------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self.check()
        if self.pos is not None and not self.attended:
            return self.pos.shape[-1] + query_length, self.seen - self.pos.shape[-1]
        return self.seen + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.seen:
            self.keys = self.keys.index_select(0, indices.to(self.keys.device))
            self.values = self.values.index_select(0, indices.to(self.values.device))
        if self.pos is not None:
            self.pos = self.pos.index_select(0, indices.to(self.pos.device))
        if self.shift is not None:
            self.shift = self.shift.index_select(0, indices.to(self.shift.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; the library passes how many, as a negative number."""
        count = -tokens_to_remove if tokens_to_remove <= 0 else self.seen - tokens_to_remove
        if count <= 0 or not self.is_initialized:
            return
        if (
            self.sliding_window is not None
            and max(0, self.seen - count - self.sliding_window + 1) < self.lost
        ):
            raise InputError(
                f"Taking back {count} tokens needs some that have left the window of {self.sliding_window}.",
                "keep a copy of the cache from before",
            )
        self.seen -= count
        if self.pos is None:
            self.keys, self.values = self.keys[..., :-count, :], self.values[..., :-count, :]
            return
        left = int((self.pos < self.seen).flatten(0, -2).any(0).sum())  # slots that some row still needs
        self.keys, self.values = self.keys[..., :left, :], self.values[..., :left, :]
        self.pos = self.pos[..., :left]
        if bool((self.pos >= self.seen).any()):
            self.pos, self.ragged = torch.where(self.pos >= self.seen, -1, self.pos), True

    def reset(self) -> None:
        super().reset()
        self.__init__(self.sliding_window)  # type: ignore[misc]


def track(cache: Cache) -> Cache:
    """Exchange the layers of a cache for tracked ones, what they hold included."""
    if isinstance(cache, EncoderDecoderCache):
        track(cache.self_attention_cache)
        track(cache.cross_attention_cache)
        return cache
    if getattr(cache, "offloading", False):
        raise _refused("an offloaded cache")
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = TrackedLayer
    cache.layers[:] = [
        layer if type(layer) is TrackedLayer or type(layer).__name__ == "DummyLayer" else _tracked(layer)
        for layer in cache.layers
    ]  # a dummy stands where a layer reads the entries of another
    return cache


def _tracked(layer: Any) -> TrackedLayer:
    if "LinearAttention" in type(layer).__name__:
        raise InputError(
            f"Tokens cannot leave a cache with {type(layer).__name__}: it holds one state of all that was read.",
            "choose among the features behind the vision tower, or use a model in which every layer attends",
        )
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise _refused(f"a cache with {type(layer).__name__}")
    window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None
    tracked = TrackedLayer(window)
    tracked.seen = layer.get_seq_length()
    if layer.is_initialized:
        tracked.lazy_initialization(layer.keys, layer.values)
        tracked.keys, tracked.values = layer.keys, layer.values
        if tracked.keys.numel() and tracked.keys.shape[-2] != tracked.seen:
            tracked.pos = tracked.positions()
    return tracked


def _refused(what: str) -> InputError:
    return InputError(
        f"Tokens cannot leave {what}: its entries have fixed places.",
        "generate with the default dynamic cache (no cache_implementation=), or attach no method that removes tokens",
    )


def refuse_paged(*_: Any, **__: Any) -> None:
    raise InputError(
        "Continuous batching packs unequal prompts into one row of a paged cache, where no method could tell them "
        "apart.",
        "use generate() with a padded batch, or detach first",
    )


def forked(cache: Cache) -> Cache:
    """The cache as it is now, which grows by itself: what both hold is shared."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


def new_cache(config: Any, encoder_decoder: bool = False) -> Cache:
    own = DynamicCache(config=config)
    return EncoderDecoderCache(own, DynamicCache()) if encoder_decoder else own


def fit_mask(
    mask: Any,
    *,
    queries: int,
    groups: int,
    keep: Tensor | None,
    pos: Tensor | None,
    start: int,
    ragged: bool,
    causal: bool,
    dtype: torch.dtype,
    padding_only: bool = False,
) -> Any:
    """The model's mask for rows and columns that are still there.

    `keep` (batch, queries) are the rows' places in the chunk, -1 for fillers; `pos` the logical positions of
    the keys; `start` the logical position of the chunk's first token. None stays None where the operator's own
    rule, `causal` or not, is right. A kernel may take a mask of `padding_only`, (batch, keys).
    """
    if pos is None and keep is not None:  # no cache: the columns are the rows
        pos = torch.where(keep < 0, -1, keep)
        ragged = bool((keep < 0).any())
    if pos is None:
        return mask
    if mask is not None and not isinstance(mask, Tensor):
        raise InputError(
            f"Tokens are missing, and a {type(mask).__name__} cannot be narrowed to those that are left.",
            "load the model with attn_implementation='sdpa' or 'eager'",
        )
    if padding_only or (mask is not None and mask.ndim == 2):
        if pos.ndim == 3:
            raise InputError(
                "Heads hold other entries, and this attention takes one mask of padding for all of them.",
                "load the model with attn_implementation='sdpa' or 'eager', or evict the same entries from all heads",
            )
        if mask is None:
            return (pos >= 0).long() if ragged else None
        return mask.gather(1, pos.clamp_min(0)) * (pos >= 0)
    if mask is None and not ragged and (not causal or queries == 1 or pos.shape[-1] == queries):
        return None
    columns = pos[:, None] if pos.ndim == 2 else pos.repeat_interleave(groups, 1)  # (batch, heads or 1, keys)
    if mask is None:
        rows = (
            torch.arange(queries, device=pos.device).expand(pos.shape[0], -1)
            if keep is None
            else keep.clamp_min(0)
        )
        mask = (
            columns[:, :, None, :] <= (rows + start)[:, None, :, None]
            if causal
            else columns[:, :, None, :] >= -1
        )
    else:
        batch = columns.shape[0]
        if keep is not None:
            rows = keep.clamp_min(0)[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            mask = mask.expand(batch, -1, -1, -1).gather(2, rows)
        heads = max(columns.shape[1], mask.shape[1])
        index = columns.clamp_min(0)[:, :, None, :].expand(-1, heads, mask.shape[2], -1)
        mask = mask.expand(batch, heads, -1, -1).gather(3, index)
    if ragged:
        full = (columns >= 0)[:, :, None, :]
        filler = None if keep is None else (keep < 0)[:, None, :, None]
        if mask.dtype == torch.bool:
            mask = mask & full if filler is None else (mask & full) | filler
        else:
            mask = mask.masked_fill(~full, torch.finfo(dtype).min)
            mask = mask if filler is None else mask.masked_fill(filler, 0.0)
    return mask
