"""Many states as few concepts: clusters, main directions, or parts that add up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.errors import InputError

ROUNDS = 100


@dataclass(frozen=True)
class Concepts:
    vectors: Tensor  # (concepts, width)
    activations: Tensor  # (samples, concepts)

    @property
    def of(self) -> Tensor:
        """Every sample's most active concept: (samples,)."""
        return self.activations.argmax(1)

    def samples(self, n: int) -> Tensor:
        """Those in which each concept is most active: (concepts, n)."""
        return self.activations.topk(n, dim=0).indices.T


def decompose(h: Tensor, k: int, how: str = "semi_nmf", seed: int = 0) -> Concepts:
    """Of states (samples, width): the middles of clusters (kmeans), the directions of most variance (pca), or
    h = activations @ vectors with activations that are not negative (semi_nmf)."""
    if not 1 <= k <= len(h):
        raise InputError(f"{len(h)} states cannot make {k} concepts.", "give more samples, or ask for fewer")
    h = h.double()
    if how == "pca":
        vectors = torch.linalg.svd(h - h.mean(0), full_matrices=False).Vh[:k]
    else:
        vectors = _kmeans(h, k, torch.Generator().manual_seed(seed))
    if how == "semi_nmf":
        return _semi_nmf(h, vectors)
    return Concepts(vectors, active(h, vectors, how))


def active(h: Tensor, vectors: Tensor, how: str = "semi_nmf") -> Tensor:
    """How much of concepts (concepts, width) of that kind is in states (samples, width): (samples, concepts)."""
    h, vectors = h.double(), vectors.double()
    if how == "pca":
        return (h - h.mean(0)) @ vectors.T
    if how == "kmeans":
        return 1 / (1 + torch.cdist(h, vectors))
    found = _nearest(h, vectors)
    for _ in range(ROUNDS):
        found = _better(found, h, vectors)
    return found


def _kmeans(h: Tensor, k: int, noise: torch.Generator) -> Tensor:
    middles = h[torch.randint(len(h), (1,), generator=noise)]
    while len(middles) < k:  # the farther from all, the likelier
        away = torch.cdist(h, middles).amin(1).square()
        weights = away if away.sum() > 0 else torch.ones_like(away)
        middles = torch.cat([middles, h[torch.multinomial(weights, 1, generator=noise)]])
    for _ in range(ROUNDS):
        mine = torch.cdist(h, middles).argmin(1)
        new = torch.stack([h[mine == c].mean(0) if (mine == c).any() else middles[c] for c in range(k)])
        if torch.equal(new, middles):
            break
        middles = new
    return middles


def _semi_nmf(h: Tensor, middles: Tensor) -> Concepts:
    """Vectors by least squares and activations by factors that keep their sign, in turn; from clusters on."""
    found = _nearest(h, middles)
    for _ in range(ROUNDS):
        found = _better(found, h, torch.linalg.pinv(found) @ h)
    return Concepts(torch.linalg.pinv(found) @ h, found)


def _nearest(h: Tensor, vectors: Tensor) -> Tensor:
    """Activations to begin with."""
    distance = torch.cdist(h, vectors)
    return torch.zeros_like(distance).scatter_(1, distance.argmin(1, keepdim=True), 1.0) + 0.2


def _better(found: Tensor, h: Tensor, vectors: Tensor) -> Tensor:
    """Activations that leave less of the states unexplained, and are not negative either."""
    fit, own = h @ vectors.T, vectors @ vectors.T
    grows = fit.clamp_min(0) + found @ (-own).clamp_min(0)
    shrinks = (-fit).clamp_min(0) + found @ own.clamp_min(0)
    return found * (grows / shrinks.clamp_min(1e-12)).sqrt()


def matched(a: Tensor, b: Tensor) -> list[int]:
    """For each concept of `a` (concepts, width) one of `b`, so that their cosines have the largest sum."""
    unit = torch.nn.functional.normalize
    return assigned((1 - unit(a.double(), dim=1) @ unit(b.double(), dim=1).T).tolist())


def assigned(cost: list[list[float]]) -> list[int]:
    """A column for each row, with the least sum: the Hungarian method, by shortest paths."""
    n = len(cost)
    row_price, price = [0.0] * (n + 1), [0.0] * (n + 1)
    row_of = [n] * (n + 1)  # of every column; the last one is outside, and its row the one to be placed
    for row in range(n):
        row_of[n], column = row, n
        least, before, done = [torch.inf] * n, [n] * n, [False] * (n + 1)
        while row_of[column] != n:
            done[column] = True
            here, step, following = row_of[column], torch.inf, n
            for j in range(n):
                if done[j]:
                    continue
                now = cost[here][j] - row_price[here] - price[j]
                if now < least[j]:
                    least[j], before[j] = now, column
                if least[j] < step:
                    step, following = least[j], j
            for j in range(n + 1):
                if done[j]:
                    row_price[row_of[j]] += step
                    price[j] -= step
                elif j < n:
                    least[j] -= step
            column = following
        while column != n:
            row_of[column] = row_of[before[column]]
            column = before[column]
    columns = [0] * n
    for column in range(n):
        columns[row_of[column]] = column
    return columns
