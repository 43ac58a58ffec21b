"""Estimates with their 95% intervals. Several questions share a picture, so pictures are what is drawn again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import nan, sqrt

import numpy as np
from numpy.typing import ArrayLike

Z = 1.959964  # of the normal distribution, two sides of 2.5%
DRAWS = 2000
BLOCK = 100  # draws at a time, for memory


@dataclass(frozen=True)
class Estimate:
    """NaN where there is nothing to estimate from."""

    value: float
    low: float
    high: float
    count: int  # of what the value is a share or a mean of


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
    pictures = len(totals)
    rng = np.random.default_rng(seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(totals.sum(0)))
        drawn = [
            statistic(rng.multinomial(pictures, np.full(pictures, 1 / pictures), BLOCK) @ totals)
            for _ in range(DRAWS // BLOCK)
        ]
    found = np.concatenate(drawn)
    found = found[np.isfinite(found)]
    low, high = np.percentile(found, (2.5, 97.5)) if len(found) else (nan, nan)
    return Estimate(value, float(low), float(high), pictures)


def share(hits: ArrayLike, of: ArrayLike, seed: int = 0) -> Estimate:
    """How many of how many, each given by picture."""
    hits, of = np.asarray(hits, np.float64), np.asarray(of, np.float64)
    met, count, pictures = float(hits.sum()), int(of.sum()), int((of > 0).sum())
    if count == pictures:
        return wilson(met, count)
    if met in (0, count):  # every draw would be alike, which is no certainty
        return replace(wilson(pictures * met / count, pictures), count=count)
    return replace(bootstrap(np.stack([hits, of]), lambda t: t[..., 0] / t[..., 1], seed), count=count)
