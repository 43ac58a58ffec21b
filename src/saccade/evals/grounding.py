"""How well attention lies on a thing: maps (..., tokens) against the share of every token that shows it (tokens,).

Tokens that show no place, such as the ends of rows, are left out of both. Pixels may stand for tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.geometry import of_picture


def shown(mask: Tensor, boxes: Tensor) -> Tensor:
    """The shares, from a mask of pixels (height, width) and boxes in pixels (tokens, 4): NaN for no place."""
    return of_picture(mask, boxes)


def inside(maps: Tensor, shares: Tensor) -> Tensor:
    """The share of the attention on the picture that lies on the thing."""
    return (maps * shares).sum(-1) / maps.sum(-1)


def over_chance(maps: Tensor, shares: Tensor) -> Tensor:
    """How many times more lies on it than if all tokens were looked at alike."""
    return inside(maps, shares) / shares.mean()


def pointing(maps: Tensor, shares: Tensor) -> Tensor:
    """The pointing game (Zhang et al., 2016): how likely a point of the peak hits the thing. A peak is a whole token,
    or several where they are equal."""
    peak = (maps == maps.amax(-1, keepdim=True)).to(shares)
    return (peak * shares).sum(-1) / peak.sum(-1)


def auc(maps: Tensor, shares: Tensor) -> Tensor:
    """How likely a point on the thing is looked at more than a point beside it, equal ones counting half. NaN where
    the thing is nowhere, or everywhere."""
    ordered, order = maps.sort(-1)
    beside = torch.nn.functional.pad((1 - shares)[order].cumsum(-1), (1, 0))  # among those ordered before
    below, upto = (
        beside.gather(-1, torch.searchsorted(ordered, maps.contiguous(), right=right))
        for right in (False, True)
    )
    return (shares * (below + upto) / 2).sum(-1) / (shares.sum() * (1 - shares).sum())
