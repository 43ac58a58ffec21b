"""Hugging Face models as hosts: the interface seam, inputs, image features, caches."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saccade.core.call import AttentionCall
from saccade.core.errors import AttachError, InputError
from saccade.core.plan import execute
from saccade.core.seams import private
from saccade.core.seams.plain import PlainHost
from saccade.core.site import Site
from saccade.core.state import Sequence, Vocabulary
from saccade.models.towers import PLACEHOLDERS, SPECIAL_IDS, TRANSIENT

if TYPE_CHECKING:
    from saccade.core.passes import Pass
    from saccade.core.session import Runtime

PREFIX = "saccade:"  # before the native name, which some families look for


# ---- the interface seam -------------------------------------------------------------------------------


class _Hook:
    """What the attention function needs to know of the module that calls it."""

    def __init__(self, site: Site, runtime: Runtime, native: Callable[..., Any], config: Any, name: str) -> None:
        self.site, self.runtime, self.native = site, runtime, native
        self.config, self.native_name = config, name


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

    def undo() -> None:
        if module.config is shadow:
            module.config = config
        del module._saccade

    return undo


def _eager(module: nn.Module) -> Callable[..., Any] | None:
    """The module's own function for `eager`: the one whose name its code hands to the interface."""
    for base in type(module).__mro__:
        for value in vars(base).values():
            function = inspect.unwrap(value) if inspect.isfunction(value) else None
            for name in function.__code__.co_names if function else ():
                if "eager" in name and "attention" in name and name in function.__globals__:  # type: ignore[union-attr]
                    return function.__globals__[name]  # type: ignore[union-attr]
    return None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    hook: _Hook = module._saccade
    pass_ = hook.runtime.current()
    plan = pass_.plans.get(hook.site)
    if plan is None:
        return hook.native(module, query, key, value, attention_mask, **kwargs)
    causal = kwargs.get("is_causal")
    call = AttentionCall(
        hook.site,
        query,
        key,
        value,
        attention_mask,
        scale=kwargs.get("scaling"),
        causal=getattr(module, "is_causal", True) if causal is None else causal,
        operator=_native,
        pass_=pass_,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        position_bias=kwargs.get("position_bias"),
        window=kwargs.get("sliding_window"),
        segments=kwargs.get("cu_seq_lens_q"),
        options=kwargs,
    )
    out = execute(call, plan)
    return out.transpose(1, 2).contiguous(), None


def _native(call: AttentionCall) -> Tensor:
    hook: _Hook = call.site.module._saccade  # type: ignore[assignment]
    options: dict[str, Any] = call.options or {}
    if call.mask is not None and not call.causal and options.get("is_causal"):
        options = {**options, "is_causal": False}
    out, _ = hook.native(call.site.module, call.q, call.k, call.v, call.mask, **options)
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

    def check(self) -> None:
        """Refuse a native implementation that was changed under us."""
        hooks = (getattr(site.module, "_saccade", None) for site in self.sites)
        for config, name in {id(h.config): (h.config, h.native_name) for h in hooks if h}.values():
            if config._attn_implementation != name:
                now = config._attn_implementation
                config._attn_implementation_internal = name
                raise AttachError(
                    f"set_attn_implementation({now!r}) was called while a session is attached; "
                    f"the model stays with {name!r}.",
                    "detach, change the implementation, and attach again",
                )

    def wraps(self) -> list[tuple[Any, str, str]]:
        """Methods of the library that the runtime stands around: (object, name, what it is)."""
        found: list[tuple[Any, str, str]] = []
        if hasattr(self.model, "generate"):
            found.append((self.model, "generate", "generate"))
        for kind in ("image", "video"):
            if hasattr(self.base, f"get_{kind}_features"):
                found.append((self.base, f"get_{kind}_features", kind))
        return found

    # ---- reading what a forward is given ------------------------------------------------------------

    def prompt(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Of what `generate` was given, the arguments of a forward."""
        names = inspect.signature(self.model.forward).parameters
        wanted = {name: value for name, value in inputs.items() if name in names and value is not None}
        first = inputs.get("inputs")
        if isinstance(first, Tensor):
            wanted.setdefault(self.model.main_input_name, first)
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
        cache = inputs.get("past_key_values")
        return cache if isinstance(cache, Cache) else None

    def cached_tokens(self, cache: Any) -> int:
        return int(cache.get_seq_length())

    def cache_of_output(self, output: Any) -> Cache | None:
        cache = getattr(output, "past_key_values", None)
        return cache if isinstance(cache, Cache) else None

    def sequence_of(self, cache: Any) -> Sequence | None:
        return getattr(cache, "_saccade_sequence", None)

    def follow(self, cache: Any, sequence: Sequence) -> None:
        """Let the sequence share the cache's fate."""
        if not isinstance(cache, _Followed):
            cache.__class__ = _followed(type(cache))
        cache._saccade_sequence = sequence

    def counts(self, output: Any) -> list[int]:
        """Tokens of every item in what `get_*_features` returned."""
        features = getattr(output, "pooler_output", output)
        if isinstance(features, Tensor) and features.ndim == 2:
            return [features.shape[0]]
        return [part.shape[-2] if part.ndim > 1 else 1 for part in features]

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
                "A prompt of inputs_embeds cannot be cleared of its pictures.", "pass input_ids and pixel_values"
            )
        visual = torch.zeros_like(ids, dtype=torch.bool)
        for kind in ("image", "video"):
            if kind in self.vocabulary.placeholders:
                visual |= ids == self.vocabulary.placeholders[kind]
        mask = inputs.get("attention_mask")
        real = torch.ones_like(ids) if mask is None else mask
        keep = ~visual & (real != 0)
        length = int(keep.sum(1).max())
        order = keep.long().sort(dim=1, stable=True).indices[:, -length:]  # kept tokens to the right, in order
        kept = {
            name: value.gather(1, order)
            for name, value in inputs.items()
            if isinstance(value, Tensor) and value.shape == ids.shape and not name.startswith(("pixel", "position"))
        }
        kept["attention_mask"] = keep.gather(1, order).to(real.dtype)
        if bool(kept["attention_mask"].all()):
            del kept["attention_mask"]
        return kept

    def kind_of(self, name: str, pass_: Pass) -> str:
        """What a space other than the main sequence is made of."""
        if name == "encoder" or name.endswith(".context"):
            inputs = pass_.inputs
            if "input_features" in inputs or name == "audio":
                return "audio"
            return "image" if self.vocabulary.placeholders.get("image") is not None else "text"
        return super().kind_of(name, pass_)


class _Followed:
    """A cache whose rows a sequence follows."""

    _saccade_sequence: Sequence

    def reorder_cache(self, beam_idx: Tensor) -> Any:
        result = super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._saccade_sequence.reorder(beam_idx)
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


@functools.cache
def _followed(cls: type) -> type:
    return type(cls.__name__, (_Followed, cls), {"__module__": cls.__module__})


def _vocabulary(config: Any, text_config: Any) -> Vocabulary:
    placeholders = {}
    for kind, names in PLACEHOLDERS.items():
        found = next((v for n in names if isinstance(v := getattr(config, n, None), int)), None)
        if found is not None:
            placeholders[kind] = found
    special: set[int] = set()
    for source in (config, text_config):
        for name in SPECIAL_IDS:
            value = getattr(source, name, None)
            special.update(v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int))
    return Vocabulary(placeholders, frozenset(special - set(placeholders.values())))
