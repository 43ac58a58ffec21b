"""Read parallel segments of a prompt in an order that each head makes by itself, whatever order they stand in.

    every token of a segment sees what stands before all segments, the other segments whole, its own causally
    weight of segment j = sum of softmax(q . k) on it, without positions, over all segments / its length
                          of a segment's queries together, the own left out; of every later query by itself
    positions: all segments end where the last one ends; for queries of a segment it keeps that place and the others
               follow in front of it, for later queries they stand in front of the query, the weightiest nearest

Segments take up the same positions as before, each once, in every head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError, OptionError
from saccade.core.method import Method, Sites, option


@dataclass(eq=False)
class PINE(Method):
    card = Card(
        slug="pine",
        name="PINE",
        kind="method",
        family="steering",
        form="method",
        target="llm (RoPE, decoder-only), vlm",
        paper="Eliminating Position Bias of Language Models: A Mechanistic Approach (Wang et al., 2024)",
        summary="Answer alike in whatever order parallel segments of the prompt stand",
        neutral={"spans": ()},
        code="wzq016/PINE",
        choices=(
            "The cache stays as the model fills it: queries are turned by what keys would be moved, which is the same; "
            "the released code keeps keys that are not rotated.",
            "Rotations are those that a probe finds, so that any half, interleaved or partial ones are served.",
        ),
        headline="8 to 10 points on pairs of RewardBench's reasoning",
        tags=(
            "position bias",
            "lost in the middle",
            "order invariance",
            "rotary positions",
            "retrieval augmented",
        ),
    )

    spans: tuple[tuple[int, int], ...] = option(
        (),
        "first token and the one behind the last of every segment, counted from the prompt's first; see `join`",
    )
    sites: Sites = option("text.*.self", "layers")

    def __post_init__(self) -> None:
        super().__post_init__()
        edges = [edge for span in self.spans for edge in span]
        if any(a >= b for a, b in self.spans) or edges[1:-1:2] != edges[2::2]:
            raise OptionError(
                f"PINE(spans={self.spans!r}): segments follow each other, and none is empty.",
                "give (first, end) of each, where one ends as the next begins",
            )

    def acts(self, call: AttentionCall) -> bool:
        return len(self.spans) > 1

    def scores(self, call: AttentionCall, s: Tensor) -> Tensor:
        kpos = call.kpos
        if call.pos is not None or kpos[0] != 0 or call.window is not None:
            raise InputError(
                f"PINE needs all keys at {call.site.name}, and some are out of sight.",
                "use a model without windows",
            )
        begins = call.klayout.where("first").int().argmax(1).tolist()
        assert isinstance(call.span, slice)
        rows = range(call.span.start, call.span.stop)
        samples = [self._sample(call, b, begin, rows, s[b]) for b, begin in enumerate(begins)]
        return torch.stack(samples)

    def _sample(self, call: AttentionCall, b: int, begin: int, rows: range, s: Tensor) -> Tensor:
        """Scores of one sample (heads, rows, keys), rows being those of the call."""
        start = int(call.qpos[0])
        region = Region([(begin + a, begin + b) for a, b in self.spans])
        stop = start + call.q.shape[2]
        if stop <= region.start:
            return s
        if region.start < start < region.end or stop < region.end:
            raise InputError(
                f"PINE reads all segments in one pass, and this one ends at {stop - begin} of {self.spans}.",
                "give the spans of the whole prompt, and generate without prefill_chunk_size",
            )
        q = call.q[b].to(s.dtype)  # at least float32, for they are rotated twice
        k = call.k[b].to(s.dtype).repeat_interleave(call.groups, 0)

        def scored(queries: Tensor, keys: Tensor) -> Tensor:
            raw = queries @ keys.transpose(-1, -2) * call.scale
            return raw if call.softcap is None else torch.tanh(raw / call.softcap) * call.softcap

        places = torch.arange(region.start, region.end, device=q.device)
        bare = call.rotate(k[:, region.start : region.end], -places)  # without their positions

        def weighed(at: Tensor, own: slice | None) -> Tensor:
            """What queries at positions (rows,) give to every segment: (heads, rows, segments)."""
            raw = scored(call.rotate(q[:, at - start], -at), bare)
            if own is not None:
                raw[..., own] = -torch.inf
            w = raw.softmax(-1)
            return torch.stack([w[..., part].sum(-1) / n for part, n in region.parts()], -1)

        s = s.clone()
        positions = torch.arange(rows.start, rows.stop, device=q.device) + start
        for d, (first, end) in enumerate(region.spans):
            mine = ((positions >= first) & (positions < end)).nonzero()[:, 0]
            if not len(mine):
                continue
            own = slice(first - region.start, end - region.start)
            weight = weighed(torch.arange(first, end, device=q.device), own).sum(1)  # (heads, segments)
            weight[:, d] = torch.inf
            moved = region.moves(weight)
            turned = q[:, positions[mine] - start]
            for j, (left, right) in enumerate(region.spans):
                if j != d:
                    nearer = call.rotate(turned, (moved[:, d] - moved[:, j])[:, None])
                    s[:, mine, left:right] = scored(nearer, k[:, left:right])
            kept = call.rotate(turned, moved[:, d][:, None])
            s[:, mine, begin : region.start] = scored(kept, k[:, begin : region.start])
        later = (positions >= region.end).nonzero()[:, 0]
        if len(later):
            moved = region.moves(weighed(positions[later], None))  # (heads, rows, segments)
            for j, (left, right) in enumerate(region.spans):
                nearer = call.rotate(q[:, positions[later] - start], -moved[..., j])
                s[:, later, left:right] = scored(nearer, k[:, left:right])
        return s


@dataclass(frozen=True)
class Region:
    """Segments that stand one behind the other."""

    spans: list[tuple[int, int]]

    @property
    def start(self) -> int:
        return self.spans[0][0]

    @property
    def end(self) -> int:
        return self.spans[-1][1]

    def parts(self) -> list[tuple[slice, int]]:
        """Every segment's place in the region, and its length."""
        return [(slice(a - self.start, b - self.start), b - a) for a, b in self.spans]

    def moves(self, weight: Tensor) -> Tensor:
        """By how many positions each segment moves, the weightiest to the region's end and the others in front of it:
        (..., segments)."""
        order = weight.argsort(dim=-1, descending=True, stable=True)
        lengths = torch.tensor([b - a for a, b in self.spans], device=weight.device)
        nearer = lengths[order].cumsum(-1) - lengths[order]  # tokens between a segment and the region's end
        ends = torch.tensor([b for _, b in self.spans], device=weight.device)
        return self.end - ends - nearer.gather(-1, order.argsort(-1))


def join(
    tokenizer: Any, prefix: str, segments: Sequence[str], suffix: str
) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """A prompt's inputs, and the spans of its segments, for a tokenizer of their own for every part."""
    parts = [tokenizer(prefix)["input_ids"]]
    parts += [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (*segments, suffix)]
    edges = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
    ids = torch.tensor([[i for part in parts for i in part]])
    spans = tuple(itertools.pairwise(edges[:-1]))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, spans
