"""What the tests of missing tokens share: seeded choices of what stays, and small methods that make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from zoo import FAMILIES

from saccade.core.method import Method
from saccade.core.tokens import Tokens, TokensCall

EARLY = ("prefill", "extend")


def draw(*shape: int, seed: int, share: float = 0.5) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def staying(inputs: Mapping[str, Tensor], seed: int = 0, share: float = 0.5) -> Tensor:
    """Which tokens of a prompt stay (samples, tokens): other ones, and other numbers, in every sample. The
    first two and the last stay, and so does padding."""
    ids = inputs["input_ids"]
    keep = draw(*ids.shape, seed=seed, share=share)
    keep[:, -1] = True
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    real = mask.cumsum(1)
    return keep | (mask == 0) | (real <= 2) | (real == real[:, -1:])


def visual(name: str, inputs: Mapping[str, Tensor]) -> Tensor:
    config = FAMILIES[name].build().config
    tokens = (getattr(config, key, None) for key in ("image_token_id", "image_token_index"))
    return inputs["input_ids"] == next(t for t in tokens if isinstance(t, int))


def gone(keep: Mapping[int, Tensor], layers: int = 4) -> dict[int, Tensor]:
    """For the oracle: what left at one layer is missing there and in all above."""
    masks: dict[int, Tensor] = {}
    left: Tensor | None = None
    for layer in range(layers):
        if layer in keep:
            left = ~keep[layer] if left is None else left | ~keep[layer]
        if left is not None:
            masks[layer] = left[:, None, None, :]
    return masks


@dataclass(eq=False)
class Leave(Method):
    """Tokens leave before some layers: `keep[layer]` (samples, tokens of the prompt) says which stay."""

    keep: dict[int, Tensor] = field(default_factory=dict)
    sites: Any = "text.*.layer"
    phases: tuple[str, ...] = EARLY
    form: str = "mask"
    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[TokensCall, Tokens], Tokens] | None = None

    def tokens(self, call: TokensCall) -> Tokens | None:
        if call.layer not in self.keep:
            return None
        keep = self.keep[call.layer]
        first = call.pass_.start
        keep = torch.nn.functional.pad(keep, (0, first + call.pass_.tokens), value=True)
        keep = keep[:, first : first + call.pass_.tokens].repeat_interleave(
            call.h.shape[0] // keep.shape[0], 0
        )
        if call.removal is not None:
            keep = keep.gather(1, call.removal.keep.clamp_min(0)) & (call.removal.keep >= 0)
        tokens = Tokens(as_indices(keep) if self.form == "indices" else keep, **self.options)
        return tokens if self.change is None else self.change(call, tokens)


def as_indices(keep: Tensor) -> Tensor:
    """(..., most), -1 on the left of rows that keep fewer; one empty place where none keeps any."""
    most = max(1, int(keep.sum(-1).max()))
    index = keep.long().sort(dim=-1, stable=True).indices[..., -most:]
    return torch.where(keep.gather(-1, index), index, -1)


@dataclass(eq=False)
class Evict(Method):
    """Entries leave the cache of some layers: `keep[layer]` (samples, key heads, tokens of the prompt) says
    which logical positions stay. `form` is how that is said."""

    keep: dict[int, Tensor] = field(default_factory=dict)
    sites: Any = "text.*.self"
    phases: tuple[str, ...] = EARLY
    form: str = "ragged"

    def evict(self, call: Any, cache: Any) -> Tensor | None:
        if call.site.index not in self.keep:
            return None
        keep = self.keep[call.site.index]
        rows, heads, slots, _ = cache.keys.shape
        keep = keep.repeat_interleave(rows // keep.shape[0], 0)
        pos = cache.positions()
        pos = (pos[:, None] if pos.ndim == 2 else pos).expand(rows, heads, slots)
        keep = torch.nn.functional.pad(keep, (0, cache.seen), value=True)
        stay = keep.gather(2, pos.clamp_min(0)) & (pos >= 0)
        if self.form == "shared":
            assert bool((stay == stay[:1, :1]).all())
            return as_indices(stay[0, 0])
        return as_indices(stay[:, 0] if self.form == "samples" else stay)


FORMS = ("shared", "samples", "heads", "ragged")


def entries(inputs: Mapping[str, Tensor], form: str, seed: int = 0, heads: int = 2) -> Tensor:
    """Which entries stay (samples, key heads, tokens), as each form can say it."""
    batch, tokens = inputs["input_ids"].shape
    if form == "ragged":
        keep = draw(batch, heads, tokens, seed=seed, share=0.6)
    else:
        shape = {"shared": (1, 1), "samples": (batch, 1), "heads": (batch, heads)}[form]
        rank = torch.rand(*shape, tokens, generator=torch.Generator().manual_seed(seed)).argsort(-1)
        keep = (rank < 2 * tokens // 3).expand(batch, heads, -1)
    keep = keep.clone()
    keep[..., -1] = True
    return keep


def evicted(keep: Mapping[int, Tensor], prompt: int, chunk: int | None = None) -> dict[int, Tensor]:
    """For the oracle: missing for every query after the pass that brought them."""
    brought = torch.arange(prompt) // (chunk or prompt)
    later = torch.arange(prompt + 1)[:, None] >= (brought + 1) * (chunk or prompt)
    later[prompt] = True
    return {layer: ~stays[:, :, None] & later for layer, stays in keep.items()}


def together(*masks: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """What several oracles' masks hide."""
    found: dict[int, Tensor] = {}
    for mask in masks:
        for layer, hidden in mask.items():
            found[layer] = found[layer] | hidden if layer in found else hidden
    return found
