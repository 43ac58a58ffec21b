"""Other prompts to follow beside the caller's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.errors import InputError
from saccade.core.layout import Layout
from saccade.core.passes import Run

WORDS = ("input_ids", "attention_mask", "position_ids")


def without_pictures(run: Run) -> dict[str, Any]:
    """The prompt without its pictures, of which it must have some."""
    without = run.without_images()
    if without["input_ids"].shape == run.inputs["input_ids"].shape:
        raise InputError(
            f"{type(run.method).__name__} compares a prompt with and without its picture: it has none.",
            "add one",
        )
    return without


@dataclass(frozen=True)
class Seen:
    """A prompt's pictures, kept for the conversation; beams do not change them."""

    shape: torch.Size  # of its ids
    pictures: dict[str, Tensor]


def with_pictures(run: Run) -> dict[str, Any] | None:
    """The prompt's inputs; in a later turn with the pictures of an earlier one. None where there are none."""
    assert run.last is not None
    state, ids = run.last.sequence.state_of(run.method), run.inputs["input_ids"]
    if any("pixel_values" in name for name in run.inputs):
        given = {n: v for n, v in run.inputs.items() if isinstance(v, Tensor) and n not in WORDS}
        state["seen"] = Seen(ids.shape, given)
    seen = state.get("seen")
    if seen is None:
        return None
    more = ids.shape[1] - seen.shape[1]  # words, which are no pictures
    marked = {n: F.pad(v, (0, more)) if v.shape == seen.shape else v for n, v in seen.pictures.items()}
    return {**marked, **run.inputs}


def seeing(run: Run) -> dict[str, Any]:
    """`with_pictures` for a method that cannot do without."""
    inputs = with_pictures(run)
    if inputs is None:
        raise InputError(f"{type(run.method).__name__} needs a picture: the prompt has none.", "add one")
    return inputs


def of_samples(run: Run) -> tuple[Layout, Tensor]:
    """The layout of every sample's first beam, and the rows of these beams."""
    assert run.last is not None
    layout = run.last.sequence.layout()
    samples = torch.arange(run.samples, device=layout.sample.device)
    first = (layout.sample == samples[:, None]).long().argmax(1)
    return layout.at(first), first


def repainted(inputs: Mapping[str, Any], paint: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The inputs with every picture's pixels changed, one picture after another. What fills up a batch of pictures
    or tiles, all zeros, stays."""
    changed = dict(inputs)
    for name, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        if name in inputs:
            sizes = inputs[grid].prod(1).tolist() if grid in inputs else 1  # pictures as rows of patches
            painted = torch.cat([paint(part) for part in inputs[name].split(sizes)])
            changed[name] = torch.where(_fillers(inputs[name]), 0, painted)
    return changed


def _fillers(pixels: Tensor) -> Tensor:
    """Pictures (..., colours, height, width), or patches (patches, numbers), that are empty."""
    axes = (-3, -2, -1) if pixels.ndim > 3 else (-1,)
    return (pixels == 0).all(axes, keepdim=True)


def answered(inputs: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
    """One prompt's inputs with an answer (tokens,) behind it."""
    prompt, more = inputs["input_ids"], len(ids)
    marked = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and v.shape == prompt.shape}
    longer = {n: F.pad(v, (0, more), value=int(n == "attention_mask")) for n, v in marked.items()}
    return {**inputs, **longer, "input_ids": torch.cat([prompt, ids[None]], 1)}
