"""Estimates with their 95% intervals. Several questions share a picture, so pictures are what is drawn again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import nan, sqrt

import numpy as np
from numpy.typing import ArrayLike

Z = 1.959964  # of the normal distribution, two sides of 2.5%
DRAWS = 2000
BLOCK = 100  # draws at a time, for memory
FEW = 2000  # pictures, whose draws are kept


@dataclass(frozen=True)
class Draws:
    """Pictures drawn with replacement, the same ones for as many pictures and the same seed."""

    totals: np.ndarray  # (pictures, columns)
    statistic: Callable[[np.ndarray], np.ndarray]
    seed: int

    def values(self) -> np.ndarray:
        pictures = len(self.totals)
        drawn = _kept(pictures, self.seed) if pictures <= FEW else _drawn(pictures, self.seed)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.concatenate([self.statistic(block @ self.totals) for block in drawn])


def _drawn(pictures: int, seed: int) -> Iterator[np.ndarray]:
    """How often each picture is drawn, (draws, pictures) by blocks."""
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS // BLOCK):
        yield rng.multinomial(pictures, np.full(pictures, 1 / pictures), BLOCK).astype(np.float64)


@lru_cache(2)
def _kept(pictures: int, seed: int) -> list[np.ndarray]:
    """For the next score of as many."""
    return [*_drawn(pictures, seed)]


@dataclass(frozen=True)
class Estimate:
    """NaN where there is nothing to estimate from."""

    value: float
    low: float
    high: float
    count: int  # of what the value is a share or a mean of
    draws: Draws | None = field(default=None, repr=False, compare=False)


def wilson(hits: float, count: int) -> Estimate:
    """A share of independent cases (Wilson, 1927)."""
    if not count:
        return Estimate(nan, nan, nan, 0)
    p, z = hits / count, Z * Z / count
    middle, half = p + z / 2, sqrt(z * p * (1 - p) + z * z / 4)
    return Estimate(p, max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z)), count)


def bootstrap(totals: ArrayLike, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> Estimate:
    """Pictures drawn with replacement (Efron, 1979). `totals` (columns, pictures) are sums within a picture, and
    `statistic` makes a number of their sums over pictures, (..., columns) -> (...)."""
    totals = np.asarray(totals, np.float64).T
    draws = Draws(totals, statistic, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(totals.sum(0)))
    return Estimate(value, *_ends(draws.values()), len(totals), draws)


def difference(one: Estimate, other: Estimate) -> Estimate:
    """Of two estimates on the same pictures, in the same order, which are drawn for both together. The count is of
    the pictures in which they differ; without draws there is no interval."""
    value = one.value - other.value
    if one.draws is None or other.draws is None:
        return Estimate(value, nan, nan, 0)
    differ = int((one.draws.totals != other.draws.totals).any(1).sum())
    return Estimate(value, *_ends(one.draws.values() - other.draws.values()), differ)


def _ends(drawn: np.ndarray) -> tuple[float, float]:
    found = drawn[np.isfinite(drawn)]
    low, high = np.percentile(found, (2.5, 97.5)) if len(found) else (nan, nan)
    return float(low), float(high)


def share(hits: ArrayLike, of: ArrayLike, seed: int = 0) -> Estimate:
    """How many of how many, each given by picture."""
    hits, of = np.asarray(hits, np.float64), np.asarray(of, np.float64)
    met, count, pictures = float(hits.sum()), int(of.sum()), int((of > 0).sum())
    totals = np.stack([hits, of])
    if count == pictures:
        found = wilson(met, count)
    elif met in (0, count):  # every draw would be alike, which is no certainty
        found = wilson(pictures * met / count, pictures)
    else:
        return replace(bootstrap(totals, _ratio, seed), count=count)
    return replace(found, count=count, draws=Draws(totals.T, _ratio, seed))


def _ratio(totals: np.ndarray) -> np.ndarray:
    return totals[..., 0] / totals[..., 1]
