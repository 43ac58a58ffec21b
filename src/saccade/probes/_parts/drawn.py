"""Small pictures of one thing each, for experiments that need no other data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drawn:
    """A disc or a square of some colour, somewhere on another colour, with noise."""

    pixels: Tensor  # (pictures, 3, side, side), 0 to 1
    kind: Tensor  # (pictures,) 0 for discs, 1 for squares
    mask: Tensor  # (pictures, side, side), bool: the thing


def drawn(count: int, side: int = 32, seed: int = 0) -> Drawn:
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    kind = torch.randint(0, 2, (count,), generator=generator)
    radius = between(0.15, 0.25, count, 1, 1) * side
    centre = between(0.3, 0.7, 2, count, 1, 1) * side
    place = torch.arange(side) + 0.5
    across, down = (place - centre[0]).abs(), (place[:, None] - centre[1]).abs()
    far = torch.where(kind[:, None, None] == 0, (across**2 + down**2).sqrt(), torch.maximum(across, down))
    mask = far <= radius
    thing, ground = between(0.6, 1.0, count, 3, 1, 1), between(0.0, 0.3, count, 3, 1, 1)
    pixels = torch.where(mask[:, None], thing, ground)
    return Drawn((pixels + between(-0.05, 0.05, *pixels.shape)).clamp(0, 1), kind, mask)
