"""The oracle for tokens that are missing: one forward from nothing, where what is gone is masked.

It runs on an attention of its own, written out in plain torch, in float64, and knows nothing of the library
under test: layers and heads are found by the attention modules' `layer_idx`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from helpers import Exact, cast, shared, skip_blind_chunks
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from zoo import FAMILIES

F64 = torch.float64
CLOSE = 1e-9  # for logits of order one, computed in float64 in two orders


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scale = options.get("scaling")
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if options.get("softcap") is not None:
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    if options.get("position_bias") is not None:
        scores = scores + options["position_bias"]
    if attention_mask is not None:
        scores = scores + attention_mask
    gone = getattr(module, "gone", None)
    if gone is not None:
        gone = gone.repeat_interleave(groups, 1) if gone.shape[1] == scores.shape[1] // groups else gone
        scores = scores.masked_fill(gone[:, :, -scores.shape[2] :], torch.finfo(scores.dtype).min)
    if options.get("s_aux") is not None:
        sinks = options["s_aux"].view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("dense", _attention)
AttentionMaskInterface.register("dense", eager_mask)


def oracle(name: str) -> Any:
    """The family's model on the oracle's attention; Falcon knows no other than its own."""
    return shared(name, F64, "eager" if name == "falcon" else "dense")


def subject(name: str, implementation: str | None = None) -> Any:
    """The same model, the same precision, for the library under test."""
    return shared(name, F64, implementation)


def inputs_of(name: str, **options: Any) -> dict[str, Any]:
    return cast(FAMILIES[name].inputs(**options), F64)


def readers(model: nn.Module) -> dict[int, nn.Module]:
    """Self-attention modules of the text tower, by layer."""
    found = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        aside = any(word in path for word in ("vision", "visual", "encoder", "cross", "EncDec"))
        if "Attention" in kind and "Layer" not in kind and not aside and hasattr(module, "layer_idx"):
            found[module.layer_idx] = module
    return found


def _masked(module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
    lowest = torch.finfo(F64).min
    mask = options["attention_mask"].masked_fill(module.gone, lowest)  # type: ignore[union-attr]
    return args, {**options, "attention_mask": mask}


@contextmanager
def without(model: nn.Module, gone: Mapping[int, Tensor]) -> Iterator[None]:
    """Keys that are `gone` (batch, heads or 1, queries or 1, keys) of a layer are not seen there."""
    modules = readers(model)
    gone = {layer: mask for layer, mask in gone.items() if layer in modules}  # others read pictures alone
    hooks = []
    for layer, mask in gone.items():
        modules[layer].gone = mask
        if model.config._attn_implementation != "dense":
            hooks.append(modules[layer].register_forward_pre_hook(_masked, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in gone:
            del modules[layer].gone


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def recompute(
    model: Any,
    inputs: Mapping[str, Any],
    answer: Tensor | None = None,
    gone: Mapping[int, Tensor] | None = None,
    **more: Any,
) -> Tensor:
    """Logits (rows, prompt + answer, vocabulary) of everything at once, nothing cached."""
    return everything(model, inputs, answer, gone, **more).logits


def everything(
    model: Any,
    inputs: Mapping[str, Any],
    answer: Tensor | None = None,
    gone: Mapping[int, Tensor] | None = None,
    **more: Any,
) -> Any:
    ids = inputs["input_ids"]
    answer = ids[:, :0] if answer is None else answer
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    mask = torch.cat([mask, torch.ones_like(answer)], 1)
    given = {**inputs, "input_ids": torch.cat([ids, answer], 1), "attention_mask": mask}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            behind = int("PaliGemma" in type(model).__name__)  # its answer is no longer of the prefix
            given[name] = torch.cat([inputs[name], torch.full_like(answer, behind)], 1)
    if "cross_attention_mask" in inputs:
        last = inputs["cross_attention_mask"][:, -1:]
        given["cross_attention_mask"] = torch.cat(
            [inputs["cross_attention_mask"], last.expand(-1, answer.shape[1], -1, -1)], 1
        )
    grids = any(name.endswith("grid_thw") for name in inputs)  # such models count in three directions
    if "position_ids" in inspect.signature(model.forward).parameters and not grids:
        given["position_ids"] = positions(mask)
    whole = {layer: spread(t, given["input_ids"].shape[1]) for layer, t in (gone or {}).items()}
    for module in model.modules():
        if "rope_deltas" in module.__dict__:
            module.rope_deltas = None
    with Exact(), torch.no_grad(), without(model, whole):
        return model(**{**given, **more}, use_cache=False)


def spread(gone: Tensor, tokens: int) -> Tensor:
    """(batch, heads, queries, keys), for later keys and queries too, which see what the last saw."""
    queries, keys = gone.shape[2], gone.shape[3]
    gone = nn.functional.pad(gone, (0, tokens - keys))
    if queries not in (1, tokens):
        gone = torch.cat([gone, gone[:, :, -1:].expand(-1, -1, tokens - queries, -1)], 2)
    return gone.expand(-1, -1, tokens, -1)


def generate(model: Any, inputs: Mapping[str, Any], tokens: int = 4, **options: Any) -> Any:
    """A generation of exactly that many tokens, none of them special, with its raw logits."""
    skip_blind_chunks(inputs, options)
    model.generation_config.pad_token_id = 0
    options = {"do_sample": False, **options}
    with Exact():
        return model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            suppress_tokens=list(range(14)),
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )


def assert_follows(out: Any, wanted: Tensor, prompt: int, atol: float = CLOSE) -> None:
    """A generation without beams has at every step the logits of `wanted` (rows, tokens, vocabulary)."""
    got = torch.stack(list(out.logits), 1)
    expected = wanted[:, prompt - 1 : prompt - 1 + got.shape[1]]
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) < atol


def differs(a: Any, b: Any) -> bool:
    """Whether it matters at all what is tested."""
    return (
        float((a.logits[0] - b.logits[0]).abs().max()) > 1e-3
        or float((a.logits[1] - b.logits[1]).abs().max()) > 1e-3
    )
