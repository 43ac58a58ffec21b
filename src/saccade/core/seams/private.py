"""Every private or fragile name of transformers and diffusers that we lean on, and its known form.

`check()` compares once. Where a library has moved, the error says what moved and which versions we know.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from saccade.core.errors import VersionError

KNOWN = "5.19 to 5.23"


@dataclass(frozen=True)
class Name:
    """`path` is `module:attribute.attribute`, brackets behind a class stand for one made of it; `parameters` begin
    its signature, None for what is no function."""

    path: str
    parameters: tuple[str, ...] | None = None


NAMES = (
    Name("transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS"),
    Name(
        "transformers.modeling_utils:AttentionInterface.get_interface",
        ("self", "attn_implementation", "default"),
    ),
    Name("transformers.modeling_utils:AttentionInterface.register", ("key", "value")),
    Name("transformers.configuration_utils:PreTrainedConfig._attn_implementation"),
    Name("transformers.configuration_utils:PreTrainedConfig()._attn_implementation_internal"),
    Name(
        "transformers.models.qwen3_vl.modeling_qwen3_vl:Qwen3VLTextModel._deepstack_process",
        ("self", "hidden_states", "visual_pos_masks", "visual_embeds"),
    ),
    Name("transformers.cache_utils:Cache.reorder_cache", ("self", "beam_idx")),
    Name("transformers.cache_utils:Cache.batch_repeat_interleave", ("self", "repeats")),
    Name("transformers.cache_utils:Cache.batch_select_indices", ("self", "indices")),
    Name("transformers.cache_utils:Cache.crop", ("self",)),
    Name("transformers.cache_utils:Cache.get_seq_length", ("self", "layer_idx")),
)


DIFFUSERS = (
    Name("diffusers:DiffusionPipeline.components"),
    Name("diffusers.models.attention_dispatch:_AttentionBackendRegistry._backends"),
    Name(
        "diffusers.models.attention_dispatch:_AttentionBackendRegistry.register", ("backend", "constraints")
    ),
    Name("diffusers.models.attention_dispatch:dispatch_attention_fn", ("query", "key", "value", "attn_mask")),
)


@functools.cache
def check() -> None:
    """Raise where a name is gone or has another signature."""
    check_names(NAMES)


@functools.cache
def check_diffusers() -> None:
    check_names(DIFFUSERS, "diffusers", "0.42", "diffusers>=0.42")


def check_names(
    names: tuple[Name, ...],
    library: str = "transformers",
    known: str = KNOWN,
    wanted: str = "transformers>=5.19,<6",
) -> None:
    for name in names:
        module, _, path = name.path.partition(":")
        try:
            value: Any = functools.reduce(_part, path.split("."), importlib.import_module(module))
        except (ImportError, AttributeError):
            problem = "is gone"
        else:
            if name.parameters is None:
                continue
            found = tuple(inspect.signature(value).parameters)
            if found[: len(name.parameters)] == name.parameters:
                continue
            problem = f"takes {', '.join(found)} instead of {', '.join(name.parameters)}"
        raise VersionError(
            f"{library} {importlib.import_module(library).__version__} has moved: {name.path} {problem}.",
            f"use a version that we know, {known}: pip install '{wanted}'",
        )


def _part(owner: Any, name: str) -> Any:
    part = getattr(owner, name.removesuffix("()"))
    return part() if name.endswith("()") else part
