"""Hugging Face models as hosts: the interface seam, inputs, image features, caches."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saccade.core.branch import Open, pad_left
from saccade.core.cache import TrackedLayer, fit_mask, new_cache, refuse_paged, track
from saccade.core.call import AttentionCall
from saccade.core.errors import AttachError, InputError
from saccade.core.plan import by_distance, evict, execute, execute_groups
from saccade.core.seams import private
from saccade.core.seams.plain import PlainHost
from saccade.core.seams.tokens import Peeked
from saccade.core.seams.wrap import wrap
from saccade.core.site import Site
from saccade.core.state import Sequence, Vocabulary
from saccade.models.towers import BY_SAMPLE, PLACEHOLDERS, SPECIAL_IDS, TRANSIENT

if TYPE_CHECKING:
    from saccade.core.layout import Layout
    from saccade.core.passes import Pass, Run
    from saccade.core.runtime import Runtime

PREFIX = "saccade:"  # before the native name, which some families look for


# ---- the interface seam -------------------------------------------------------------------------------


class _Hook:
    """What the attention function needs to know of the module that calls it."""

    def __init__(
        self, site: Site, runtime: Runtime, native: Callable[..., Any], config: Any, name: str
    ) -> None:
        self.site, self.runtime, self.native = site, runtime, native
        self.config, self.native_name = config, name
        self.shares = shares(site.module)
        self.cached = site.tower == runtime.host.main_tower

    @functools.cached_property
    def owner(self) -> int | None:
        return owner(self.site.module)


def install(site: Site, runtime: Runtime) -> Callable[[], None]:
    """Give the module a shallow copy of its config that names our attention function.

    Masks are made from the model's own config and stay right.
    """
    module: Any = site.module
    config = module.config
    native_name = config._attn_implementation or "eager"
    if native_name.startswith(PREFIX):
        raise AttachError(
            f"{site.path} is attached already, through another object that contains it.",
            "attach to the same object, or detach the other session first",
        )
    name = PREFIX + native_name
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, _attention)
    native = ALL_ATTENTION_FUNCTIONS.get_interface(native_name, _eager(module))
    shadow = copy.copy(config)
    shadow.__dict__["_attn_implementation_internal"] = name
    module.config = shadow
    module._saccade = _Hook(site, runtime, native, config, native_name)
    unwrap = wrap(module, "compute_bias", _of_all_keys) if by_distance(module) else None

    def undo() -> None:
        if unwrap is not None:
            unwrap()
        if module.config is shadow:
            module.config = config
        del module._saccade

    return undo


def _of_all_keys(
    compute: Callable[..., Tensor],
    query_length: int,
    key_length: int,
    *,
    past_seen_tokens: Any = 0,
    **options: Any,
) -> Tensor:
    """A term for every distance (1, heads, queries, keys), for the keys that left too."""
    if isinstance(past_seen_tokens, int):  # else the cache is static, and nothing leaves
        key_length = max(key_length, past_seen_tokens + query_length)
    return compute(query_length, key_length, past_seen_tokens=past_seen_tokens, **options)


def _eager(module: nn.Module) -> Callable[..., Any] | None:
    """The module's own function for `eager`: the one whose name its code hands to the interface."""
    for base in type(module).__mro__:
        for value in vars(base).values():
            function = inspect.unwrap(value) if inspect.isfunction(value) else None
            for name in function.__code__.co_names if function else ():
                if "eager" in name and "attention" in name and name in function.__globals__:  # type: ignore[union-attr]
                    return function.__globals__[name]  # type: ignore[union-attr]
    return None


def unfolding(module: nn.Module) -> nn.Module | None:
    """The linear map that unfolds all that a cache of latents holds, in every pass."""
    return getattr(module, "kv_b_proj", None) if hasattr(module, "expand_kv") else None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    hook: _Hook = module._saccade
    site, pass_ = hook.site, hook.runtime.current()
    plan = pass_.plans.get(site)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    held = pos = keep = None
    if pass_.tracked or pass_.removal(site) is not None:
        held, pos, keep, attention_mask = _present(hook, pass_, query, key, attention_mask, causal)
        if pass_.peeking is not None and pass_.peeking[0] is not None and pass_.peeking[0].seen:
            ahead = pass_.peeking[0]
            held_keys, held_values = ahead.keys, ahead.values
            if hasattr(module, "expand_kv"):  # the cache holds a latent
                held_keys, held_values = module.expand_kv(held_keys, held_values)
            key, value = torch.cat([held_keys, key], 2), torch.cat([held_values, value], 2)
    if pass_.tracked and kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = _distances(kwargs["position_bias"], site, key, pos)
    groups = pass_.groups
    unwanted = plan is None if groups is None else not any(p.plans.get(site) for _, p, _ in groups)
    eager = hook.native_name == "eager"
    if unwanted and pass_.peeking is None and (groups is None or not eager):
        return hook.native(module, query, key, value, attention_mask, **kwargs)
    call = AttentionCall(
        site,
        query,
        key,
        value,
        attention_mask,
        scale=kwargs.get("scaling"),
        causal=causal,
        operator=_native,
        pass_=pass_,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        position_bias=kwargs.get("position_bias"),
        window=kwargs.get("sliding_window"),
        segments=kwargs.get("cu_seq_lens_q"),
        options=kwargs,
        pos=pos,
        keep=keep,
    )
    if pass_.peeking is not None:
        raise Peeked(call)
    call.keeps_weights = eager
    if groups is not None:
        out = execute_groups(call, groups, None if hook.shares else held)
        return out.transpose(1, 2).contiguous(), call.returned_weights
    assert plan is not None
    out = execute(call, plan).transpose(1, 2).contiguous()
    if plan.evict and not hook.shares:  # else its owner does
        evict(call, plan, held)
    if call.keeps_weights and plan.edits:
        return out, call.weights().to(query.dtype)
    return out, call.returned_weights


def _present(
    hook: _Hook, pass_: Pass, query: Tensor, key: Tensor, mask: Any, causal: bool
) -> tuple[TrackedLayer | None, Tensor | None, Tensor | None, Any]:
    """The site's cache layer, the positions of its keys, the rows' places, and a mask that fits them."""
    removal = pass_.removal(hook.site)
    keep = None if removal is None else removal.places
    held = pass_.held(hook.owner, hook.site.kind) if pass_.tracked and hook.cached else None
    if hook.site.kind != "self":
        if keep is not None and mask is not None and mask.ndim == 4:
            rows = keep.clamp_min(0)[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            mask = mask.expand(keep.shape[0], -1, -1, -1).gather(2, rows)
        return held, *_crossed(hook, pass_, held, query, key, keep, mask)
    full = query.shape[2] if removal is None else removal.full
    if held is None:
        pos, start, ragged = None, 0, False
    elif pass_.peeking is None or hook.shares:
        pos, start, ragged = held.call_pos, held.seen - full, held.ragged
    else:
        pos, start = _positions_ahead(held, key, keep), held.seen
        ragged = held.ragged or (keep is not None and bool((keep < 0).any()))
    if pos is None and keep is None:  # nothing is missing
        return held, None, None, mask
    added = 0 if removal is None else query.shape[2] - removal.behind.start
    mask = fit_mask(
        mask,
        queries=query.shape[2] - added,
        groups=query.shape[1] // key.shape[1],
        keep=None if removal is None else removal.keep,
        pos=pos,
        start=start,
        ragged=ragged,
        causal=causal,
        dtype=query.dtype,
        padding_only="flash" in hook.native_name,
    )
    mask = _with_appended(mask, added)
    if pos is None and keep is not None:
        pos = torch.where(keep < 0, -1, keep + (pass_.logical_start(hook.site) if held is None else 0))
    return held, pos, keep, mask


def _crossed(
    hook: _Hook,
    pass_: Pass,
    held: TrackedLayer | None,
    query: Tensor,
    key: Tensor,
    keep: Tensor | None,
    mask: Any,
) -> tuple[Tensor | None, Tensor | None, Any]:
    """As `_present`, of another sequence, whose entries come once and stay in their places."""
    if held is None:
        return None, keep, mask
    own = pass_.held(hook.owner)
    if own is not None and own is not held:
        own.beside = held
    if held.pos is None:
        return None, keep, mask
    given = mask is not None
    mask = fit_mask(
        mask,
        queries=query.shape[2],
        groups=query.shape[1] // key.shape[1],
        keep=None,
        pos=held.pos,
        start=0,
        ragged=held.ragged,
        causal=False,
        dtype=query.dtype,
        padding_only="flash" in hook.native_name,
    )
    if mask is not None and not given and hook.native_name == "eager":  # which adds it
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return held.pos, keep, mask


def _distances(bias: Tensor, site: Site, key: Tensor, pos: Tensor | None) -> Tensor:
    """A term for every distance (1, heads, queries, keys), for the keys that are left. To another sequence there is
    no distance: there it is 0, made for the entries of the first layer."""
    if site.kind == "cross":
        return bias.new_zeros(*bias.shape[:3], key.shape[2])
    if pos is None:
        return bias
    pos = pos[:, None] if pos.ndim == 2 else pos
    index = pos.clamp_min(0)[:, :, None, :].expand(-1, *bias.shape[1:3], -1)
    return bias.expand(index.shape[0], -1, -1, -1).gather(3, index)


def _with_appended(mask: Tensor | None, added: int) -> Tensor | None:
    """The mask with tokens behind the last that all see, and that see what the last sees."""
    if mask is None or not added:
        return mask
    if mask.ndim == 2:
        return torch.nn.functional.pad(mask, (0, added), value=1)
    mask = torch.cat([mask, mask[:, :, -1:].expand(-1, -1, added, -1)], 2)
    return torch.nn.functional.pad(mask, (0, added), value=mask.dtype == torch.bool)


def shares(module: Any) -> bool:
    """Whether it reads the keys and values of an earlier layer."""
    return bool(getattr(module, "is_kv_shared_layer", False))


def owner(module: Any) -> int | None:
    """The layer of the cache that an attention module reads: its own, or the last of its type that has one."""
    if not shares(module):
        return getattr(module, "layer_idx", None)
    if getattr(module, "kv_shared_layer_index", None) is not None:
        return int(module.kv_shared_layer_index)
    kinds = module.config.layer_types[: len(module.config.layer_types) - module.config.num_kv_shared_layers]
    return len(kinds) - 1 - kinds[::-1].index(module.layer_type)


def _positions_ahead(held: TrackedLayer, key: Tensor, keep: Tensor | None) -> Tensor | None:
    """Positions as they would be behind what the cache holds; None where none is missing."""
    if not held.seen or (held.pos is None and keep is None):
        return None
    fresh = torch.arange(key.shape[2], device=key.device).expand(key.shape[0], -1) if keep is None else keep
    fresh = torch.where(fresh < 0, -1, fresh + held.seen)
    old = held.positions()
    fresh = fresh if old.ndim == 2 else fresh[:, None].expand(-1, old.shape[1], -1)
    return torch.cat([old, fresh], -1)


def _native(call: AttentionCall) -> Tensor:
    hook: _Hook = call.site.module._saccade  # type: ignore[assignment]
    options: dict[str, Any] = call.options or {}
    if hook.native_name == "flex_attention" and isinstance(call.mask, Tensor):
        raise InputError(
            f"{call.site.name}: flex attention as the library calls it takes no bias of every head.",
            "load the model with attn_implementation='sdpa'",
        )
    if call.mask is not None and not call.causal and options.get("is_causal"):
        options = {**options, "is_causal": False}
    out, call.returned_weights = hook.native(call.site.module, call.q, call.k, call.v, call.mask, **options)
    return out.transpose(1, 2)


# ---- the host -----------------------------------------------------------------------------------------


class TransformersHost(PlainHost):
    """What a `PreTrainedModel` says of itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        private.check()
        super().__init__(model)
        self.config = model.config
        self.text_config = model.config.get_text_config()
        self.encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self.vocabulary = _vocabulary(model.config, self.text_config)
        self.base = model.base_model
        self.by_sample = model.config.model_type in BY_SAMPLE
        self._configs = [(c, vars(c)["_attn_implementation_internal"]) for c in _configs(model)]

    def check(self) -> None:
        """Refuse a native implementation that was changed under us."""
        for config, name in self._configs:
            now = vars(config)["_attn_implementation_internal"]
            if now != name:
                for changed, before in self._configs:
                    changed._attn_implementation_internal = before
                raise AttachError(
                    f"set_attn_implementation({now!r}) was called while a session is attached; "
                    f"the model stays with {name!r}.",
                    "detach, change the implementation, and attach again",
                )

    def in_pieces(self, given: Mapping[str, Any]) -> bool:
        """Whether a prompt is read so. Refused where the library leaves its pictures out, as it does before 5.23."""
        version = transformers.__version__
        config = given.get("generation_config") or self.model.generation_config
        chunks = given.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
        seen = any("pixel" in name or name == "input_features" for name in self.prompt(given))
        if chunks and seen and not self.encoder_decoder and tuple(map(int, version.split(".")[:2])) < (5, 23):
            raise InputError(
                f"transformers {version} reads the chunks of a prompt without its pictures and sounds.",
                "generate without prefill_chunk_size, or pip install 'transformers>=5.23'",
            )
        return bool(chunks)

    def wraps(self) -> list[tuple[Any, str, str]]:
        """Methods of the library that the runtime stands around: (object, name, what it is)."""
        text = self.roots().get("text", self.base)
        found: list[tuple[Any, str, str]] = []
        if hasattr(self.model, "generate"):
            found.append((self.model, "generate", "generate"))
        if hasattr(self.model, "init_continuous_batching"):
            found.append((self.model, "init_continuous_batching", "paged"))
        if hasattr(text, "_deepstack_process"):
            found.append((text, "_deepstack_process", "deepstack"))
        for kind in ("image", "video"):
            owner = next((m for m in (self.base, self.model) if hasattr(m, f"get_{kind}_features")), None)
            if owner is not None:
                found.append((owner, f"get_{kind}_features", kind))
        return found

    # ---- reading what a forward is given ------------------------------------------------------------

    def prompt(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Of what `generate` was given, the arguments of a forward."""
        wanted = {
            name: value for name, value in inputs.items() if name in self.parameters and value is not None
        }
        first = inputs.get("inputs")
        if isinstance(first, Tensor):
            wanted.setdefault(str(self.model.main_input_name), first)
        wanted.pop("past_key_values", None)
        wanted.pop("use_cache", None)
        return wanted

    def ids(self, inputs: Mapping[str, Any]) -> tuple[Tensor | None, tuple[int, int] | None]:
        """Ids of the main sequence, and its (rows, tokens) where only embeddings are given."""
        prefix = "decoder_" if self.encoder_decoder else ""
        ids = inputs.get(f"{prefix}input_ids")
        if isinstance(ids, Tensor) and ids.ndim == 2:
            return ids, (ids.shape[0], ids.shape[1])
        embeds = inputs.get(f"{prefix}inputs_embeds")
        if isinstance(embeds, Tensor) and self.main_tower == "text":
            return None, (embeds.shape[0], embeds.shape[1])
        return None, None

    def mask(self, inputs: Mapping[str, Any], columns: int) -> Tensor | None:
        """(batch, columns so far), where one was given."""
        mask = inputs.get("decoder_attention_mask" if self.encoder_decoder else "attention_mask")
        return mask if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == columns else None

    def cache(self, inputs: Mapping[str, Any]) -> Cache | None:
        if type(inputs.get("cache")).__name__ == "PagedAttentionCache":  # of a manager that began before
            refuse_paged()
        cache = inputs.get("past_key_values")
        return cache if isinstance(cache, Cache) else None

    def cached_tokens(self, cache: Any) -> int:
        return int(cache.get_seq_length())

    def cache_of_output(self, output: Any) -> Cache | None:
        cache = getattr(output, "past_key_values", None)
        return cache if isinstance(cache, Cache) else None

    def sequence_of(self, cache: Any) -> Sequence | None:
        return getattr(cache, "_saccade_sequence", None)

    def follow(self, cache: Any, sequence: Sequence, branches: list[Open] | tuple[Open, ...] = ()) -> None:
        """Let the sequence and its branches share the cache's fate."""
        if not isinstance(cache, _Followed):
            cache.__class__ = _followed(type(cache))  # type: ignore[arg-type]
        cache._saccade_sequence = sequence
        cache._saccade_branches = branches

    def feature_layer(self) -> int:
        """As the configuration says, in places among the hidden states: embeddings first."""
        last = super().feature_layer()
        place = getattr(self.config, "vision_feature_layer", None)
        place = place[-1] if isinstance(place, list | tuple) else place
        if not isinstance(place, int):
            return last
        return last + 1 + place if place < 0 else place - 1

    def rotaries(self) -> list[nn.Module]:
        """Modules that turn positions of the text into rotations."""
        roots = self.roots()
        inside = {id(m) for site in self.sites if site.kind == "layer" for m in site.module.modules()}
        inside |= {id(m) for tower, root in roots.items() if tower != "text" for m in root.modules()}
        for root in (roots.get("text", self.model), self.model):  # they may stand beside the layers
            rotary = [
                m for m in root.modules() if "rotary" in type(m).__name__.lower() and id(m) not in inside
            ]
            if rotary:
                return rotary
        return []

    def unpack(self, output: Any) -> list[Tensor]:
        """Features (tokens, width) of every item in what `get_*_features` returned."""
        features = _features_of(output)
        return [features] if isinstance(features, Tensor) and features.ndim == 2 else list(features)

    def pack(self, output: Any, parts: list[Tensor]) -> Any:
        """The same, with other features."""
        old = _features_of(output)
        if isinstance(old, Tensor):
            new: Any = parts[0] if old.ndim == 2 else torch.stack(parts)
        else:
            new = type(old)(parts)
        if old is output:
            return new
        changed = copy.copy(output)
        setattr(changed, "pooler_output" if output.pooler_output is not None else "last_hidden_state", new)
        return changed

    # ---- caches that know their positions, and branches in them ------------------------------------------

    def track_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs with a cache that knows its positions, where the model would make one."""
        cache = inputs.get("past_key_values")
        if cache is None:
            uses = inputs.get("use_cache")
            if uses is False or (uses is None and not getattr(self.text_config, "use_cache", True)):
                return inputs
            if self.model.training or "past_key_values" not in self.parameters:
                return inputs
            cache = new_cache(self.text_config, self.encoder_decoder)
        if not isinstance(cache, Cache):
            raise InputError(
                f"A {type(cache).__name__} is no cache that tokens could leave.", "pass a DynamicCache"
            )
        return {**inputs, "past_key_values": track(cache)}

    def cache_layers(self, cache: Any, kind: str = "self") -> list[TrackedLayer]:
        return getattr(cache, f"{kind}_attention_cache", cache).layers if cache is not None else []

    @contextlib.contextmanager
    def attended(self, cache: Any, tracked: bool) -> Iterator[None]:
        """While a pass runs that knows, or does not, which entries are missing."""
        every = [*self.cache_layers(cache), *self.cache_layers(cache, "cross")]
        layers = list({id(layer): layer for layer in every if isinstance(layer, TrackedLayer)}.values())
        before = [layer.attended for layer in layers]
        for layer in layers:
            layer.attended = tracked
        try:
            yield
        finally:
            for layer, attended in zip(layers, before, strict=True):
                layer.attended = attended

    def last_position(self, run: Run) -> Tensor:
        """(rows,) position of the last token that a run has read, before positions were closed up."""
        pass_ = run.last
        assert pass_ is not None
        rows = pass_.sequence.rows
        if pass_.rotaries:
            ids = pass_.rotaries[0].ids[..., -1]
            return (ids.amax(0) if ids.ndim == 2 else ids).expand(rows)
        mask = torch.ones(rows, pass_.sequence.length, dtype=torch.long) if pass_.mask is None else pass_.mask
        return mask.sum(1) - 1

    def with_rows(
        self, inputs: Mapping[str, Any], branches: list[Open], pass_: Pass, moved: int
    ) -> dict[str, Any]:
        """One step's inputs with rows for every branch, which reads the same token at its own position."""
        ids = inputs["input_ids"]
        rows, times = ids.shape[0], 1 + len(branches)
        wide = {}
        for name, value in inputs.items():
            repeated = isinstance(value, Tensor) and value.ndim and value.shape[0] == rows
            wide[name] = torch.cat([value] * times) if repeated else value
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones(rows, pass_.sequence.length, dtype=torch.long, device=ids.device)
        columns = moved + mask.shape[1]
        wide["attention_mask"] = torch.cat(
            [pad_left(m, columns, 1) for m in (mask, *(b.mask.to(mask) for b in branches))]
        )
        if "position_ids" in self.parameters:
            mine = inputs.get("position_ids")
            if mine is None:
                mine = torch.full((rows, 1), pass_.start, device=ids.device)
            theirs = [(b.next - 1)[:, None].to(mine).expand(*mine.shape[:-2], -1, -1) for b in branches]
            wide["position_ids"] = torch.cat([mine, *theirs], mine.ndim - 2)
        return wide

    def positioned(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """With positions that do not count padding, as `generate()` gives them, where it matters: where they are
        learned."""
        mask = inputs.get("attention_mask")
        if (
            mask is None
            or self.rotaries()
            or "position_ids" not in self.parameters
            or "position_ids" in inputs
        ):
            return inputs
        return {**inputs, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}

    def extra(self, inputs: Mapping[str, Any], last_only: bool) -> dict[str, Any]:
        """Without a cache, unless one is given, and without a mask that masks nothing, for it costs a third."""
        inputs = dict(inputs)
        if "use_cache" in self.parameters and "past_key_values" not in inputs:
            inputs.setdefault("use_cache", False)
        if last_only and "logits_to_keep" in self.parameters:
            inputs["logits_to_keep"] = 1
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and self.main_tower == "text" and bool(mask.all()):
            del inputs["attention_mask"]
        return inputs

    def lack(self, need: str) -> str:
        if need == "branches":
            crossed = any(site.tower == "text" and site.kind == "cross" for site in self.sites)
            return (
                "it reads another sequence by cross-attention, which has no rows for them" if crossed else ""
            )
        if need == "features" and not any(what in ("image", "video") for _, _, what in self.wraps()):
            return "it has no get_image_features"
        if need not in ("image", "features"):
            return super().lack(need)
        if "image" not in self.vocabulary.placeholders:
            return "it takes no pictures among its words"
        if any(site.tower == "text" and site.kind == "cross" for site in self.sites):
            return "its pictures are seen by cross-attention, not as tokens of the text"
        return ""

    def transient(self) -> list[tuple[Any, str, Any]]:
        """State that the model keeps between calls: (object, name, value)."""
        return [
            (module, name, module.__dict__[name])
            for module in self.model.modules()
            for name in TRANSIENT
            if name in module.__dict__
        ]

    def without_images(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The same prompt without pictures and their placeholders, shorter rows padded on the left."""
        ids, _ = self.ids(inputs)
        if ids is None:
            raise InputError(
                "A prompt of inputs_embeds cannot be cleared of its pictures.",
                "pass input_ids and pixel_values",
            )
        visual = torch.zeros_like(ids, dtype=torch.bool)
        for kind in ("image", "video"):
            if kind in self.vocabulary.placeholders:
                visual |= ids == self.vocabulary.placeholders[kind]
        without = self.shortened(inputs, ~visual)
        return {
            name: without[name] for name in without if name == "attention_mask" or _by_token(inputs, name)
        }

    def shortened(self, inputs: Mapping[str, Any], keep: Tensor) -> dict[str, Any]:
        """The same prompt with these of its tokens alone (samples, tokens), shorter rows padded on the left."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        real = torch.ones_like(ids) if mask is None else mask
        keep = keep & (real != 0)
        length = int(keep.sum(1).max())
        order = (
            keep.long().sort(dim=1, stable=True).indices[:, -length:]
        )  # kept tokens to the right, in order
        kept = keep.gather(1, order)
        short = {name: value for name, value in inputs.items() if not name.startswith("position")}
        for name in [name for name in short if _by_token(inputs, name)]:
            short[name] = inputs[name].gather(1, order).where(kept, ids[:, -1:] if name == "input_ids" else 0)
        return {**short, "attention_mask": kept.to(real.dtype)}

    def beside(self, inputs: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        """Two prompts as one batch, the second shorter and padded on the left."""
        gap = inputs["input_ids"].shape[1] - other["input_ids"].shape[1]
        both = dict(inputs)
        for name, theirs in other.items():
            mine = inputs[name] if name in inputs else torch.ones_like(inputs["input_ids"])
            filler = theirs[:, -1:] if name == "input_ids" else torch.zeros_like(theirs[:, -1:])
            both[name] = torch.cat([mine, torch.cat([filler.expand(-1, gap), theirs], 1)])
        return both

    def space(self, name: str, states: Tensor, pass_: Pass) -> Layout:
        """What an encoder reads, with pictures among its words, is told by its ids."""
        mark, ids = self.vocabulary.placeholders.get("image"), pass_.run.inputs.get("input_ids")
        rows, tokens = states.shape[0], states.shape[2]
        encoded = self.encoder_decoder and name in ("encoder", "text.context")
        if not encoded or mark is None or not isinstance(ids, Tensor) or ids.shape[1] != tokens:
            return super().space(name, states, pass_)
        sequence, beams = Sequence(self.vocabulary), rows // ids.shape[0]
        ids = ids.repeat_interleave(beams, 0)
        sequence.extend(ids, (rows, tokens), ids.device, generated=False, samples=rows // beams)
        mask = pass_.run.inputs.get("attention_mask")
        sequence.pad(None if mask is None else mask.repeat_interleave(beams, 0))
        counts = (ids == mark).sum(1).tolist()
        boxes = pass_.run.boxes.get("image")
        if boxes is not None and len(boxes) * beams == sum(counts):
            parts = [part for part in boxes.split(counts[::beams]) for _ in range(beams)]
            sequence.add_items("image", [[count] for count in counts], parts)
        return sequence.layout()

    def kind_of(self, name: str, pass_: Pass) -> str:
        """What a space other than the main sequence is made of."""
        if name == "encoder" or name.endswith(".context"):
            inputs = pass_.inputs
            if "input_features" in inputs or name == "audio":
                return "audio"
            sees = "image" in self.vocabulary.placeholders or any(s.tower == "vision" for s in self.sites)
            return "image" if sees else "text"
        return super().kind_of(name, pass_)


def _by_token(inputs: Mapping[str, Any], name: str) -> bool:
    """Whether an argument has a number for every token of the prompt."""
    value = inputs[name]
    told = isinstance(value, Tensor) and value.shape == inputs["input_ids"].shape
    return told and not name.startswith(("pixel", "position"))


def _features_of(output: Any) -> Any:
    """Of a picture, in what `get_*_features` returned."""
    features = getattr(output, "pooler_output", output)
    return output.last_hidden_state if features is None else features


class _Followed:
    """A cache whose rows a sequence follows."""

    _saccade_sequence: Sequence
    _saccade_branches: tuple[Open, ...] | list[Open] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the cache that it was."""
        state = {name: value for name, value in self.__dict__.items() if not name.startswith("_saccade")}
        return _empty, (type(self).__mro__[2],), state

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        own: Any = getattr(self, "self_attention_cache", self)
        for layer in own.layers:
            if isinstance(layer, TrackedLayer):
                layer.check()
        return super().get_mask_sizes(*args, **kwargs)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> Any:
        inside = [branch for branch in self._saccade_branches if branch.cache is None]
        rows = beam_idx.numel()
        every = torch.cat([beam_idx + rows * group for group in range(1 + len(inside))])
        result = super().reorder_cache(every)  # type: ignore[misc]
        self._saccade_sequence.reorder(beam_idx)
        for branch in self._saccade_branches:
            branch.reorder(beam_idx)
        return result

    def batch_repeat_interleave(self, repeats: int) -> Any:
        result = super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        rows = self._saccade_sequence.rows
        self._saccade_sequence.reorder(torch.arange(rows).repeat_interleave(repeats))
        return result

    def batch_select_indices(self, indices: Tensor) -> Any:
        result = super().batch_select_indices(indices)  # type: ignore[misc]
        self._saccade_sequence.reorder(indices)
        return result

    def crop(self, *args: Any, **kwargs: Any) -> Any:
        result = super().crop(*args, **kwargs)  # type: ignore[misc]
        self._saccade_sequence.crop(int(self.get_seq_length()))  # type: ignore[attr-defined]
        return result


def _empty(cls: Any) -> Any:
    return cls.__new__(cls)


@functools.cache
def _followed(cls: type) -> type:
    return type(cls.__name__, (_Followed, cls), {"__module__": cls.__module__})


def _configs(model: PreTrainedModel) -> list[Any]:
    """Of the model and all that is in it."""
    own = (module.config for module in model.modules() if isinstance(module, PreTrainedModel))
    return list({id(config): config for config in own}.values())


def _vocabulary(config: Any, text_config: Any) -> Vocabulary:
    placeholders: dict[str, int] = {}
    for kind, names in PLACEHOLDERS.items():
        own = getattr(config, f"{kind if kind == 'audio' else 'vision'}_config", None)  # some keep it there
        found = next(
            (v for c in (config, own) for n in names if isinstance(v := getattr(c, n, None), int)), None
        )
        if found is not None and found not in placeholders.values():
            placeholders[kind] = found
    special: set[int] = set()
    for source in (config, text_config):
        for name in SPECIAL_IDS:
            value = getattr(source, name, None)
            special.update(
                v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)
            )
    return Vocabulary(placeholders, frozenset(special - set(placeholders.values())))
