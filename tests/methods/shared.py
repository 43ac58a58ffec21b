"""What the tests of the methods share: inputs of two unequal samples, the samples alone, answers, replays."""

from __future__ import annotations

from typing import Any

import torch
from helpers import cast
from torch import Tensor, nn
from zoo import Family, run
from zoo.base import pad, words

from saccade.core.site import Site, match

Inputs = dict[str, Any]


def two(f: Family, dtype: torch.dtype = torch.float32, side: str = "left") -> Inputs:
    """Two samples; where the family reads text, of different lengths and padded on that side."""
    if "vlm" in f.tags:
        made = f.inputs(images=(1, 2) if "multi_image" in f.tags else (1, 1), side=side)
    elif "llm" in f.tags:
        made = pad([words(1, 24)[0], words(1, 17, seed=5)[0]], side)
    else:
        made = f.inputs()
    return cast(made, dtype)


def alone(inputs: Inputs, sample: int) -> Inputs:
    """One sample of `two`, without its padding."""
    if isinstance(inputs, tuple):
        return tuple(value[sample : sample + 1] for value in inputs)
    ids = inputs.get("input_ids")
    if ids is None:
        return {name: value[sample : sample + 1] for name, value in inputs.items()}
    real = inputs["attention_mask"][sample].bool()
    rows = {name: v for name, v in inputs.items() if v.shape[:2] == ids.shape[:2] and v.ndim == 2}
    single = {name: value[sample : sample + 1, real] for name, value in rows.items()}
    others = {name: value for name, value in inputs.items() if name not in rows}
    pictures = slice(0, 1) if sample == 0 else slice(1, None)
    if (grids := others.pop("image_grid_thw", None)) is not None:  # pictures as rows of patches
        sizes = grids.prod(1).tolist()
        patches = others["pixel_values"].split(sizes)[pictures]
        return {**single, "image_grid_thw": grids[pictures], "pixel_values": torch.cat(patches)}
    return {**single, **{name: value[pictures] for name, value in others.items()}}


def generated(model: Any, inputs: Inputs, tokens: int = 3, **options: Any) -> Any:
    """What `generate` returns, greedy unless told otherwise, never ended early."""
    asked = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **options}
    return model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, **asked)


def answer(model: nn.Module, inputs: Inputs, tokens: int = 3, **options: Any) -> Tensor:
    """Logits of generated tokens (samples, tokens, words); of a model that does not write, its output."""
    if not (hasattr(model, "generate") and model.can_generate()):
        return run(model, inputs)
    return torch.stack(generated(model, inputs, tokens, **options).logits, 1)


def replay(model: Any, inputs: Inputs, written: Tensor) -> Tensor:
    """Logits with which one sample alone writes these tokens: (tokens, words)."""
    start = inputs["input_ids"].shape[1]

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, written[ids.shape[1] - start]] = 0
        return only

    return answer(model, inputs, len(written), logits_processor=[force])[0]


def numbers(patterns: Any, kind: str = "self", depth: int = 32) -> list[int | None]:
    """The layers that the patterns name in a text tower of that depth."""
    nothing = nn.Identity()
    sites = [Site(f"text.{i}.{kind}", "", nothing, "text", i, kind, "interface", depth) for i in range(depth)]
    return [site.index for site in match(patterns, sites)]


def followed(inputs: Inputs, first: Any, words_: Tensor) -> Inputs:
    """The second turn of a conversation: all that was written so far, and new words."""
    ids = torch.cat([first.sequences, words_], 1)
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    return {"input_ids": ids, "attention_mask": nn.functional.pad(mask, (0, more), value=1)}
