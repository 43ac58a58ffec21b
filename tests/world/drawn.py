"""Scenes that several tests look at."""

from functools import cache

from saccade.world.scenes import Scene, scenes


@cache
def drawn(split: str = "train", count: int = 1200) -> tuple[Scene, ...]:
    return tuple(scenes(count, split))


def near(share: float, expected: float, count: int) -> bool:
    """Whether a share of so many independent draws is within four standard deviations."""
    return abs(share - expected) <= 4 * (expected * (1 - expected) / count) ** 0.5
