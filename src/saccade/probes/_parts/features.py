"""How alike features are: across networks, to their labels, to each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 100  # of k-means, at most


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two kinds of features (samples, width) of the same samples: 0 to 1."""
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def clusters(x: Tensor, k: int, seed: int = 0) -> Tensor:
    """k-means, from a k-means++ start: the cluster of every row of (samples, width)."""
    noise, x = torch.Generator().manual_seed(seed), x.double()
    centres = x[torch.randint(len(x), (1,), generator=noise)]
    while len(centres) < k:
        far = torch.cdist(x, centres).amin(1) ** 2
        centres = torch.cat([centres, x[torch.multinomial(far + 1e-12, 1, generator=noise)]])
    for _ in range(STEPS):
        nearest = torch.cdist(x, centres).argmin(1)
        moved = [x[nearest == c].mean(0) if (nearest == c).any() else centres[c] for c in range(k)]
        if torch.equal(torch.stack(moved), centres):
            break
        centres = torch.stack(moved)
    return nearest


def agreement(found: Tensor, labels: Tensor) -> dict[str, float]:
    """Of clusters and labels (samples,): purity, normalised mutual information, adjusted Rand index."""
    both = torch.zeros(int(found.max()) + 1, int(labels.max()) + 1, dtype=torch.float64)
    both.index_put_((found, labels), torch.ones(len(found), dtype=torch.float64), accumulate=True)
    p, rows, columns = both / both.sum(), both.sum(1) / both.sum(), both.sum(0) / both.sum()
    inside = p > 0
    shared = (p[inside] * (p[inside] / (rows[:, None] * columns)[inside]).log()).sum()
    spread = (torch.special.entr(rows).sum() + torch.special.entr(columns).sum()) / 2
    pairs, a, b = (_pairs(t) for t in (both, both.sum(1), both.sum(0)))
    chance = a * b / _pairs(both.sum())
    return {
        "purity": float(p.amax(1).sum()),
        "nmi": float(shared / spread) if spread > 0 else 1.0,
        "ari": float((pairs - chance) / ((a + b) / 2 - chance)) if a + b != 2 * chance else 1.0,
    }


def _pairs(counts: Tensor) -> Tensor:
    return (counts * (counts - 1) / 2).sum()


def neighbours(known: Tensor, labels: Tensor, x: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """The label that the k most similar of known features (samples, width) give to each of `x`, weighed by
    exp(cosine / temperature)."""
    near, at = (F.normalize(x, dim=-1) @ F.normalize(known, dim=-1).T).topk(min(k, len(known)))
    votes = torch.zeros(len(x), int(labels.max()) + 1, dtype=near.dtype)
    return votes.scatter_add(1, labels[at], (near / temperature).exp()).argmax(1)


def retrieval(x: Tensor, labels: Tensor) -> float:
    """Mean average precision of finding, by cosine, the samples with a sample's own label."""
    cosine = F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).T
    order = cosine.fill_diagonal_(-torch.inf).argsort(dim=1, descending=True, stable=True)[:, :-1]
    hits = (labels[order] == labels[:, None]).double()
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
    found = hits.sum(1) > 0
    return float(((precision * hits).sum(1)[found] / hits.sum(1)[found]).mean())


def keypoints(a: Tensor, b: Tensor, wanted: Tensor, truth: Tensor, alpha: float = 0.1) -> float:
    """PCK: how often the patch of `b` (rows, columns, width) that is most similar to the one of `a` under a keypoint
    has its middle within alpha of where that is in `b`. Keypoints (points, 2) are x and y, 0 to 1."""
    (rows, columns), (down, across) = a.shape[:2], b.shape[:2]
    x, y = (wanted * torch.tensor([columns, rows])).long().clamp_min(0).unbind(1)
    asked = a[y.clamp_max(rows - 1), x.clamp_max(columns - 1)]
    best = (F.normalize(asked, dim=-1) @ F.normalize(b.flatten(0, 1), dim=-1).T).argmax(1)
    found = torch.stack([(best % across + 0.5) / across, (best // across + 0.5) / down], 1)
    return float(((found - truth).norm(dim=1) <= alpha).double().mean())


def propagated(
    frames: Tensor, first: Tensor, last: int = 7, radius: int = 12, k: int = 5, temperature: float = 0.1
) -> Tensor:
    """Segments of a video's frames (frames, rows, columns, width), by those of its first (rows, columns, classes):
    (frames, rows, columns, classes). A patch takes them from the k most similar of the patches near its place in the
    first frame and the last ones."""
    rows, columns = frames.shape[1:3]
    at = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    near = ((at[:, None] - at).abs().amax(-1) <= radius).to(frames.dtype)
    x, found = F.normalize(frames.flatten(1, 2), dim=-1), [first.flatten(0, 1).to(frames.dtype)]
    for t in range(1, len(x)):
        known = [0, *range(max(1, t - last), t)]
        w = torch.cat([(x[t] @ x[s].T / temperature).exp() * near for s in known], 1)  # (patches, sources)
        best, source = w.topk(min(k, w.shape[1]))
        given = torch.cat([found[s] for s in known])[source]  # (patches, k, classes)
        found.append((best[..., None] * given).sum(1) / best.sum(1, keepdim=True))
    return torch.stack(found).unflatten(1, (rows, columns))
