"""By how much a model's rotary embedding turns queries and keys, found by a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.method import Method
from saccade.core.seams.plain import PlainHost

TOKENS, STEPS = 6, 5  # of the probe: words, and positions by which they move
CLOSE = 0.1  # of the size of queries, which bfloat16 rounds


@dataclass(frozen=True)
class Rotation:
    """Pairs of dimensions that turn by their frequency at every position; the dimensions behind them stay."""

    frequencies: Tensor  # (pairs,), in float64
    interleaved: bool  # a pair are neighbours; else it is one of the first half and one of the second

    def __call__(self, x: Tensor, by: Tensor | int) -> Tensor:
        """Queries or keys (..., dim) as they would be that many positions (...) later."""
        by = torch.as_tensor(by, device=x.device)[..., None]
        angle = by * self.frequencies.to(x.device)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        pairs = len(self.frequencies)
        turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        if self.interleaved:
            a, b = turning.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = turning.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([turned, rest.expand(*turned.shape[:-1], -1)], -1)


@dataclass(eq=False)
class Queries(Method):
    seen: dict[str, Tensor] = field(default_factory=dict)

    def observe(self, call: AttentionCall) -> None:
        self.seen[call.site.name] = call.q.detach().double()


def find(
    host: PlainHost, forward: Callable[[dict[str, Any], tuple[Method, ...]], Any]
) -> dict[str, Rotation]:
    """By site of the main tower: the rotation that makes its queries what they are some positions later."""
    sites = f"{host.main_tower}.*.self"
    now, later = Queries(sites=sites), Queries(sites=sites)
    words = host.model.get_input_embeddings().weight  # type: ignore[operator]
    for watch, start in ((now, 0), (later, STEPS)):
        positions = torch.arange(start, start + TOKENS, device=words.device)[None]
        ids = torch.arange(TOKENS, device=words.device)[None] + len(words) // 2
        forward({"input_ids": ids, "position_ids": positions}, (watch,))
    found = {}
    for site, q in now.seen.items():
        fits = [r for r in _rotations(host) if 2 * len(r.frequencies) <= q.shape[-1]]
        errors = [_error(rotation(q, STEPS), later.seen[site]) for rotation in fits]
        if errors and min(errors) < CLOSE:
            found[site] = fits[errors.index(min(errors))]
    return found


def _rotations(host: PlainHost) -> Iterator[Rotation]:
    """All that the model's rotary modules could mean."""
    for module in host.rotaries():
        for name, frequencies in module.named_buffers():
            if "inv_freq" in name:
                for interleaved in (False, True):
                    yield Rotation(frequencies.detach().double(), interleaved)


def _error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
