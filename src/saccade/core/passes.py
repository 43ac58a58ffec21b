"""One forward of a model (a pass), and the generation or call that it belongs to (a run)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from saccade.core import calibration
from saccade.core.cache import TrackedLayer
from saccade.core.call import AttentionCall, Span
from saccade.core.errors import InputError
from saccade.core.layout import Layout
from saccade.core.site import match
from saccade.core.state import Sequence
from saccade.core.tokens import Removal, Tokens
from saccade.models.towers import UNBATCHED

if TYPE_CHECKING:
    from saccade.core.branch import Branch, Open
    from saccade.core.method import Method
    from saccade.core.plan import Plan
    from saccade.core.runtime import Runtime
    from saccade.core.seams.projections import Matrices
    from saccade.core.site import Site
    from saccade.core.words import Word


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
    in_pieces: bool = False  # the prompt is read so
    follows: bool = False  # of a branch: it reads a prompt, then single tokens of the answer
    step: int = -1  # passes so far, less one
    start: int | None = None  # tokens that were cached before it
    answer: Tensor | None = None  # the ids that `generate()` returned
    method: Any = None  # the method whose event runs
    sequence: Sequence | None = None  # of its last pass
    features: dict[str, list[int]] = field(default_factory=dict)  # by kind: tokens of every item, in order
    boxes: dict[str, Tensor] = field(default_factory=dict)  # by kind: (tokens, 4)
    pictures: dict[str, list[int]] = field(default_factory=dict)  # by kind: tokens of every picture, in order
    placed: set[str] = field(default_factory=set)
    removed: Tensor | None = (
        None  # (samples, tokens of the prompt) placeholders whose features were taken out
    )
    renumbers: bool = False  # and the positions close up
    branches: list[Open] = field(default_factory=list)
    moved: int = 0  # columns by which branches moved the prompt's rows in the cache
    last: Pass | None = None  # the newest
    cache: Any = None  # that the newest pass grew
    tracked: bool = False  # tokens may be missing, so the cache must know its positions
    unverified: str = ""  # the option by which `generate()` feeds tokens that may be taken back
    waiting: list[tuple[Method, Branch]] | None = None  # branches that have not begun
    sampling: Any = None  # of a pipeline of diffusers, what stands around it
    _states: dict[int, dict[str, Any]] = field(default_factory=dict)
    _matched: dict[tuple[str, ...], list[Site]] = field(default_factory=dict)
    _overriding: dict[tuple[str, ...], list[Method]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.runtime.located is not None:
            self.pictures.update(self.runtime.located.pictures)
            self.boxes.update(self.runtime.located.boxes)

    @property
    def state(self) -> dict[str, Any]:
        """The running method's own dictionary, which lives as long as the run."""
        return self.state_of(self.method)

    def state_of(self, method: Method) -> dict[str, Any]:
        return self._states.setdefault(id(method), {})

    @property
    def samples(self) -> int:
        """Rows of the caller's batch."""
        _, shape = self.runtime.host.ids(self.inputs)
        if shape is not None:
            return shape[0]
        main = self.inputs.get(getattr(self.runtime.model, "main_input_name", ""))
        tensors = [v for v in (main, *self.inputs.values()) if isinstance(v, Tensor) and v.ndim]
        return tensors[0].shape[0] if tensors else 1

    @property
    def feature_layer(self) -> int:
        """Layer of the vision tower whose output is given to the text."""
        return self.runtime.host.feature_layer()

    def forward(
        self,
        inputs: Mapping[str, Any],
        methods: Iterable[Method] = (),
        *,
        grad: bool = False,
        last_only: bool = False,
    ) -> Any:
        """An extra pass with methods of its own (none, unless given). It leaves no trace in the model.

        `last_only` spares the logits of all positions but the last, where the model can.
        """
        beside = [extra for one in self.methods if (extra := one.extra(self, grad))]
        return self.runtime.extra_pass(inputs, (*methods, *beside), grad, last_only)

    def unembed(self, h: Tensor, norm: bool = True) -> Tensor:
        """Logits that the model's own head gives to hidden states (..., width)."""
        return self.runtime.unembed(h, norm)

    def final(self, h: Tensor) -> Tensor:
        """What goes to the model's head, of what the last layer gives (..., width)."""
        return self.runtime.head.before(h)

    def matrices(self, site: str) -> Matrices:
        """W_q, W_k, W_v and W_o of the heads of a self-attention, such as `text.3.self`."""
        return self.runtime.linears(site).matrices()

    def taking(self, site: Site, heads: Tensor, made: Tensor) -> tuple[Tensor, Tensor | float]:
        """W_o (heads * dim, width) and the bias with which an attention makes what it gives (..., width) of its
        heads' outputs (..., heads * dim)."""
        return self.runtime.taking(site, heads, made)

    def readout(self) -> tuple[nn.LayerNorm, nn.Linear]:
        """The norm and the projection that make CLIP's vector of a picture of its class token."""
        return self.runtime.readout()

    def norm(self, site: str) -> nn.Module:
        """The norm right before attention, or an mlp."""
        return self.runtime.norm(site)

    def projector(self, inputs: Mapping[str, Any]) -> nn.Module:
        """The module that makes features of the vision tower's tokens, found on the pictures of a prompt."""
        return self.runtime.projector(inputs)

    def mlp(self, site: str, h: Tensor) -> Tensor:
        """What an mlp, such as `text.0.mlp`, and the norm before it make of hidden states (..., width)."""
        return self.runtime.mlp(site, h)

    def embed(self, ids: Tensor) -> Tensor:
        """What the text tower is given for ids: (..., width)."""
        model: Any = self.runtime.model
        return model.get_input_embeddings()(ids)

    def without_images(self) -> dict[str, Any]:
        """The prompt's inputs, its pictures and their tokens taken out."""
        return self.runtime.host.without_images(self.inputs)

    def shortened(self, inputs: Mapping[str, Any], keep: Tensor) -> dict[str, Any]:
        """A prompt's inputs with these of its tokens alone: (samples, tokens), bool."""
        return self.runtime.host.shortened(inputs, keep)

    def beside(self, other: Mapping[str, Any]) -> dict[str, Any]:
        """The prompt's inputs with another, shorter prompt's as further rows."""
        return self.runtime.host.beside(self.inputs, other)

    def places(self, method: Method, event: str) -> list[Site]:
        """The sites at which a method wants an event, in the model's order."""
        return self.matching(method.sites_of(event))

    def matching(self, patterns: tuple[str, ...]) -> list[Site]:
        """The model's sites that one of the patterns names."""
        if patterns not in self._matched:
            self._matched[patterns] = match(patterns, self.runtime.host.sites)
        return self._matched[patterns]

    def overriding(self, *events: str) -> list[Method]:
        """The run's methods that override one of the events."""
        if events not in self._overriding:
            self._overriding[events] = [m for m in self.methods if set(events) & set(type(m).events())]
        return self._overriding[events]

    def calibration(self) -> dict[str, Tensor]:
        """What the running method measured of this model, by `session.calibrate`."""
        if "calibration" not in self.state:
            self.state["calibration"] = calibration.load(self.method.kept_as(), self.runtime.model)
        return self.state["calibration"]

    def go_on(self, inputs: dict[str, Any]) -> None:
        """Another forward of the caller's own loop, with pictures of its own."""
        self.inputs, self.removed, self.renumbers = inputs, None, False
        self.features, self.placed = {}, set()

    def begin(self) -> None:
        for method in self.methods:
            self.method = method
            method.begin(self)

    def end(self) -> list[tuple[str, Method, Any]]:
        """Slug or class name of every method whose `end` returned something, the method, and what it returned."""
        results = []
        for method in self.methods:
            self.method = method
            result = method.end(self)
            if result is not None:
                card = getattr(method, "card", None)
                results.append((card.slug if card else type(method).__name__, method, result))
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
            ids = self._prompt_ids()
            ids = (
                pass_.sequence.ids_from(pass_.sequence.length - pass_.tokens)
                if ids is None
                else ids[:, self.start :]
            )
            if ids is None:
                continue
            wanted = (ids == placeholder).sum(1).tolist()
            located = self._located(kind, sum(wanted))
            if not located and kind not in self.features:
                continue
            self.placed.add(kind)
            rows = pass_.sequence.rows // ids.shape[0]
            each = self.pictures[kind] if located else self.features[kind]
            counts = None if self.runtime.host.by_sample and not located else _share(each, wanted)
            counts = [_runs(row) for row in ids == placeholder] if counts is None else counts
            parts = [p for p in self.boxes[kind].split(wanted) for _ in range(rows)] if located else None
            pass_.sequence.add_items(kind, [c for c in counts for _ in range(rows)], parts)

    def _located(self, kind: str, tokens: int) -> bool:
        """Whether the pictures that were located are the prompt's."""
        described = sum(self.pictures.get(kind, ()))
        if described and tokens and described != tokens and self.generating:
            raise InputError(
                f"The pictures that were located have {described} {kind} tokens, the prompt has {tokens}.",
                "call session.locate(processor, images) with the pictures of this prompt, or with none",
            )
        return 0 < described == tokens

    def boxed(self, layout: Layout, name: str, site: Site) -> Layout:
        """A space beside the main sequence, with boxes where its tokens are those of the located pictures."""
        boxes = self.boxes.get(name)
        if boxes is None and name == "vision" and self.runtime.located is not None:
            boxes = self.runtime.located.tower_boxes(site)
        if boxes is None or len(boxes) == 0 or len(boxes) % layout.shape[1]:
            return layout
        times, rest = divmod(layout.shape[0], len(boxes) // layout.shape[1])  # more than once: beams
        if times == 0 or rest or (times > 1 and name == "vision"):
            return layout
        boxes = boxes.to(layout.kind.device).view(-1, layout.shape[1], 4).repeat_interleave(times, 0)
        return replace(layout, box=boxes)

    def check_features(self, site: Site) -> None:
        """Refuse to go on where features should have been chosen and never came."""
        wanting = self.overriding("features")
        ids = self.prompt_ids() if wanting and site.tower == "text" else None
        if ids is None:
            return
        for kind, placeholder in self.runtime.host.vocabulary.placeholders.items():
            if kind in ("image", "video") and kind not in self.features and bool((ids == placeholder).any()):
                raise InputError(
                    f"{type(wanting[0]).__name__} chooses among the {kind}'s features, which this call never made.",
                    f"call the model itself: its generate() makes them without get_{kind}_features"
                    if self.generating and any(name.startswith("pixel") for name in self.inputs)
                    else "give the model the pixels, not inputs_embeds or features that were made before",
                )

    def prompt_ids(self) -> Tensor | None:
        """Ids (samples, tokens) that this run brings to the cache."""
        ids = self.runtime.host.ids(self.inputs)[0]
        return None if ids is None else ids[:, (self.start or 0) if self.generating else 0 :]

    def _prompt_ids(self) -> Tensor | None:
        return self.runtime.host.ids(self.inputs)[0] if self.generating else None


def _share(counts: list[int], wanted: list[int]) -> list[list[int]] | None:
    """Items in order to rows in order, each row as many tokens as it has placeholders; None where they do not fit."""
    shares: list[list[int]] = []
    items = iter(counts)
    for tokens in wanted:
        share: list[int] = []
        while sum(share) < tokens:
            share.append(next(items, tokens))
        shares.append(share)
    fits = all(sum(share) == tokens for share, tokens in zip(shares, wanted)) and next(items, None) is None
    return shares if fits else None


def _runs(mask: Tensor) -> list[int]:
    """Lengths of the runs of neighbours."""
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff()
    return ((edges == -1).nonzero() - (edges == 1).nonzero())[:, 0].tolist()


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
        self.start = sequence.length - tokens  # logical position of the first of them
        self.tracked = False  # the cache knows its positions, for tokens may be missing
        self.removals: dict[str, Removal] = {}  # by tower, as they stand
        self.removals_at: dict[
            tuple[str, int | None], tuple[Removal | None, Removal | None]
        ] = {}  # by layer, before and in it, for one that runs again
        self.rewound = False  # whole layers do, so that `removals` are those of the running one
        self.rotaries: list[Any] = []  # what rotary modules were given
        self.peeking: tuple[Any] | None = (
            None  # a layer runs for its attention call alone, before this cache layer
        )
        # Rows of the prompt and of its branches, and how far right their columns stand in the cache.
        self.groups: list[tuple[slice, Pass, int]] | None = None
        self.tower_inputs: dict[str, Mapping[str, Any]] = {}
        self.rows: dict[str, Tensor] = {}  # of the batch, by name, where they have names
        self._spans: dict[Any, Span] = {}
        self._spaces: dict[Any, Layout] = {}
        self._layouts: dict[tuple[str, int, int, int], tuple[Layout, Layout]] = {}

    @property
    def complete(self) -> bool:
        """The whole prompt has been read: it may come in pieces."""
        prompt = self.run._prompt_ids() if self.run.in_pieces else None
        return prompt is None or self.sequence.length >= prompt.shape[1]

    def check_complete(self, what: str = "judges by the prompt's last words") -> None:
        """Refuse a prompt of which more will come."""
        if not self.complete:
            raise InputError(
                f"{type(self.run.method).__name__} {what}, and the prompt comes in pieces.",
                "generate without prefill_chunk_size",
            )

    def only(self, name: str) -> Self:
        """The same pass as these rows of its batch see it."""
        part = copy.copy(self)
        part.rows = {name: torch.arange(len(self.rows[name]), device=self.rows[name].device)}
        part._spans, part._spaces, part._layouts = {}, {}, {}
        return part

    def logical_start(self, site: Site) -> int:
        """Position of the pass' first token in the site's space: a tower beside the text begins anew."""
        return self.start if self._sequential(site) and site.kind == "self" else 0

    def logical_end(self, site: Site, tokens: int) -> int:
        """Position after the last token of the site's space, which shows `tokens` of it."""
        return self.sequence.length if self._sequential(site) and tokens <= self.sequence.length else tokens

    def layouts(self, call: AttentionCall) -> tuple[Layout, Layout]:
        """Of queries and of keys."""
        site = call.site
        key = (
            site.name,
            call.q.shape[0],
            call.q.shape[2],
            call.k.shape[2],
        )  # a packed tower is called per picture
        if key not in self._layouts:
            tokens = call.q.shape[2] if call.keep is None else self.full(site)
            queries = self.layout_of(site, call.q.shape[0], tokens, call.q.device)
            keys = queries if site.kind == "self" else self._context(call)
            self._layouts[key] = (queries, keys)
        return self._layouts[key]

    def _context(self, call: AttentionCall) -> Layout:
        """Of the other sequence, keys that left included."""
        held = None if call.pos is None else self.held(getattr(call.site.module, "layer_idx", None), "cross")
        shape = call.k.shape[0], 0, call.k.shape[2] if held is None else held.seen, 0
        return self._space(f"{call.site.tower}.context", call.k.new_empty(shape), call.site)

    def span(self, rows: str, call: AttentionCall) -> Span:
        """Named rows of a call: `last` by sample, the others as the smallest slice that holds them."""
        queries = call.q.shape[2]
        if rows == "all" or (rows == "last" and queries == 1):
            return slice(0, queries)
        if rows == "last" and self._sequential(call.site):
            self.check_complete("asks for the prompt's last row")
        key = (rows, call.site.tower, queries, id(call.keep))
        if key not in self._spans:
            self._spans[key] = (
                self._last(call, queries) if rows == "last" else self._covering(rows, call, queries)
            )
        return self._spans[key]

    def _last(self, call: AttentionCall, queries: int) -> Span:
        """The last real row of each sample: a slice unless there is padding on the right."""
        added = self.appended(call.site)
        last = slice(added.start - 1, added.start) if added.stop else slice(queries - 1, queries)
        if (
            self.mask is None
            or not self._sequential(call.site)
            or (queries != self.tokens and call.keep is None)
        ):
            return last
        real = self.mask[:, -self.tokens :] != 0
        if call.keep is not None:
            real = real.gather(1, call.keep.clamp_min(0)) & (call.keep >= 0)
        if bool(real[:, -1].all()):
            return last
        index = torch.arange(queries, device=real.device).expand_as(real)
        return torch.where(real, index, 0).amax(1, keepdim=True).to(call.q.device)

    def _covering(self, rows: str, call: AttentionCall, queries: int) -> Span:
        found = call.queries(rows).any(0).nonzero()[:, 0]
        return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)

    def held(self, index: int | None, kind: str = "self") -> TrackedLayer | None:
        """A layer of the cache, or with "cross" what it holds of another sequence."""
        layers = self.run.runtime.host.cache_layers(self.run.cache, kind)
        return layers[index] if index is not None and index < len(layers) else None

    def removal(self, site: Site) -> Removal | None:
        """Of the running layer, which gradient checkpointing may run for the second time."""
        if not self.removals and not self.removals_at:
            return None
        if self.run.runtime.recomputing and not self.rewound:
            return self.removals_at.get((site.tower, site.index), (None, None))[1]
        return self.removals.get(site.tower)

    def rewind(self, site: Site) -> None:
        """Back to what had left before a layer, where gradient checkpointing runs all of it again."""
        self.rewound = True
        before = self.removals_at.get((site.tower, site.index), (None, None))[0]
        if before is None:
            self.removals.pop(site.tower, None)
        else:
            self.removals[site.tower] = before

    def full(self, site: Site) -> int:
        """How many tokens the tower was given."""
        removal = self.removal(site)
        assert removal is not None
        return removal.full

    def places(self, site: Site) -> Tensor | None:
        """Places of a self-attention's tokens (batch, tokens), -1 for what has none; None where all are there."""
        removal = self.removal(site) if site.kind == "self" else None
        return None if removal is None else removal.places

    def appended(self, site: Site) -> slice:
        """Where in the running layer the tokens stand that methods appended; (0, 0) where there are none."""
        removal = self.removal(site)
        return slice(0, 0) if removal is None or removal.appended is None else removal.behind

    def repairs(self, tower: str) -> bool:
        """Somebody reads the hidden states of every layer, which must have their full length."""
        inputs = self.tower_inputs.get(tower, self.inputs)
        return bool(inputs.get("output_hidden_states"))

    def leaving(self, site: Site) -> Tokens | None:
        """Placeholders whose features were taken out: they leave before the first layer."""
        if site.index != 0:
            return None
        self.run.check_features(site)
        removed = self.run.removed
        if removed is None or self.phase == "decode" or not self._sequential(site):
            return None
        at = self.start - (self.run.start or 0) if self.run.generating else 0
        removed = torch.nn.functional.pad(removed, (0, max(0, at + self.tokens - removed.shape[1])))
        removed = removed[:, at : at + self.tokens]
        if not bool(removed.any()):
            return None
        rows = self.sequence.rows // removed.shape[0]
        keep = ~removed.repeat_interleave(rows, 0)
        return Tokens(keep, positions="renumber" if self.run.renumbers else "keep")

    def layout_of(self, site: Site, batch: int, tokens: int, device: torch.device) -> Layout:
        """Of a tower's tokens, those that left included."""
        return self._space(site.tower, torch.empty(batch, 0, tokens, 0, device=device), site)

    def _sequential(self, site: Site) -> bool:
        return site.tower == self.run.runtime.host.main_tower

    def _space(self, name: str, states: Tensor, site: Site) -> Layout:
        if name == site.tower and self._sequential(site) and self.sequence.length:
            layout = self.sequence.layout()
            return layout if self.complete else replace(layout, ended=False)
        key = (name, states.shape[0], states.shape[2])
        if key not in self._spaces:
            self._spaces[key] = self.run.boxed(self.run.runtime.host.space(name, states, self), name, site)
        return self._spaces[key]


class Denoising(Pass):
    """One call of a denoiser: for all rows that the pipeline guides with, or for some.

    `i` counts the steps, of which there are `total`; a step may take several evaluations. `purpose` is sample,
    predict (asked for by `denoise`), branch, or forward (`run.forward`).
    """

    def __init__(
        self,
        run: Run,
        sequence: Sequence,
        inputs: Mapping[str, Any],
        *,
        t: Tensor,
        i: int,
        total: int,
        rows: dict[str, Tensor],
        context: Tensor | None,
        module: nn.Module,
        purpose: str = "sample",
    ) -> None:
        super().__init__(run, sequence, "denoise", inputs)
        self.t, self.i, self.total, self.purpose = t, i, total, purpose
        self.rows, self.module = rows, module
        self.context = context  # (batch, tokens, width) of the text, as the pipeline gave it
        self.text = 0 if context is None else context.shape[1]  # tokens of the text, those of `enter` too
        self.raw: dict[str, Tensor] = {}  # of this step: the predictions before guidance, by name

    def only(self, name: str) -> Self:
        part = super().only(name)
        if self.context is not None:
            part.context = self.context[self.rows[name]]
        return part

    def narrow(self, inputs: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        """For `enter`: the arguments with these rows alone. What is predicted for them stands for the others
        too. None where this call has no such rows: it is then left out."""
        if name not in self.rows:
            return None
        index = self.rows[name]
        batch = sum(len(rows) for rows in self.rows.values())
        part = self.only(name)
        self.rows, self.context = part.rows, part.context
        self._spans, self._spaces, self._layouts = {}, {}, {}
        return {key: rows_of(value, index, batch, key) for key, value in inputs.items()}

    def layouts(self, call: AttentionCall) -> tuple[Layout, Layout]:
        key = (call.site.name, call.q.shape[0], call.q.shape[2], call.k.shape[2])
        if key not in self._layouts:
            self._layouts[key] = self.run.runtime.host.denoising_layouts(self, call)
        return self._layouts[key]

    @property
    def words(self) -> list[list[Word]]:
        """By row, the words of its text and the tokens that they are made of."""
        sampling = self.run.sampling
        if sampling is None or self.context is None or not sampling.reads:
            raise InputError(
                "No text encoder was asked: the words are not known.", "give the pipeline prompts"
            )
        return sampling.words(self.context, self.rows)

    def grid(self, tokens: int) -> tuple[int, ...] | None:
        """Rows and columns, of a clip frames before them, in which that many tokens of the latents stand."""
        return self.run.runtime.host.grid(self, tokens)


def rows_of(value: Any, index: Tensor, batch: int, name: str = "") -> Any:
    """Rows of an argument of the denoiser, where it has a batch; dictionaries and lists of them too."""
    if isinstance(value, Tensor):
        batched = value.ndim and value.shape[0] == batch and name not in UNBATCHED
        return value[index.to(value.device)] if batched else value
    if isinstance(value, dict):
        return {key: rows_of(v, index, batch, key) for key, v in value.items()}
    if isinstance(value, list | tuple) and name not in UNBATCHED:
        return type(value)([rows_of(v, index, batch) for v in value])
    return value


class HiddenCall:
    """Hidden states at one site in one pass."""

    def __init__(self, site: Site, pass_: Pass) -> None:
        self.site, self.pass_ = site, pass_
        self.run, self.phase = pass_.run, pass_.phase

    @property
    def state(self) -> dict[str, Any]:
        """As `AttentionCall.state`."""
        return self.pass_.sequence.state_of(self.run.method)

    @property
    def start(self) -> int:
        """Logical position of the first of the states, in the main sequence."""
        return self.pass_.start

    @property
    def appended(self) -> slice:
        """Which of the states are tokens that methods appended."""
        return self.pass_.appended(self.site)

    def rows(self, name: str, h: Tensor) -> Tensor:
        """Which of the states are tokens of a kind or segment: (batch, tokens, 1), bool."""
        removal = self.pass_.removal(self.site)
        tokens = h.shape[1] if removal is None else removal.full
        mask = self.pass_.layout_of(self.site, h.shape[0], tokens, h.device).where(name)[:, -tokens:]
        if removal is not None:
            mask = mask.gather(1, removal.places.clamp_min(0)) & (removal.places >= 0)
        return mask[:, :, None]

    def by_sample(self, t: Tensor) -> Tensor:
        """Values of the caller's samples (samples, ...) for the rows of the states, beams and all."""
        sample = self.pass_.sequence.sample
        return t if sample is None else t.index_select(0, sample.to(t.device))

    def last(self, h: Tensor) -> Tensor:
        """The state of each row's last real token: (batch, width)."""
        if h.shape[1] == 1:
            return h[:, 0]
        index = torch.arange(h.shape[1], device=h.device)
        last = torch.where(self.rows("all", h)[..., 0], index, 0).amax(1)
        return h[torch.arange(h.shape[0], device=h.device), last]

    def spread(self, mask: Tensor) -> Tensor:
        """A mask over the states (batch, tokens) as one over the tokens of the pass, False where one left."""
        removal = self.pass_.removal(self.site)
        return mask if removal is None else removal.spread(mask)
