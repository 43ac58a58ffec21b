"""One forward of a model (a pass), and the generation or call that it belongs to (a run)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.core.call import AttentionCall, Span
from saccade.core.layout import Layout
from saccade.core.state import Sequence

if TYPE_CHECKING:
    from saccade.core.method import Method
    from saccade.core.plan import Plan
    from saccade.core.session import Runtime
    from saccade.core.site import Site


@dataclass
class Run:
    """One `generate()`, or one forward that stands alone.

    `inputs` are the arguments that the model's forward would get for the whole prompt.
    """

    runtime: Runtime
    inputs: dict[str, Any]
    methods: tuple[Method, ...]
    plans: Mapping[Site, Plan]
    generating: bool = False
    step: int = -1  # passes so far, less one
    start: int | None = None  # tokens that were cached before it
    method: Any = None  # the method whose event runs
    features: dict[str, list[int]] = field(default_factory=dict)  # by kind: tokens of every item, in order
    boxes: dict[str, Tensor] = field(default_factory=dict)  # by kind: (tokens, 4)
    pictures: dict[str, list[int]] = field(default_factory=dict)  # by kind: tokens of every picture, in order
    placed: set[str] = field(default_factory=set)
    _states: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, Any]:
        """The running method's own dictionary, which lives as long as the run."""
        return self.state_of(self.method)

    def state_of(self, method: Method) -> dict[str, Any]:
        return self._states.setdefault(id(method), {})

    @property
    def samples(self) -> int:
        """Rows of the caller's batch."""
        return next((v.shape[0] for v in self.inputs.values() if isinstance(v, Tensor) and v.ndim), 1)

    def forward(self, inputs: Mapping[str, Any], methods: Iterable[Method] = (), grad: bool = False) -> Any:
        """An extra pass with methods of its own (none, unless given). It leaves no trace in the model."""
        return self.runtime.extra_pass(inputs, tuple(methods), grad)

    def without_images(self) -> dict[str, Any]:
        """The prompt's inputs, its pictures and their tokens taken out."""
        return self.runtime.host.without_images(self.inputs)

    def begin(self) -> None:
        for self.method in self.methods:
            self.method.begin(self)

    def end(self) -> dict[str, tuple[Method, Any]]:
        """The methods, and what their `end` returned, by slug or class name."""
        results = {}
        for method in self.methods:
            self.method = method
            result = method.end(self)
            if result is not None:
                card = getattr(method, "card", None)
                results[card.slug if card else type(method).__name__] = (method, result)
        return results

    def phase(self, past: int, tokens: int) -> str:
        """Of a pass that brings `tokens` to a cache of `past`."""
        if past == 0:
            return "prefill"
        if self.generating and (prompt := self._prompt_ids()) is not None:
            return "extend" if past < prompt.shape[1] else "decode"
        return "decode" if tokens == 1 else "extend"

    def past_ids(self, start: int, stop: int, rows: int) -> Tensor | None:
        """Ids of tokens that were cached before we came, where the whole conversation is given."""
        ids = self._prompt_ids()
        if ids is None or ids.shape[1] < stop:
            return None
        return ids[:, start:stop].repeat_interleave(rows // ids.shape[0], 0)

    def place_items(self, pass_: Pass) -> None:
        """Tell the sequence which placeholder belongs to which picture, once their features are known."""
        for kind in set(self.features) | set(self.pictures):
            placeholder = self.runtime.host.vocabulary.placeholders.get(kind)
            if placeholder is None or kind in self.placed:
                continue
            self.placed.add(kind)
            ids = self._prompt_ids()
            ids = pass_.sequence.ids_from(pass_.sequence.length - pass_.tokens) if ids is None else ids[:, self.start :]
            if ids is None:
                continue
            wanted = (ids == placeholder).sum(1).tolist()
            rows = pass_.sequence.rows // ids.shape[0]
            counts = _share(self.pictures.get(kind) or self.features[kind], wanted)
            boxes = self.boxes.get(kind)
            parts = None if boxes is None else [p for p in boxes.split(wanted) for _ in range(rows)]
            pass_.sequence.add_items(kind, [c for c in counts for _ in range(rows)], parts)

    def _prompt_ids(self) -> Tensor | None:
        return self.runtime.host.ids(self.inputs)[0] if self.generating else None


def _share(counts: list[int], wanted: list[int]) -> list[list[int]]:
    """Items in order to rows in order, each row as many tokens as it has placeholders."""
    shares: list[list[int]] = []
    items = iter(counts)
    for tokens in wanted:
        share: list[int] = []
        while sum(share) < tokens:
            share.append(next(items, tokens))
        shares.append(share)
    return shares


class Pass:
    """One forward. `phase` is prefill, extend (more of a prompt onto a cache), decode or denoise."""

    def __init__(
        self,
        run: Run,
        sequence: Sequence,
        phase: str,
        inputs: Mapping[str, Any],
        tokens: int = 0,
        mask: Tensor | None = None,
    ) -> None:
        self.run, self.sequence, self.phase, self.inputs = run, sequence, phase, inputs
        self.tokens = tokens  # of the main sequence that came with this pass
        self.mask = mask  # (batch, columns so far), zeros are padding
        self.plans = run.plans
        self.tower_inputs: dict[str, Mapping[str, Any]] = {}
        self._spans: dict[Any, Span] = {}
        self._spaces: dict[Any, Layout] = {}
        self._layouts: dict[str, tuple[Layout, Layout]] = {}

    def logical_end(self, site: Site, tokens: int) -> int:
        """Position after the last token of the site's space, which shows `tokens` of it."""
        return self.sequence.length if self._sequential(site) and tokens <= self.sequence.length else tokens

    def layouts(self, call: AttentionCall) -> tuple[Layout, Layout]:
        """Of queries and of keys."""
        site = call.site
        if site.name not in self._layouts:
            queries = self._space(site.tower, call.q, site)
            keys = queries if site.kind == "self" else self._space(f"{site.tower}.context", call.k, site)
            self._layouts[site.name] = (queries, keys)
        return self._layouts[site.name]

    def span(self, rows: str, call: AttentionCall) -> Span:
        """Named rows of a call: `last` by sample, the others as the smallest slice that holds them."""
        queries = call.q.shape[2]
        if rows == "all":
            return slice(0, queries)
        key = (rows, call.site.tower, queries)
        if key not in self._spans:
            self._spans[key] = self._last(call, queries) if rows == "last" else self._covering(rows, call, queries)
        return self._spans[key]

    def _last(self, call: AttentionCall, queries: int) -> Span:
        """The last real row of each sample: a slice unless there is padding on the right."""
        last = slice(queries - 1, queries)
        if self.mask is None or not self._sequential(call.site) or queries != self.tokens:
            return last
        real = self.mask[:, -queries:] != 0
        if bool(real[:, -1].all()):
            return last
        index = torch.arange(queries, device=real.device).expand_as(real)
        return torch.where(real, index, 0).amax(1, keepdim=True).to(call.q.device)

    def _covering(self, rows: str, call: AttentionCall, queries: int) -> Span:
        found = call.qlayout.where(rows)[:, -queries:].any(0).nonzero()[:, 0]
        return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)

    def _sequential(self, site: Site) -> bool:
        return site.tower == self.run.runtime.host.main_tower

    def _space(self, name: str, states: Tensor, site: Site) -> Layout:
        if name == site.tower and self._sequential(site) and self.sequence.length:
            return self.sequence.layout()
        key = (name, states.shape[0], states.shape[2])
        if key not in self._spaces:
            self._spaces[key] = self.run.runtime.host.space(name, states, self)
        return self._spaces[key]
