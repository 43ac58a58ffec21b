"""Tokens that are alike, and their means."""

from __future__ import annotations

import torch
from torch import Tensor


def clusters(x: Tensor, k: int, iterations: int, starts: int, seed: int) -> Tensor:
    """The cluster of every token (tokens,), in the order of their members' mean place; none is empty."""
    x = x.detach()
    draw = torch.Generator().manual_seed(seed)
    found = [_lloyd(x, x[_spread(x, k, draw)], iterations) for _ in range(starts)]
    best = min(found, key=lambda cluster: float((x - aggregates(x, cluster, k)[cluster]).square().sum()))
    place = torch.arange(len(x), device=x.device, dtype=torch.float64)[:, None]
    order = aggregates(place, best, k)[:, 0].argsort(stable=True)
    return order.argsort()[best]


def _spread(x: Tensor, k: int, draw: torch.Generator) -> Tensor:
    """k-means++: tokens drawn one by one, by their squared distance from the nearest before."""
    chosen = [int(torch.randint(len(x), (1,), generator=draw))]
    far = (x - x[chosen[0]]).square().sum(1)
    while len(chosen) < k:
        far[chosen] = 0
        chances = (
            far
            if bool(far.any())
            else torch.ones_like(far).index_fill(0, torch.tensor(chosen).to(far.device), 0)
        )
        chosen.append(int(torch.multinomial(chances.double().cpu(), 1, generator=draw)))
        far = torch.minimum(far, (x - x[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen, device=x.device)


def _lloyd(x: Tensor, means: Tensor, iterations: int) -> Tensor:
    cluster = _nearest_mean(x, means)
    for _ in range(iterations):
        before, cluster = cluster, _nearest_mean(x, aggregates(x, cluster, len(means)))
        if torch.equal(before, cluster):
            break
    return cluster


def _nearest_mean(x: Tensor, means: Tensor) -> Tensor:
    """The cluster of every token; one that would have none gets the token that is farthest from its own mean."""
    distance, cluster = torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    for empty in (cluster.bincount(minlength=len(means)) == 0).nonzero()[:, 0].tolist():
        alone = cluster.bincount(minlength=len(means))[cluster] == 1
        farthest = distance.masked_fill(alone, -1).argmax()
        cluster[farthest], distance[farthest] = empty, 0
    return cluster


def aggregates(x: Tensor, cluster: Tensor, k: int) -> Tensor:
    """The mean of every cluster: (k, width)."""
    counts = cluster.bincount(minlength=k).to(x.dtype)
    return x.new_zeros(k, x.shape[1]).index_add(0, cluster, x) / counts[:, None]


def nearest(x: Tensor, cluster: Tensor, means: Tensor) -> Tensor:
    """Of every cluster the member nearest to its mean: (k,)."""
    far = (x - means[cluster]).square().sum(1)
    members = cluster == torch.arange(len(means), device=x.device)[:, None]
    return torch.where(members, far, torch.inf).argmin(1)
