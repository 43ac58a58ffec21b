"""Which tokens show a part of a picture that somebody points at."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.core.probe import patch_of

Box = tuple[float, float, float, float]


def patch_boxes(call: AttentionCall) -> Tensor:
    """Of every key, a token of the vision tower, the box: (batch, keys, 4), NaN for tokens without a place. In
    pixels of the located pictures, or else of the picture that the tower is given."""
    runtime, batch, keys = call.run.runtime, call.k.shape[0], call.k.shape[2]
    if runtime.located is not None:
        tower = next(site for site in runtime.host.sites if site.tower == "vision" and site.kind == "self")
        return runtime.located.tower_boxes(tower).view(-1, keys, 4).to(call.k.device)
    given = {**call.run.inputs, **call.pass_.inputs}
    pixels = next((v for n, v in given.items() if n == "pixel_values" and v.ndim == 4), None)
    if pixels is None:
        raise InputError(
            "The places of the tower's patches are not known.", "call session.locate(processor, images) first"
        )
    height, width = patch_of(runtime.model)
    corners = _grid(pixels.shape[-2] // height, pixels.shape[-1] // width, height, width)
    boxes = torch.full((keys, 4), torch.nan)
    boxes[keys - len(corners) :] = corners.float()  # behind class and register tokens
    return boxes.to(call.k.device).expand(batch, -1, -1)


def token_boxes(call: AttentionCall) -> Tensor:
    """Of every key, a token of the text, the box: (batch, keys, 4), NaN for words. In pixels of the located pictures,
    or else of what the tower is given, over which a picture's tokens stand in a square."""
    layout = call.klayout
    if layout.box is not None:
        return layout.box
    pixels = next((v for n, v in call.run.inputs.items() if n == "pixel_values" and v.ndim == 4), None)
    boxes = torch.full((*layout.shape, 4), torch.nan, device=layout.kind.device)
    for row, items in enumerate(layout.item):
        for item in items[items >= 0].unique().tolist():
            mine = (items == item).nonzero()[:, 0]
            side = math.isqrt(len(mine))
            if pixels is None or side**2 != len(mine):
                raise InputError(
                    "The places of the picture's tokens are not known.",
                    "call session.locate(processor, images) first",
                )
            boxes[row, mine] = _grid(side, side, pixels.shape[-2] / side, pixels.shape[-1] / side).to(boxes)
    return boxes


def _grid(rows: int, columns: int, height: float, width: float) -> Tensor:
    """Boxes of cells of that size, row by row: (cells, 4)."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([x * width, y * height, (x + 1) * width, (y + 1) * height], -1).view(-1, 4)


def inside(boxes: Tensor, regions: Sequence[Box] | Tensor) -> Tensor:
    """The share of every token's box (batch, tokens, 4) that lies in its picture's region, or in the one region of
    all: (batch, tokens), 0 for tokens without a place."""
    region = torch.as_tensor(regions, dtype=boxes.dtype, device=boxes.device)[:, None]  # (batch or 1, 1, 4)
    low, high = torch.maximum(boxes[..., :2], region[..., :2]), torch.minimum(boxes[..., 2:], region[..., 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    return (shared / (boxes[..., 2:] - boxes[..., :2]).prod(-1)).nan_to_num(0)
