"""Standing around a layer, so that other tokens go in than came."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.core.cache import TrackedLayer
from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.core.passes import Pass
from saccade.core.seams.wrap import wrap
from saccade.core.site import Site
from saccade.core.tokens import Removal, Tokens, TokensCall, dense_rank, gather_tokens
from saccade.models.towers import BY_TOKEN

if TYPE_CHECKING:
    from saccade.core.runtime import Runtime


class Peeked(Exception):
    """Carries the attention call out of a layer that was only asked for it."""

    def __init__(self, call: AttentionCall) -> None:
        self.call = call


class Rotary:
    """What a rotary module was given in this pass, and what it made of it."""

    def __init__(self, at: Callable[[Tensor], Any], ids: Tensor, out: Any) -> None:
        self.at, self.ids, self.out = at, ids, out  # `at(other ids)` is what it would have made of those


def install(site: Site, runtime: Runtime) -> Callable[[], None]:
    names = tuple(inspect.signature(site.module.forward).parameters)
    inside = [s for s in runtime.host.sites if s.seam == "interface" and s.path.startswith(f"{site.path}.")]
    crosses = bool(inside) and all(s.kind == "cross" for s in inside)
    around = functools.partial(_around, site, runtime, names, bool(inside), crosses)
    return wrap(site.module, "forward", around, outermost=True)


def install_rotary(module: nn.Module, runtime: Runtime) -> Callable[[], None]:
    """Remember what rotary modules are called with, so that positions can be renumbered."""

    def around(
        forward: Callable[..., Any], x: Tensor, position_ids: Tensor, *rest: Any, **options: Any
    ) -> Any:
        out = forward(x, position_ids, *rest, **options)
        at = functools.partial(_rotate, forward, x, rest, options)
        runtime.current().rotaries.append(Rotary(at, position_ids, out))
        return out

    return wrap(module, "forward", around)


def _rotate(
    forward: Callable[..., Any], x: Tensor, rest: tuple[Any, ...], options: dict[str, Any], ids: Tensor
) -> Any:
    return forward(x, ids, *rest, **options)


def deepstack(
    runtime: Runtime, add: Callable[..., Tensor], h: Tensor, visual: Tensor, embeds: Tensor
) -> Tensor:
    """Features that a model adds to its first layers' visual tokens, for those tokens that are left."""
    removal = runtime.current().removals.get("text")
    if removal is None or removal.whole:
        return add(h, visual, embeds)
    own = visual.flatten().long().cumsum(0).view_as(visual) - 1  # which of the embeds a token has
    keep = removal.keep.clamp_min(0)
    left = visual.gather(1, keep) & (removal.keep >= 0)
    return add(h, left, embeds[own.gather(1, keep)[left]])


def _around(
    site: Site,
    runtime: Runtime,
    names: tuple[str, ...],
    masks: bool,
    crosses: bool,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    pass_ = runtime.current()
    plan = pass_.plans.get(site)
    methods = [m for m in (plan.tokens if plan else ()) if pass_.phase in m.phases]
    if runtime.recomputing:
        pass_.rewind(site)
    elif site.index == 0:  # a tower may run for the second time in a pass
        pass_.removals.pop(site.tower, None)
    before = pass_.removals.get(site.tower)
    inputs = {**dict(zip(names, args)), **kwargs}
    held = None if crosses else _cache_layer(site, inputs)
    fresh = pass_.leaving(site)
    if not methods and before is None and fresh is None and (held is None or held.shift is None):
        return forward(*args, **kwargs)

    h: Tensor = inputs[names[0]]
    repairs = pass_.repairs(site.tower)
    if before is not None and repairs:
        h = gather_tokens(h, before.keep, 1)
    if before is not None and h.shape[1] != before.keep.shape[1]:
        raise InputError(
            f"{site.name} is given {h.shape[1]} tokens where {before.keep.shape[1]} are left: from there on the model "
            "reads only the tokens whose logits are asked for.",
            "evict from the cache instead, or call the model without logits_to_keep",
        )
    step = _Step(site, pass_, before, h, inputs, held, masks)
    if fresh is not None:
        step.take(fresh)
    for method in methods:
        pass_.run.method = method
        call = TokensCall(site, pass_, step.h, functools.partial(step.peek, forward, names[0]))
        answer = method.tokens(call)
        if answer is not None:
            _refuse_rows_of_all(site, h, inputs, answer)
            step.take(answer)
    pass_.removals_at[site.tower, site.index] = before, step.removal
    given = step.inputs(names[0], caching=True)
    out = forward(given.pop(names[0]), **given)  # gradient checkpointing wants its input by position
    states = step.set_aside(out[0] if isinstance(out, tuple) else out)
    if step.once:
        states = step.put_back(states)
    removal = pass_.removals.get(site.tower)
    if removal is not None:
        removal.whole = repairs or site.index == site.depth - 1
        states = removal.scatter(states) if removal.whole else states
    return (states, *out[1:]) if isinstance(out, tuple) else states


def _refuse_rows_of_all(site: Site, h: Tensor, inputs: dict[str, Any], tokens: Tokens) -> None:
    if h.ndim != 3 or (h.shape[0] == 1 and _packed(inputs)):
        none = "from which none can leave" if tokens.append is None else "which none can join"
        raise InputError(
            f"{site.name} keeps its tokens in a grid, or those of all pictures in one row, {none}.",
            "take tokens out behind the tower (the features event), or in the text tower",
        )


class _Step:
    """One layer's share of a removal."""

    def __init__(
        self,
        site: Site,
        pass_: Pass,
        before: Removal | None,
        h: Tensor,
        inputs: dict[str, Any],
        held: TrackedLayer | None,
        masks: bool,
    ) -> None:
        self.site, self.pass_, self.before, self.given, self.held = site, pass_, before, inputs, held
        self.masks = masks  # its attention can be given a mask, for rows that keep fewer than others
        self.whole = self.h = h  # what goes on above, and what goes in
        self.here: Tensor | None = None  # (batch, left) places in `whole`, where they are not the same

    def take(self, tokens: Tokens) -> None:
        batch, left = self.h.shape[:2]
        keep = tokens.index(batch, left, empty=self.held is not None and not self.pass_.complete).to(
            self.h.device
        )
        if not self.masks and bool((keep < 0).any()):
            raise InputError(
                f"At {self.site.name} each sample keeps another number of tokens, which its attention cannot mask.",
                "keep as many in every sample",
            )
        if tokens.values is not None and tokens.values.shape[:2] != keep.shape:
            raise InputError(
                f"Values {tuple(tokens.values.shape)} were given for {tuple(keep.shape)} tokens that stay.",
                "give one of each, in their order",
            )
        if tokens.append is not None:
            self._append(tokens)
        if tokens.keep is None and tokens.values is None:
            return
        here, removal = self.here, self._further(self.removal, self.h.shape[1], keep, tokens.positions)
        self.h = gather_tokens(self.h, keep, 1) if tokens.values is None else tokens.values.to(self.h.dtype)
        if tokens.only_this_layer:
            self.here = keep if here is None else torch.where(keep < 0, -1, here.gather(1, keep.clamp_min(0)))
        elif here is None:
            self.whole, self.before = self.h, removal
        else:
            self._leave_too(here, keep, tokens.positions)
        self.pass_.removals[self.site.tower] = removal

    def _append(self, tokens: Tokens) -> None:
        assert tokens.append is not None
        if tokens.only_this_layer:
            raise InputError(
                f"Tokens were appended before {self.site.name} for this layer only, and they stay until the last.",
                "leave only_this_layer out",
            )
        if self.site.tower == "text" or self.given.get("position_embeddings") is not None:
            raise InputError(
                f"{self.site.name} counts its tokens by their positions, and those that are appended have none.",
                "append them in a tower that learned its positions and reads both ways, such as CLIP's, SigLIP's or "
                "DINOv2's",
            )
        batch, left, width = self.h.shape
        new = tokens.append.to(self.h)
        if new.ndim not in (2, 3) or new.shape[-1] != width or new.shape[:-2] not in ((), (batch,)):
            raise InputError(
                f"Tokens {tuple(new.shape)} were appended to {tuple(self.h.shape)}.",
                f"give (tokens, {width}) or ({batch}, tokens, {width})",
            )
        new = new.expand(batch, -1, -1)

        def joined(old: Removal | None, left: int) -> Removal:
            old = old or Removal(torch.arange(left, device=new.device).expand(batch, -1), left)
            return old.holding(new if old.appended is None else torch.cat([old.appended, new], 1))

        self.pass_.removals[self.site.tower] = joined(self.removal, left)
        self.before = joined(self.before, self.whole.shape[1])

    def set_aside(self, states: Tensor) -> Tensor:
        """What the layer made of the tower's own tokens; the appended ones wait for the next layer."""
        removal = self.removal
        if removal is None or removal.appended is None:
            return states
        appended = states[:, removal.behind]
        self.pass_.removals[self.site.tower] = removal.holding(appended)
        self.before = None if self.before is None else self.before.holding(appended)
        return states[:, : removal.behind.start]

    @property
    def removal(self) -> Removal | None:
        return self.pass_.removals.get(self.site.tower)

    @property
    def once(self) -> bool:
        """Some tokens left for this layer only."""
        return self.here is not None

    def _leave_too(self, here: Tensor, keep: Tensor, positions: str) -> None:
        """Tokens that leave for good, when others have left for this layer only."""
        stay = torch.ones(self.whole.shape[:2], dtype=torch.bool, device=keep.device)
        left = torch.zeros_like(here, dtype=torch.bool)
        rows, columns = (keep >= 0).nonzero(as_tuple=True)
        left[rows, keep[rows, columns]] = True
        rows, columns = ((here >= 0) & ~left).nonzero(as_tuple=True)
        stay[rows, here[rows, columns]] = False
        index = Tokens(stay).index(*stay.shape)
        self.before = self._further(self.before, stay.shape[1], index, positions)
        self.whole = gather_tokens(self.whole, index, 1)
        place = stay.cumsum(1) - 1 + (index < 0).sum(1, keepdim=True)
        here = torch.where(keep < 0, -1, here.gather(1, keep.clamp_min(0)))
        self.here = torch.where(here < 0, -1, place.gather(1, here.clamp_min(0)))

    def _further(self, old: Removal | None, tokens: int, keep: Tensor, positions: str) -> Removal:
        new = Removal(keep, tokens) if old is None else old.further(keep)
        if positions == "renumber":
            self._renumber(old, new)
        return new

    def _renumber(self, old: Removal | None, new: Removal) -> None:
        """Close up the positions; what follows moves up by as much, in this layer and those above."""
        rotary = self._rotary()
        if rotary is None:
            raise InputError(
                f"{self.site.name} has no rotary positions that could be numbered anew.",
                "keep positions as they are (positions='keep')",
            )
        shared = [
            s.name
            for s in self.pass_.run.runtime.host.sites
            if getattr(s.module, "is_kv_shared_layer", False)
        ]
        if shared:
            raise InputError(
                f"{shared[0]} reads the keys of another layer, which were rotated as they stood.",
                "keep positions as they are (positions='keep')",
            )
        before, there = self._ids(rotary), None
        if old is not None:
            before, there = gather_tokens(before, old.keep, -1) if old.ids is None else old.ids, old.keep >= 0
        if (
            before.ndim == 3
            and self.pass_.phase == "extend"
            and bool((before[:, :, 0] != before[0, :, 0]).any())
        ):
            raise InputError(
                "A picture came in two chunks, and its positions can close up only as a whole.",
                "generate without prefill_chunk_size, or keep positions as they are (positions='keep')",
            )
        there = (
            torch.ones_like(before if before.ndim == 2 else before[0], dtype=torch.bool)
            if there is None
            else there
        )
        ids = new.ids if new.ids is not None else gather_tokens(self._ids(rotary), new.keep, -1)
        new.ids, gap = dense_rank(ids, new.keep >= 0, before, there)
        new.shift = gap if new.shift is None else new.shift + gap

    def _ids(self, rotary: Rotary) -> Tensor:
        """The model's positions, moved up by what left in earlier passes."""
        ids = rotary.ids.expand(*rotary.ids.shape[:-2], self.h.shape[0], -1)
        return ids if self.held is None or self.held.shift is None else ids - self.held.shift[:, None]

    def _rotary(self) -> Rotary | None:
        embeddings = self.given.get("position_embeddings")
        return next((r for r in self.pass_.rotaries if r.out is embeddings or _same(r.out, embeddings)), None)

    def inputs(self, first: str, *, caching: bool) -> dict[str, Any]:
        """The layer's arguments for the tokens that are left."""
        inputs = {**self.given, first: self.h}
        removal = self.removal
        if removal is not None and removal.appended is not None:
            inputs[first] = torch.cat([self.h, removal.appended], 1)
        shift = None if self.held is None else self.held.shift
        keep = None if removal is None else removal.keep
        embeddings = inputs.get("position_embeddings")
        if embeddings is not None:
            rotary = (
                self._rotary()
                if shift is not None or (removal is not None and removal.ids is not None)
                else None
            )
            if rotary is not None:
                ids = self._ids(rotary)
                if removal is not None:
                    ids = removal.ids if removal.ids is not None else gather_tokens(ids, removal.keep, -1)
                inputs["position_embeddings"] = rotary.at(ids)
            elif removal is not None and keep is not None:
                whole = isinstance(embeddings, Tensor)  # of complex numbers
                parts = [
                    _gather_patches(t, keep, removal.full) for t in ((embeddings,) if whole else embeddings)
                ]
                inputs["position_embeddings"] = parts[0] if whole else tuple(parts)
        if keep is not None and isinstance(inputs.get("position_ids"), Tensor):
            inputs["position_ids"] = gather_tokens(inputs["position_ids"], keep, -1)
        for name in BY_TOKEN:
            if keep is not None and isinstance(value := inputs.get(name), Tensor):
                between = value.ndim == 4
                left = gather_tokens(value[:, 0] if between else value, keep, 1)
                inputs[name] = left[:, None] if between else left
        if removal is not None and self.held is not None and caching:
            self.held.incoming = (removal.full, removal.keep)
            if removal.shift is not None:
                self.held.shift = removal.shift if shift is None else shift + removal.shift
        return inputs

    def peek(self, forward: Callable[..., Any], first: str, *, rotated: bool = True) -> AttentionCall:
        """The coming attention call, without touching the cache."""
        inputs = self.inputs(first, caching=False)
        if not rotated:
            rotary = self._rotary()
            if rotary is None:
                raise InputError(
                    f"{self.site.name} has no rotary positions that could be left out.",
                    "use a model with rotary positions, such as Llama or Qwen",
                )
            ids = self._ids(rotary)
            inputs["position_embeddings"] = rotary.at(ids.new_zeros(*ids.shape[:-1], self.h.shape[1]))
        cached = inputs.pop("past_key_values", None)
        self.pass_.peeking = (self.held,) if cached is not None else (None,)
        try:
            forward(**inputs)
        except Peeked as peeked:
            return peeked.call
        finally:
            self.pass_.peeking = None
        raise InputError(
            f"{self.site.name} makes no attention call that could be seen ahead.", "use another layer"
        )

    def put_back(self, states: Tensor) -> Tensor:
        """Tokens that left for this layer only come back as they were before it."""
        assert self.here is not None
        rows, columns = (self.here >= 0).nonzero(as_tuple=True)
        whole = self.whole.clone()
        whole[rows, self.here[rows, columns]] = states[rows, columns]
        if self.before is None:
            del self.pass_.removals[self.site.tower]
        else:
            self.pass_.removals[self.site.tower] = self.before
        return whole


def _gather_patches(t: Tensor, keep: Tensor, full: int) -> Tensor:
    """Rotations of the tokens that are left. Some towers have none for the tokens before the patches, some the
    same for all samples, some a dimension of heads behind the tokens."""
    if t.ndim == 4 and t.shape[-2] != full:
        return gather_tokens(t, keep, -3)
    ahead = full - t.shape[-2]
    if not bool((keep[:, :ahead] == torch.arange(ahead, device=keep.device)).all()):
        raise InputError(
            f"The first {ahead} tokens are no patches and have no place, and some of them would leave.",
            f"let the first {ahead} stay",
        )
    left = keep[:, ahead:] - ahead
    return gather_tokens(t[None], left, -2)[:, None] if t.ndim == 2 else gather_tokens(t, left, -2)


def _cache_layer(site: Site, inputs: dict[str, Any]) -> TrackedLayer | None:
    cache = inputs.get("past_key_values")
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", ())
    index = site.index
    if index is None or index >= len(layers) or not isinstance(layers[index], TrackedLayer):
        return None
    return layers[index]


def _packed(inputs: dict[str, Any]) -> bool:
    """Rotations of tokens that belong to no row."""
    embeddings = inputs.get("position_embeddings")
    return isinstance(embeddings, tuple) and embeddings[0].ndim == 2


def _same(a: Any, b: Any) -> bool:
    return (
        isinstance(a, tuple)
        and isinstance(b, tuple)
        and len(a) == len(b)
        and all(x is y for x, y in zip(a, b))
    )
