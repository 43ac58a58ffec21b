"""Choose keys in a few layers, and read them again in the layers above each.

    s_j    attention of the newest word on key j, summed over heads
    R      the first sinks, the newest `recent`, and of the others the k = keep * n with the largest s
    a refresh layer reads everything and finds R;  the others read the R of the last refresh layer, without scores

A calibration profiles prompts:  e_l = 1 - cos(heads' outputs, those over R alone),  o(a, b) = the share of the k of a
that b has too. Layers with e above a threshold are refresh layers; beside them at most `budget` of all are so that

    dp[j][n] = min over i < j of  dp[i][n - 1] + sum over i < m < j of (1 - o(i, m))

is least. While a prompt is read nothing changes, and the cache loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, Sites, option
from saccade.core.passes import Run
from saccade.core.session import Session
from saccade.reduction._parts.cache import chosen, positions, slots
from saccade.reduction._parts.choice import highest


@dataclass(eq=False)
class HyLRA(Method):
    card = Card(
        slug="hylra",
        name="HyLRA",
        kind="method",
        family="reduction",
        form="method",
        target="llm",
        paper="HyLRA: Hybrid Layer Reuse Attention for Efficient Long-Context Inference (Ai et al., 2026)",
        summary="Find the keys that matter in a few layers, and read only these in the others",
        needs=("first_token",),
        neutral={"keep": 1.0},
        sure="abstract",
        choices=(
            "Costs, measures and defaults are a reconstruction.",
            "Words are written that way; prompts are read densely.",
            "A profile looks at the last word of each prompt, and a layer's own keys are with sinks and newest "
            "ones, as where they are read.",
            "Where more layers are sensitive than the budget allows, these and the first are the refresh layers.",
        ),
        headline="6%-46% higher throughput with <1% accuracy degradation",
        tags=("sparse attention", "layer reuse", "long context", "decoding", "dynamic programming"),
    )

    keep: float = option(0.1, "share of the keys that is chosen, at least one", low=0, high=1)
    sinks: int = option(4, "first keys, which are always read", low=0)
    recent: int = option(64, "newest keys, which are always read", low=1)
    refresh: str | tuple[int, ...] = option("calibrated", "calibrated, or the layers that read everything")
    threshold: float = option(0.1, "error from which a layer reads everything", low=0, high=2)
    budget: float = option(0.5, "share of the layers that read everything, at most", low=0, high=1)
    sites: Sites = option("text.*.self", "layers")
    phases: tuple[str, ...] = option(("decode",), "passes in which keys are reused")

    def replace(self, call: AttentionCall) -> Tensor | None:
        if call.site.layer in self._refreshing(call.run):
            return None
        kept = call.run.state["kept"]
        return chosen(call, kept[:, None].expand(-1, call.k.shape[1], -1)).native()

    def observe(self, call: AttentionCall) -> None:
        if call.site.layer in self._refreshing(call.run):
            fixed, own = self.keys_of(call)
            entries, pos = slots(fixed | own), positions(call)[:, 0]
            call.run.state["kept"] = torch.where(entries < 0, -1, pos.gather(1, entries.clamp_min(0)))

    def keys_of(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """The sinks and newest keys, and those that are chosen: (batch, keys)."""
        if call.pos is not None and call.pos.ndim == 3:
            raise InputError(
                "HyLRA reads the same keys with all heads, and each head of this cache holds others.",
                "use it without a method that evicts by heads",
            )
        there = call.columns("all")[:, 0, 0]
        first, last = there.cumsum(1) <= self.sinks, there.flip(1).cumsum(1).flip(1) <= self.recent
        fixed = there & (first | last)
        count = (self.keep * there.sum(1, keepdim=True).double()).round().long().clamp_min(1)
        return fixed, highest(call.weights("last")[:, :, 0].sum(1), there & ~fixed, count)

    def _refreshing(self, run: Run) -> set[int]:
        if "refreshing" not in run.state:
            layers = [site.layer for site in run.places(self, "replace")]
            if isinstance(self.refresh, str):
                known = run.calibration()
                if len(known["errors"]) != len(layers):
                    raise InputError(
                        f"HyLRA was calibrated with {len(known['errors'])} layers and has {len(layers)}.",
                        "calibrate it with the same sites",
                    )
                forced = {*(known["errors"] > self.threshold).nonzero()[:, 0].tolist()}
                places = policy(known["overlap"], forced, round(self.budget * len(layers)))
                run.state["refreshing"] = {layers[place] for place in places}
            elif layers[0] in self.refresh:
                run.state["refreshing"] = {*self.refresh}
            else:
                raise InputError(
                    f"Layer {layers[0]} would read the keys of a layer before it, and there is none.",
                    "let the first layer of sites be in refresh",
                )
        return run.state["refreshing"]

    def calibrate(self, session: Session, samples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Samples are prompts, inputs of a forward."""
        profile, count = Profile(of=self, sites=self.sites), 0
        with torch.no_grad():
            for count, sample in enumerate(samples, 1):  # noqa: B007
                session.forward(sample, (profile,))
        if not count:
            raise InputError("There is no prompt from which layers could be profiled.", "give some")
        size = len(profile.errors)
        errors = torch.tensor([sum(each) / len(each) for each in profile.errors.values()])
        overlap = torch.eye(size)
        for (a, b), shares in profile.shares.items():
            places = [*profile.errors]
            overlap[places.index(a), places.index(b)] = sum(shares) / len(shares)
        return {"errors": errors, "overlap": overlap}


@dataclass(eq=False)
class Profile(Method):
    """What each layer loses by its own keys alone, and how many of them later layers choose too."""

    of: HyLRA = field(default_factory=HyLRA)
    errors: dict[int, list[float]] = field(default_factory=dict)  # by layer: of every sample
    shares: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # by two layers
    before: dict[int, Tensor] = field(default_factory=dict)  # by layer: keys of the running forward

    def observe(self, call: AttentionCall) -> None:
        fixed, own = self.of.keys_of(call)
        w, layer = call.weights("last"), call.site.layer
        part = w * (fixed | own)[:, None, None]
        dense, sparse = (
            call.apply(each)[:, :, 0].flatten(1) for each in (w, part / part.sum(-1, keepdim=True))
        )
        self.errors.setdefault(layer, []).extend((1 - F.cosine_similarity(dense, sparse)).tolist())
        if self.before and layer <= max(self.before):
            self.before.clear()  # another forward
        for earlier, theirs in self.before.items():
            both = (own & theirs).sum(1) / own.sum(1).clamp_min(1)
            self.shares.setdefault((earlier, layer), []).extend(both.tolist())
        self.before[layer] = own


def policy(overlap: Tensor, forced: set[int], budget: int) -> list[int]:
    """Refresh layers, the first among them, that cost the least: overlap is (layers, layers)."""
    layers, forced = len(overlap), forced | {0}
    cost = (1 - overlap.double()).tolist()
    best: list[dict[int, tuple[float, list[int]]]] = [{} for _ in range(layers + 1)]
    best[0] = {1: (0.0, [0])}
    for j in range(1, layers + 1):
        for i in range(j):
            if any(i < layer < j for layer in forced):
                continue
            reused = sum(cost[i][m] for m in range(i + 1, j))
            for n, (total, chosen_) in best[i].items():
                old = best[j].get(n + 1, (math.inf, []))
                best[j][n + 1] = min(old, (total + reused, [*chosen_, j]))
    limit = max(budget, len(forced))
    return min(one for n, one in best[layers].items() if n - 1 <= limit)[1][:-1]
